"""The compiled arithmetic against float64 and against torch's own roundings."""

import math
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from conftest import ROOT

from models import compiled, softmax


@compiled.kernel
def apply(which, x, out):
    """out (N,) = one of the functions of x (N,)."""
    for block in numba.prange(1):
        for place in range(block, len(x)):
            value = compiled.widen(x[place])
            if which == 0:
                value = compiled.exp(value)
            elif which == 1:
                value = compiled.sigmoid(value)
            elif which == 2:
                value = compiled.tanh(value)
            out[place] = compiled.narrow(value, out)


@compiled.kernel
def maxima(rows, out):
    """out (N,) = the largest of each row (N, K)."""
    for place in numba.prange(len(rows)):
        out[place] = compiled.largest(rows[place])


@compiled.kernel
def threads(out):
    """out (N,) = the number of the thread that took each turn."""
    for place in numba.prange(len(out)):
        out[place] = numba.get_thread_id()


def values(which, x):
    out = torch.empty(x.shape, dtype=torch.float32)
    apply(("exp", "sigmoid", "tanh").index(which), x, out)
    return out


@pytest.mark.parametrize(("which", "limit"), (("exp", 87.0), ("sigmoid", 80.0), ("tanh", 30.0)))
def test_functions_are_those_of_float64(which, limit):
    """To three units of the last place, relative, small arguments and large ones, both signs."""
    grid = torch.cat(
        [torch.linspace(-limit, limit, 200_001), torch.logspace(-30, 0, 10_001), -torch.logspace(-30, 0, 997)]
    )
    want = getattr(torch, which)(grid.double())
    error = ((values(which, grid).double() - want) / want.clamp(min=1e-37).where(want >= 0, want)).abs()
    error[grid == 0] = 0
    assert error.max() < 4e-7, grid[error.argmax()]


def test_functions_beyond_their_range():
    """Large arguments end at the limits; what is not a number stays none."""
    far = torch.tensor([-math.inf, -1e4, -90.0, 90.0, 1e4, math.inf])
    assert values("exp", far)[:3].max() < 1e-37 and values("exp", far)[3:].min() > 1e38
    assert torch.allclose(values("sigmoid", far), (far > 0).float(), atol=1e-37)
    assert torch.equal(values("tanh", far), far.sign())
    for which in ("exp", "sigmoid", "tanh"):
        assert values(which, torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]


def test_bfloat16_is_read_and_rounded_as_torch_does():
    """Every bfloat16 number; float32 numbers between and half way between two."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    every = every[~every.isnan()]
    wide = torch.empty(every.shape, dtype=torch.float32)
    apply(3, every, wide)
    assert torch.equal(wide, every.float())
    finite = every.float()[every.float().abs() < 3e38]
    between = torch.cat([finite * factor for factor in (1.001, 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-8, 0.9973)])
    between = between[between.isfinite()]
    narrow = torch.empty(between.shape, dtype=torch.bfloat16)
    apply(3, between, narrow)
    assert torch.equal(narrow, between.bfloat16())


def test_largest_of_a_row():
    """Both signs, zeros, infinities."""
    rows = torch.randn(7, 131, generator=torch.Generator().manual_seed(1))
    rows[0] -= 10
    rows[1] = 0
    rows[2, 5], rows[3, 130], rows[4] = math.inf, 77, -math.inf
    out = torch.empty(7)
    maxima(rows, out)
    assert torch.equal(out, rows.amax(1))


def test_threads_are_as_many_as_torch_has():
    """A kernel shares its turns among so many, whatever numba's own setting is."""
    before = torch.get_num_threads()
    out = torch.empty(64, dtype=torch.int64)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            threads(out)
            assert out.max() + 1 == min(count, numba.config.NUMBA_NUM_THREADS)
    finally:
        torch.set_num_threads(before)


def test_what_kernels_can_take(monkeypatch):
    """float32 and bfloat16 on a CPU, all of them, while nobody traces; nothing when they are switched off."""
    single, double, meta = torch.zeros(2), torch.zeros(2).double(), torch.zeros(2, device="meta")
    assert compiled.usable(single, single.bfloat16())
    assert not compiled.usable(single, double) and not compiled.usable(meta) and not compiled.usable(single.half())
    with compiled.torch_only():
        assert not compiled.usable(single)
        with compiled.torch_only():
            assert not compiled.usable(single)
        assert not compiled.usable(single)
    assert compiled.usable(single)
    compiled.use(False)
    assert not compiled.usable(single)
    compiled.use(True)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert not compiled.usable(single)


