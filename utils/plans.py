"""The tables of the seeds: what each of their rows trains, and what was published for it."""

import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import UserError, report
from .pictures import curves_picture, sparsity_picture
from .run_tables import KINDS, TRAINED, plan_text, records_text

ROOT = Path(__file__).parent.parent
EVERY = "500"
"""Batches between checkpoints, so that a run that was killed goes on."""
SEED = "-seed-"
"""Between a row's name and the number of a further seed."""
DONE = ("finished", "max-minutes")
"""Of a training's status: nothing is left of it to train."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    name: of its run and record. commands: scripts with their flags; the last, train_*.py or evaluate.py, leaves the
    record. valid, test: published perplexities, if any. In commands {runs} is the table's folder of runs, {seed} what
    a name has behind it for a further seed.
    """

    name: str
    commands: tuple
    valid: float = None
    test: float = None


def trained(name, flags, valid=None, test=None):
    """A Row of one training."""
    return Row(name, (flags,), valid, test)


MEDIUM = "train_rnn.py --data penn --recipe example --tied --emsize 650 --nhid 650 --dropout 0.5 --amp bf16"
"""The seed's LSTM of 650 units, on the smaller corpus."""
LONGER = f"{MEDIUM} --epochs 6 --lr 5 --decay 0.4 --decay-from 3 --start-from dense{{seed}}"
"""What every pruned row and the control train after the dense row."""


def pruned(name, flags, valid=None, test=None):
    """A Row that goes on from the dense one while it is pruned."""
    return trained(name, f"{LONGER} {flags}".strip(), valid, test)


def at_once(percent):
    """A Row of the dense model pruned without training."""
    name = f"at-once-{percent}"
    checkpoint = f"{{runs}}/{name}{{seed}}.pt"
    dense = "{runs}/dense{seed}/best.pt"
    prune = f"compress.py prune --checkpoint {dense} --sparsity {percent / 100} --output {checkpoint}"
    return Row(name, (prune, f"evaluate.py --checkpoint {checkpoint}"))


def search(emsize, heads, layers, key, output, slots, test):
    """A Row of the port's search: embedding and head of one size."""
    name = f"rmc-{emsize}-{heads}-{layers}-{key}-{slots}" + ("-output" if output else "")
    sizes = f"--emsize {emsize} --headsize {emsize} --numheads {heads} --attmlplayers {layers} --keysize {key}"
    drop = "" if output else " --dropout 0"
    return trained(name, f"train_rmc.py --data wikitext-2 --variant port {sizes} --memslots {slots}{drop}", test=test)


EXAMPLE = "train_rnn.py --data wikitext-2 --recipe example"
AWD_LSTM = "train_awd.py --data penn --batch-size 20 --dropouti 0.4 --dropouth 0.25 --seed 141"
AWD_QRNN = (
    "train_awd.py --data penn --model QRNN --batch-size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 "
    "--dropouth 0.3 --dropouti 0.4 --seed 9001"
)
CACHE = "--pointer --lambdasm 0.1 --theta 1.0 --window 500"

