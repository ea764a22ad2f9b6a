"""Planned tables: their rows are run, go on where they were cut, and are rendered with what was published."""

import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from . import UserError, report
from .pictures import curves_picture, sparsity_picture
from .plans import MEASURED, OF_ANOTHER_CORPUS, PLANS
from .run_tables import KINDS, TRAINED, cells, plan_text, records_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
SUMMARY = "published"
"""Marks the table of all planned rows in the README."""
SUMMARY_COLUMNS = ("row", "model", "corpus", "epochs", "test perplexity", "published", "command")
OWN_RECIPE = "-fast"
"""Of the names of rows whose recipe is not the published one."""
EVERY = "500"
"""Batches between checkpoints, so that a run that was killed goes on."""
SEED = "-seed-"
"""Between a row's name and the number of a further seed."""


def make(args):
    """Run what rows of the table args.name are missing, each kept as it ends; the page is rendered after each.

    args: name, only (rows), seeds (how many each), budget (minutes of each training, or None), cuda, tf32, cuda_graphs,
    runs_dir, results, differences (for render).
    Raises UserError for rows that there are not, and when a script fails.
    """
    if args.name in MEASURED:
        measure(args)
        return
    names = [row.name for row in PLANS[args.name]]
    unknown = [name for name in args.only or () if name not in names]
    if unknown:
        raise UserError(f"--only {' '.join(unknown)}: {args.name} has {', '.join(names)}")
    rows = [row for row in PLANS[args.name] if not args.only or row.name in args.only]
    if (page := args.results / f"{args.name}.md").exists():
        report.around(page, args.name)  # its markers are missed now, not after hours
    runs, kept = Path(args.runs_dir, args.name), []
    for row in rows:
        for number in range(args.seeds):
            seed = f"{SEED}{number + 1}" if number else ""
            if _done(args.results / args.name / f"{row.name}{seed}.json", args.budget):
                kept.append(f"{row.name}{seed}")
                continue
            runs.mkdir(parents=True, exist_ok=True)
            added = {f"{row.name}{seed}": _run(row, runs, number, seed, args)}
            render(args.name, args.results, added, args.differences)
    if kept:
        report.say(
            f"| not run again: {', '.join(kept)}, recorded in {args.results / args.name} (--results for another)"
        )
    render(args.name, args.results, differences=args.differences)


def measure(args):
    """Run what a table of measurements is missing; benchmark.py keeps the records and pages."""
    for line in MEASURED[args.name]:
        command = [word.format(runs=args.runs_dir) for word in shlex.split(line)]
        name = command[command.index("--record") + 1]
        if not _measured(args.results, command[0], name):
            places = [] if args.results.resolve() == RESULTS else ["--results", str(args.results)]
            _call(["benchmark.py", *command, *places, *_device(args)], name)
        for path in _measured(args.results, command[0], name):
            report.say(f"| {name} in {path.parent}.md")


def _measured(results, kind, name):
    """The records of a measurement, by its sub-command's and its own name; a run may be called like it."""
    return [path for path in sorted(results.glob(f"*/{name}.json")) if report.read_record(path).get("kind") == kind]


def _trains(row):
    return row.commands[-1].startswith("train_")


def _run(row, runs, number, seed, args):
    """The record of a row and seed: of the run that is there, or of its commands, run now."""
    name = f"{row.name}{seed}"
    place = runs / name / "run.json" if _trains(row) else runs / f"{name}.json"
    if not _done(place, args.budget):
        for command in row.commands:
            words = [word.format(runs=runs, seed=seed) for word in shlex.split(command)]
            _call(_argv(words, runs, name, number, args), name)
    if not _done(place, args.budget):
        raise UserError(f"{name} has not ended; the same command goes on with it")
    return report.read_record(place)


def _done(place, budget):
    """Whether there is a record of something that has ended, of its own or after `budget` minutes."""
    if not place.is_file():
        return False
    record = report.read_record(place)
    cut = record.get("status") == "max-minutes" and budget is not None and record["minutes"] >= budget
    return bool(record["results"]) and (cut or record.get("status", "finished") == "finished")


def _argv(words, runs, name, number, args):
    """A command's words as they are run: a training has a name and place, or is gone on with where it was cut.

    Raises UserError for a run that has a best checkpoint and lost what it could go on with.
    """
    script, *flags = words
    if script.startswith("train_"):
        folder = runs / name
        place = ["--runs-dir", str(runs), "--save", str(runs / "model.pt")]
        if (folder / "last.pt").is_file():
            flags = [*place[:2], "--resume", name]
        else:
            if (folder / "best.pt").exists():
                raise UserError(
                    f"{folder} has a best.pt, but no last.pt to go on with: move it away to train {name} anew"
                )
            shutil.rmtree(folder, ignore_errors=True)  # cut before its first checkpoint
            flags += [*place, "--name", name, "--checkpoint-every", EVERY]
            flags += ["--seed", str(1111 + number)] if number else []
            flags += [*_device(args), *(["--cuda-graphs"] if args.cuda_graphs else [])]
        flags += ["--max-minutes", f"{args.budget:g}"] if args.budget else []
    elif script == "evaluate.py":
        flags += ["--record", str(runs / f"{name}.json"), *_device(args)]
    return [script, *flags]


