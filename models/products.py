"""Products of few rows and those inside a loop over time."""

import contextlib

import numba
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from . import compiled

ROWS = 1024
"""Rows of inputs that one product for a weight's gradient takes: enough for full speed, few enough for the cache."""
FEW = 4
"""Rows up to which a product on a CPU takes as long as reading the weights from memory."""
SOME = 48
"""Rows up to which MKL's product, torch's default, takes up to four times as long as oneDNN's."""
BLOCKS = 64
"""Parts of a matrix that threads share among themselves."""

narrowed = None
"""Within fixed_weights: {id of a weight: (it, its copy in bfloat16, its bias in float32)}."""


def product_dtype(weight):
    """The type that products with a weight are computed in: autocast's where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def one_step(x):
    """Whether x (T, B, E) is one step without gradients on a CPU, for which packing weights would take longer."""
    if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return len(x) == 1 and x.device.type == "cpu"


@contextlib.contextmanager
def fixed_weights():
    """Inside the `with` no parameter changes: for `linear` in bfloat16 each is converted once."""
    global narrowed
    narrowed = {}
    try:
        yield
    finally:
        narrowed = None


def linear(x, weight, bias=None):
    """functional.linear, x (..., K), weight (N, K), bias (N,) or None -> (..., N); faster for SOME rows on a CPU.

    Without gradients the product of FEW rows takes as long as reading the weights from memory, torch's on an AMD
    processor two to four times that; SOME more rows are oneDNN's. Under autocast within fixed_weights a parameter is
    read in bfloat16 for FEW; x and the result are float32 there.
    """
    rows = x.shape[:-1].numel()
    if torch.is_grad_enabled() or not compiled.usable(x, weight) or not 0 < x.numel() <= SOME * x.shape[-1]:
        return functional.linear(x, weight, bias)
    single = x.dtype == weight.dtype == product_dtype(weight) == torch.float32
    if rows > FEW:
        if single and torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return functional.linear(x, weight, bias)
    arrays = (weight, _offset(weight, bias)) if single and weight.is_contiguous() else _narrowed(weight, bias)
    if arrays is None:
        return functional.linear(x, weight, bias)
    y = torch.empty(*x.shape[:-1], len(weight))
    _few(x.float().reshape(rows, x.shape[-1]), *arrays, y.view(rows, len(weight)))
    return y


def _offset(weight, bias):
    """The bias in float32, zeros without one."""
    return weight.new_zeros(len(weight), dtype=torch.float32) if bias is None else bias.float()


def _narrowed(weight, bias):
    """A parameter in bfloat16 and its bias, converted once; None where fixed_weights and autocast do not allow it."""
    if product_dtype(weight) != torch.bfloat16 or narrowed is None or not isinstance(weight, nn.Parameter):
        return None
    if id(weight) not in narrowed:
        narrowed[id(weight)] = weight, compiled.array(weight.bfloat16()), compiled.array(_offset(weight, bias))
    return narrowed[id(weight)][1:]


@compiled.kernel
def _few(x, weight, bias, y):
    """x (R, K) float32, weight (N, K), bias (N,) -> y (R, N)."""
    words, size = weight.shape
    for block in numba.prange(BLOCKS):
        for n in range(words * block // BLOCKS, words * (block + 1) // BLOCKS):
            row = weight[n]
            for r in range(len(x)):
                inputs, total = x[r], np.float32(0)
                for k in range(size):
                    total += compiled.widen(row[k]) * inputs[k]
                y[r, n] = total + bias[n]


def column_sums(x):
    """x (R, N) summed over R in float32 or wider -> (N,); what a bias's gradient is made of.

    torch's sum of bfloat16 in float32 makes a wide copy of x first, which may take longer than the weight's product.
    """
    if not compiled.usable(x):
        return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
    sums = torch.zeros(BLOCKS, x.shape[1])
    _column_sums(x, sums)
    return sums.sum(0)


@compiled.kernel
def _column_sums(x, sums):
    """The sums over each of BLOCKS parts of the rows of x (R, N) are added to sums (BLOCKS, N)."""
    rows, columns = x.shape
    for block in numba.prange(BLOCKS):
        total = sums[block]
        for r in range(rows * block // BLOCKS, rows * (block + 1) // BLOCKS):
            row = x[r]
            for c in range(columns):
                total[c] += compiled.widen(row[c])


def step_linear(weight, bias=None):
    """x -> x W^T + b, for every step of a loop over time: what all steps share is done once.

    weight (N, K), bias (N,) or None; the function takes x (..., K) and returns (..., N). Under autocast it computes in
    its type. When a gradient will be asked for, the weight is converted and packed once for all steps, backwards, too,
    and its own gradient is one product over all steps instead of one a step. Values are those of functional.linear,
    which is all that torch.compile is shown.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
        return lambda x: linear(x, weight, bias)
    shared = _Shared(weight, bias)
    handle = _Collect.apply(weight, bias, shared)
    return lambda x: _Step.apply(x, handle, shared)


