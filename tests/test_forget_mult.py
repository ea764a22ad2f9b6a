"""The recurrence in every way it is computed against a loop over numbers in float64; what torch asks of an operator."""

import itertools

import pytest
import torch
from torch import nn

from models import BackwardForgetMult, ForgetMult, compiled, forget_mult, recurrence
from models.forget_mult import BACKENDS, choose, operator

STEPS, BATCH, NHID = 7, 3, 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
backends = pytest.mark.parametrize("backend", BACKENDS)
forms = pytest.mark.parametrize(("mix", "reverse"), list(itertools.product((True, False), (False, True))))


def make(steps=STEPS, batch=BATCH, size=NHID, seed=0):
    """Gates between 0.05 and 0.95, inputs of both signs, a first state, in float64."""
    random = torch.Generator().manual_seed(seed)
    gate = torch.rand(steps, batch, size, generator=random, dtype=torch.float64) * 0.9 + 0.05
    x = torch.randn(steps, batch, size, generator=random, dtype=torch.float64)
    return gate, x, torch.randn(batch, size, generator=random, dtype=torch.float64)


def by_hand(gate, x, initial, mix, reverse):
    """h_t by Python's arithmetic on scalars, with gradients."""
    steps, batch, size = x.shape
    hs = [[[None] * size for _ in range(batch)] for _ in range(steps)]
    for b, j in itertools.product(range(batch), range(size)):
        h = initial[b, j]
        for t in reversed(range(steps)) if reverse else range(steps):
            g, value = gate[t, b, j], x[t, b, j]
            h = g * value + (1 - g) * h if mix else g * h + value
            hs[t][b][j] = h
    return torch.stack([torch.stack([torch.stack(row) for row in rows]) for rows in hs])


def outcome(solve, leaves, *arguments):
    """h and the gradients of a fixed mix of it, by name."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    h = solve(*leaves, *arguments)
    mixing = torch.randn(h.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(h.dtype)
    gradients = torch.autograd.grad((h * mixing).sum(), leaves)
    return dict(zip(("h", "gate", "x", "initial"), (h, *gradients), strict=True))


def assert_close(got, want, tolerance):
    errors = {name: ((got[name].double() - part).norm() / part.norm()).item() for name, part in want.items()}
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


def ours(gate, x, initial, mix, reverse, backend):
    return (forget_mult if mix else recurrence)(gate, x, initial, reverse, backend)


@backends
@forms
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("steps", "batch"), ((STEPS, BATCH), (1, BATCH), (STEPS, 1), (1, 1)))
def test_equations(backend, mix, reverse, dtype, steps, batch):
    """h, and the gradients in gate, x and the first state; results keep the type of the inputs."""
    leaves = [leaf.to(dtype) for leaf in make(steps, batch)]
    want = outcome(by_hand, [leaf.double() for leaf in leaves], mix, reverse)
    got = outcome(ours, leaves, mix, reverse, backend)
    assert {part.dtype for part in got.values()} == {dtype}
    assert_close(got, want, TOLERANCE[dtype] * (30 if backend == "scan" else 1))


@backends
def test_more_columns_than_a_thread_takes(backend):
    """Chunks that are filled and one that is not, all equal to the plain loop."""
    leaves = make(3, 2, 601)
    want = outcome(ours, leaves, True, False, "reference")
    assert_close(outcome(ours, leaves, True, False, backend), want, 1e-11)


@backends
@forms
def test_any_strides(backend, mix, reverse):
    """Transposed, cut and expanded inputs, and the expanded gradient that a plain sum sends back."""
    gate, x, initial = make()
    want = outcome(ours, (gate, x, initial), mix, reverse, "reference")
    apart = torch.empty(NHID, BATCH, 2 * STEPS, dtype=torch.float64)[..., ::2].permute(2, 1, 0).copy_(gate)
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert_close(outcome(ours, (apart, turned, initial.t().contiguous().t()), mix, reverse, backend), want, 1e-12)
    constant = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    h = ours(constant.expand_as(x), x, None, mix, reverse, backend)
    h.sum().backward()
    every = torch.full_like(x, 0.25, requires_grad=True)
    ours(every, x, None, mix, reverse, "reference").sum().backward()
    assert constant.grad.item() == pytest.approx(every.grad.sum().item())


@backends
@pytest.mark.parametrize("reverse", (False, True))
def test_chunks_with_carried_state_equal_the_whole(backend, reverse):
    gate, x, initial = make()
    whole = forget_mult(gate, x, initial, reverse, backend)
    cut = 4
    first, second = (slice(cut, None), slice(None, cut)) if reverse else (slice(None, cut), slice(cut, None))
    part = forget_mult(gate[first], x[first], initial, reverse, backend)
    rest = forget_mult(gate[second], x[second], part[0 if reverse else -1], reverse, backend)
    joined = torch.cat([rest, part] if reverse else [part, rest])
    torch.testing.assert_close(joined, whole, rtol=1e-9, atol=1e-9)


@backends
@forms
def test_gradcheck(backend, mix, reverse):
    leaves = [leaf.requires_grad_() for leaf in make(4, 2, 3)]
    assert torch.autograd.gradcheck(lambda *inputs: ours(*inputs, mix, reverse, backend), leaves)


@backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_opcheck(backend, dtype):
    """What torch.library asks: schema, autograd, fake tensors, dynamic shapes, of both operators."""
    gate, x, initial = (leaf.to(dtype) for leaf in make(4, 2, 3))
    leaves = [leaf.requires_grad_() for leaf in (gate, x, initial)]
    torch.library.opcheck(operator.solve, (*leaves, True, False, backend))
    plain = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(operator.solve_backward, (plain[1], *plain[:2], plain[0], plain[2], False, True, backend))


def test_compiles_as_one_operation_whatever_the_number_of_steps():
    """No graph break, and the graph does not grow with T."""
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph

    @torch.compile(fullgraph=True, backend=backend, dynamic=False)
    def call(f, x):
        return ForgetMult()(f.sigmoid(), x.tanh())

    for steps in (5, 50):
        f, x, _ = make(steps)
        torch.testing.assert_close(call(f, x), forget_mult(f.sigmoid(), x.tanh()))
    assert sizes[0] == sizes[1]
    torch.compiler.reset()


def test_no_second_gradients():
    """Asking for them is an error, not a wrong number."""
    leaves = [leaf.requires_grad_() for leaf in make()]
    (gradient,) = torch.autograd.grad(forget_mult(*leaves).sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_modules_have_the_call_of_the_seed():
    """ForgetMult()(f, x, hidden, use_cuda) and its mirror image, which is the same on time turned round."""
    f, x, hidden = make()
    expected = forget_mult(f, x, hidden)
    assert torch.equal(ForgetMult()(f, x, hidden, use_cuda=True), expected)
    assert torch.equal(ForgetMult()(f, x, hidden_init=hidden, use_cuda=False), expected)
    assert torch.equal(ForgetMult()(f, x), forget_mult(f, x, torch.zeros_like(hidden)))
    assert torch.equal(BackwardForgetMult()(f.flip(0), x.flip(0), hidden).flip(0), expected)
    torch.testing.assert_close(ForgetMult(backend="scan")(f, x, hidden), expected)


def test_types_mix():
    """A narrow gate and a wide input give a wide h; a state may be wider than both, and its gradient is."""
    f, x, hidden = make()
    assert forget_mult(f.bfloat16(), x.float()).dtype == torch.float32
    hidden = hidden.float().requires_grad_()
    h = forget_mult(f.bfloat16(), x.bfloat16(), hidden)
    h.float().sum().backward()
    assert h.dtype == torch.bfloat16 and hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ("reference", "cpu", "torch"))
def test_narrow_types_are_carried_in_float32(backend):
    """300 small steps from 256, which bfloat16 can't take one by one: each is below half a unit of its last place."""
    a, b = torch.ones(300, 1, 2, dtype=torch.bfloat16), torch.full((300, 1, 2), 0.25, dtype=torch.bfloat16)
    h = recurrence(a, b, torch.full((1, 2), 256.0), backend=backend)
    assert h[-1].flatten().tolist() == [332, 332]  # 331 to the nearest