def _device(args):
    """Where a script computes, as its flags say it."""
    return [flag for flag, given in (("--cuda", args.cuda), ("--tf32", args.tf32)) if given]


def _call(argv, name):
    """Run a script of this repository; Ctrl-C is for the script alone until it ends, then ends this, too.

    Raises UserError when it fails.
    """
    report.say(f"| {name} | {shlex.join(['python', *argv])}")
    command = argv if argv[0] == "-m" else [str(ROOT / argv[0]), *argv[1:]]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *given: pressed.append(given))
    try:
        code = subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONPATH": paths}).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"{name} ended with exit code {code}, its message is above; the same command goes on with it")


def render(name, results, added=None, differences=False):
    """Keep the records {name: record} added in results/NAME/, put all that are there on results/NAME.md as a table.

    Planned rows come first and in their order, with what was published and a picture; other records follow. No record
    and no page is written when one can't be rendered or drawn. differences: planned or not, all are rows of one table,
    as records_text has it. Raises UserError when there is none.
    """
    folder, page = results / name, results / f"{name}.md"
    found = {path.stem: report.read_record(path) for path in sorted(folder.glob("*.json"))} | (added or {})
    records = {stem: record for stem, record in found.items() if record.get("kind") in KINDS}
    if not records:
        planned = ", ".join([*MEASURED, *PLANS])
        raise UserError(f"{folder} has no run records; name run folders after {name}, or a planned table: {planned}")
    rows, others = [], dict(records)
    for row in PLANS.get(name, ()):
        own = _own(row, records)
        if own:
            rows.append((row.name, (row.valid, row.test), [others.pop(stem) for stem in own]))
    parts = []
    if differences:
        parts, others = [records_text(records, differences=True)], {}
    elif rows:
        parts = [plan_text(rows)]
    folder.mkdir(parents=True, exist_ok=True)
    if rows:
        parts += [f"![{name}]({name}.png)\n"] if draw(name, rows, results / f"{name}.png") else []
        missing = [row.name for row in PLANS[name] if row.name not in [done for done, _, _ in rows]]
        parts += [f"Not run: {', '.join(missing)}.\n"] if missing else []
    if others:
        parts += [records_text(others)]
    (report.replace_between if page.exists() else report.put_on_page)(page, name, "\n".join(parts))
    for stem, record in (added or {}).items():
        report.write_record(folder / f"{stem}.json", record)
    if results.resolve() == RESULTS:
        report.replace_between(ROOT / "README.md", SUMMARY, summary_text(results))
    report.say(f"| {len(records)} records in {page}")


def _own(row, names):
    """Those of the records' names that are of a row, for whatever seed, in order."""
    own = [name for name in names if name == row.name or name.startswith(row.name + SEED)]
    return sorted(own, key=lambda name: (len(name), name))  # the tenth seed after the second


def summary_text(results):
    """The README's markdown table: planned rows that were run and whose test perplexity was published.

    Of a table's rows by recipes of our own, the best on the validation split for each published figure.
    """
    rows = []
    for name, plan in PLANS.items():
        if name in OF_ANOTHER_CORPUS:
            continue
        paths, best = {path.stem: path for path in (results / name).glob("*.json")}, {}
        for row in plan:
            records = [report.read_record(paths[stem]) for stem in _own(row, paths)]
            if row.test and records and all(record.get("status", "finished") == "finished" for record in records):
                valid, ours = (
                    statistics.mean(record["results"][split]["perplexity"] for record in records)
                    for split in ("valid", "test")
                )
                key = row.test if OWN_RECIPE in row.name else row.name
                if key not in best or valid < best[key][0]:
                    best[key] = valid, ours, row, records[0]
        for _, ours, row, record in best.values():
            cell = cells(record)
            line = [f"[{row.name}](results/{name}.md)", *(cell[column] for column in ("model", "corpus", "epochs"))]
            command = f"`python benchmark.py table {name} --only {row.name}`"
            rows.append([*line, f"{ours:.2f}", f"{row.test:g}", command])
    return report.markdown_table(SUMMARY_COLUMNS, rows)


def draw(name, rows, path):
    """The picture of a planned table: perplexity over sparsity for pruning, curves for the others.

    Returns whether there was anything to draw.
    """
    curves = [(row, records) for row, _, records in rows if records[0]["kind"] == TRAINED]
    if name == "pruning":
        sparsity_picture([(row, published[1], records[0]) for row, published, records in rows], path)
    elif curves:
        curves_picture(curves, path)
    return name == "pruning" or bool(curves)
