"""A planned table trains what it needs, and no more."""

import importlib
import math
import os
import shlex
import signal
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import cells

import benchmark
from utils import UserError, plans, report, rows
from utils import planned as planning


@pytest.fixture
def place(tmp_path):
    """A results folder with nothing in it."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def test_planned_measurements_run_once(monkeypatch, place, capsys):
    """Those without a record run, into the folder asked for; --list shows them."""
    ran = []

    def call(argv, env):
        ran.append(shlex.join(argv[1:]))
        (place / "speed").mkdir(exist_ok=True)
        record = {"kind": argv[2], "environment": {}}
        report.write_record(place / "speed" / f"{argv[argv.index('--record') + 1]}.json", record)
        return subprocess.CompletedProcess(argv, 0)

    for module in (plans, planning):
        monkeypatch.setattr(module, "MEASURED", {"fast": ("speed --record one", "layers {runs}/x --record two")})
    monkeypatch.setattr(planning, "subprocess", Namespace(run=call))
    (place / "mine").mkdir()
    report.write_record(place / "mine" / "two.json", {"kind": "training", "environment": {}})  # a run's name counts not
    for _ in range(2):
        benchmark.main(["table", "fast", "--runs-dir", "he re", "--results", str(place)])
    script = Path(benchmark.__file__)
    assert ran == [
        f"{script} speed --record one --results {place}",
        f"{script} layers 'he re/x' --record two --results {place}",
    ]
    assert f"two in {place / 'speed'}.md" in capsys.readouterr().out
    benchmark.main(["table", "--list"])
    assert "fast\n  benchmark.py speed --record one" in capsys.readouterr().out


@pytest.fixture
def planned(monkeypatch, tiny_corpus, place, tmp_path):
    """planned(*FLAGS): benchmark.py table small, planned with three rows; the commands that it ran, in this process."""
    ran = []

    def call(argv, env):
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(planning.ROOT)
        ran.append(shlex.join(argv[2:]))
        module = importlib.import_module(Path(argv[1]).stem)
        module.main(argv[2:])
        return subprocess.CompletedProcess(argv, 0)

    train = f"train_rnn.py --data {tiny_corpus} --emsize 11 --nhid 11 --batch-size 7 --bptt 13 --epochs 1 --threads 1"
    small = (
        rows.trained("dense", train, 20.25, 21.5),
        rows.trained("longer", f"{train} --start-from dense{{seed}}"),
        rows.at_once(50),
    )
    for module in (plans, planning):
        monkeypatch.setattr(module, "PLANS", {"small": small})
    monkeypatch.setattr(planning, "subprocess", Namespace(run=call))

    def run(*flags):
        ran.clear()
        benchmark.main(["table", "small", "--runs-dir", str(tmp_path / "runs"), "--results", str(place), *flags])
        return list(ran)

    return run


def planned_rows(place):
    """The rows of the table on the page."""
    text = (place / "small.md").read_text(encoding="utf-8")
    return cells(text[text.index("| row |") :].split("\n\n")[0])


def test_a_planned_table_trains_what_it_needs(planned, place, tmp_path):
    """Rows in their order with what was published, models made of models; nothing is done twice; more seeds later."""
    assert len(planned("--only", "dense")) == 1
    text = (place / "small.md").read_text(encoding="utf-8")
    assert "Not run: longer, at-once-50." in text and "![small](small.png)" in text
    assert (place / "small.png").stat().st_size > 10_000
    ran = planned("--budget", "3")
    assert ["--max-minutes 3" in each for each in ran] == [True, False, False]
    assert ran[1].startswith("prune ") and "at-once-50.json" in ran[2]
    dense, longer, pruned = planned_rows(place)
    shown = [dense[key] for key in ("row", "epochs", "published valid", "published test")]
    assert shown == ["dense", "1", "20.25", "21.5"]
    assert float(longer["valid ppl"]) < float(dense["valid ppl"]) and longer["published test"] == ""
    assert pruned["model"].startswith("LSTM 1x11 tied, 4") and pruned["epochs"] == ""  # not the biases
    assert planned() == []
    ran = planned("--seeds", "2")
    assert ["--seed 1112" in each for each in ran] == [True, True, False, False]
    assert "--start-from dense-seed-2" in ran[1] and "dense-seed-2/best.pt" in ran[2]
    scores = [
        report.read_record(place / "small" / f"dense{seed}.json")["results"]["test"]["perplexity"]
        for seed in ("", "-seed-2")
    ]
    assert scores[0] != scores[1]
    (dense, *_) = planned_rows(place)
    assert dense["test ppl"] == f"{sum(scores) / 2:.2f} ({min(scores):.2f} to {max(scores):.2f})"
    assert dense["seeds"] == "1111 1112"
    assert planned("--differences") == []
    text = (place / "small.md").read_text(encoding="utf-8")
    assert "| row |" not in text and "![small](small.png)" in text
    rows = cells(text[text.index("| what differs |") :].split("\n\n")[0])
    assert sorted((row["what differs"], row["seeds"]) for row in rows) == [
        ("`--start-from dense-seed-2`", "1112"),
        ("`--start-from dense` `--max-minutes 3`", "1111"),
        ("nothing", "1111 1112"),
    ]


def test_a_planned_training_that_was_cut_goes_on(planned, place, tmp_path, monkeypatch):
    """Ctrl-C is for the training, ends the table after it, and the same command resumes; records name both commands."""
    run = planning.subprocess.run

    def interrupted(argv, env):
        os.kill(os.getpid(), signal.SIGINT)
        return run([*argv, "--max-minutes", "0.00001"], env=env)

    monkeypatch.setattr(planning, "subprocess", Namespace(run=interrupted))
    with pytest.raises(KeyboardInterrupt):
        planned("--only", "dense")
    assert not (place / "small").exists()
    monkeypatch.setattr(planning, "subprocess", Namespace(run=run))
    (ran,) = planned("--only", "dense", "--budget", "5")
    assert "--resume dense" in ran and "--epochs" not in ran
    record = report.read_record(place / "small" / "dense.json")
    assert record["status"] == "finished" and "--epochs 1" in record["command"]
    assert len(record["resumed_by"]) == 1 and "--resume dense" in record["resumed_by"][0]


def test_the_readme_has_the_best_of_our_recipes(planned, place, monkeypatch):
    """Of rows by recipes of our own one for each published figure; those by the published recipe all."""
    planned("--only", "dense")
    record = report.read_record(place / "small" / "dense.json")
    found = {"plain": 30.0, "first-fast": 29.0, "second-fast": 28.0, "third-fast": 27.0, "other-fast": 31.0}
    for name, perplexity in found.items():
        record["results"]["valid"]["perplexity"] = perplexity
        record["results"]["test"]["perplexity"] = 100 - perplexity  # chosen by valid, never by test
        report.write_record(place / "small" / f"{name}.json", record)
    small = tuple(rows.trained(name, "", test=5.0 if name == "other-fast" else 21.5) for name in found)
    monkeypatch.setattr(planning, "PLANS", {"small": small})
    shown = [row["row"].partition("]")[0][1:] for row in cells(planning.summary_text(place).strip())]
    assert shown == ["plain", "third-fast", "other-fast"]


def test_a_planned_table_trains_on_a_gpu(planned, fails, monkeypatch):
    """A row's training has the flags of the device, once; replayed passes only where they are asked for."""
    ran = []

    def call(argv, env):
        ran.append(argv)
        return subprocess.CompletedProcess(argv, 2)

    monkeypatch.setattr(planning, "subprocess", Namespace(run=call))
    for flags in ([], ["--cuda"], ["--cuda", "--tf32", "--cuda-graphs"]):
        assert "dense ended" in fails(lambda flags=flags: planned("--only", "dense", *flags))
        assert [each for each in ran.pop() if each in ("--cuda", "--tf32", "--cuda-graphs")] == flags


