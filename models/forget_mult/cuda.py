"""The recurrence and the pooling by forget_mult.cu's kernels, launched through CuPy on torch's stream.

Proven without a GPU by tests/test_cuda.py, on one by tests/test_gpu.py. CuPy is imported when a CUDA tensor asks, not
before.
"""

import functools
import warnings

import numpy as np
import torch

from . import nvrtc
from .reference import wide

THREADS = 128
"""Of a block."""
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
WIDTHS = {torch.float32: 4, torch.float64: 2, torch.bfloat16: 4}
"""Columns of one thread where there are enough of them."""
ENOUGH = 1 << 16
"""Threads that fill a large GPU: only with more columns than that for each of WIDTHS a thread takes several."""
SCALARS = {torch.float32: np.float32, torch.float64: np.float64}


@torch.compiler.assume_constant_result
def usable(device):
    """Whether the kernels can be launched on a GPU; a warning says once why not."""
    reason = _obstacle(device.index)
    if reason:
        _warn(reason)
    return not reason


@functools.cache
def _obstacle(index):
    """Why the module can't be loaded on a device, or None."""
    try:
        _module(index)
    except Exception as error:  # of imports, libraries, the compiler, the driver
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


@functools.cache
def _warn(reason):
    warnings.warn(
        f"the recurrence runs by torch's operations, slower than by kernels of ours, which need CuPy, pynvrtc and "
        f"NVRTC: pip install {packages(torch.version.cuda)} ({reason})",
        RuntimeWarning,
        stacklevel=4,
    )


def packages(version):
    """What to install for a torch of a CUDA version ("13.0"; None: without CUDA)."""
    major = (version or "13.0").split(".")[0]
    return f"cupy-cuda{major}x pynvrtc==9.2 nvidia-cuda-nvrtc{'-cu12' if major == '12' else ''}"


@functools.cache
def _module(index):
    """The kernels, loaded on a device."""
    from cupy.cuda.function import Module

    with torch.cuda.device(index):
        major, minor = torch.cuda.get_device_capability(index)
        module = Module()
        module.load(nvrtc.kernels(10 * major + minor))
        return module


def submit(device, name, blocks, arguments):
    """Start a kernel on a device's current stream, taken anew each time: a caller may have changed it.

    Raises ValueError for a device that is no GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"backend 'cuda' takes tensors on a GPU, got {device}")
    from cupy.cuda import Stream

    with torch.cuda.device(device):
        stream = Stream.from_external(torch.cuda.current_stream(device))
        _module(device.index).get_function(name)((blocks, 1, 1), (THREADS, 1, 1), arguments, stream=stream)


def launch(name, threads, tensors, *scalars):
    """Start a kernel with one thread for each of `threads`: addresses of the tensors (None: 0), then the scalars.

    Raises ValueError for tensors that are not contiguous, or not on one device.
    """
    device = tensors[0].device
    for tensor in tensors:
        if tensor is not None and not (tensor.is_contiguous() and tensor.device == device):
            raise ValueError(f"{name} takes contiguous tensors of one device")
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    submit(device, name, -(-threads // THREADS), (*addresses, *scalars))


def width(dtype, columns, tensors):
    """Columns of one thread: several where there are enough of them and every address is aligned for it."""
    several = WIDTHS[dtype]
    aligned = all(tensor.data_ptr() % (several * tensor.element_size()) == 0 for tensor in tensors)
    return several if aligned and columns % several == 0 and columns >= several * ENOUGH else 1


def forward(gate, x, initial, mix, reverse):
    """See the package's docstring."""
    h = torch.empty_like(x)
    _recur("forward", (gate, x, initial.to(wide(x)), h), mix, reverse)
    return h


def backward(slope, gate, x, h, initial, mix, reverse):
    """See the package's docstring."""
    first = initial.to(wide(x))
    made = torch.empty_like(gate), torch.empty_like(x), torch.empty_like(first)
    _recur("backward", (slope, gate, x, h, first, *made), mix, reverse)
    return *made[:2], made[2].to(initial.dtype)


def _recur(way, tensors, mix, reverse):
    """tensors: the arguments of the kernel; the first is (T, B, H)."""
    (steps, *row), dtype = tensors[0].shape, tensors[0].dtype
    columns = row[0] * row[1]
    if not columns:
        return
    several = width(dtype, columns, tensors)
    name = f"{way}_{'mix' if mix else 'sum'}_{NAMES[dtype]}_{several}"
    launch(name, columns // several, tensors, np.int64(steps), np.int64(columns), np.int32(reverse))


def pool(gates, initial, update, keep, kinds, candidate, reverse, c, output):
    """What pooling.pool needs in one pass: gates (T, B, kinds * H), initial (B, H); c, output (T, B, H) are written.

    update (T or 0, B, H); candidate: a number of CANDIDATES. c and output may be one if there is no o (kinds 2).
    """
    _pool("pool", gates, (gates, initial, update, c, output), keep, kinds, candidate, reverse)


def pool_back(d_output, gates, initial, update, keep, kinds, candidate, reverse, c, d_gates, carried):
    """Its gradients: d_gates (T, B, kinds * H) is written; carried (B, H), by the last c, becomes that by initial."""
    tensors = d_output, gates, initial, update, c, d_gates, carried
    _pool("pool_back", gates, tensors, keep, kinds, candidate, reverse)


def _pool(way, gates, tensors, keep, kinds, candidate, reverse):
    steps, batch, features = len(gates), gates.shape[1], gates.shape[2] // kinds
    columns, scalar = batch * features, SCALARS[wide(gates)]
    tensors = [tensor if tensor.numel() else None for tensor in tensors]
    if columns:
        sizes = np.int64(steps), np.int64(columns), np.int64(features)
        numbers = *sizes, scalar(keep), np.int32(candidate), np.int32(reverse)
        launch(f"{way}_{NAMES[gates.dtype]}_{kinds}", columns, tensors, *numbers)
