"""The compiled LSTM over time against torch's own module with the same weights in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.lstm import lstm

EMSIZE, NHID = 5, 7


def make(steps=11, batch=3):
    """A module with random biases, and leaves: inputs (T, B, E), h and c (B, H)."""
    torch.manual_seed(6)
    module = nn.LSTM(EMSIZE, NHID)
    leaves = [torch.randn(shape) for shape in ((steps, batch, EMSIZE), (batch, NHID), (batch, NHID))]
    return module, [leaf.requires_grad_() for leaf in leaves]


def ours(module, x, h, c, dtype):
    gates = functional.linear(x, module.weight_ih_l0, module.bias_ih_l0 + module.bias_hh_l0)
    return lstm(gates, module.weight_hh_l0, h, c, dtype)


def theirs(module, x, h, c):
    output, (h, c) = module(x, (h[None], c[None]))
    return output, h[0], c[0]


def outcome(compute, module, leaves):
    """Outputs, final states and every gradient by name."""
    parts = compute(module, *leaves)
    random = torch.Generator().manual_seed(7)
    mixes = [torch.randn(part.shape, generator=random) for part in parts]
    named = {**dict(module.named_parameters()), **dict(zip(("x", "h", "c"), leaves, strict=True))}
    gradients = torch.autograd.grad(
        sum((m * part).sum() for m, part in zip(mixes, parts, strict=True)), [*named.values()]
    )
    return dict(zip(["output", "last h", "last c", *named], (*parts, *gradients), strict=True))


def assert_near(results, exact, tolerance):
    """By relative error, named; gradients are made of gates kept in 16 bits."""
    errors = {name: ((results[name] - want).norm() / want.norm()).item() for name, want in exact.items()}
    bounds = {name: tolerance if name in ("output", "last h", "last c") else max(tolerance, 1e-4) for name in errors}
    assert not {name: error for name, error in errors.items() if not error < bounds[name]}


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)))
@pytest.mark.parametrize(("steps", "batch"), ((11, 3), (1, 3), (11, 1), (1, 1), (2, 37)))
def test_equals_torch_in_float64(steps, batch, dtype, tolerance):
    """Relative errors; in bfloat16 only the products are rounded. More columns than the threads' parts, too."""
    module, leaves = make(steps, batch)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = outcome(theirs, copy.deepcopy(module).double(), exact_leaves)
    results = outcome(lambda *arguments: ours(*arguments, dtype), module, leaves)
    assert {part.dtype for part in results.values()} == {torch.float32}
    assert_near(results, exact, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)))
@pytest.mark.parametrize("units", ((1, 2, 5), (4,), (0, 1, 2, 3, 4, 5, 6)), ids=len)
@pytest.mark.parametrize("batch", (1, 37))
def test_units_that_are_left_out_are_weights_of_zero(batch, units, dtype, tolerance):
    """As torch in float64 with zeros in the other columns of W_hh; these get no gradient."""
    module, leaves = make(batch=batch)
    units = torch.tensor(units)
    there = torch.zeros(NHID, dtype=torch.float64).index_fill(0, units, 1)

    def few(module, x, h, c):
        gates = functional.linear(x, module.weight_ih_l0, module.bias_ih_l0 + module.bias_hh_l0)
        return lstm(gates, module.weight_hh_l0.index_select(1, units), h, c, dtype, units)

    def masked(module, x, h, c):
        weights = {"weight_hh_l0": module.weight_hh_l0 * there}
        output, (h, c) = torch.func.functional_call(module, weights, (x, (h[None], c[None])))
        return output, h[0], c[0]

    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = outcome(masked, copy.deepcopy(module).double(), exact_leaves)
    results = outcome(few, module, leaves)
    assert_near(results, exact, tolerance)
    assert not results["weight_hh_l0"][:, there == 0].any()


def test_inputs_in_the_type_of_the_products():
    """Gates of x in bfloat16 are taken as they are, and get their gradient in bfloat16."""
    module, (x, h, c) = make()
    gates = functional.linear(x, module.weight_ih_l0).detach()
    narrow = gates.bfloat16().requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    results = [lstm(each, module.weight_hh_l0, h, c, torch.bfloat16)[0] for each in (narrow, wide)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(result.sum(), each)[0] for result, each in zip(results, (narrow, wide), strict=True)
    ]
    assert gradients[0].dtype == torch.bfloat16
    torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=1e-2, atol=1e-4)


def test_chunks_equal_the_whole():
    """State carried over, gradients through it."""
    module, (x, h, c) = make()
    whole = ours(module, x, h, c, torch.float32)
    first, *state = ours(module, x[:4], h, c, torch.float32)
    second, *state = ours(module, x[4:], *state, torch.float32)
    parts = torch.cat([first, second]), *state
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(sum(part.sum() for part in result), (x, h, c)) for result in (parts, whole)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