def test_what_a_planned_table_refuses(planned, fails, monkeypatch):
    """Rows that there are not; a table without a name; a script that fails."""
    assert "dense, longer, at-once-50" in fails(lambda: planned("--only", "sparse"))
    assert "--list" in fails(benchmark.main, "table")
    assert "--budget is for tables" in fails(benchmark.main, "table", "other", "--budget", "3")
    assert "--seeds is for tables" in fails(benchmark.main, "table", "small", "RUN", "--seeds", "2")
    assert "--only is for tables" in fails(benchmark.main, "table", "rmc-speed", "--only", "RMC")
    assert "--cuda-graphs is for tables" in fails(benchmark.main, "table", "rmc-speed", "--cuda", "--cuda-graphs")
    failing = Namespace(run=lambda argv, env: subprocess.CompletedProcess(argv, 2))
    monkeypatch.setattr(planning, "subprocess", failing)
    assert "dense ended with exit code 2" in fails(lambda: planned("--only", "dense"))


def test_a_run_cut_by_the_budget_says_so_and_goes_on(planned, place):
    """After its minutes it is done for that budget, not for a larger one or none; the README does not have it."""
    assert len(planned("--only", "dense", "--budget", "0.0001")) == 1
    (row,) = planned_rows(place)
    assert row["epochs"] == "1, max-minutes" and "dense" not in planning.summary_text(place)
    assert planned("--only", "dense", "--budget", "0.0001") == []
    (ran,) = planned("--only", "dense", "--budget", "5")
    assert "--resume dense --max-minutes 5" in ran
    (row,) = planned_rows(place)
    assert row["epochs"] == "1" and "[dense]" in planning.summary_text(place)
    planned("--only", "longer", "--budget", "0.0001")
    (ran,) = planned("--only", "longer")
    assert ran.endswith("--resume longer") and planned_rows(place)[1]["epochs"] == "1"


