"""The LSTM over time against torch's own module with the same weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.lstm import lstm

EMSIZE, NHID = 5, 7


def make(steps=11, batch=3, dtype=torch.float64):
    """A module with random biases, and leaves: inputs (T, B, E), h and c (B, H)."""
    torch.manual_seed(6)
    module = nn.LSTM(EMSIZE, NHID).to(dtype)
    leaves = [torch.randn(shape, dtype=dtype) for shape in ((steps, batch, EMSIZE), (batch, NHID), (batch, NHID))]
    return module, [leaf.requires_grad_() for leaf in leaves]


def ours(module, x, h, c, dtype):
    gates = functional.linear(x, module.weight_ih_l0, module.bias_ih_l0 + module.bias_hh_l0)
    return lstm(gates, module.weight_hh_l0, h, c, dtype)


def theirs(module, x, h, c):
    output, (h, c) = module(x, (h[None], c[None]))
    return output, h[0], c[0]


def compare(module, leaves, dtype, tolerance):
    """Outputs, final states and every gradient: relative errors, by name."""
    results = ours(module, *leaves, dtype), theirs(module, *leaves)
    torch.manual_seed(7)
    mixes = [torch.randn_like(part) for part in results[1]]
    named = {**dict(module.named_parameters()), **dict(zip(("x", "h", "c"), leaves, strict=True))}
    gradients = [
        torch.autograd.grad(sum((m * part).sum() for m, part in zip(mixes, parts, strict=True)), list(named.values()))
        for parts in results
    ]
    names = ["output", "last h", "last c", *named]
    pairs = zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True)
    errors = {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in zip(names, pairs, strict=True)}
    assert not {name: error for name, error in errors.items() if not error < tolerance}


@pytest.mark.parametrize(("steps", "batch"), ((11, 3), (1, 3), (11, 1), (1, 1)))
def test_float64(steps, batch):
    compare(*make(steps, batch), torch.float64, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)))
def test_float32_with_products_in(dtype, tolerance):
    """Packed weights; in bfloat16 only the products are rounded."""
    module, leaves = make(dtype=torch.float32)
    compare(module, leaves, dtype, tolerance)
    assert {part.dtype for part in ours(module, *leaves, dtype)} == {torch.float32}


def test_chunks_equal_the_whole():
    """State carried over, gradients through it."""
    module, (x, h, c) = make()
    whole = ours(module, x, h, c, torch.float64)
    first, *state = ours(module, x[:4], h, c, torch.float64)
    second, *state = ours(module, x[4:], *state, torch.float64)
    parts = torch.cat([first, second]), *state
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(sum(part.sum() for part in result), (x, h, c)) for result in (parts, whole)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    module, (x, h, c) = make(3, 2)
    assert torch.autograd.gradcheck(lambda x, h, c: ours(module, x, h, c, torch.float64), (x, h, c))
