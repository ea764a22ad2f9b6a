"""What a run leaves behind: log lines, the run folder, run records, tables and curves."""

import csv
import datetime
import functools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.files import atomic_write

from . import UserError, runtime

RECORD_FORMAT = 1
RULE = "-" * 89


def say(line=""):
    """Print a line; a progress bar on the terminal stays below it. Of torchrun's processes only the first prints."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def progress(sequence, label):
    """Iterate over a sized sequence and show how far it is: a bar on a terminal, else a line each half minute.

    label: what is being done; None shows nothing.
    """
    if label is None:
        yield from sequence
        return
    if sys.stderr.isatty():
        yield from tqdm(sequence, desc=label, leave=False)
        return
    start = shown = time.monotonic()
    for done, item in enumerate(sequence):
        now = time.monotonic()
        if now - shown > 30:
            shown = now
            left = (now - start) / done * (len(sequence) - done)
            say(f"| {label} | {done}/{len(sequence)} | eta {duration(left)}")
        yield item


def duration(seconds):
    """h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


def rate(lr):
    """A learning rate as word_language_model prints it, with more digits below 0.01."""
    return f"{lr:.2f}" if lr >= 0.01 else f"{lr:.3g}"


class RunFolder:
    """runs/NAME: run.json, train_log.txt, test_log.txt, metrics.csv, curves.png, best.pt, last.pt.

    best-whole.pt, after a stop in the middle of an epoch that is the best so far: the best at the end of an epoch.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.best, self.last, self.whole = (self.path / f"{name}.pt" for name in ("best", "last", "best-whole"))
        self.logs = {}

    @classmethod
    def create(cls, runs_dir, name):
        """A new folder; name None means date and time.

        Raises UserError when the name is taken or the folder can't be made.
        """
        path = Path(runs_dir) / (name or datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
        while name is None and path.exists():
            path = path.with_name(path.name + "_")
        if path.exists():
            more = f", or go on with it: --resume {name}" if cls(path).last.is_file() else ""
            raise UserError(f"{path} is taken: choose another --name{more}")
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {error.strerror}; choose another --runs-dir") from None
        return cls(path)

    def open_logs(self, sizes=None):
        """Open train_log.txt and test_log.txt; a resumed run cuts them to the `sizes` its checkpoint remembers."""
        for name in ("train", "test"):
            log = open(self.path / f"{name}_log.txt", "a", encoding="utf-8")  # noqa: SIM115
            if sizes:
                log.truncate(min(sizes[name], log.seek(0, os.SEEK_END)))
            self.logs[name] = log

    def log_sizes(self):
        """Bytes in each log."""
        return {name: log.seek(0, os.SEEK_END) for name, log in self.logs.items()}

    def log(self, line, *names):
        """Print a line and append it to the logs named ("train", "test")."""
        say(line)
        for name in names:
            self.logs[name].write(line + "\n")
            self.logs[name].flush()

    def close(self):
        """Close the logs."""
        for log in self.logs.values():
            log.close()

    def write(self, record, history):
        """Write run.json, metrics.csv and, once there is an epoch, curves.png."""
        write_record(self.path / "run.json", record)
        if history["epochs"]:
            write_metrics(self.path / "metrics.csv", history["epochs"])
            draw_curves(self.path / "curves.png", history, self.path.name)


class NoFolder:
    """Stands in for the run folder in the processes of torchrun that write nothing."""

    best = last = whole = None

    def open_logs(self, sizes=None):
        """Nothing."""

    def log_sizes(self):
        """No logs."""
        return {}

    def log(self, line, *names):
        """Nothing."""

    def write(self, record, history):
        """Nothing."""

    def close(self):
        """Nothing."""


@contextmanager
def closing_logs(folder):
    """Close a run folder's logs at the end, whatever happens."""
    try:
        yield folder
    finally:
        folder.close()


def environment(device, amp):
    """What a figure depends on besides the code: processor or GPU, threads, versions, commit. Plain values."""
    return {
        "device": runtime.describe(device),
        "threads": torch.get_num_threads(),
        "amp": amp,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": git_commit(),
    }


CHANGES = ("--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results", ":(top,exclude)README.md")
"""git's word for changes of tracked files but those that tables are written to, row by row."""


@functools.cache
def git_commit():
    """The commit of this code, with "-dirty" for uncommitted changes (CHANGES); None outside a git checkout.

    That of the first call counts to the end of the process: a checkout may change while something runs.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", *CHANGES], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("-dirty" if changes.stdout else "")


def command(argv):
    """The command line as a user would type it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *argv])


def corpus_record(corpus):
    """Name, counts and checksums of a corpus, plain values."""
    return {
        "name": corpus.name,
        "types": len(corpus.vocabulary),
        "tokens": {split: len(getattr(corpus, split)) for split in corpus.checksums},
        "checksums": corpus.checksums,
        "options": corpus.options,
    }


def score_record(score, checkpoint, epoch):
    """A Score with the checkpoint it belongs to, plain values."""
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "targets": score.targets,
        "batch_size": score.batch_size,
        "checkpoint": checkpoint,
        "epoch": epoch,
    }