PLANS = {
    "word-language-model": (  # pytorch/examples' README; the figures of 650 and 1500 units are distiller's
        trained("lstm-200", f"{EXAMPLE} --epochs 6", test=117.61),
        trained("lstm-200-tied", f"{EXAMPLE} --epochs 6 --tied", test=110.44),
        trained("lstm-200-tied-40", f"{EXAMPLE} --tied", test=87.17),
        trained("lstm-650", f"{EXAMPLE} --emsize 650 --nhid 650 --dropout 0.5"),
        trained("lstm-650-tied", f"{EXAMPLE} --emsize 650 --nhid 650 --dropout 0.5 --tied", 88.17, 84.21),
        trained("lstm-1500", f"{EXAMPLE} --emsize 1500 --nhid 1500 --dropout 0.65"),
        trained("lstm-1500-tied", f"{EXAMPLE} --emsize 1500 --nhid 1500 --dropout 0.65 --tied", 87.49, 83.85),
    ),
    "wikitext2": (  # L0SG/relational-rnn-pytorch; its RMC's test figure counts a short last chunk as a whole one
        trained("lstm", "train_rnn.py --data wikitext-2", 111.31, 105.56),
        trained("lstm-loop", "train_rnn.py --data wikitext-2 --loop", 111.31, 105.56),
        trained("rmc-paper", "train_rmc.py --data wikitext-2"),
        trained("rmc-port", "train_rmc.py --data wikitext-2 --variant port", 112.77, 107.21),
    ),
    "rmc-search": (
        search(128, 4, 3, 128, False, 1, 128.81),
        search(128, 8, 3, 128, False, 1, 141.84),
        search(128, 4, 3, 32, False, 1, 123.26),
        search(128, 4, 3, 32, True, 1, 112.4),
        search(128, 4, 3, 64, False, 1, 124.44),
        search(128, 4, 3, 64, True, 1, 110.16),
        search(128, 4, 2, 64, True, 1, 111.67),
        search(64, 4, 3, 64, True, 1, 133.68),
        search(64, 4, 3, 32, True, 1, 135.93),
        search(64, 4, 3, 64, True, 4, 137.93),
        search(192, 4, 3, 64, True, 1, 107.21),
        search(192, 4, 3, 64, True, 4, 114.85),
        search(256, 4, 3, 256, False, 1, 194.73),
        search(256, 4, 3, 64, True, 1, 126.39),
    ),
    "awd": (
        trained("awd-lstm", f"{AWD_LSTM} --epochs 500", 61.2, 58.8),
        trained("awd-lstm-finetuned", f"{AWD_LSTM} --epochs 500 --finetune awd-lstm{{seed}}", 58.8, 56.5),
        Row(
            "awd-lstm-cache",
            (f"evaluate.py --checkpoint {{runs}}/awd-lstm-finetuned{{seed}}/best.pt {CACHE}",),
            *(53.2, 52.5),
        ),
        trained("awd-qrnn", f"{AWD_QRNN} --epochs 550", 60.6, 58.3),
        trained("awd-qrnn-finetuned", f"{AWD_QRNN} --epochs 300 --finetune awd-qrnn{{seed}}", 59.1, 56.7),
        Row(
            "awd-qrnn-cache",
            (f"evaluate.py --checkpoint {{runs}}/awd-qrnn-finetuned{{seed}}/best.pt {CACHE}",),
            *(53.4, 52.6),
        ),
    ),
    "pruning": (  # IntelLabs/distiller: WikiText-2, the dense row of 650 units, the others of 1,500
        trained("dense", f"{MEDIUM} --epochs 40", 88.17, 84.21),
        pruned("dense-longer", ""),
        pruned("agp-70", "--sparsity 0.7 --prune-epochs 0:4:1", 90.67, 85.96),
        pruned("agp-70-decay", "--sparsity 0.7 --prune-epochs 0:4:1 --wdecay 1e-6", 90.59, 85.84),
        pruned("agp-70b", "--compress schedules/medium-70b.yaml", 87.40, 82.93),
        pruned("agp-80", "--compress schedules/medium-80.yaml", 89.31, 83.64),
        pruned("agp-90", "--sparsity 0.9 --prune-epochs 0:4:1", 90.70, 85.67),
        pruned("agp-95", "--sparsity 0.95 --prune-epochs 0:4:1", 98.42, 92.79),
        at_once(50),
        at_once(70),
        at_once(80),
        at_once(90),
    ),
}


def make(args):
    """Run what rows of the table args.name are missing, each kept as it ends; the page is rendered after each.

    args: name, only (rows), seeds (how many each), budget (minutes of each training, or None), cuda, runs_dir, results.
    """
    rows = [row for row in PLANS[args.name] if not args.only or row.name in args.only]
    if not rows:
        raise UserError(f"--only {' '.join(args.only)}: {args.name} has {', '.join(r.name for r in PLANS[args.name])}")
    runs = Path(args.runs_dir, args.name)
    for row in rows:
        for number in range(args.seeds):
            seed = f"{SEED}{number + 1}" if number else ""
            if not (args.results / args.name / f"{row.name}{seed}.json").exists():
                runs.mkdir(parents=True, exist_ok=True)
                render(args.name, args.results, {f"{row.name}{seed}": _run(row, runs, number, seed, args)})
    render(args.name, args.results)


def _trains(row):
    return row.commands[-1].startswith("train_")


