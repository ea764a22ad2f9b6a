"""Speed, memory and quality are measured as benchmark.py says."""

import importlib
from argparse import Namespace
from functools import partial

import pytest
import torch
from conftest import InProcess, cells, files

import benchmark
from models import build
from utils import UserError, measurements, parsing, report, tables, workers

SMALL = "--emsize 11 --nhid 11 --batch-size 7 --bptt 13"


@pytest.fixture
def candidates(monkeypatch):
    """Small models under three of the real names."""
    flags = {"LSTM, port": "", "LSTM loop, port": " --loop", "GRU, port": " --model GRU"}
    small = {name: ("train_rnn", f"--recipe port {SMALL}{flag}") for name, flag in flags.items()}
    monkeypatch.setattr(measurements, "CANDIDATES", small)


def speed(capsys, *flags):
    """Table and other lines that benchmark.py speed prints with a vocabulary of 50."""
    benchmark.main(["speed", "--vocab-size", "50", *flags])
    out = capsys.readouterr().out
    start = out.index("| model |")
    return cells(out[start:]), out[:start].splitlines()


def test_speed_prints_a_row_a_candidate(candidates, capsys, tmp_path):
    """A row of figures; above it what was timed on which machine; the page is what its record says."""
    place = ("--record", "small", "--results", str(tmp_path))
    rows, lines = speed(capsys, "--rounds", "1", "--warmup", "1", "--only", "LSTM, port", *place)
    assert len(rows) == 1
    row = rows[0]
    milliseconds = float(row["ms/batch, median (range)"].split()[0])
    assert row["model"] == "LSTM, port"
    assert float(row["forward only ms"]) >= 0
    assert int(row["tokens/s"].replace(",", "")) == pytest.approx(7 * 13 * 1000 / milliseconds, rel=0.5)
    assert int(row["launches"]) > 20 and float(row["peak MiB"]) >= 0
    assert any("Vocabulary 50" in line and "--rounds 1" in line for line in lines)
    assert any(f"torch {torch.__version__}" in line and "threads" in line for line in lines)
    record = report.read_record(tmp_path / "speed" / "small.json")
    assert record["rows"][0]["tokens"] == 7 * 13 and min(record["rows"][0]["products_ms"]) > 0
    page = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert tables.speed_text(record) in page


@pytest.mark.parametrize(
    ("name", "parameters"),
    (
        ("RMC, WikiText-103, tied", 214_966_067),
        ("AWD-QRNN, WikiText-103, split", 153_886_638),
    ),
)
def test_large_candidates_have_the_published_sizes(name, parameters):
    """Worked out by hand from the sizes in the papers (key size as the head's), at WikiText-103's 267,735 words."""
    script, flags = measurements.LARGE[name]
    module = importlib.import_module(script)
    args, _ = parsing.parse_training(module.build_parser(), module.RECIPES, flags.split())
    parsing.settle_cutoffs(args, 267_735)
    assert args.batch_size == 64
    with torch.device("meta"):
        assert build(module.model_config(args, 267_735)).num_params() == parameters


def test_large_candidates_are_for_words_that_name_their_corpus():
    """--only AWD is of those in their usual sizes."""
    args = dict.fromkeys(("port", "example", "martyn", "fastai", "awd", "qrnn"))
    chosen = [list(measurements.chosen(Namespace(only=[only], **args))) for only in ("AWD", "WikiText-103")]
    assert chosen == [["AWD-LSTM", "AWD-QRNN"], list(measurements.LARGE)]


class Stand_in:
    """A worker that answers what it was told to."""

    def __init__(self, steps, **answers):
        self.steps, self.answers, self.ended = iter(steps), answers, False

    def __call__(self, method, *arguments):
        return (next(self.steps), 1.0) if method == "step" else self.answers[method]

    def end(self):
        self.ended = True


