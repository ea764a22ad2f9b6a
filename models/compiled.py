"""Arithmetic of the loops that numba compiles for a CPU, where torch would walk over memory once an operation.

A kernel takes numpy arrays, views of tensors; bfloat16, which numpy does not have, as the 16 bits of uint16. Within a
kernel everything is float32.
"""

import contextlib
import functools
import hashlib
import os
from pathlib import Path

import numba
import numpy as np
import torch
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import overload, register_jitable

ARITHMETIC = {"contract", "reassoc", "arcp", "nsz"}
"""What a kernel may reorder; NaN and infinity keep their meaning, so that a diverged loss is seen."""
DTYPES = (torch.float32, torch.bfloat16)

wanted = True
"""Whether kernels are used where they can be; see use and torch_only."""
announce = None
"""Called with a kernel's name before it is compiled, which takes seconds."""

inner = register_jitable(fastmath=ARITHMETIC, error_model="numpy")
"""Decorator of a function that kernels call."""


SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


class _Kept(FunctionCache):
    """numba's files of compiled functions, which are not to be used after a change of this file either.

    What numba has just compiled differs in rounding from what it reads back, because the loops' bodies were optimized
    once more on the way. So that all runs are equal, bit for bit, a child process compiles and this one reads.
    """

    def __init__(self, dispatcher):
        super().__init__(dispatcher.py_func)
        self.dispatcher, self.in_child = dispatcher, False

    def _index_key(self, signature, codegen):
        return *super()._index_key(signature, codegen), SOURCE

    def load_overload(self, signature, target_context):
        found = super().load_overload(signature, target_context)
        if found is not None or self.in_child or not hasattr(os, "fork"):
            return found
        if announce:
            announce(self.dispatcher.py_func.__name__.strip("_"))
        child = os.fork()
        if not child:
            self.in_child = True
            try:
                self.dispatcher.compile(signature)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return super().load_overload(signature, target_context)


def kernel(function):
    """Compile at the first call, keep on disk; numba.prange within it shares its turns among torch's threads."""
    call = numba.njit(parallel=True, fastmath=ARITHMETIC, error_model="numpy")(function)
    with contextlib.suppress(RuntimeError):  # no folder to keep it in
        call._cache = _Kept(call)

    @functools.wraps(function)
    def launch(*arguments):
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        if torch.get_num_threads() != threads:  # numba, as it starts its threads, sets OpenMP's number, torch's too
            torch.set_num_threads(threads)
        call(*map(array, arguments))

    launch.dispatcher = call
    return launch


def use(decision):
    """Whether kernels are to be used from now on; torch's own operations do the work otherwise."""
    global wanted
    wanted = decision


@contextlib.contextmanager
def torch_only():
    """Inside the `with` no kernel is used: the operations are those of a GPU."""
    before = wanted
    use(False)
    try:
        yield
    finally:
        use(before)


def usable(*tensors):
    """Whether kernels can take these: float32 or bfloat16 on a CPU, and nobody traces them."""
    fits = all(each.device.type == "cpu" and each.dtype in DTYPES for each in tensors)
    return wanted and fits and not torch.jit.is_tracing() and not torch.compiler.is_compiling()


def array(argument):
    """A tensor's memory as numpy sees it; anything else as it is."""
    if not isinstance(argument, torch.Tensor):
        return argument
    argument = argument.detach()
    return (argument.view(torch.uint16) if argument.dtype == torch.bfloat16 else argument).numpy()


def widen(value):
    """An element as float32."""


@overload(widen, inline="always")
def _widen(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def narrow(value, array):
    """A float32 as an element of the array: rounded to nearest, ties to even, if that is of bfloat16."""


@overload(narrow, inline="always")
def _narrow(value, array):
    if array.dtype != types.uint16:
        return lambda value, array: value

    def rounded(value, array):
        bits = np.float32(value).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))

    return rounded


@inner
def largest(row):
    """The largest element of a row of float32, found among integers of the same order, which vectors can hold."""
    top = np.int32(-(2**31))
    for column in range(len(row)):
        bits = np.float32(row[column]).view(np.int32)
        top = max(top, np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(top ^ np.int32(np.int32(top >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@inner
def exp(x):
    """e^x in float32 to 2 units of the last place: Cephes' polynomial, which the compiler turns into vectors.

    0 below -87.3, where float32 has denormals; finite above 88, unlike the library's.
    """
    x = np.float32(-87.3) if x < np.float32(-87.3) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@inner
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return np.float32(1) / (np.float32(1) + exp(-x))


@inner
def tanh(x):
    """tanh x = 1 - 2 / (e^2x + 1); Cephes' polynomial near 0, where that would cancel."""
    far = np.float32(1) - np.float32(2) / (exp(x + x) + np.float32(1))
    square = x * x
    p = np.float32(-5.70498872745e-3)
    p = p * square + np.float32(2.06390887954e-2)
    p = p * square + np.float32(-5.37397155531e-2)
    p = p * square + np.float32(1.33314422036e-1)
    p = p * square + np.float32(-3.33332819422e-1)
    near = p * square * x + x
    return near if square < np.float32(0.390625) else far
