"""What a training step costs: launches, memory, and the time of its matrix products alone."""

import statistics
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.forget_mult import operator

from . import UserError

mkldnn = torch.ops.mkldnn
CPU = torch.device("cpu")
FREE = ("empty", "new_empty", "detach", "_unsafe_view", "lift_fresh", "alias")
"""Operations that launch nothing, besides views."""


INSIDE = {"recurrence": operator.compute, "recurrence_backward": operator.compute_backward}
"""Operators of ours, and what they do: that is counted."""


class Operations(TorchDispatchMode):
    """Inside the `with`: launches, the number of tensor operations that are no views, and the matrix products by shape.

    products: a Counter of (kind, (M, K, N), strides, dtype), kind "mm" or "packed". Those inside the library's LSTM
    kernel are counted as it has to compute them: the inputs' at once, the hidden state's step by step.
    """

    def __init__(self):
        super().__init__()
        self.launches, self.products = 0, Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        own = INSIDE.get(operation._schema.name.split("::")[1])
        if own:
            with self:
                return own(*args, **(kwargs or {}))
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name.removeprefix("aten::")
        self.launches += not (operation.is_view or name.startswith(FREE))
        if name == "mm":
            self.add(args[0], args[1])
        elif name in ("addmm", "addmm_"):
            self.add(args[1], args[2])
        elif name == "mkldnn::_linear_pointwise":
            rows, (n, k) = args[0].numel() // args[0].shape[-1], args[1].shape
            self.products["packed", (rows, k, n), None, args[0].dtype] += 1
        elif name in ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"):
            self.add_lstm(*args[:3], backward=name.endswith("backward"))
        return result

    def add(self, left, right, count=1):
        """One product of matrices, (M, K) and (K, N)."""
        strides = left.stride(), right.stride()
        self.products["mm", (*left.shape, right.shape[1]), strides, left.dtype] += count

    def add_lstm(self, x, w_ih, w_hh, backward):
        """The products of one layer: x (T, B, K), w_ih (G, K), w_hh (G, H)."""
        steps, batch, _ = x.shape
        rows, step = x.new_empty(steps * batch, len(w_ih)), x.new_empty(batch, len(w_ih))
        if backward:
            self.add(rows, w_ih)
            self.add(step, w_hh, steps)
            self.add(rows.t(), x.flatten(0, 1))
            self.add(rows.t(), x.new_empty(steps * batch, w_hh.shape[1]))
        else:
            self.add(x.flatten(0, 1), w_ih.t())
            self.add(x.new_empty(batch, w_hh.shape[1]), w_hh.t(), steps)


def count(call):
    """The Operations of one call."""
    with Operations() as operations:
        call()
    return operations


@torch.no_grad()
def products_alone(products, device=CPU, seconds=0.1):
    """Milliseconds that the products of an Operations take by themselves, and the arithmetic in GFLOP.

    Each shape is timed for about `seconds`, median, and multiplied by how often it occurs.
    """
    milliseconds = gflop = 0.0
    for (kind, (m, k, n), strides, dtype), times in products.items():
        if kind == "packed":
            right = mkldnn._reorder_linear_weight(torch.randn(n, k).to(dtype))
            call = partial(mkldnn._linear_pointwise, torch.randn(m, k).to(dtype), right, None, "none", [], "")
        else:
            shapes = zip(((m, k), (k, n)), strides, strict=True)
            operands = (torch.empty_strided(*part, dtype=dtype, device=device).normal_() for part in shapes)
            call = partial(torch.mm, *operands)
        milliseconds += times * median_time(call, seconds, device)
        gflop += times * 2 * m * k * n / 1e9
    return milliseconds, gflop


def once(call, device=CPU):
    """Milliseconds of one call; on a GPU with the wait for it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def median_time(call, seconds, device=CPU):
    """Milliseconds of a call, the median of as many as fit into `seconds`, three at least."""
    call()
    taken, spent = [], 0.0
    while len(taken) < 3 or spent < 1000 * seconds:
        taken.append(once(call, device))
        spent += taken[-1]
    return statistics.median(taken)


def memory_above(call, device):
    """MiB that `call` needs at its peak above what is there before it: of the GPU, or resident in the process.

    There without pages of files: code of libraries that is loaded on the way. Raises UserError on a system without
    /proc.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("memory is read from /proc, which only Linux has; run this on Linux, or with --cuda")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = _status("VmRSS") - _status("RssFile")
    call()
    return _status("VmHWM") - _status("RssFile") - before


def _status(field):
    """A field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024