def test_speed_is_the_median_of_the_rounds_after_the_warmup(candidates, capsys, monkeypatch):
    """Warm-up steps do not count; ratios to the peer are of the steps of one round, launches and peaks of one step."""
    common = {"forward": 5.0, "launches": 30, "products": (20.0, 1.5), "tokens_a_step": 91}
    workers = {
        "LSTM, port": Stand_in((900.0, 40.0, 10.0, 30.0), **common),
        "port-rnn (LSTM, port)": Stand_in((900.0, 80.0, 30.0, 15.0), forward=6.0, launches=120),
    }
    memory = {"LSTM, port": 10.0, "port-rnn (LSTM, port)": 40.0}
    monkeypatch.setattr(measurements, "start_workers", lambda args: (memory, workers))
    rows, _ = speed(capsys, "--rounds", "3", "--warmup", "1")
    assert rows[0] == {
        "model": "LSTM, port",
        "ms/batch, median (range)": "30.0 (10.0 to 40.0)",
        "tokens/s": f"{7 * 13 / 0.030:,.0f}",
        "forward only ms": "5.0",
        "launches": "30",
        "peak MiB": "10",
        "products alone ms": "20.0 (20.0 to 20.0)",
        "step / products": "1.50 (0.50 to 2.00)",
        "times the peer's speed": "2.00 (0.50 to 3.00)",
        "launches / peer's": "0.25",
        "peak / peer's": "0.25",
    }
    assert rows[1]["ms/batch, median (range)"] == "30.0 (15.0 to 80.0)"
    assert all(worker.ended for worker in workers.values())


def test_settings_are_compared_round_by_round(candidates, capsys, monkeypatch):
    """A process a setting, which differs in its flags alone; times the first row's of the same round.

    torch.compile is left out for a loop.
    """
    made = []

    def worker(script, flags, peer, checkout, args):
        made.append((args.threads, args.tune_allocator, args.onednn, args.numba, args.amp, "--compile" in flags))
        times = (900.0, 20.0, 30.0, 10.0) if len(made) == 1 else (5.0, 40.0, 30.0, 50.0)
        return Stand_in(times)

    monkeypatch.setattr(measurements, "Worker", worker)
    monkeypatch.setattr(measurements, "SETTINGS", dict(list(measurements.SETTINGS.items())[::2]))
    names = ["--only", "LSTM, port", "LSTM loop"]
    benchmark.main(["settings", *names, "--rounds", "3", "--warmup", "1", "--vocab-size", "53"])
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out[out.index("| setting |") :].strip().splitlines()[2:]]
    alike = (None, True, None, True, "off", False)
    ways = [alike, (None, False, *alike[2:]), (None, True, True, *alike[3:]), (*alike[:3], False, *alike[4:])]
    assert made == [*ways, (*alike[:5], True), *ways]
    first, changed, same = "20 (10 to 30)", "40 (30 to 50)", "1.00 (1.00 to 1.00)"
    assert rows[0] == ["| as it comes", first, same, changed, f"{same} |"]
    assert rows[1] == ["| `--no-tune-allocator`", changed, "2.00 (1.00 to 5.00)", changed, f"{same} |"]
    assert [row[0] for row in rows[2:]] == ["| `--onednn`", "| `--no-numba`", "| `--compile`"]
    assert rows[-1][1:] == [changed, "2.00 (1.00 to 5.00)", "", " |"]


def test_without_a_compiler_the_other_settings_are_timed(candidates, capsys, monkeypatch):
    """A line says what is missing; what else is wrong with --compile or without it is not hidden."""

    def worker(script, flags, peer, checkout, args):
        if "--compile" in flags or args.threads:
            raise trouble
        return Stand_in((10.0, 20.0))

    monkeypatch.setattr(measurements, "Worker", worker)
    few = {"as it comes": {}, "--no-numba": {"numba": False}}
    monkeypatch.setattr(measurements, "SETTINGS", few)
    command = ["settings", "--only", "LSTM, port", "--rounds", "1", "--warmup", "1", "--vocab-size", "53"]
    trouble = UserError("no C++ compiler")
    benchmark.main(command)
    out = capsys.readouterr().out
    assert "| --compile is not timed: no C++ compiler" in out
    assert "| `--no-numba` |" in out and "| `--compile` |" not in out
    with pytest.raises(UserError, match="no C"):
        benchmark.main([*command, "--threads", "1"])
    trouble = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        benchmark.main(command)


