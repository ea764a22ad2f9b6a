"""Language models in integers, simulated: every operation computes what integer arithmetic would, to the bit.

A real number r is scale * (q - zero) with q an integer of a few bits (IntelLabs/distiller's range_linear.py).
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from .apart import ACTIVATIONS, Apart, Floats

MODES = ("symmetric", "asymmetric")
CLIPS = ("none", "avg", "gauss", "laplace")
ACIQ = {
    "gauss": {2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92},
    "laplace": {2: 2.83, 3: 3.89, 4: 5.03, 5: 6.2, 6: 7.41, 7: 8.64, 8: 9.89},
}
"""Where to clip, in deviations from the mean (laplace: in mean absolute ones), by bits: Banner et al. 2018, table 1."""
BOUNDS = {"sigmoid": 6.0, "tanh": 4.0}
"""Beyond these an activation is flat: no more of the range of what feeds it alone is kept."""


@dataclass(frozen=True)
class Grid:
    """The numbers that integers of `bits` bits stand for: scale * (q - zero), q from -2^(bits - 1).

    scale, zero: numbers, or of weights by channel tensors (N, 1).
    """

    scale: float
    zero: int
    bits: int

    @property
    def ends(self):
        """The least and the greatest integer."""
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def integers(self, real):
        """The integers nearest to real numbers, int32."""
        return (real.double() / self.scale + self.zero).round().clamp(*self.ends).int()

    def reals(self, integers):
        """What integers stand for, float32."""
        return ((integers - self.zero) * self.scale).float()


def grid_of(low, high, mode, bits):
    """The grid for numbers from `low` to `high` (floats, or tensors of one shape), 0 always among them.

    symmetric: zero 0, scale max(|low|, |high|) / ((2^bits - 1) / 2). asymmetric: from low to high in 2^bits - 1 steps.
    """
    low, high = torch.as_tensor(low).double().clamp(max=0), torch.as_tensor(high).double().clamp(min=0)
    steps = (1 << bits) - 1
    if mode == "symmetric":
        scale, zero = torch.maximum(-low, high) / (steps / 2), torch.zeros_like(low)
    else:
        scale = (high - low) / steps
        zero = -(low / scale.clamp(min=1e-300)).round() - (1 << bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    if not low.dim():
        return Grid(scale.item(), int(zero), bits)
    return Grid(scale, zero, bits)


def activation_range(statistics, clip, bits):
    """(low, high) of an operation's results, by its statistics (utils/quantization.py has their names).

    clip: none, all that was seen; avg, what rows reach in the mean; gauss, laplace: what costs least if results are so
    distributed. Where nothing but a sigmoid or tanh follows, no more than BOUNDS.
    """
    low, high = statistics["min"], statistics["max"]
    if clip == "avg":
        low, high = statistics["avg_min"], statistics["avg_max"]
    elif clip in ACIQ:
        reach = ACIQ[clip][bits] * statistics["std" if clip == "gauss" else "mean_abs_dev"]
        low, high = max(low, statistics["mean"] - reach), min(high, statistics["mean"] + reach)
    bound = BOUNDS.get(statistics.get("feeds"), math.inf)
    return max(low, -bound), min(high, bound)


@dataclass
class Number:
    """Results of the operation `name`: integers on a grid, or floats where grid is None. Taken apart like tensors."""

    values: torch.Tensor
    name: str
    grid: Grid | None

    def like(self, values):
        """Other values of the same operation."""
        return Number(values, self.name, self.grid)

    def chunk(self, parts, dim):
        """As Tensor.chunk."""
        return [self.like(part) for part in self.values.chunk(parts, dim)]

    def flatten(self, start):
        """As Tensor.flatten."""
        return self.like(self.values.flatten(start))

    def __getitem__(self, index):
        return self.like(self.values[index])

    def __len__(self):
        return len(self.values)

    @property
    def shape(self):
        """As Tensor.shape."""
        return self.values.shape

    def reals(self):
        """Floats."""
        return self.values if self.grid is None else self.grid.reals(self.values)


def in_half(name, patterns):
    """Whether one of the patterns, "all" or shell patterns of a part of a name, describes an operation."""
    return any(pattern == "all" or fnmatchcase(name, f"*{pattern}*") for pattern in patterns)


class Integers(Floats):
    """Operations in integers, or in float16, or left in floats.

    settings: mode, per_channel (a grid for each row of a matrix), clip, weight_bits, activation_bits, fp16 (patterns of
    operations in float16; a part of a name will do), statistics {operation: {min, ...}}. Weights are never clipped,
    the embedding's neither, which has one grid of weight_bits. A sum of products is an integer of 32 bits, to which a
    bias on its grid is added.
    """

    def __init__(self, settings):
        self.settings, self.weights = settings, {}
        self.grids = {name: self._grid(name, statistics) for name, statistics in settings["statistics"].items()}

    def _grid(self, name, statistics):
        """The grid of an operation's results; of the embedding's table, which is weights, over all that was seen."""
        table = statistics["kind"] == "embedding" and not self.half(name)
        clip = "none" if table else self.settings["clip"]
        bits = self.settings["weight_bits" if table else "activation_bits"]
        return grid_of(*activation_range(statistics, clip, bits), self.settings["mode"], bits)

    def half(self, name):
        """Whether an operation is done in float16."""
        return in_half(name, self.settings["fp16"])

    def integer(self, x):
        """A Number of integers: one of floats is put on the grid of the operation that made it."""
        if x.grid is not None:
            return x
        grid = self.grids[x.name]
        return Number(grid.integers(x.values), x.name, grid)

    def rounded(self, name, integers):
        """The result of an operation, from whole numbers as float64 on its grid, its zero added."""
        return Number(integers.round().clamp(*self.grids[name].ends).int(), name, self.grids[name])

    def weight(self, name, weight):
        """The integers (N, K) of a matrix less their zero, as float64, and their grid; made once."""
        if name not in self.weights:
            rows = (1, True) if self.settings["per_channel"] else ()
            low, high = weight.amin(*rows), weight.amax(*rows)
            grid = grid_of(low, high, self.settings["mode"], self.settings["weight_bits"])
            self.weights[name] = (grid.integers(weight) - grid.zero).double(), grid
        return self.weights[name]

    def as_half(self, name, function, *inputs):
        """A function of inputs rounded to float16, itself rounded; sums are of float32."""
        reals = (x.reals() if isinstance(x, Number) else x for x in inputs)
        result = function(*(x.half().float() for x in reals))
        return Number(result.half().float(), name, None)

    def embedding(self, name, tokens, weight):
        if self.half(name):
            return self.as_half(name, lambda rows: rows, weight[tokens])
        if name not in self.weights:
            self.weights[name] = self.grids[name].integers(weight)
        return Number(self.weights[name][tokens], name, self.grids[name])

    def linear(self, name, x, weight, bias, feeds=None):
        if self.half(name):
            return self.as_half(name, torch.nn.functional.linear, x, weight, bias)
        x, (q, grid) = self.integer(x), self.weight(name, weight)
        step = x.grid.scale * (grid.scale[:, 0] if self.settings["per_channel"] else grid.scale)
        total = (x.values - x.grid.zero).double() @ q.t()  # whole numbers below 2^53: exact
        if bias is not None:
            total = (total + (bias.double() / step).round()).clamp(-(2.0**31), 2.0**31 - 1)
        out = self.grids[name]
        return self.rounded(name, (total * (step / out.scale)).round() + out.zero)

    def add(self, name, a, b, feeds=None):
        return self._sum(name, a, b, 1)

    def subtract(self, name, a, b):
        return self._sum(name, a, b, -1)

    def _sum(self, name, a, b, sign):
        if self.half(name):
            return self.as_half(name, lambda a, b: a + sign * b, a, b)
        out = self.grids[name]
        a, b = (
            ((x.values - x.grid.zero).double() * (x.grid.scale / out.scale)).round() for x in map(self.integer, (a, b))
        )
        return self.rounded(name, a + sign * b + out.zero)

    def multiply(self, name, a, b):
        if self.half(name):
            return self.as_half(name, torch.mul, a, b)
        a, b, out = self.integer(a), self.integer(b), self.grids[name]
        product = (a.values - a.grid.zero) * (b.values - b.grid.zero)
        return self.rounded(name, (product.double() * (a.grid.scale * b.grid.scale / out.scale)).round() + out.zero)

    def activate(self, name, kind, x):
        if self.half(name):
            return self.as_half(name, ACTIVATIONS[kind], x)
        return Number(self.grids[name].integers(ACTIVATIONS[kind](self.integer(x).reals())), name, self.grids[name])

    def free(self, name, function, *inputs):
        return Number(function(*(x.reals() for x in inputs)), name, None)

    def enter(self, name, x):
        x = Number(x, name, None)
        free = self.settings["statistics"][name]["kind"] == "free"
        return x if free or self.half(name) else self.integer(x)

    def leave(self, x):
        return x.reals()

    def scale(self, x, factor):
        if x.grid is None:
            return x.like(x.values * factor)
        return Number(x.values, x.name, Grid(x.grid.scale * factor, x.grid.zero, x.grid.bits))

    def stack(self, parts):
        return parts[0].like(torch.stack([part.values for part in parts]))

    def join(self, parts, dim):
        return parts[0].like(torch.cat([part.values for part in parts], dim))


class Quantized(Apart):
    """An Apart in Integers; quantization: their settings. Other arguments: LanguageModel's."""

    def __init__(self, quantization, **arguments):
        super().__init__(**arguments)
        self.operations = Integers(quantization)