def _run(row, runs, number, seed, args):
    """The record of a row and seed: of the run that is there, or of its commands, run now."""
    name = f"{row.name}{seed}"
    place = runs / name / "run.json" if _trains(row) else runs / f"{name}.json"
    if not _done(place):
        for command in row.commands:
            _call(_argv(command.format(runs=runs, seed=seed), runs, name, number, args), name)
    if not _done(place):
        raise UserError(f"{name} has not ended; the same command goes on with it")
    return report.read_record(place)


def _done(place):
    """Whether there is a record of something that has ended."""
    if not place.is_file():
        return False
    record = report.read_record(place)
    return bool(record["results"]) and record.get("status", "finished") in DONE


def _argv(command, runs, name, number, args):
    """A command's words as they are run: a training has a name and place, or is gone on with where it was cut."""
    script, *flags = shlex.split(command)
    if script.startswith("train_"):
        folder = runs / name
        place = ["--runs-dir", str(runs), "--save", str(runs / "model.pt")]
        if (folder / "last.pt").is_file():
            flags = [*place[:2], "--resume", name]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # cut before its first checkpoint
            flags += [*place, "--name", name, "--checkpoint-every", EVERY]
            flags += ["--seed", str(1111 + number)] if number else []
            flags += ["--cuda"] if args.cuda else []
        flags += ["--max-minutes", f"{args.budget:g}"] if args.budget else []
    elif script == "evaluate.py":
        flags += ["--record", str(runs / f"{name}.json"), *(["--cuda"] if args.cuda else [])]
    return [script, *flags]


def _call(argv, name):
    """Run a script of this repository; Ctrl-C is for the script alone until it ends, then ends this, too.

    Raises UserError when it fails.
    """
    report.say(f"| {name} | {shlex.join(['python', *argv])}")
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *given: pressed.append(given))
    try:
        code = subprocess.run([sys.executable, str(ROOT / argv[0]), *argv[1:]]).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"{name} ended with exit code {code}, its message is above; the same command goes on with it")


def render(name, results, added=None, differences=False):
    """Keep the records {name: record} added in results/NAME/, put all that are there on results/NAME.md as a table.

    Planned rows come first and in their order, with what was published and a picture; other records follow. Nothing is
    written when a record can't be rendered. differences: for records_text. Raises UserError when there is none.
    """
    folder, page = results / name, results / f"{name}.md"
    found = {path.stem: report.read_record(path) for path in sorted(folder.glob("*.json"))} | (added or {})
    records = {stem: record for stem, record in found.items() if record["kind"] in KINDS}
    if not records:
        raise UserError(f"{folder} holds no run records: name run folders, python benchmark.py table {name} RUN")
    rows, parts = [], []
    for row in PLANS.get(name, ()):
        own = [stem for stem in sorted(records) if stem == row.name or stem.startswith(row.name + SEED)]
        if own:
            rows.append((row.name, (row.valid, row.test), [records.pop(stem) for stem in own]))
    if rows:
        parts = [plan_text(rows), f"![{name}]({name}.png)\n"]
        missing = [row.name for row in PLANS[name] if row.name not in [done for done, _, _ in rows]]
        parts += [f"Not run: {', '.join(missing)}.\n"] if missing else []
    if records:
        parts.append(records_text(records, differences))
    folder.mkdir(parents=True, exist_ok=True)
    (report.replace_between if page.exists() else report.put_on_page)(page, name, "\n".join(parts))
    for stem, record in (added or {}).items():
        report.write_record(folder / f"{stem}.json", record)
    if rows:
        draw(name, rows, results / f"{name}.png")
    report.say(f"| {sum(len(own) for _, _, own in rows) + len(records)} rows in {page}")


def draw(name, rows, path):
    """The picture of a planned table: perplexity over sparsity for pruning, curves for the others."""
    if name == "pruning":
        sparsity_picture([(row, published[1], records[0]) for row, published, records in rows], path)
        return
    curves = [(row, records[0]) for row, _, records in rows if records[0]["kind"] == TRAINED]
    if curves:
        curves_picture(curves, path)


def listing():
    """A line a table and row: what it runs, what was published."""
    lines = []
    for name, rows in PLANS.items():
        lines.append(name)
        for row in rows:
            published = f" (published: {row.test:g} test)" if row.test else ""
            lines.append(f"  {row.name}{published}: {'; '.join(row.commands)}")
    return "\n".join(lines)
