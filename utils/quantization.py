"""Post-training quantization: what operations make of a text, as a file, and a model in integers out of it."""

import math
from pathlib import Path

import torch
import yaml

from data.batching import columns, window_lengths, windows
from data.files import atomic_write
from models import build
from models.apart import Floats
from models.quantized import in_half

from . import UserError, evaluation, report

COLUMNS = 10
"""Columns of the text that statistics are taken from."""
NUMBERS = ("min", "max", "avg_min", "avg_max", "mean", "std", "mean_abs_dev")
"""Of an operation's results: least and greatest; the means over rows (a step of a column; of the embedding, whose
rows are few numbers, a step of all) of each row's least and greatest; mean, standard deviation, and mean distance from
the mean. All but the second pair are IntelLabs/distiller's: its running means of rows count a step by its elements, so
that the first step's rows, made from the zero state, are nearly all that they hold."""


SETTINGS = {
    "mode": "symmetric",
    "per_channel": False,
    "clip": "none",
    "weight_bits": 8,
    "activation_bits": 8,
    "fp16": [],
}
"""Of quantized.Integers, besides the statistics: the seed's defaults."""


class Statistics(Floats):
    """Operations in floats that note what comes of them. means: {operation: mean}, to measure distances from."""

    def __init__(self, means):
        self.seen, self.means = {}, means

    def note(self, name, kind, x, feeds=None):
        """Add results x (..., features) of the operation `name`; kind: what it does."""
        zeros = dict.fromkeys(("rows", "lows", "highs", "count", "sum", "squares", "distances"), 0.0)
        own = self.seen.setdefault(name, {"kind": kind, "feeds": feeds, "min": math.inf, "max": -math.inf, **zeros})
        reals = x.detach().double()
        lows, highs = reals.amin(-1), reals.amax(-1)
        own["min"], own["max"] = min(own["min"], lows.min().item()), max(own["max"], highs.max().item())
        own["rows"] += lows.numel()
        own["lows"] += lows.sum().item()
        own["highs"] += highs.sum().item()
        own["count"] += reals.numel()
        own["sum"] += reals.sum().item()
        own["squares"] += reals.square().sum().item()
        own["distances"] += (reals - self.means.get(name, 0.0)).abs().sum().item()
        return x

    def embedding(self, name, tokens, weight):
        rows = super().embedding(name, tokens, weight)
        self.note(name, "embedding", rows.flatten(1))
        return rows

    def linear(self, name, x, weight, bias, feeds=None):
        return self.note(name, "linear", super().linear(name, x, weight, bias), feeds)

    def add(self, name, a, b, feeds=None):
        return self.note(name, "add", super().add(name, a, b), feeds)

    def subtract(self, name, a, b):
        return self.note(name, "subtract", super().subtract(name, a, b))

    def multiply(self, name, a, b):
        return self.note(name, "multiply", super().multiply(name, a, b))

    def activate(self, name, kind, x):
        return self.note(name, "activate", super().activate(name, kind, x))

    def free(self, name, function, *inputs):
        return self.note(name, "free", super().free(name, function, *inputs))

    def results(self):
        """{operation: {kind, feeds if it feeds an activation alone, NUMBERS}}."""
        return {name: _numbers(own) for name, own in self.seen.items()}


def _numbers(own):
    mean, described = own["sum"] / own["count"], {"kind": own["kind"]}
    if own["feeds"]:
        described["feeds"] = own["feeds"]
    return described | {
        "min": own["min"],
        "max": own["max"],
        "avg_min": own["lows"] / own["rows"],
        "avg_max": own["highs"] / own["rows"],
        "mean": mean,
        "std": math.sqrt(max(0.0, own["squares"] / own["count"] - mean**2)),
        "mean_abs_dev": own["distances"] / own["count"],
    }


def apart(saved):
    """A checkpoint's model, taken apart."""
    model = build({**saved["config"], "quantization": {**SETTINGS, "statistics": {}}}).eval()
    model.load_state_dict(saved["weights"])
    return model


def steps(ids):
    """The text ids (N,) that statistics are taken from, as it is read: tokens [(T, B)], B at most COLUMNS."""
    stream = columns(ids, min(COLUMNS, max(1, len(ids) // 2)))
    return [tokens for tokens, _ in windows(stream, window_lengths(len(stream) - 1, evaluation.STEPS))]


@torch.inference_mode()
def observe(model, text, means, label=None):
    """Statistics of one pass over text [(T, B)] by a model taken apart; means {operation: mean}: of the pass before."""
    model.operations, state = Statistics(means), model.initial_state(text[0].shape[1])
    for tokens in report.progress(text, label):
        hidden, state = model.hidden(tokens, state)
        model.log_probs(hidden)
    return model.operations.results()


def collect(saved, ids):
    """The statistics {operation: {...}} of a checkpoint's model on a text; saved: the checkpoint; ids (N,)."""
    model, text = apart(saved), steps(ids)
    first = observe(model, text, {}, "statistics, pass 1")
    return observe(model, text, {name: own["mean"] for name, own in first.items()}, "statistics, pass 2")


def write_statistics(path, statistics):
    """As YAML, which may be edited. Raises UserError when it can't be written."""
    try:
        with atomic_write(path, "w", encoding="utf-8") as file:
            yaml.safe_dump(statistics, file, sort_keys=False)
    except OSError as error:
        raise UserError(f"cannot write --statistics {path}: {error.strerror}; choose another file") from None


def read_statistics(path):
    """What write_statistics wrote. Raises UserError for what is no such file."""
    try:
        statistics = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        for own in statistics.values():
            own |= {"kind": str(own["kind"]), **{number: float(own[number]) for number in NUMBERS}}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--statistics {path}: expected what compress.py quantize writes there ({reason})") from None
    return statistics


def operations(config):
    """{operation: its kind} of a model that a checkpoint's config describes, in the order of their first use."""
    plain = {name: value for name, value in config.items() if name not in ("native", "sparse")}
    model = build({**plain, "quantization": {**SETTINGS, "statistics": {}}}).eval()
    return {name: own["kind"] for name, own in observe(model, [torch.zeros(1, 1, dtype=torch.int64)], {}).items()}


def check(settings, saved):
    """Raises UserError when an operation has no statistics, or a pattern of fp16 matches none."""
    names = list(operations(saved["config"]))
    missing = [name for name in names if name not in settings["statistics"]]
    if missing:
        raise UserError(f"--statistics: there are none of {', '.join(missing)}; give another file to collect them into")
    for pattern in settings["fp16"]:
        if pattern != "all" and not any(in_half(name, [pattern]) for name in names):
            raise UserError(f"--fp16 {pattern}: no operation is called so; there are {', '.join(names)}")


def kinds(config):
    """What a model that a checkpoint's config describes computes in what: {integers, float16, float32: operations}."""
    names, settings = {"integers": [], "float16": [], "float32": []}, config.get("quantization")
    for name, kind in operations(config).items():
        if settings:
            half = in_half(name, settings["fp16"])
            names["float32" if kind == "free" else "float16" if half else "integers"].append(name)
        else:
            names["integers" if "native" in config and kind in ("linear", "embedding") else "float32"].append(name)
    return names


def summary(config):
    """How many operations are done in integers, and which are not, in one line."""
    names = kinds(config)
    wide = (
        f" | {len(names[kind])} in {kind}: {' '.join(names[kind])}" for kind in ("float16", "float32") if names[kind]
    )
    return f"{len(names['integers'])} operations in integers" + "".join(wide)
