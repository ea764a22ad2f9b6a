"""Launches, products and memory of known computations."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from models import forget_mult
from models.products import step_linear
from utils import timing

STEPS, BATCH, EMSIZE, NHID = 5, 3, 7, 11


def shapes(operations):
    """{(M, K, N): how often}, whatever the kind."""
    found = {}
    for (_, shape, _, _), times in operations.products.items():
        found[shape] = found.get(shape, 0) + times
    return found


def test_views_and_empty_tensors_are_no_launches():
    """A product, a ReLU and two copies are four; transposing, slicing, reshaping and allocating are none."""
    x, w = torch.randn(3, 5), torch.randn(7, 5)

    def call():
        y = torch.empty(3)
        return y, torch.mm(x, w.t()).t()[1:].relu().unsqueeze(0).view(-1, 3).contiguous().detach(), x.t().contiguous()

    operations = timing.count(call)
    assert operations.launches == 4
    assert shapes(operations) == {(3, 5, 7): 1}


def test_products_of_a_linear_layer():
    """Forward, gradients of the input and the weight; added in place; with a bias in the packed form of a loop."""
    layer, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    expected = {(3, 5, 7): 1, (3, 7, 5): 1, (7, 3, 5): 1}
    assert shapes(timing.count(lambda: layer(x).sum().backward())) == expected
    total = torch.zeros(5, 7)
    assert shapes(timing.count(lambda: total.addmm_(torch.randn(5, 3), torch.randn(3, 7)))) == {(5, 3, 7): 1}
    packed = timing.count(lambda: step_linear(layer.weight, layer.bias)(x).sum().backward())
    assert shapes(packed) == expected
    assert sum(kind == "packed" for kind, *_ in packed.products) == 2


@pytest.mark.parametrize("steps", (3, 11))
def test_our_operators_are_counted_as_what_they_do(steps):
    """The recurrence by torch's operations is one a step, forward and backward, and a fixed number besides."""
    f, x = (torch.rand(steps, 2, 5, requires_grad=True) for _ in range(2))
    counted = timing.count(lambda: forget_mult(f, x, backend="torch").sum().backward()).launches
    assert 2 * steps < counted < 2 * steps + 30
    again = timing.count(lambda: forget_mult(f.repeat(2, 1, 1), x.repeat(2, 1, 1), backend="torch").sum().backward())
    assert again.launches == pytest.approx(counted + 2 * steps, abs=6)


def test_products_of_an_lstm():
    """Those of its equations, whether the library's kernel hides them or not."""
    layer = nn.LSTM(EMSIZE, NHID)
    x = torch.randn(STEPS, BATCH, EMSIZE, requires_grad=True)
    gates, rows = 4 * NHID, STEPS * BATCH
    expected = {
        (rows, EMSIZE, gates): 1, (BATCH, NHID, gates): STEPS, (rows, gates, EMSIZE): 1, (BATCH, gates, NHID): STEPS,
        (gates, rows, EMSIZE): 1, (gates, rows, NHID): 1,
    }  # fmt: skip
    assert shapes(timing.count(lambda: layer(x)[0].sum().backward())) == expected


def test_products_alone_are_timed_by_shape(monkeypatch):
    """How often times the median; 2 M K N floating point operations each."""
    called = []

    def median_time(call, seconds, device):
        called.append(tuple(call().shape))
        return 10.0

    monkeypatch.setattr(timing, "median_time", median_time)
    operations = timing.Operations()
    operations.add(torch.randn(3, 5), torch.randn(7, 5).t(), count=4)
    operations.products["packed", (2, 5, 3), None, torch.bfloat16] += 1
    milliseconds, gflop = timing.products_alone(operations.products)
    assert called == [(3, 7), (2, 3)]
    assert milliseconds == 50
    assert gflop == pytest.approx((4 * 2 * 3 * 5 * 7 + 2 * 2 * 5 * 3) / 1e9)


def test_median_time(monkeypatch):
    """The median of the calls that fit, after one that is not timed."""
    marks = iter((0.0, 1.0, 1.0, 1.2, 2.0, 2.5))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(marks))
    calls = []
    assert timing.median_time(lambda: calls.append(1), 0.5) == pytest.approx(500)
    assert len(calls) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_above_what_was_there():
    """64 MiB that come and go are the peak, above 32 MiB from before, in a process that has used nothing else.

    64 MiB of a file that is read where it is mapped, as code is, count nothing.
    """
    code = """
import mmap, tempfile
import torch
from utils.timing import memory_above
cpu = torch.device("cpu")
kept = torch.ones(32 << 18)
for size in (64, 0):
    def call():
        torch.ones(size << 18)
        torch.ones(size << 18)
    print(memory_above(call, cpu))
with tempfile.TemporaryFile() as file:
    file.truncate(64 << 20)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        print(memory_above(lambda: sum(mapped[::4096]), cpu))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    large, none, mapped = map(float, out.split())
    assert 60 <= large < 80
    assert none < 4
    assert mapped < 4