@pytest.mark.parametrize("gpu", (False, True))
def test_what_differs_from_its_reference_is_not_timed(candidates, capsys, monkeypatch, gpu):
    """It is left out with a line; the others stay; every process is let go. A GPU's memory needs none of its own."""
    made = []

    def worker(script, flags, peer, checkout, args):
        made.append(Stand_in((), difference=1e-4 if "GRU" in flags else 1e-6, memory=3.0))
        return made[-1]

    monkeypatch.setattr(measurements, "Worker", worker)
    args = benchmark.build_parser().parse_args(["speed", *["--cuda"] * gpu])
    memory, workers = measurements.start_workers(args)
    assert list(memory) == list(workers) == ["LSTM, port", "LSTM loop, port"]
    assert sorted(worker.ended for worker in made) == [False, False, True] + [True, True] * (not gpu)
    assert not any(worker.ended for worker in workers.values()) and memory == dict.fromkeys(workers, 3.0)
    assert "GRU, port: its loss is 1.0e-04 off its reference, more than 1e-05: not timed" in capsys.readouterr().out


def test_memory_prints_a_row_a_candidate(candidates, capsys):
    """Parameters, and a peak that is not nothing."""
    benchmark.main(["memory", "--vocab-size", "5003", "--only", "LSTM, port"])
    out = capsys.readouterr().out
    (row,) = cells(out[out.index("| model |") :])
    parameters = 5003 * 12 + 4 * 11 * (11 + 11 + 2)
    assert (row["model"], row["parameters"]) == ("LSTM, port", f"{parameters:,}")
    assert float(row.popitem()[1]) > 0


def test_generate_times_words(candidates, capsys, tmp_path, monkeypatch):
    """A row a candidate, the weights that a word needs, and the peer's time over ours in each round."""
    monkeypatch.setattr(measurements, "Worker", partial(InProcess, kind=workers.Candidate))
    place = ["--record", "g", "--results", str(tmp_path), "--threads", "1"]
    flags = ["--rounds", "2", "--warmup", "1", "--words", "5", "--vocab-size", "5003"]
    benchmark.main(["generate", "--only", "LSTM, port", *flags, *place])
    record = report.read_record(tmp_path / "speed" / "g.json")
    (row,) = record["rows"]
    assert len(row["ms"]) == len(row["reading_ms"]) == 2 and min(row["ms"] + row["reading_ms"]) > 0
    assert row["weights_mib"] == pytest.approx((5003 * 12 + 4 * 11 * 24) / 2**18)  # tied: the embedding is the head
    peer = {"name": "port-rnn (LSTM, port)", "ms": [3 * taken for taken in row["ms"]]}
    text = tables.generate_text({**record, "rows": [row, peer]})
    assert "3.00 (3.00 to 3.00)" in text and "5 words in one column" in text


