"""Log lines, run folders, run records, tables and curves."""

import csv
import datetime
import json
import math
import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace

import matplotlib.image
import pytest
import torch

from utils import UserError, report
from utils.evaluation import Score
from utils.report import RunFolder


def epoch_entry(number, train_ppl=90.0, valid_ppl=80.0, partial=False, part=1.0):
    """One epoch of a history, with what the trainer puts there."""
    return {
        "epoch": number,
        "partial": partial,
        "part": part,
        "batches": 53,
        "lr": 20.0 / number,
        "train_ppl": train_ppl,
        "valid_ppl": valid_ppl,
        "valid_batch": 10,
    }


def history(*epochs, points=()):
    return {"epochs": list(epochs), "points": [list(point) for point in points]}


@pytest.mark.parametrize(
    ("lr", "shown"),
    ((20.0, "20.00"), (1.0, "1.00"), (0.05, "0.05"), (0.01, "0.01"), (0.001, "0.001"), (0.000125, "0.000125")),
)
def test_rate(lr, shown):
    """Two digits, as word_language_model prints it; more where those would say nothing."""
    assert report.rate(lr) == shown


@pytest.mark.parametrize(("seconds", "shown"), ((0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01")))
def test_duration(seconds, shown):
    """Hours, minutes, seconds."""
    assert report.duration(seconds) == shown


def test_say_is_a_line_on_standard_output(capsys):
    """And an empty one."""
    report.say("| a line")
    report.say()
    assert capsys.readouterr() == ("| a line\n\n", "")


@pytest.mark.parametrize("label", (None, "reading"))
@pytest.mark.parametrize("items", ([], [5], "abc", range(7)), ids=repr)
@pytest.mark.parametrize("terminal", (True, False), ids=("terminal", "file"))
def test_progress_yields_every_item(monkeypatch, label, items, terminal):
    """In order, with and without a label, on a terminal and elsewhere."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(report.progress(items, label)) == list(items)


def test_progress_is_a_line_each_half_minute(monkeypatch, capsys):
    """With a clock of 16 seconds an item: after 32 and 64 seconds, and the time left by the items so far."""
    clock = iter(range(1000, 2000, 16))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    list(report.progress(range(7), "reading"))
    list(report.progress(range(7), None))
    lines = ["| reading | 1/7 | eta 0:03:12", "| reading | 3/7 | eta 0:01:25", "| reading | 5/7 | eta 0:00:38"]
    assert capsys.readouterr().out.splitlines() == lines


def test_markdown_table():
    """The first column to the left, numbers to the right, values as str gives them."""
    table = report.markdown_table(("model", "ppl", "ms"), [["LSTM", 80.5, None], ["GRU", "81.00", 3]])
    assert table == (
        "| model | ppl | ms |\n"  # what a reader of markdown sees as a table
        "| :-- | --: | --: |\n"
        "| LSTM | 80.5 | None |\n"
        "| GRU | 81.00 | 3 |\n"
    )


def test_replace_between_changes_only_what_is_between(tmp_path):
    """Other markers, text before and after, and a second use."""
    path = tmp_path / "README.md"
    frame = "# Title\n<!-- other -->\nkeep\n<!-- /other -->\n<!-- speed -->\n{}<!-- /speed -->\ntail — without an end"
    path.write_text(frame.format("old\n\nlines\n"), encoding="utf-8")
    for text in ("| new |\n", "", "| again |\n"):
        report.replace_between(path, "speed", text)
        assert path.read_text(encoding="utf-8") == frame.format(text)
    assert os.listdir(tmp_path) == ["README.md"]


@pytest.mark.parametrize(
    "content",
    (
        None,
        "",
        "<!-- speed -->\n",
        "<!-- /speed -->\n",
        "<!-- /speed -->\n<!-- speed -->\n",
        "<!-- speeds -->\n<!-- /speeds -->\n",
    ),
    ids=("no file", "empty", "no end", "no start", "reversed", "other name"),
)
def test_replace_between_needs_both_markers(tmp_path, content):
    """The message names file and markers, and the file stays as it is."""
    path = tmp_path / "README.md"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]*README\.md[^\n]*<!-- speed -->[^\n]*<!-- /speed -->[^\n]*$"):
        report.replace_between(path, "speed", "text\n")
    assert path.exists() == (content is not None)
    assert content is None or path.read_text() == content


def test_record_round_trip(tmp_path):
    """Numbers to the last bit, text, None, nesting; the file is JSON that ends with a line."""
    record = {"kind": "test", "results": {"loss": 4.7 / 3, "name": "naïve"}, "list": [1, None, True], "tiny": 1e-300}
    path = tmp_path / "run.json"
    report.write_record(path, record)
    assert report.read_record(path) == {"format": report.RECORD_FORMAT, **record}
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n") and json.loads(text)["results"] == record["results"]
    with pytest.raises(TypeError):
        report.write_record(path, {"kind": {1, 2}})
    assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize(
    "content",
    (None, b"", b"{", b"[1]", b"3", b'{"kind": "test"}', b'{"format": 999}', b"\xff\xfe", b"text\nof two lines"),
    ids=repr,
)
def test_other_files_are_no_records(tmp_path, content):
    """One line that names the file; a folder and a missing file too."""
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    for place in (path, tmp_path):
        with pytest.raises(UserError) as info:
            report.read_record(place)
        assert str(place) in str(info.value) and "\n" not in str(info.value)


def test_metrics_have_a_row_an_epoch_and_the_columns_of_the_history(tmp_path):
    """Plain csv."""
    epochs = [epoch_entry(1), epoch_entry(2, partial=True, part=0.25)]
    report.write_metrics(tmp_path / "metrics.csv", epochs)
    with open(tmp_path / "metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == list(epochs[0])
    assert rows == [[str(value) for value in epoch.values()] for epoch in epochs]


POINTS = [(i / 10, 500.0 / (i + 1) + 80, 20.0 if i < 30 else 5.0) for i in range(1, 60)]
HISTORIES = {
    "one epoch": history(epoch_entry(1)),
    "one epoch with log lines": history(epoch_entry(1), points=POINTS[:9]),
    "many epochs": history(*(epoch_entry(n, 300 / n, 200 / n + n) for n in range(1, 41)), points=POINTS),
    "one partial epoch": history(epoch_entry(1, partial=True, part=0.02)),
    "a partial epoch at the end": history(epoch_entry(1), epoch_entry(2, partial=True, part=0.5), points=POINTS[:15]),
    "an infinite training perplexity": history(epoch_entry(1, math.inf), epoch_entry(2), points=POINTS[:20]),
    "an infinite validation perplexity": history(epoch_entry(1, 90.0, math.inf), epoch_entry(2)),
    "an infinite log line": history(epoch_entry(1), points=[(0.5, math.inf, 20.0), *POINTS[5:9]]),
    "nothing finite": history(
        epoch_entry(1, math.inf, math.inf), points=[(0.5, math.inf, 20.0), (1.0, math.inf, 20.0)]
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_curves_are_a_picture(tmp_path, figures, curves, name):
    """A PNG of 840 by 660 in colours, all that is finite inside the frame, whatever the run came to."""
    epochs, points = HISTORIES[name]["epochs"], HISTORIES[name]["points"]
    report.draw_curves(tmp_path / "curves.png", HISTORIES[name], "a run")
    assert 10_000 < (tmp_path / "curves.png").stat().st_size < 200_000
    assert os.listdir(tmp_path) == ["curves.png"]
    pixels = (matplotlib.image.imread(tmp_path / "curves.png") * 255).round()
    assert pixels.shape == (660, 840, 4)
    colours = {tuple(colour) for colour in pixels[..., :3].reshape(-1, 3).astype(int).tolist()}
    white, blue, orange, grey = (255, 255, 255), (31, 119, 180), (255, 127, 14), (102, 102, 102)
    assert {white, blue, grey} <= colours
    assert orange in colours or max(len(epochs), len(points)) == 1
    low, high = figures[0].axes[0].get_ylim()
    shown = [epoch[key] for epoch in epochs for key in ("train_ppl", "valid_ppl") if epoch[key] < math.inf]
    assert all(0 < low < value < high < math.inf for value in shown)
    best = min(epoch["valid_ppl"] for epoch in epochs)
    assert [text.get_text() for text in figures[0].axes[0].texts] == ([f"{best:.2f}"] if best < math.inf else [])


def test_curves_show_the_history(tmp_path, figures, curves):
    """A partial epoch ends where its part does; log lines and their rates are where they were written."""
    epochs = [epoch_entry(1, 95.0, 85.0), epoch_entry(2, 90.0, 70.0), epoch_entry(3, 80.0, 75.0, True, 0.25)]
    points = [(0.5, 99.0, 20.0), (1.5, 92.0, 10.0), (2.25, 81.0, 5.0)]
    report.draw_curves(tmp_path / "curves.png", history(*epochs, points=points), "a run")
    report.draw_curves(tmp_path / "curves.png", history(*epochs), "a run")
    lines = [[line.get_xydata().tolist() for axes in figure.axes for line in axes.lines] for figure in figures]
    train, valid = ([[1, 95], [2, 90], [2.25, 80]], [[1, 85], [2, 70], [2.25, 75]])
    assert lines[0] == [[[x, y] for x, y, _ in points], train, valid, [[x, lr] for x, _, lr in points]]
    assert lines[1] == [train, valid, [[1, 20], [2, 10], [2.25, 20 / 3]]]
    top, bottom = figures[0].axes
    assert [text.get_text() for text in top.texts] == ["70.00"]
    assert top.get_title() == "a run" and top.get_yscale() == "log"
    report.draw_curves(tmp_path / "curves.png", history(*epochs), "lr$_$x")  # no formula
    assert figures[-1].axes[0].get_title() == "lr$_$x"
    assert (top.get_ylabel(), bottom.get_ylabel(), bottom.get_xlabel()) == ("perplexity", "learning rate", "epoch")


@pytest.mark.parametrize(("train", "side"), [(60.0, 1), (90.0, -1)])
def test_the_best_figure_stands_where_the_training_curve_is_not(tmp_path, figures, curves, train, side):
    """Above the validation curve where training's is below it, and below where it is above."""
    report.draw_curves(tmp_path / "curves.png", history(epoch_entry(1, train, 70.0)), "a run")
    (label,) = figures[0].axes[0].texts
    assert label.get_text() == "70.00" and label.xyann[1] * side > 0


def test_a_taken_name_is_refused(tmp_path):
    """With the name and what to do; what is there stays."""
    folder = RunFolder.create(tmp_path / "deep" / "runs", "mine")
    (folder.path / "run.json").write_text("{}")
    assert folder.path == tmp_path / "deep" / "runs" / "mine"
    with pytest.raises(UserError, match=r"^[^\n]*mine is taken: choose another --name$"):
        RunFolder.create(tmp_path / "deep" / "runs", "mine")
    folder.last.touch()
    with pytest.raises(UserError, match=r"^[^\n]*mine is taken[^\n]*--resume mine$"):
        RunFolder.create(tmp_path / "deep" / "runs", "mine")
    assert (folder.path / "run.json").read_text() == "{}"


def test_names_by_the_clock_are_unique(tmp_path, monkeypatch):
    """Three within a second are three folders."""

    class Stopped(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, 7, 11, 13, 17)

    monkeypatch.setattr(datetime, "datetime", Stopped)
    names = [RunFolder.create(tmp_path, None).path.name for _ in range(3)]
    assert names[0] == "2031-05-07_11-13-17"
    assert sorted(os.listdir(tmp_path)) == sorted(set(names))


def test_a_place_for_runs_that_is_none_is_refused(tmp_path):
    """A file where a folder should be."""
    (tmp_path / "file").write_text("text")
    for runs_dir in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(UserError, match=r"^[^\n]*--runs-dir[^\n]*$"):
            RunFolder.create(runs_dir, "mine")


def test_logs_are_cut_to_what_the_checkpoint_knows(tmp_path, capsys):
    """Lines go to the screen and the logs named; a resumed run goes on where its checkpoint was."""
    folder = RunFolder(tmp_path)
    folder.open_logs()
    folder.log("| one — line", "train")
    folder.log("| screen only")
    folder.log("| both", "train", "test")
    sizes = folder.log_sizes()
    folder.log("| lost", "train", "test")
    assert (tmp_path / "test_log.txt").read_text() == "| both\n| lost\n"
    folder.close()
    resumed = RunFolder(tmp_path)
    resumed.open_logs({**sizes, "test": sizes["test"] + 10**6})
    resumed.log("| again", "train", "test")
    resumed.close()
    assert sizes == {"train": len("| one — line\n| both\n".encode()), "test": len("| both\n")}
    assert (tmp_path / "train_log.txt").read_text(encoding="utf-8") == "| one — line\n| both\n| again\n"
    assert (tmp_path / "test_log.txt").read_text() == "| both\n| lost\n| again\n"
    assert capsys.readouterr().out == "| one — line\n| screen only\n| both\n| lost\n| again\n"


def test_logs_are_closed_whatever_happens(tmp_path):
    """Also after an exception, which goes on."""
    with pytest.raises(ZeroDivisionError), report.closing_logs(RunFolder(tmp_path)) as folder:
        folder.open_logs()
        raise ZeroDivisionError
    assert [log.closed for log in folder.logs.values()] == [True, True]


def test_a_run_folder_gets_metrics_and_curves_with_its_first_epoch(tmp_path):
    """Before that only the record."""
    folder = RunFolder.create(tmp_path, "mine")
    folder.write({"kind": "test"}, history())
    assert os.listdir(folder.path) == ["run.json"]
    folder.write({"kind": "test", "epochs": 1}, history(epoch_entry(1)))
    assert sorted(os.listdir(folder.path)) == ["curves.png", "metrics.csv", "run.json"]
    assert report.read_record(folder.path / "run.json")["epochs"] == 1


def git(folder, *args):
    """What git says in a folder, as a made-up author."""
    author = ("-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", folder, *author, *args], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def look():
    """look(): the commit, by a process that begins."""

    def call():
        report.git_commit.cache_clear()
        return report.git_commit()

    yield call
    report.git_commit.cache_clear()


def test_commit_of_a_checkout_with_its_changes(tmp_path, monkeypatch, look):
    """The commit's name; "-dirty" for a changed file, not for an untracked one."""
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    git(tmp_path, "init", "--quiet")
    assert look() is None
    (tmp_path / "report.py").write_text("first")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "untracked").write_text("text")
    assert len(commit) == 40 and look() == commit
    (tmp_path / "report.py").write_text("second")
    assert look() == f"{commit}-dirty"


def test_tables_do_not_change_the_code(tmp_path, monkeypatch, look):
    """results/ and README.md, which a table writes after each of its rows, do not count; others of their names do."""
    inside = tmp_path / "utils"
    for folder in (inside, tmp_path / "results", inside / "results"):
        folder.mkdir()
    monkeypatch.setattr(report, "__file__", str(inside / "report.py"))
    paths = [tmp_path / "results" / "mine.md", tmp_path / "README.md", inside / "results" / "code.py"]
    for path in paths:
        path.write_text("first")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    for path in paths[:2]:
        path.write_text("second")
    assert look() == commit
    paths[2].write_text("second")
    assert look() == f"{commit}-dirty"


def test_no_commit_outside_git_and_without_git(tmp_path, monkeypatch, look):
    """None, no exception."""
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert look() is None
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "first")
    assert look()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look() is None


def test_command_can_be_typed_again(monkeypatch):
    """The script's name without its folder, arguments quoted where they must be."""
    monkeypatch.setattr(sys, "argv", ["/some/where/train_rnn.py", "ignored"])
    argv = ["--name", "two words", "--data", "it's"]
    assert shlex.split(report.command(argv)) == ["python", "train_rnn.py", *argv]


def test_plain_values_of_scores_corpora_and_machines():
    """What goes into records can be written as JSON, perplexity and counts included."""
    score = report.score_record(Score(math.log(80), 217, 3), "best.pt", 7)
    assert score.pop("perplexity") == pytest.approx(80)
    assert score == {"loss": math.log(80), "targets": 217, "batch_size": 3, "checkpoint": "best.pt", "epoch": 7}
    splits = {"train": [1] * 11, "valid": [1] * 5, "test": [1] * 3}
    checksums = {split: split * 2 for split in splits}
    options = {"vocab": "all", "vocab_size": None}
    corpus = Namespace(name="tiny", vocabulary=[0] * 29, checksums=checksums, options=options, **splits)
    tokens = {"train": 11, "valid": 5, "test": 3}
    want = {"name": "tiny", "types": 29, "tokens": tokens, "checksums": checksums, "options": options}
    assert report.corpus_record(corpus) == want
    machine = report.environment(torch.device("cpu"), "bf16")
    assert json.loads(json.dumps(machine)) == machine
    assert machine["torch"] == torch.__version__ and machine["threads"] == torch.get_num_threads()
    assert machine["amp"] == "bf16" and machine["device"].startswith("cpu (")
    assert {"platform", "python", "numpy", "commit"} < machine.keys()