def test_what_is_recorded_is_not_run_again_and_said_to_be(planned, place, capsys):
    """With where it is; a word of --only that is no row is refused beside one that is."""
    planned("--only", "dense")
    capsys.readouterr()
    assert planned("--only", "dense") == []
    assert f"not run again: dense, recorded in {place / 'small'}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--only dence: small has dense, longer, at-once-50"):
        planned("--only", "dense", "dence")


def test_a_page_without_its_place_is_missed_before_anything_runs(planned, place):
    """A training of hours would have no table to go to."""
    (place / "small.md").write_text("by hand\n", encoding="utf-8")
    with pytest.raises(UserError, match="needs the lines <!-- small -->"):
        planned("--only", "dense")
    assert not (place.parent / "runs").exists()


def test_a_finished_run_without_its_last_checkpoint_is_not_deleted(planned, place):
    """One that was cut before its first checkpoint is."""
    folder = place.parent / "runs" / "small" / "dense"
    folder.mkdir(parents=True)
    (folder / "best.pt").touch()
    with pytest.raises(UserError, match=r"best\.pt, but no last\.pt"):
        planned("--only", "dense")
    assert (folder / "best.pt").exists()
    (folder / "best.pt").rename(folder / "notes.txt")
    assert len(planned("--only", "dense")) == 1


def test_runs_in_a_folder_with_a_space(planned, place):
    """A row of several commands, and one that starts from another's model."""
    assert len(planned("--runs-dir", str(place.parent / "my runs"))) == 4
    assert [row["row"] for row in planned_rows(place)] == ["dense", "longer", "at-once-50"]


def test_a_row_that_never_was_finite_is_shown(planned, place):
    """Its table can be rendered and drawn, alone and beside others, which then can."""
    planned("--only", "dense", "longer")
    path = place / "small" / "dense.json"
    record = report.read_record(path)
    for epoch in record["history"]["epochs"]:
        epoch["valid_ppl"] = math.inf
    report.write_record(path, record)
    for _ in range(2):
        planning.render("small", place)
        assert (place / "small.png").stat().st_size > 10_000
        (place / "small" / "longer.json").unlink(missing_ok=True)


def test_rows_without_curves_have_no_picture(planned, place):
    """The page has no link to one that is not drawn."""
    planned("--only", "dense", "at-once-50")
    (place / "small" / "dense.json").unlink()
    planning.render("small", place)
    assert "small.png" not in (place / "small.md").read_text(encoding="utf-8")


def test_seeds_are_in_the_order_of_their_numbers():
    """The tenth after the second."""
    names = ["a-seed-10", "b", "a-seed-2", "a", "ab-seed-3"]
    assert planning._own(rows.trained("a", ""), names) == ["a", "a-seed-2", "a-seed-10"]