def prepare(weight, bias=None, relu=False):
    """x -> x W^T + b without gradients, for many calls: on a CPU the weight (N, K) is packed once, by oneDNN.

    bias (N,) or None; x (..., K) has the weight's type. relu: of the sum, in the same call.
    """
    weight = weight.detach().contiguous()
    narrow = weight.dtype in (torch.float32, torch.bfloat16)
    if weight.device.type != "cpu" or not narrow or not torch.backends.mkldnn.is_available():
        finish = torch.relu if relu else lambda x: x
        return lambda x: finish(functional.linear(x, weight, bias))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "relu" if relu else "none", [], "")


class _Shared:
    """What the steps share: the weight for forward and backward products, and each step's part of its gradient."""

    def __init__(self, weight, bias):
        self.dtype, self.wide = product_dtype(weight), weight.dtype
        weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.forward, self.backward = prepare(weight, self.bias), prepare(weight.t())
        self.inputs, self.slopes, self.rows = [], [], 0
        self.d_weight, self.d_bias = None, None

    def add(self, x, slope):
        """Take a step's input (..., K) and the gradient of its output (..., N)."""
        self.inputs.append(x.flatten(0, -2))
        self.slopes.append(slope.flatten(0, -2))
        self.rows += len(self.inputs[-1])
        if self.rows >= ROWS:
            self._multiply()

    def gradients(self):
        """Of the weight (N, K) and the bias (N,) or None, from all steps added; the sums start anew."""
        if self.rows:
            self._multiply()
        gradients = self.d_weight, self.d_bias
        self.d_weight, self.d_bias = None, None
        return gradients

    def _multiply(self):
        slopes, inputs = torch.cat(self.slopes), torch.cat(self.inputs)
        self.inputs, self.slopes, self.rows = [], [], 0
        d_bias = None if self.bias is None else column_sums(slopes).to(self.wide)
        d_weight = torch.mm(slopes.t(), inputs)
        if self.d_weight is None:
            self.d_weight, self.d_bias = d_weight.to(self.wide), d_bias
            return
        self.d_weight += d_weight
        if self.bias is not None:
            self.d_bias += d_bias


class _Collect(torch.autograd.Function):
    """A handle that every step depends on, so that its backward runs after theirs."""

    @staticmethod
    def forward(ctx, weight, bias, shared):
        ctx.shared = shared
        return weight.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        return *ctx.shared.gradients(), None


class _Step(torch.autograd.Function):
    """One step's product."""

    @staticmethod
    def forward(ctx, x, handle, shared):
        ctx.shared, ctx.dtype = shared, x.dtype
        x = x.to(shared.dtype)
        ctx.save_for_backward(x)
        return shared.forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        ctx.shared.add(ctx.saved_tensors[0], slope)
        return ctx.shared.backward(slope).to(ctx.dtype), None, None