def test_results_do_not_depend_on_the_threads():
    """Losses, gradients in the logits, and their sums over the rows: bit for bit, one thread or two."""
    random = torch.Generator().manual_seed(2)
    logits, bias = torch.randn(37, 101, generator=random), torch.randn(101, generator=random)
    places, scored = torch.randint(101, (37,), generator=random), torch.ones(37)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            sums = torch.zeros(softmax.BLOCKS, 101)
            results.append([*softmax._losses(logits.clone(), bias, places, scored, sums), sums])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_arguments_become_arrays_of_the_same_memory():
    """No copies: what a kernel writes, the tensor has; a gradient's history is no obstacle."""
    tensor = torch.zeros(3, requires_grad=True) * 1
    compiled.array(tensor)[1] = 5
    assert tensor.tolist() == [0, 5, 0]
    narrow = torch.ones(2, dtype=torch.bfloat16)
    assert compiled.array(narrow).dtype == np.uint16 and compiled.array(narrow)[0] == 0x3F80
    assert compiled.array(3) == 3


COLD = """
import sys
import torch
from models import compiled, softmax
compiled.announce = print
random = torch.Generator().manual_seed(1)
logits, bias = torch.randn(251, 1003, generator=random) * 3, torch.randn(1003, generator=random)
sums = torch.zeros(softmax.BLOCKS, 1003)
places, scored = torch.randint(1003, (251,), generator=random), torch.ones(251)
losses, slopes = softmax._losses(logits, bias, places, scored, sums)
torch.save([losses, slopes, sums], sys.argv[1])
"""


FEWER = """
import torch
torch.set_num_threads(1)
from models import compiled, softmax
places, sums = torch.zeros(2, dtype=int), torch.zeros(softmax.BLOCKS, 3)
softmax._losses(torch.zeros(2, 3), torch.zeros(3), places, torch.ones(2), sums)
print(torch.get_num_threads())
"""


def test_the_first_kernel_leaves_torch_its_threads():
    """As --threads 1 set them: numba, as it starts two of its own, would give torch's products two as well."""
    environment = os.environ | {"NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", FEWER], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.stdout.split() == ["1"], run.stderr


def test_a_run_that_compiles_equals_one_that_finds_the_kernels(tmp_path):
    """Bit for bit; only the first compiles, and says so."""
    results, said = [], []
    for number in range(2):
        path, environment = tmp_path / f"{number}.pt", os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
        command = [sys.executable, "-c", COLD, path]
        said.append(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        results.append(torch.load(path))
    assert said == ["compiled_losses\n", ""]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_kernels_are_compiled_anew_when_their_arithmetic_changes(monkeypatch):
    """What is kept is not used after a change of compiled.py."""
    x, out = torch.ones(2), torch.empty(2)
    apply(0, x, out)
    cache = apply.dispatcher._cache
    signature = apply.dispatcher.signatures[0]
    assert cache.load_overload(signature, apply.dispatcher.targetctx) is not None
    monkeypatch.setattr(cache, "in_child", True)
    monkeypatch.setattr(compiled, "SOURCE", "another")
    assert cache.load_overload(signature, apply.dispatcher.targetctx) is None


def test_without_a_place_to_keep_them_kernels_are_compiled_each_time(monkeypatch):
    """A home and a package folder that can't be written to are no reason to fail."""

    def refuse(dispatcher):
        raise RuntimeError("no locator available")

    monkeypatch.setattr(compiled, "_Kept", refuse)
    out = torch.empty(3)
    compiled.kernel(double)(torch.tensor([1.0, 2.0, 3.0]), out)
    assert out.tolist() == [2, 4, 6]


def double(x, out):
    """out (N,) = 2 x (N,)."""
    for place in numba.prange(len(x)):
        out[place] = 2 * x[place]


@pytest.mark.parametrize(
    ("given", "threads"),
    (({"OMP_NUM_THREADS": "1"}, 1), ({"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}, 2)),
)
def test_numba_starts_no_more_threads_than_torch_may(given, threads):
    """As torchrun says it, in the environment; numba's own variable stays what it is."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    code = "import models, numba; print(numba.config.NUMBA_NUM_THREADS)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment | given, capture_output=True, text=True, timeout=100
    )
    assert run.stdout.split() == [str(threads)], run.stderr