def test_what_is_refused():
    """Other shapes and unknown names are named."""
    f, x, hidden = make()
    for arguments, message in (
        ((f[0], x[0]), "got \\(3, 5\\)"),
        ((f[:0], x[:0]), "at least one step"),
        ((f, x, hidden[:2]), "expected an initial state of \\(3, 5\\), got \\(2, 5\\)"),
        ((f, x, hidden, False, "fast"), "unknown backend 'fast': expected one of reference, cpu, scan, torch"),
    ):
        with pytest.raises(ValueError, match=message):
            forget_mult(*arguments)


def test_the_way_is_chosen_by_device():
    assert choose(torch.zeros(1)) == "cpu" and choose(torch.zeros(1, device="meta")) == "torch"
    with compiled.torch_only():
        assert choose(torch.zeros(1)) == "torch"


def test_moving_average():
    """Exponential moving average along time: one gate for all."""
    _, x, _ = make()
    average = forget_mult(torch.tensor(0.1, dtype=torch.float64), x, x[0])
    expected = x[0]
    for t in range(STEPS):
        expected = 0.1 * x[t] + 0.9 * expected
    torch.testing.assert_close(average[-1], expected)


def test_dynamic_weighted_average():
    """With f_t = w_t / (w_0 + ... + w_t), h_t is the average of the inputs so far weighted by w."""
    w, x, _ = make()
    average = forget_mult(w / w.cumsum(0), x)
    torch.testing.assert_close(average[-1], (w * x).sum(0) / w.sum(0))


class MinGRU(nn.Module):
    """Feng et al. 2024 (arXiv 2410.01201): h_t = (1 - z_t) h_{t-1} + z_t W_h x_t, z_t = sigmoid(W_z x_t).

    output, state = gru(x (T, B, input_size), state (B, H)); state None is 0.
    """

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.linear = nn.Linear(input_size, 2 * hidden_size)

    def forward(self, x, state=None):
        candidate, z = self.linear(x).chunk(2, -1)
        z = torch.sigmoid(z)
        h = recurrence(1 - z, z * candidate, state)
        return h, h[-1]


def test_minimal_gated_recurrence():
    """Equal to its equations step by step, and it learns: the sum of the last two inputs."""
    torch.manual_seed(1)
    gru, x = MinGRU(2, 5).double(), torch.randn(STEPS, BATCH, 2, dtype=torch.float64)
    output, last = gru(x)
    h = torch.zeros(BATCH, 5, dtype=torch.float64)
    for t in range(STEPS):
        candidate, z = gru.linear(x[t]).chunk(2, -1)
        h = (1 - z.sigmoid()) * h + z.sigmoid() * candidate
        torch.testing.assert_close(output[t], h)
    assert torch.equal(last, output[-1])
    model = nn.ModuleList([MinGRU(1, 17), nn.Linear(17, 1)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x = torch.randn(30, 16, 1)
    for _ in range(150):
        loss = nn.functional.mse_loss(model[1](model[0](x)[0])[1:], x[1:] + x[:-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 < (x[1:] + x[:-1]).var()
