"""step_linear in a recurrence against functional.linear in the same recurrence; linear against float64."""

import pytest
import torch
from torch.nn import functional

from models import compiled, products
from models.products import column_sums, fixed_weights, linear, step_linear

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
    """In evaluation, and for weights that are not trained, it is the plain product."""
    weight, bias, _, h = make(torch.float32)
    expected = functional.linear(h, weight, bias)
    monkeypatch.setattr(products, "_Shared", lambda *_: pytest.fail("a weight was prepared"))
    with torch.no_grad():
        torch.testing.assert_close(step_linear(weight, bias)(h), expected)
    assert step_linear(weight.detach(), bias.detach())(h).equal(expected)
    with pytest.raises(pytest.fail.Exception):
        step_linear(weight, bias)


@pytest.fixture
def layer():
    """layer(*SHAPE): x (*SHAPE, 13) and the weight and bias of 17 outputs, parameters of float32."""

    def call(*shape, bias=True):
        torch.manual_seed(5)
        x, weight = torch.randn(*shape, 13), torch.nn.Parameter(torch.randn(17, 13))
        return x, weight, torch.nn.Parameter(torch.randn(17)) if bias else None

    return call


def exact(x, weight, bias):
    """The product in float64."""
    return functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


shapes = pytest.mark.parametrize("shape", ((1,), (1, 1), (2, 1), (1, 2), (3, 1), (5, 7), (53, 1), (0, 1)))
biases = pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))


@biases
@torch.no_grad()
def test_linear_of_views(layer, bias):
    """Rows that are columns elsewhere, rows that are one row, a weight that is another one transposed."""
    x, weight, offset = layer(5, bias=bias)
    for rows in (x.t().contiguous().t(), x[:1].expand(5, 13)):
        for matrix in (weight, weight.t().contiguous().t()):
            torch.testing.assert_close(
                linear(rows, matrix, offset).double(), exact(rows, matrix, offset), rtol=1e-5, atol=1e-5
            )


@shapes
@biases
@torch.no_grad()
def test_linear(layer, shape, bias):
    """Few rows and many, on both sides of the switch of oneDNN, whose setting stays what it was."""
    leaves = layer(*shape, bias=bias)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    try:
        for precision in ("ieee", "bf16"):
            settings.fp32_precision = precision
            torch.testing.assert_close(linear(*leaves).double(), exact(*leaves), rtol=1e-5, atol=1e-5)
            assert settings.fp32_precision == precision
    finally:
        settings.fp32_precision = before


@torch.no_grad()
def test_few_rows_are_not_torchs(layer, monkeypatch):
    """Its products of few rows take longer than reading the weights; only those of a turned weight are left to it."""
    leaves = layer(1)
    monkeypatch.setattr(functional, "linear", lambda *_: pytest.fail("torch's product"))
    assert linear(*leaves).shape == (1, 17)
    assert linear(leaves[0], leaves[1][:11], leaves[2][:11]).shape == (1, 11)
    with pytest.raises(pytest.fail.Exception):
        linear(leaves[0], leaves[1].t().contiguous().t())


@pytest.mark.parametrize("shape", ((1,), (1, 1), (2, 1), (1, 2)))
@biases
@torch.no_grad()
def test_linear_of_few_rows_in_bfloat16_rounds_the_weights_only(layer, shape, bias):
    """The inputs, the sums and the result are float32: as far from float64, with weights of bfloat16, as float32 is."""
    x, weight, offset = layer(*shape, bias=bias)
    with torch.autocast("cpu", torch.bfloat16), fixed_weights():
        first, second = linear(x, weight, offset), linear(x, weight, offset)
    assert first.dtype == torch.float32
    torch.testing.assert_close(first.double(), exact(x, weight.bfloat16(), offset), rtol=1e-5, atol=1e-5)
    assert torch.equal(first, second)


@torch.no_grad()
def test_weights_are_converted_once_and_only_while_they_are_fixed(layer):
    """Two products, one copy, gone with the `with`; without it, and for what is no parameter, torch's own product."""
    x, weight, bias = layer(1)
    with torch.autocast("cpu", torch.bfloat16):
        with fixed_weights():
            for _ in range(2):
                linear(x, weight, bias)
                assert linear(x, weight[:11], bias[:11]).dtype == torch.bfloat16
            assert [kept for kept, *_ in products.narrowed.values()] == [weight]
        weight *= 2
        assert products.narrowed is None
        assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))
        with fixed_weights(), compiled.torch_only():
            assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))


def test_linear_has_gradients(layer):
    """Few rows, too: those of functional.linear."""
    leaves = layer(1)
    ours, theirs = (torch.autograd.grad(call(*leaves).sum(), leaves[1:]) for call in (linear, functional.linear))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rows", (1, 63, 1009))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_column_sums_are_those_of_float64(dtype, rows):
    """In float32 whatever the rows are in, by the kernel and without it."""
    torch.manual_seed(9)
    x = torch.randn(rows, 17).to(dtype)
    want = x.double().sum(0)
    with compiled.torch_only():
        plain = column_sums(x)
    for sums in (column_sums(x), plain):
        assert sums.dtype == torch.promote_types(dtype, torch.float32)
        assert (sums.double() - want).norm() < 1e-6 * want.norm()
