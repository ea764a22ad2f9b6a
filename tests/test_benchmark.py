"""Tables are what their records say, again and again; speed is measured as it says."""

import copy
import json
import shutil

import pytest
import torch

import benchmark
import train_rnn
from models import build
from utils import UserError, cli, report, runtime, trainer

PAGE = "# Small\n\nbefore\n\n<!-- small -->\n{}<!-- /small -->\n\nafter\n"
SMALL = "--emsize 11 --nhid 11 --batch-size 7 --bptt 13"


@pytest.fixture
def place(tmp_path):
    """A results folder with a page whose table is empty."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small.md").write_text(PAGE.format(""), encoding="utf-8")
    return tmp_path / "results"


@pytest.fixture
def table(place):
    """table(*RUNS): the page's cells by column after benchmark.py table small RUNS."""

    def call(*runs):
        benchmark.main(["table", "small", *map(str, runs), "--results", str(place)])
        page = (place / "small.md").read_text(encoding="utf-8")
        before, after = PAGE.split("{}")
        assert page.startswith(before) and page.endswith(after)
        return cells(page[len(before) : -len(after)])

    return call


def cells(text):
    """The rows of a markdown table, {column: cell}; the line below the header is left out."""
    header, rule, *rows = [
        line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.strip().splitlines()
    ]
    assert all(set(cell) <= {":", "-"} for cell in rule)
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture
def run(tiny_run, tmp_path):
    """run(NAME, CHANGE): a run folder like tiny_run's, of another name, whose record CHANGE was called on."""

    def make(name, change=lambda record: None):
        record = json.loads((tiny_run / "run.json").read_text())
        record["name"] = name
        change(record)
        (tmp_path / name).mkdir()
        report.write_record(tmp_path / name / "run.json", record)
        return tmp_path / name

    return make


def files(folder):
    """Path and bytes of all that is in a folder."""
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def made_up(record):
    record.update(minutes=12.34, ms_per_batch=71.6, forward_ms_per_batch=23.4, peak_memory_mib=1234.5, epochs=37)
    record["results"]["valid"]["perplexity"] = 123.456
    record["results"]["test"]["perplexity"] = 98.765
    record["environment"].update(device="cpu (Imaginary)", threads=3, commit="0123456789abcdef-dirty")
    record.update(command="python train_rnn.py --tied")


def test_a_row_is_what_the_record_says(table, run, place):
    """Every cell; the record is copied as it is."""
    folder = run("mine", made_up)
    assert table(folder) == [
        {
            "model": "LSTM 1x11 tied",
            "parameters": f"{29 * 11 + 4 * 11 * (11 + 11 + 2) + 29:,}",
            "corpus": "tiny",
            "recipe": "port",
            "epochs": "37",
            "minutes": "12.3",
            "valid ppl": "123.46",
            "test ppl": "98.77",
            "forward ms": "23",
            "ms/batch": "72",
            "peak MiB": "1234",
            "device": "cpu (Imaginary), 3 threads",
            "command": "`python train_rnn.py --tied`",
            "commit": "0123456789ab",
        }
    ]
    assert (place / "small" / "mine.json").read_bytes() == (folder / "run.json").read_bytes()


def better(record):
    record["results"]["test"]["perplexity"] = 1.5
    record["model"]["core"].update(model="GRU", nlayers=2, nhid=31, loop=True)
    record["model"].update(tied=False, parameters=1234567)
    record["environment"]["commit"] = None


def test_the_best_test_perplexity_comes_first(table, tiny_run, run):
    """Runs are added to those that are there; a run of the same name takes the place of the old one."""
    worse = run("worse", lambda record: record["results"]["test"].update(perplexity=1234.567))
    assert [row["test ppl"] for row in table(worse)] == ["1234.57"]
    rows = table(tiny_run, run("better", better))
    assert [row["model"] for row in rows] == ["GRU 2x31 loop", "LSTM 1x11 tied", "LSTM 1x11 tied"]
    assert [rows[0][column] for column in ("parameters", "test ppl", "commit")] == ["1,234,567", "1.50", ""]
    assert rows[2]["test ppl"] == "1234.57"
    shutil.rmtree(worse)
    again = table(run("worse", lambda record: record["results"]["test"].update(perplexity=1.25)))
    assert [row["test ppl"] for row in again] == ["1.25", "1.50", rows[1]["test ppl"]]


