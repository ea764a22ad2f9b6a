"""The fused pooling against its equations in float64, step by step."""

import itertools

import pytest
import torch
from torch.nn import functional

from models import compiled
from models.forget_mult import pooling
from models.forget_mult.pooling import CANDIDATES, MODES, pool

STEPS, BATCH, NHID = 5, 3, 7


def make(mode, masked, steps=STEPS, batch=BATCH, size=NHID):
    random = torch.Generator().manual_seed(3)
    gates = torch.randn(steps, batch, MODES[mode] * size, generator=random, dtype=torch.float64)
    initial = torch.randn(batch, size, generator=random, dtype=torch.float64)
    update = torch.rand(steps, batch, size, generator=random) < 0.7 if masked else None
    return gates, initial, update


def by_hand(gates, initial, mode, candidate, update, keep, reverse):
    """The docstring's equations, a step at a time."""
    size, c = initial.shape[1], initial
    nonlinearity = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": functional.softplus, "exp": torch.exp}
    outputs = [None] * len(gates)
    for t in reversed(range(len(gates))) if reverse else range(len(gates)):
        raw = gates[t].split(size, -1)
        z, f = nonlinearity[candidate](raw[0]), raw[1].sigmoid()
        new = f * c + raw[3].sigmoid() * z if mode == "ifo" else f * z + (1 - f) * c
        new = keep * new + (1 - keep) * c
        c = new if update is None else torch.where(update[t], new, c)
        outputs[t] = raw[2].sigmoid() * c if mode != "f" else c
    return torch.stack(outputs), c


def outcome(solve, gates, initial, *arguments):
    """Output, last state, and the gradients of a fixed mix of both."""
    gates, initial = gates.detach().requires_grad_(), initial.detach().requires_grad_()
    parts = solve(gates, initial, *arguments)
    random = torch.Generator().manual_seed(9)
    mixes = [torch.randn(part.shape, generator=random, dtype=torch.float64).to(part.dtype) for part in parts]
    loss = sum((mix * part).sum() for mix, part in zip(mixes, parts, strict=True))
    gradients = torch.autograd.grad(loss, (gates, initial))
    return dict(zip(("output", "last", "gates", "initial"), (*parts, *gradients), strict=True))


def errors(got, want, tolerance):
    found = {name: ((got[name].double() - part).norm() / part.norm()).item() for name, part in want.items()}
    return {name: error for name, error in found.items() if not error < tolerance}


CASES = list(itertools.product(MODES, CANDIDATES, (False, True), (False, True)))


@pytest.mark.parametrize(("mode", "candidate", "masked", "reverse"), CASES)
def test_equations(mode, candidate, masked, reverse):
    """By the recurrence's operator in float64, in one pass in float32, in both with a mask and an expectation."""
    gates, initial, update = make(mode, masked)
    for keep in (1.0, 0.8):
        arguments = (mode, candidate, update, keep, reverse)
        want = outcome(by_hand, gates, initial, *arguments)
        assert not errors(outcome(pool, gates, initial, *arguments), want, 1e-12)
        assert not errors(outcome(pool, gates.float(), initial.float(), *arguments), want, 1e-6)


@pytest.mark.parametrize(("steps", "batch", "size"), ((1, 3, 7), (5, 1, 7), (1, 1, 1), (2, 3, 1031)))
@pytest.mark.parametrize("mode", MODES)
def test_sizes(mode, steps, batch, size):
    """One step, one column, one feature; more features than a thread takes at once."""
    gates, initial, update = make(mode, True, steps, batch, size)
    arguments = (mode, "tanh", update, 1.0, False)
    want = outcome(by_hand, gates, initial, *arguments)
    assert not errors(outcome(pool, gates.float(), initial.float(), *arguments), want, 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_gates(mode):
    """Only what comes in and the gradient that goes out are narrow: the rest is as exact as in float32."""
    gates, initial, update = make(mode, True)
    gates = gates.bfloat16()
    arguments = (mode, "tanh", update, 0.9, False)
    want = outcome(by_hand, gates.double(), initial, *arguments)
    got = outcome(pool, gates, initial.float(), *arguments)
    assert got["output"].dtype == got["last"].dtype == torch.float32 and got["gates"].dtype == torch.bfloat16
    assert not errors({name: part for name, part in got.items() if name != "gates"}, dict(list(want.items())[:2]), 1e-6)
    assert not errors(got, {"gates": want["gates"], "initial": want["initial"]}, 4e-3)


def test_both_ways_are_taken(monkeypatch):
    """One pass where kernels can be used and no backend is asked for."""
    calls = []
    monkeypatch.setattr(pooling._Pool, "apply", lambda *arguments: calls.append(arguments))
    gates, initial, _ = make("fo", False)
    pool(gates.float(), initial.float(), "fo", "tanh")
    assert len(calls) == 1
    pool(gates, initial, "fo", "tanh")
    pool(gates.float(), initial.float(), "fo", "tanh", backend="scan")
    with compiled.torch_only():
        pool(gates.float(), initial.float(), "fo", "tanh")
    assert len(calls) == 1