def test_profile_lists_the_longest_operations(candidates, capsys, tmp_path):
    """By their own time, longest first, a group of columns a candidate; a product is among them."""
    flags = ["profile", "--vocab-size", "5003", "--operations", "7", "--record", "p", "--results", str(tmp_path)]
    benchmark.main([*flags, "--only", "LSTM, port", "LSTM loop"])
    out = capsys.readouterr().out
    record = report.read_record(tmp_path / "speed" / "p.json")
    assert [row["name"] for row in record["rows"]] == ["LSTM, port", "LSTM loop, port"]
    for row in record["rows"]:
        taken = [milliseconds for _, milliseconds, _ in row["longest"]]
        assert len(taken) == 7 and taken == sorted(taken, reverse=True) and sum(taken) <= row["total_ms"]
        assert any(name == "aten::mm" for name, _, _ in row["longest"])
    assert tables.profile_text(record) in (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert "LSTM loop, port: " in out


def test_a_profile_shortens_the_names_of_kernels():
    """To 60 letters, the last three of them dots; a name of 60 stays."""
    longest = [("k" * 61, 2.5, 1), ("m" * 60, 1.25, 3)]
    rows = [{"name": "LSTM", "longest": longest, "total_ms": 3.75}]
    text = tables.profile_text({"command": "", "machine": "", "environment": {}, "vocab_size": 5, "rows": rows})
    assert f"| {'k' * 57}... | 1 | 2.5 |" in text and f"| {'m' * 60} | 3 | 1.2 |" in text


def test_a_profile_of_candidates_with_unlike_many_operations():
    """The shorter one's cells end empty."""
    rows = [
        {"name": "LSTM", "longest": [["mm", 2.5, 1], ["add", 1.25, 3]], "total_ms": 3.75},
        {"name": "GRU", "longest": [["mm", 5.0, 7]], "total_ms": 5.0},
    ]
    text = tables.profile_text({"command": "", "machine": "", "environment": {}, "vocab_size": 5, "rows": rows})
    assert "| mm | 1 | 2.5 | mm | 7 | 5.0 |" in text and "| add | 3 | 1.2 |  |  |  |" in text


@pytest.mark.parametrize(("kind", "options"), (("--data", ()), ("--tokens", ("--types", "101"))))
def test_load_times_building_and_cache(capsys, tiny_corpus, tmp_path, kind, options):
    """Of a corpus, which gets no cache by this, and of one that is made up; kept and rendered."""
    value = str(tiny_corpus) if kind == "--data" else "5000"
    before = files(tiny_corpus)
    flags = ["load", kind, value, *options, "--rounds", "2", "--record", "load-x", "--results", str(tmp_path)]
    benchmark.main(flags)
    assert files(tiny_corpus) == before
    rows = cells(capsys.readouterr().out.strip().split("\n\n")[-1])
    assert [next(iter(row.values())) for row in rows] == ["build", "cached"]
    record = report.read_record(tmp_path / "speed" / "load-x.json")
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in record["rows"])
    assert tables.load_text(record) in (tmp_path / "speed.md").read_text(encoding="utf-8")


def test_evaluation_times_one_column(candidates, monkeypatch, capsys, tiny_corpus):
    """The perplexity of the part of the test split that was asked for, by our evaluate."""
    monkeypatch.setitem(measurements.CANDIDATES, "LSTM 650 tied, example", measurements.CANDIDATES["LSTM, port"])
    benchmark.main(["evaluation", "--data", str(tiny_corpus), "--tokens", "37", "--rounds", "2"])
    (row,) = cells(capsys.readouterr().out.strip().split("\n\n")[-1])
    assert list(row)[1].startswith("seconds for 37 targets of ")
    assert 1 < float(row["perplexity"]) < 1000 and row["times ours"] == "1.00 (1.00 to 1.00)"


def test_speed_refuses_what_it_does_not_know(candidates, fails):
    """A word that names nothing, beside others too, with the names that there are; rounds below 1."""
    message = fails(benchmark.main, "speed", "--only", "GRU", "Transformer")
    assert "'Transformer'" in message and "LSTM, port; LSTM loop, port; GRU, port;" in message
    assert "words with WikiText-103 in them, RMC" in fails(benchmark.main, "speed", "--only", "full softmax")
    assert "--rounds" in fails(benchmark.main, "speed", "--rounds", 0)


