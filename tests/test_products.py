"""step_linear in a recurrence against functional.linear in the same recurrence."""

import pytest
import torch
from torch.nn import functional

from models import products
from models.products import step_linear

STEPS, BATCH, FEATURES = 11, 3, 7


def recurrence(product, x, h):
    """h' = tanh(x + W h + b) for every step; all h side by side."""
    outputs = []
    for row in x:
        h = torch.tanh(row + product(h))
        outputs.append(h)
    return torch.stack(outputs)


def make(dtype=torch.float64, bias=True, steps=STEPS, batch=BATCH, extra=()):
    """weight, bias or None, inputs (T, B, ..., F) and the initial state, leaves that require gradients."""
    torch.manual_seed(3)
    shapes = [(FEATURES, FEATURES), (FEATURES,), (steps, batch, *extra, FEATURES), (batch, *extra, FEATURES)]
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return leaves if bias else [leaves[0], None, *leaves[2:]]


def compare(leaves, tolerance):
    """Outputs and gradients of both recurrences; each error relative, by name."""
    weight, bias, x, h = leaves
    ours = recurrence(step_linear(weight, bias), x, h)
    theirs = recurrence(lambda h: functional.linear(h, weight, bias), x, h)
    torch.manual_seed(4)
    mix = torch.randn(ours.shape, dtype=torch.float64)
    named = {name: leaf for name, leaf in zip(("weight", "bias", "x", "h"), leaves, strict=True) if leaf is not None}
    pairs = {"output": (ours, theirs)}
    gradients = [torch.autograd.grad((mix * output).sum(), list(named.values())) for output in (ours, theirs)]
    pairs |= {name: pair for name, *pair in zip(named, *gradients, strict=True)}
    errors = {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}
    assert not {name: error for name, error in errors.items() if not error < tolerance}


@pytest.mark.parametrize("rows", (1, 8, 1024), ids=("a step at a time", "parts", "all steps at once"))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize("extra", ((), (2,)), ids=("vectors", "rows of vectors"))
def test_float64(monkeypatch, rows, bias, extra):
    """Outputs and the gradients of weight, bias, inputs and initial state, however many rows are multiplied at once."""
    monkeypatch.setattr(products, "ROWS", rows)
    compare(make(bias=bias, extra=extra), 1e-12)


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize(("steps", "batch"), ((STEPS, BATCH), (1, BATCH), (STEPS, 1), (1, 1)))
def test_float32_with_packed_weights(bias, steps, batch):
    """The path of a CPU, one step and one column included."""
    compare(make(torch.float32, bias, steps, batch), 1e-5)


def test_bfloat16_under_autocast():
    """As functional.linear under autocast: outputs in its type, gradients of the weights in theirs."""
    leaves = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert step_linear(*leaves[:2])(leaves[3]).dtype == torch.bfloat16
        compare(leaves, 1e-2)
        loss = recurrence(step_linear(*leaves[:2]), *leaves[2:]).sum()
    loss.backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_a_weight_that_is_used_outside_the_loop_too():
    """Its gradient is the sum of both uses, and of two losses one after the other."""
    weight, bias, x, h = make()
    inside, plain = step_linear(weight, bias), lambda h: functional.linear(h, weight, bias)
    for _ in range(2):
        sums = [recurrence(product, plain(x), h).sum() + plain(h).sum() for product in (inside, plain)]
        ours, theirs = (torch.autograd.grad(total, (weight, bias), retain_graph=True) for total in sums)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_layout_that_is_not_contiguous():
    """Inputs and slopes that are views."""
    weight, bias, _, h = make(torch.float32, batch=FEATURES)
    turned = h.t()
    ours, theirs = step_linear(weight, bias)(turned), functional.linear(turned, weight, bias)
    torch.testing.assert_close(ours, theirs)
    slope = torch.randn(FEATURES, FEATURES).t()
    for a, b in zip(*(torch.autograd.grad(y, (weight, bias, h), slope) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_prepared_when_no_gradient_will_be_asked_for(monkeypatch):
    """In evaluation, and for weights that are not trained, it is functional.linear."""
    weight, bias, _, h = make(torch.float32)
    expected = functional.linear(h, weight, bias)
    monkeypatch.setattr(products, "_Shared", lambda *_: pytest.fail("a weight was prepared"))
    with torch.no_grad():
        assert step_linear(weight, bias)(h).equal(expected)
    assert step_linear(weight.detach(), bias.detach())(h).equal(expected)
    with pytest.raises(pytest.fail.Exception):
        step_linear(weight, bias)