def evaluation_record(model, saved, corpus, adaptation, scores, minutes, args):
    """What evaluate.py keeps: scores {split: Score} on a corpus of a model from the checkpoint `saved`, how adapted.

    minutes: of all that it took, statistics and search included.
    """
    name, device = Path(args.checkpoint).name, next(model.parameters()).device
    epoch, config = saved["best"]["epoch"], saved["config"]
    if "quantization" in config:  # its statistics are many numbers
        config = {**config, "quantization": {k: v for k, v in config["quantization"].items() if k != "statistics"}}
    pruned = sum(int((~mask).sum()) for mask in saved["pruning"]["masks"].values())
    return {
        "kind": "evaluation of a checkpoint",
        "name": Path(args.record).stem,
        "command": command(args.argv),
        "environment": environment(device, args.amp),
        "model": {**config, "parameters": model.num_params(), "pruned": pruned},
        "corpus": {"name": corpus},
        "adaptation": adaptation,
        "minutes": minutes,
        "results": {split: score_record(score, name, epoch) for split, score in scores.items()},
    }


def write_record(path, record):
    """Write a run record, whole or not at all: JSON, one form for training, evaluation, compression, benchmarks.

    record: {"kind": what was run, "command": as typed, "environment": environment(...), "results": ..., ...}.
    """
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump({"format": RECORD_FORMAT, **record}, file, indent=1)
        file.write("\n")


def read_record(path):
    """A run record. Raises UserError when the file is not one."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no run record ({error}): expected the run.json of a run folder") from None
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        raise UserError(f"{path} is no run record of format {RECORD_FORMAT}")
    return record


def make_folder(flag, path):
    """Make a folder where there is none. Raises UserError when it can't be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot make this folder ({error.strerror}); choose another place") from None


def check_place(flag, path):
    """Raises UserError where no file can be written: a path without its folder, a folder."""
    parent = Path(path).resolve().parent
    if not parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {parent}; make it, or choose another place")
    if Path(path).is_dir():
        raise UserError(f"{flag} {path}: expected the name of a file, this is a folder")


def write_metrics(path, epochs):
    """One row an epoch: the keys of the history's entries."""
    with atomic_write(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, epochs[0])
        writer.writeheader()
        writer.writerows(epochs)


def draw_curves(path, history, title):
    """Perplexity of training windows and of the validation split over epochs, and the learning rate below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    points, epochs = history["points"], history["epochs"]
    if points:
        top.plot([p[0] for p in points], [p[1] for p in points], color="0.6", lw=1, label="train (log lines, dropout)")
    ends = [e["epoch"] if not e["partial"] else e["epoch"] - 1 + e["part"] for e in epochs]
    top.plot(ends, [e["train_ppl"] for e in epochs], "s--", color="0.4", ms=4, label="train (epoch)")
    valid = [e["valid_ppl"] for e in epochs]
    top.plot(ends, valid, "o-", color="C0", ms=5, label=f"valid (batch {epochs[0]['valid_batch']})")
    top.set(yscale="log", ylabel="perplexity")
    top.set_title(title, parse_math=False)
    shown = [*valid, *(e["train_ppl"] for e in epochs), *(p[1] for p in points[len(points) // 10 :])]
    shown = [value for value in shown if math.isfinite(value)]
    if shown:
        top.set_ylim(min(shown) * 0.75, max(shown) * 1.15)
    lowest = min(range(len(valid)), key=valid.__getitem__)
    if math.isfinite(valid[lowest]):
        above = valid[lowest] >= epochs[lowest]["train_ppl"]  # on the side where the training curve is not
        place = {"textcoords": "offset points", "xytext": (0, 7 if above else -15), "ha": "center"}
        top.annotate(f"{valid[lowest]:.2f}", (ends[lowest], valid[lowest]), color="C0", **place)
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_formatter("{x:g}")
    top.tick_params(axis="y", which="minor", labelsize=7)
    top.grid(which="both", color="0.92")
    top.legend(loc="upper right")
    rates = [(p[0], p[2]) for p in points] or [(end, e["lr"]) for end, e in zip(ends, epochs, strict=True)]
    bottom.plot([x for x, _ in rates], [lr for _, lr in rates], color="C1", drawstyle="steps-post", marker=".")
    bottom.set(xlabel="epoch", ylabel="learning rate", xlim=(0, ends[-1] * 1.06))
    bottom.set_ylim(0, None)
    bottom.grid(color="0.92")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def markdown_table(header, rows):
    """A markdown table; the first column to the left, the others to the right."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"


def around(path, name):
    """What a file has up to `<!-- NAME -->` and from `<!-- /NAME -->` on. Raises UserError when they are missing."""
    path = Path(path)
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, found, rest = content.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{path} needs the lines {start.strip()} and {end} around the place of the table")
    return before + start, end + after


def replace_between(path, name, text):
    """Put `text` between the markers `<!-- NAME -->` and `<!-- /NAME -->` of a file.

    Raises UserError when the file or the markers are missing.
    """
    before, after = around(path, name)
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(before + text + after)


def put_on_page(page, name, text):
    """Text between the markers of `name` on a page of markdown; page and markers are made where there are none."""
    if not page.exists():
        page.write_text(f"# {page.stem}\n", encoding="utf-8")
    if f"<!-- {name} -->" not in page.read_text(encoding="utf-8"):
        with open(page, "a", encoding="utf-8") as file:
            file.write(f"\n<!-- {name} -->\n<!-- /{name} -->\n")
    replace_between(page, name, text)