def test_rendering_again_changes_nothing(table, tiny_run, run, place):
    """Byte for byte, ties too: from the records alone, from the runs in another order, by folder and by file."""
    runs = [tiny_run, run("better", better), run("again", lambda record: record["model"].update(parameters=3))]
    rows = table(*runs)
    before = files(place)
    for again in ((), runs[::-1], [path / "run.json" for path in runs]):
        assert table(*again) == rows
        assert files(place) == before


def test_a_page_is_made_where_there_is_none(table, tiny_run, place):
    """With markers, so that it can be rendered again; one without markers is left alone."""
    rows = table(tiny_run)
    (place / "small.md").unlink()
    for _ in range(2):
        benchmark.main(["table", "small", "--results", str(place)])
        text = (place / "small.md").read_text(encoding="utf-8")
        assert cells(text.split("<!-- small -->\n")[1].split("<!-- /small -->")[0]) == rows
    (place / "small.md").write_text("written by hand\n")
    with pytest.raises(UserError, match=r"small\.md needs the lines <!-- small --> and <!-- /small -->"):
        benchmark.main(["table", "small", "--results", str(place)])
    assert (place / "small.md").read_text() == "written by hand\n"


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda record: record.update(results={}, status="running"), "no results.*running"),
        (lambda record: record["results"]["valid"].update(batch_size=3), "batch 1"),
        (lambda record: record.update(format=999), "no run record"),
    ),
    ids=("no results", "columns", "format"),
)
def test_a_refused_run_leaves_everything_as_it_was(table, tiny_run, run, place, change, message):
    """Records and page; so the table can be rendered again without it."""
    rows = table(tiny_run)
    before = files(place)
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        table(run("better", better), run("refused", change))
    assert files(place) == before
    assert table() == rows


def test_nothing_to_render_is_refused(script, run, place, tmp_path):
    """No records yet, or a run that has not ended: exit code 2 and one line."""
    with pytest.raises(UserError, match=r"^[^\n]*no run records[^\n]*table small RUN$"):
        benchmark.main(["table", "small", "--results", str(place)])
    unended = run("unended", lambda record: record.update(results={}))
    done = script("benchmark.py", "table", "small", unended, tmp_path / "gone", "--results", place)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and str(unended) in done.stderr
    assert (place / "small.md").read_text(encoding="utf-8") == PAGE.format("")


def test_the_tables_of_this_repository_are_what_their_records_say(tmp_path):
    """Each page in results/ that has records, rendered again in a copy, is the same byte for byte."""
    pages = [page for page in sorted(benchmark.RESULTS.glob("*.md")) if list(page.with_suffix("").glob("*.json"))]
    for page in pages:
        shutil.copytree(page.with_suffix(""), tmp_path / page.stem)
        shutil.copy(page, tmp_path)
        benchmark.main(["table", page.stem, "--results", str(tmp_path)])
        assert (tmp_path / page.name).read_bytes() == page.read_bytes(), page.name


@pytest.fixture
def candidates(monkeypatch):
    """Small models under three of the real names."""
    flags = {"LSTM, port": "", "LSTM loop, port": " --loop", "GRU, port": " --model GRU"}
    small = {name: (train_rnn, f"--recipe port {SMALL}{flag}") for name, flag in flags.items()}
    monkeypatch.setattr(benchmark, "CANDIDATES", small)


def speed(capsys, *flags):
    """Table and other lines that benchmark.py speed prints with a vocabulary of 50."""
    benchmark.main(["speed", "--vocab-size", "50", *flags])
    out = capsys.readouterr().out
    start = out.index("| model |")
    return cells(out[start:]), out[:start].splitlines()


