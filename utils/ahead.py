"""Ours beside every peer: what is measured in one run, what was to be reached, and how far ahead that is."""

import shlex
import statistics
from pathlib import Path

from . import UserError, report
from .pictures import ahead_picture
from .tables import RIVALS, rival_name, spread

CHECKOUTS = {
    "port": "relational-rnn-pytorch", "example": "examples/word_language_model", "awd": "awd-lstm-lm",
    "martyn": "awd-lstm", "qrnn": "pytorch-qrnn", "log_qrnn": "PyTorch-QRNN", "sru": "sru", "fastai": "fastai",
}  # fmt: skip
"""{flag: folder} of the peers in the folder that `peers --from` names."""
TAKES = {
    "speed": ("port", "example", "awd", "martyn", "qrnn", "fastai"), "layers": ("qrnn", "log_qrnn", "sru"),
    "evaluation": ("example",), "load": ("port",),
}  # fmt: skip
TAKES["generate"] = TAKES["speed"]
"""The flags of each sub-command that name a checkout."""
BATCHES = "'LSTM, port' 'LSTM loop' 'LSTM 650' 'RMC, p'"
RUNS = {
    "fp32": f"speed --rounds 5 --warmup 2 --only {BATCHES}",
    "bf16": f"speed --rounds 5 --warmup 2 --only {BATCHES} --amp bf16",
    "awd-fp32": "speed --rounds 5 --warmup 1 --only AWD --vocab-size 10000",
    "awd-bf16": "speed --rounds 5 --warmup 1 --only AWD --vocab-size 10000 --amp bf16",
    "generate": f"generate --rounds 5 --warmup 1 --only {BATCHES} AWD --vocab-size 10000",
    "layers": "layers --rounds 9 --warmup 3",
    "evaluation": "evaluation --rounds 3 --tokens 10000",
    "load": "load --rounds 3",
}
"""{name of a record: what makes it}."""
REACH = {
    "LSTM, port": (1.5, 3), "LSTM loop, port": (1.5, 3), "LSTM 650 tied, example": (1.5, 3),
    "RMC, port's form": (3, 5), "RMC, paper's form": (4, 8), "AWD-LSTM": (1.3, 2.5), "AWD-QRNN": (1.5, 5),
}  # fmt: skip
"""How many times the peer's speed a training step is to have, in float32 and bfloat16."""
LAYERS = {"nn.LSTM": (3, 10), "pytorch-qrnn": (1.2, 1.2), "log-space QRNN": (2.5, 2.5), "SRU": (1, 1)}
"""Likewise of a QRNN layer, by the other layer."""


def commands(args):
    """[(record, argv)] of the sub-commands that `peers` runs, with the checkouts that are there.

    args: source (the folder of checkouts), only (records), quick, data, threads, results.
    """
    found = {flag: Path(args.source, place) for flag, place in CHECKOUTS.items() if Path(args.source, place).exists()}
    for flag, place in CHECKOUTS.items():
        if flag not in found:
            report.say(f"| {Path(args.source, place)} is not there: left out")
    made = []
    for name, line in RUNS.items():
        if args.only and name not in args.only:
            continue
        kind, *argv = shlex.split(line)
        for flag in TAKES[kind]:
            argv += [f"--{flag.replace('_', '-')}", str(found[flag])] if flag in found else []
        argv += ["--data", args.data] if kind in ("evaluation", "load") else []
        if args.quick:
            argv += ["--rounds", "1", *(["--warmup", "1"] if "--warmup" in argv else [])]
        argv += ["--threads", str(args.threads)] if args.threads else []
        made.append((name, [kind, *argv, "--record", name, "--results", str(args.results)]))
    return made


def comparisons(record):
    """[(what, ours, peer, times the peer's [of each round], times to be reached or None)] of a record."""
    rows = {row["name"]: row for row in record["rows"]}
    kind, narrow = record["kind"], record["environment"]["amp"] == "bf16"
    if kind == "layers":
        return _layers(record["rows"])
    if kind == "load":
        ours, theirs = rows["build"]["seconds"], rows.get("port", {}).get("seconds", ())
        return [("corpus build", "ours", "port", _over(ours, theirs), 6)] if theirs else []
    if kind == "evaluation":
        ours, *others = record["rows"]
        return [("evaluation", ours["name"], row["name"], _over(ours["seconds"], row["seconds"]), 2) for row in others]
    found = []
    for name, row in rows.items():
        for peer in map(rival_name, RIVALS.get(name, ())):
            if peer not in rows:
                continue
            ratios = _over(row["ms"], rows[peer]["ms"])
            if kind == "generate":
                found.append(("a generated word", name, peer, ratios, 2))
                continue
            what = "training step, bf16" if narrow else "training step"
            found.append((what, name, peer, ratios, REACH[name][narrow]))
            memory = [rows[peer]["memory_mib"] / row["memory_mib"]]
            found.append((f"peak memory of a {what}", name, peer, memory, 2))
    return found


def _layers(rows):
    """The comparisons of a layers record: our layer in both types with each other one's, training and not."""
    found, layers = [], {row["name"]: row for row in rows if row["what"] == "layer"}
    for peer, reach in LAYERS.items():
        for narrow, ours in enumerate(("QRNN", "QRNN bf16")):
            for what, key in (("layer", "ms"), ("layer without gradients", "inference_ms")):
                if {ours, peer} <= layers.keys() and key in layers[peer] and not (peer == "SRU" and key == "ms"):
                    ratios = _over(layers[ours][key], layers[peer][key])
                    found.append((what, ours, peer, ratios, reach[narrow] if key == "ms" or peer == "SRU" else None))
    return found


def _over(ours, theirs):
    """Times of a peer over ours, round by round."""
    return [other / own for own, other in zip(ours, theirs, strict=True)]


def every(results):
    """The comparisons of all records of RUNS that are in `results`."""
    paths = [results / page / f"{name}.json" for name in RUNS for page in ("speed", "qrnn")]
    return [found for path in paths if path.is_file() for found in comparisons(report.read_record(path))]


def summary(results):
    """Render results/peers.md and .png from the records of RUNS that are in `results`."""
    found = every(results)
    if not found:
        raise UserError(
            f"peers: no record in {results} has a peer beside ours; --from names the folder of their checkouts"
        )
    report.put_on_page(results / "peers.md", "peers", summary_text(found))
    ahead_picture(found, results / "peers.png")
    report.say(f"| {len(found)} comparisons in {results / 'peers.md'}")


def summary_text(found):
    """The markdown of comparisons."""
    rows = []
    for what, ours, peer, ratios, reach in found:
        digits = f"{statistics.median(ratios):.2f}" if len(ratios) == 1 else spread(ratios, 2)
        reached = "" if reach is None else "yes" if statistics.median(ratios) >= reach else "no"
        rows.append([what, ours, peer, digits, "" if reach is None else f"{reach:g}", reached])
    header = ("what", "ours", "peer", "times as good, median (range)", "to be reached", "reached")
    return f"{report.markdown_table(header, rows)}\n![ours beside every peer](peers.png)\n"
