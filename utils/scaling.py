"""What training costs as its sizes grow: batch, length, vocabulary, slots, layers, zeros, processes."""

import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from . import UserError, report, runtime
from .compressed import WAYS, Product
from .measurements import finish
from .pictures import scaling_picture
from .workers import Worker

ROOT = Path(__file__).parent.parent
LSTM = ("train_rnn", "--recipe example --tied --emsize 650 --nhid 650")
RMC = ("train_rmc", "--batch-size 20 --bptt 35")
QRNN = ("train_qrnn", "--bptt 35")
UNTIED = ("train_rnn", "--recipe example --emsize 200 --nhid 200 --no-tied")


@dataclass(frozen=True)
class Axis:
    """What grows: a flag of the train scripts, "" for the vocabulary, its values, and {name: (script, flags)}."""

    flag: str
    values: tuple
    series: dict


FAMILIES = {"LSTM 650": LSTM, "RMC": RMC, "QRNN": QRNN}
AXES = {
    "batch": Axis("--batch-size", (5, 10, 20, 40, 80), FAMILIES),
    "length": Axis("--bptt", (9, 18, 35, 70, 140), FAMILIES),
    "layers": Axis("--nlayers", (1, 2, 4, 8), {"LSTM 650": LSTM, "QRNN": QRNN}),
    "slots": Axis("--memslots", (1, 2, 4, 8), {"RMC": RMC}),
    "vocabulary": Axis(
        "",
        (10_000, 33_278, 100_000, 267_735),
        {"LSTM 200, full": UNTIED, "LSTM 200, adaptive": (UNTIED[0], f"{UNTIED[1]} --adaptivesoftmax")},
    ),
}
SPARSE = "zeros"
"""An axis of its own: the part of a matrix that is 0, whose product is timed in compressed rows, and dense."""
SPARSE_SIZES = (10, 650, 2600)
PROCESSES = "processes"
"""Likewise: processes of torchrun, of one thread each."""
COUNTS = (1, 2)


def scaling(args):
    """Time training steps and their products alone while one size grows; torchrun's processes; products with zeros."""
    _, machine = runtime.setup(args)
    rows = []
    for name in args.axes or (*AXES, SPARSE, PROCESSES):
        if name == SPARSE:
            rows += zeros_rows(args)
        elif name == PROCESSES:
            rows += processes_rows(args)
        else:
            rows += axis_rows(args, name)
    figures = {"kind": "scaling", "rows": rows}
    finish(args, machine, figures)
    if args.record:
        scaling_picture(figures, args.results / "speed" / f"{args.record}.png")


def ends(values, quick):
    """The values, or with --quick the least and the greatest."""
    return (values[0], values[-1]) if quick else values


def axis_rows(args, name):
    """A row for each family and value of an axis: milliseconds of steps, and of their products alone."""
    axis, rows = AXES[name], []
    points = [(family, value) for family in axis.series for value in ends(axis.values, args.quick)]
    for family, value in report.progress(points, name):
        script, flags = axis.series[family]
        vocabulary = args.vocab_size if axis.flag else value
        flags = f"{flags} {axis.flag} {value}" if axis.flag else flags
        worker = Worker(script, flags, None, None, Namespace(**{**vars(args), "vocab_size": vocabulary}))
        taken = [worker("step")[0] for _ in range(args.warmup + args.rounds)][args.warmup :]
        alone = min(worker("products")[0] for _ in range(args.rounds))
        worker.end()
        rows.append({"axis": name, "name": family, "value": value, "ms": taken, "floor_ms": alone})
    return rows


def zeros_rows(args):
    """Rows of products without the zeros of a matrix; their floor is the dense product of the same matrix."""
    dense, *sparse = (way for way in WAYS if way == "fp32" or way.startswith("rows"))
    workers = {way: Worker(way, SPARSE_SIZES, None, args, kind=Product) for way in (dense, *ends(sparse, args.quick))}
    taken = {way: [] for way in workers}
    for _ in report.progress(range(args.rounds), SPARSE):
        for way, worker in workers.items():
            taken[way].append(worker("step"))
    for worker in workers.values():
        worker.end()
    floor = sorted(taken.pop(dense))[args.rounds // 2]
    m, k, n = SPARSE_SIZES
    common = {"axis": SPARSE, "name": f"{m} x {k} by {k} x {n}", "floor_ms": floor}
    return [{**common, "value": float(way.split()[1].rstrip("%")) / 100, "ms": ms} for way, ms in taken.items()]


def processes_rows(args):
    """Rows of trainings by one process and by two under torchrun, a thread each, in turn; their floor is the share."""
    taken = {count: [] for count in COUNTS}
    for _ in report.progress(range(1 if args.quick else 3), PROCESSES):
        for count in COUNTS:
            taken[count].append(train_by(count, args))
    alone = sorted(taken[1])[len(taken[1]) // 2]
    return [
        {"axis": PROCESSES, "name": "RMC", "value": count, "ms": ms, "floor_ms": alone / count}
        for count, ms in taken.items()
    ]


def train_by(count, args):
    """Milliseconds a batch of 42 seconds of training at the script's own sizes, by so many processes of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command += [str(ROOT / "train_rmc.py"), "--data", args.data]
        command += ["--runs-dir", folder, "--save", str(Path(folder) / "model.pt"), "--name", "run", "--threads", "1"]
        command += ["--max-minutes", "0.1" if args.quick else "0.7", "--epochs", "1", "--amp", args.amp]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"torchrun of {count} processes ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        return report.read_record(Path(folder) / "run" / "run.json")["ms_per_batch"]