def test_speed_prints_a_row_a_candidate(candidates, capsys):
    """Sizes, and times that fit each other; above them what was timed on which machine."""
    rows, lines = speed(capsys, "--rounds", "1", "--warmup", "1", "--only", "LSTM, port")
    assert len(rows) == 1
    row = rows[0]
    milliseconds = float(row["ms/batch, median (range)"].split()[0])
    assert (row["model"], row["batch x BPTT"]) == ("LSTM, port", "7 x 13")
    assert row["parameters"] == f"{50 * 11 + 4 * 11 * (11 + 11 + 2) + 50:,}"
    assert 0 <= float(row["forward ms"]) <= milliseconds
    assert int(row["tokens/s"].replace(",", "")) == pytest.approx(7 * 13 * 1000 / milliseconds, rel=0.2)
    assert any("vocabulary 50 | 1 rounds" in line for line in lines)
    assert any(f"torch {torch.__version__}" in line and "threads" in line for line in lines)


def test_speed_is_the_median_of_the_rounds_after_the_warmup(candidates, capsys, monkeypatch):
    """By a clock that is set by hand: warm-up steps do not count; candidates take turns, each with its own state."""
    forward, full = (500.0, 5.0, 7.0, 6.0), (900.0, 40.0, 10.0, 30.0)
    step, models, passed, returned = trainer.training_step, [], [], []

    class Clock:
        def __init__(self, device):
            ends = zip(forward, full, strict=True)
            self.marks = (1000.0 * number + time for number, pair in enumerate(ends) for time in (0, *pair))

        def mark(self):
            return next(self.marks)

        def milliseconds(self, start, end):
            return end - start

    def training_step(model, optimizer, tokens, targets, state, *rest):
        weights = copy.deepcopy(model.state_dict())
        result = step(model, optimizer, tokens, targets, state, *rest)
        assert tokens.shape == targets.shape == (13, 7) and max(tokens.max(), targets.max()) < 50
        assert not torch.equal(weights["head.weight"], model.head.weight)
        models.append(model)
        passed.append(state)
        returned.append(result[3])
        return result

    monkeypatch.setattr(runtime, "Clock", Clock)
    monkeypatch.setattr(trainer, "training_step", training_step)
    rows, _ = speed(capsys, "--rounds", "3", "--warmup", "1", "--only", "loop", "GRU")
    assert [row["model"] for row in rows] == ["LSTM loop, port", "GRU, port"]
    for row in rows:
        assert row["ms/batch, median (range)"] == "30.0 (10.0 to 40.0)"
        assert (row["forward ms"], row["tokens/s"]) == ("6.0", f"{7 * 13 / 0.030:,.0f}")
    assert models == models[:2] * 4 and models[0] is not models[1]
    assert all(after is before for after, before in zip(passed[2:], returned, strict=False))


def test_speed_refuses_what_it_does_not_know(candidates, fails):
    """The names that there are; rounds below 1."""
    message = fails(benchmark.main, "speed", "--only", "QRNN", "Transformer")
    assert "QRNN Transformer" in message and "LSTM, port, LSTM loop, port, GRU, port" in message
    assert "--rounds" in fails(benchmark.main, "speed", "--rounds", 0)


PARAMETERS = {
    "LSTM, port": 10739078,
    "LSTM loop, port": 10739078,
    "GRU, port": 33278 * 301 + 3 * 300 * 602,
    "Elman tanh, port": 33278 * 301 + 300 * 602,
    "LSTM, example": 13987678,
    "LSTM tied, example": 13987678 - 33278 * 200,
    "RMC, paper's form": 11842622,
    "RMC, port's form": 10667072,
}


@pytest.mark.parametrize("name", benchmark.CANDIDATES)
def test_candidates_are_what_their_names_say(name):
    """Their flags are of their script; the recurrent ones have the published numbers of parameters."""
    module, flags = benchmark.CANDIDATES[name]
    args, _ = cli.parse_training(module.build_parser(), module.RECIPES, flags.split())
    with torch.device("meta"):
        model = build(module.model_config(args, 33278))
    assert model.num_params() == PARAMETERS[name]
    assert getattr(model.core, "loop", False) == ("loop" in name or "RMC" in name)