def test_quality_trains_and_scores(monkeypatch, tiny_corpus, tmp_path, capsys):
    """Each candidate from each seed: the perplexity of a model that has learnt, in the table and the record."""
    monkeypatch.setattr(measurements, "Worker", partial(InProcess, kind=workers.Candidate))
    flags = "--emsize 11 --nhid 11 --batch-size 7 --bptt 13 --lr 10"
    argv = ["quality", "--data", str(tiny_corpus), "--only", "AWD-QRNN", "--seeds", "2", "--tokens", "3000"]
    benchmark.main([*argv, f"--flags={flags}", "--record", "small", "--results", str(tmp_path), "--threads", "1"])
    record = report.read_record(tmp_path / "awd" / "small.json")
    assert [(row["name"], row["seed"]) for row in record["rows"]] == [("AWD-QRNN", 1), ("AWD-QRNN", 2)]
    assert all(5 < row["test"] < 29.5 and row["updates"] > 20 and row["ms"] > 0 for row in record["rows"])
    assert record["rows"][0]["test"] != record["rows"][1]["test"]
    assert "| AWD-QRNN | 1 |" in capsys.readouterr().out and "1.000" in (tmp_path / "awd.md").read_text()


def test_many_seeds_become_their_mean():
    """Means, standard errors and that of the ratio, as computed by hand; each seed by itself when they are few."""
    common = {"corpus": "tiny", "epochs": 1, "command": "", "machine": "", "environment": {}}
    tests = {"ours": (100, 104, 96, 102, 98), "theirs": (50, 50, 50, 50, 51)}
    rows = [
        {"name": name, "seed": seed, "updates": 3, "ms": 10 * seed, "valid": 7 * score, "test": score}
        for name, scores in tests.items()
        for seed, score in enumerate(scores, 1)
    ]
    text = tables.quality_text({**common, "rows": rows})
    assert "| ours | 5 | 700.00 ± 9.90 | 100.00 ± 1.41 | 30 | 1 |" in text
    assert "| theirs | 5 | 351.40 ± 1.40 | 50.20 ± 0.20 | 30 | 0.502 ± 0.007 |" in text
    text = tables.quality_text({**common, "rows": rows[:4] + rows[5:9]})
    assert "| ours | 4 | 714.00 | 102.00 | 40 | 1.000 |" in text
    assert "| theirs | 2 | 350.00 | 50.00 | 20 | 0.481 |" in text


PARAMETERS = {
    "LSTM, port": 10739078,
    "LSTM loop, port": 10739078,
    "GRU, port": 33278 * 301 + 3 * 300 * 602,
    "GRU loop, port": 33278 * 301 + 3 * 300 * 602,
    "Elman tanh, port": 33278 * 301 + 300 * 602,
    "LSTM, example": 13987678,
    "LSTM tied, example": 13987678 - 33278 * 200,
    "LSTM 650 tied, example": 33278 * 651 + 2 * 4 * 650 * 1302,
    "RMC, paper's form": 11842622,
    "RMC, port's form": 10667072,
    "QRNN, paper": 33278 * 1281 + 2 * 3 * 640 * 1281,
    "LSTM 640, QRNN's paper": 33278 * 1281 + 2 * 4 * 640 * 1282,
    "AWD-LSTM": 33556078,
    "AWD-QRNN": 33354628,
}


@pytest.mark.parametrize("name", measurements.CANDIDATES)
def test_candidates_are_what_their_names_say(name):
    """Their flags are of their script; the recurrent ones have the published numbers of parameters."""
    script, flags = measurements.CANDIDATES[name]
    module = importlib.import_module(script)
    args, _ = parsing.parse_training(module.build_parser(), module.RECIPES, flags.split())
    with torch.device("meta"):
        model = build(module.model_config(args, 33278))
    assert model.num_params() == PARAMETERS[name]
    assert getattr(model.core, "loop", False) == any(word in name for word in ("loop", "RMC", "QRNN, ", "AWD-QRNN"))
