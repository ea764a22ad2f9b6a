"""Tables are what their run records say, again and again."""

import json
import shutil

import pytest
from conftest import cells, files

import benchmark
from utils import UserError, report, run_tables

PAGE = "# Small\n\nbefore\n\n<!-- small -->\n{}<!-- /small -->\n\nafter\n"


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
            "commit": "0123456789ab-dirty",
        }
    ]
    assert (place / "small" / "mine.json").read_bytes() == (folder / "run.json").read_bytes()


def test_times_of_several_seeds_are_means_and_devices_are_all_named(run):
    """Perplexities with their range; what is the same for both stands once, the command is the first's."""

    def slower(record):
        made_up(record)
        record.update(minutes=20.1, ms_per_batch=100.4, forward_ms_per_batch=41.0, command="another")
        record["environment"].update(commit="fedcba987654321", device="cpu (Another)")
        record["results"]["test"]["perplexity"] = 99.77

    records = [report.read_record(run(*each) / "run.json") for each in (("one", made_up), ("two", slower))]
    header, _, row = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in run_tables.plan_text([("both", (None, 97.5), records)]).strip().splitlines()
    )
    shown = dict(zip(header, row, strict=True))
    assert shown["minutes"] == "16.2" and shown["ms/batch"] == "86" and shown["forward ms"] == "32"
    assert shown["test ppl"] == "99.27 (98.77 to 99.77)" and shown["published test"] == "97.5"
    assert shown["device"] == "cpu (Imaginary), 3 threads; cpu (Another), 3 threads"
    assert shown["commit"] == "0123456789ab-dirty; fedcba987654" and shown["command"] == "`python train_rnn.py --tied`"
    (single,) = [run_tables.plan_text([("one", (None, None), records[:1])]).strip().splitlines()[2]]
    assert "| 12.3 |" in single and "; " not in single


def better(record):
    record["results"]["test"]["perplexity"] = 1.5
    record["model"]["core"].update(model="GRU", nlayers=2, nhid=31, loop=True)
    record["model"].update(tied=False, parameters=1234567)
    record["environment"]["commit"] = None


def test_a_compressed_model_is_called_so():
    """How it was pruned and quantized, in the name that tables show."""
    core = {"model": "LSTM", "nlayers": 2, "nhid": 17, "loop": False}
    model = {"family": "rnn", "core": core, "tied": True, "parameters": 1000, "pruned": 0}
    assert run_tables.model_name(model) == "LSTM 2x17 tied"
    assert run_tables.model_name({**model, "pruned": 804}) == "LSTM 2x17 tied, 80.4% pruned"
    assert run_tables.model_name({**model, "tied": False, "cutoffs": [5]}) == "LSTM 2x17 adaptive"
    assert run_tables.model_name({**model, "cutoffs": [5], "splitcross": True}) == "LSTM 2x17 tied split"
    assert run_tables.model_name({**model, "native": True}) == "LSTM 2x17 tied, native"
    settings = {"mode": "asymmetric", "per_channel": True, "clip": "avg", "weight_bits": 8, "activation_bits": 7}
    named = [run_tables.model_name({**model, "quantization": settings | {"fp16": fp16}}) for fp16 in ([], ["a", "b"])]
    assert named[0] == "LSTM 2x17 tied, 8/7 bits asymmetric per channel clip avg"
    assert named[1] == f"{named[0]} float16 a,b"


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


def test_seeds_side_by_side(run, place):
    """Runs whose commands differ in seed and name only share a row; rows are named by what is not common to all.

    Of a flag that a row has twice, the last value counts, as it does for the script.
    """

    def trained(flags, seed, test):
        def change(record):
            record["command"] = f"python train_awd.py --nhid 5 {flags}--seed {seed} --epochs 3 --name a-{seed}"
            record["command"] += " --checkpoint-every 500" * (seed == 2)
            record["config"]["seed"] = seed
            record["results"]["test"].update(perplexity=test, epoch=2 * seed)

        return run(f"{flags.strip(' -').replace(' ', '-')}{seed}", change)

    runs = [
        trained("--wdrop 0.5 --wdrop 0 ", 2, 132.0),
        trained("", 1, 99.0),
        trained("", 2, 101.0),
        trained("--wdrop 0.5 --wdrop 0 ", 1, 128.0),
    ]
    benchmark.main(["table", "small", *map(str, runs), "--differences", "--results", str(place)])
    page = (place / "small.md").read_text(encoding="utf-8")
    assert "`python train_awd.py --nhid 5 --epochs 3 --seed SEED`" in page
    rows = cells(page[page.index("| what differs") :].split("<!--")[0])
    assert [row["what differs"] for row in rows] == ["nothing", "`--wdrop 0`"]
    assert [row["test ppl"] for row in rows] == ["99.00 101.00", "128.00 132.00"]
    assert [row["times the first row's"] for row in rows] == ["1.000", "1.300"]
    assert rows[1]["seeds"] == "1 2" and rows[1]["best epoch"] == "2 4"


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
        (lambda record: record.update(kind="speed"), "record of speed: expected that of a training"),
    ),
    ids=("no results", "columns", "format", "measurement"),
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
    with pytest.raises(UserError, match=r"^[^\n]*small has no run records[^\n]*after small[^\n]* awd-penn[^\n]*$"):
        benchmark.main(["table", "small", "--results", str(place)])
    unended = run("unended", lambda record: record.update(results={}))
    done = script("benchmark.py", "table", "small", unended, tmp_path / "gone", "--results", place)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and str(unended) in done.stderr
    assert (place / "small.md").read_text(encoding="utf-8") == PAGE.format("")


def test_what_a_table_refuses(tiny_run, run, place, fails):
    """Two runs of one name, a name or a --results that are no place, records that are none; nothing is written."""
    again = run("again", lambda record: record.update(name="tiny"))
    before = files(place)
    common = ("--results", place)
    assert "another run given is called tiny" in fails(benchmark.main, "table", "small", tiny_run, again, *common)
    elsewhere = run("elsewhere", lambda record: record.update(name="../evil"))
    assert "without a folder, got '../evil'" in fails(benchmark.main, "table", "small", elsewhere, *common)
    for name in ("", "../small"):
        assert "expected a name" in fails(benchmark.main, "table", name, tiny_run, *common)
    nothing = place.parent / "nothing.json"
    nothing.write_text('{"format": 1}')
    assert "a record of None" in fails(benchmark.main, "table", "small", nothing, *common)
    assert files(place) == before
    taken = place.parent / "taken"
    taken.touch()
    assert "--results" in fails(benchmark.main, "table", "small", tiny_run, "--results", taken)
    assert "--results" in fails(benchmark.main, "load", "--record", "x", "--results", taken)
    assert "--record a/b" in fails(benchmark.main, "load", "--record", "a/b", *common)


def test_a_bar_in_a_name_does_not_split_its_row():
    """It is escaped."""
    assert report.markdown_table(("a", "b"), [["x|y", 1]]).splitlines()[-1] == r"| x\|y | 1 |"


def test_flags_in_either_spelling_name_a_run():
    """--runs_dir and --checkpoint_every are no settings, as --runs-dir and --checkpoint-every are none."""
    command = "python train_awd.py --nhid 5 --runs_dir x --checkpoint_every 500 --save y"
    assert run_tables._setting(command) == ["python train_awd.py", "--nhid 5"]
