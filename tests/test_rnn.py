"""The recurrent cores: library and loop against torch.nn and against the equations, written out unit by unit."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from models import rnn
from models.lstm import lstm
from models.rnn import RNN

EMSIZE, NHID = 13, 11
STEPS, BATCH = 7, 5
KINDS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
TORCH = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN_TANH": nn.RNN,
    "RNN_RELU": functools.partial(nn.RNN, nonlinearity="relu"),
}

kinds = pytest.mark.parametrize("kind", KINDS)
ways = pytest.mark.parametrize("loop", (False, True), ids=("library", "loop"))


def sigmoid(value):
    return 1 / (1 + torch.exp(-value))


def unit(kind, a, r, old):
    """New (h,) or (h, c) of one unit; a, r: what its gates get from the input and from the old hidden vector."""
    if kind == "LSTM":
        i, f, g, o = (from_x + from_h for from_x, from_h in zip(a, r, strict=True))
        c = sigmoid(f) * old[1] + sigmoid(i) * torch.tanh(g)
        return sigmoid(o) * torch.tanh(c), c
    if kind == "GRU":
        reset, update = sigmoid(a[0] + r[0]), sigmoid(a[1] + r[1])
        return ((1 - update) * torch.tanh(a[2] + reset * r[2]) + update * old[0],)
    total = a[0] + r[0]
    return (torch.tanh(total) if kind == "RNN_TANH" else total.clamp(min=0),)


def by_hand(kind, weights, x, state):
    """Output and final state by the equations, for one layer, step, column and unit after the other."""
    finals = []
    for layer in range(len(state[0])):
        w_ih, w_hh, b_ih, b_hh = (
            weights[f"rnn.{name}_l{layer}"].unbind(0) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        parts, outputs = [part[layer] for part in state], []
        for step in x:
            columns = []
            for b, features in enumerate(step):
                a = [row @ features + bias for row, bias in zip(w_ih, b_ih, strict=True)]
                r = [row @ parts[0][b] + bias for row, bias in zip(w_hh, b_hh, strict=True)]
                units = [unit(kind, a[j::NHID], r[j::NHID], [part[b, j] for part in parts]) for j in range(NHID)]
                columns.append([torch.stack(values) for values in zip(*units, strict=True)])
            parts = [torch.stack(values) for values in zip(*columns, strict=True)]
            outputs.append(parts[0])
        x = torch.stack(outputs)
        finals.append(parts)
    return x, [torch.stack(layers) for layers in zip(*finals, strict=True)]


def outcome(compute, weights, x, state):
    """By name: output, final state, and the gradients of a made-up loss of both by every weight, x and the state."""
    x, state = x.clone().requires_grad_(), tuple(part.clone().requires_grad_() for part in state)
    output, final = compute(x, state)
    results = {"output": output, **{f"final state {i}": part for i, part in enumerate(final)}}
    random = torch.Generator().manual_seed(5)
    factors = [torch.randn(value.shape, generator=random, dtype=torch.float64) for value in results.values()]
    loss = sum((factor * value).sum() for factor, value in zip(factors, results.values(), strict=True))
    leaves = {**weights, "x": x, **{f"state {i}": part for i, part in enumerate(state)}}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    results |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def assert_close(got, want, tolerance):
    """Each tensor's relative error, by its norm, is at most `tolerance`."""
    assert got.keys() == want.keys()
    errors = {name: ((got[name].double() - value).norm() / value.norm()).item() for name, value in want.items()}
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


def make(kind, layers, steps=STEPS, batch=BATCH, dropout=0.0, loop=False, seed=1):
    """A core in float64, an input and a state that is not zero."""
    torch.manual_seed(seed)
    core = RNN(kind, EMSIZE, NHID, layers, dropout, loop).double()
    x = torch.randn(steps, batch, EMSIZE, dtype=torch.float64)
    return core, x, tuple(torch.randn_like(part) for part in core.initial_state(batch))


@functools.cache
def expected(kind, layers, steps, batch):
    """The outcome by hand of what `make` makes."""
    core, x, state = make(kind, layers, steps, batch)
    weights = dict(core.named_parameters())
    return outcome(functools.partial(by_hand, kind, weights), weights, x, state)


def sizes():
    """Layers, steps, columns: all depths, then one step, one column and both."""
    return [(1, STEPS, BATCH), (2, STEPS, BATCH), (3, STEPS, BATCH), (2, 1, BATCH), (2, STEPS, 1), (3, 1, 1)]


@kinds
@pytest.mark.parametrize(("layers", "steps", "batch"), sizes())
@ways
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-12), (torch.float32, 1e-5)), ids=("f64", "f32"))
def test_core_follows_the_equations(kind, layers, steps, batch, loop, dtype, tolerance):
    """Output, final state and every gradient, for all depths, for one step and one column, in both precisions."""
    core, x, state = make(kind, layers, steps, batch, loop=loop)
    core = core.to(dtype)
    results = outcome(core, dict(core.named_parameters()), x.to(dtype), [part.to(dtype) for part in state])
    assert {value.dtype for value in results.values()} == {dtype}
    assert_close(results, expected(kind, layers, steps, batch), tolerance)


@kinds
@pytest.mark.parametrize("layers", (1, 2, 3))
def test_torch_module_with_the_same_weights_agrees(kind, layers):
    """torch.nn's own module gives what the equations give: they are the same recurrence."""
    core, x, state = make(kind, layers)
    module = TORCH[kind](EMSIZE, NHID, layers).double()
    module.load_state_dict({name.removeprefix("rnn."): value for name, value in core.state_dict().items()})

    def compute(x, state):
        output, final = module(x, state if kind == "LSTM" else state[0])
        return output, final if kind == "LSTM" else (final,)

    weights = {f"rnn.{name}": weight for name, weight in module.named_parameters()}
    assert_close(outcome(compute, weights, x, state), expected(kind, layers, STEPS, BATCH), 1e-12)


@kinds
@ways
@pytest.mark.parametrize("batch", (1, BATCH))
@pytest.mark.parametrize("chunks", ((1, 2, 4), (1,) * 7), ids=str)
def test_chunks_with_carried_state_equal_the_whole(kind, loop, batch, chunks):
    """Gradients too, through the carried state; the state passed in is not written to."""
    core, x, state = make(kind, 2, batch=batch, loop=loop)
    weights = dict(core.named_parameters())

    def chunked(x, state):
        outputs = []
        for chunk in x.split(chunks):
            before = [part.clone() for part in state]
            output, new_state = core(chunk, state)
            assert all(map(torch.equal, state, before)), "the state that was passed in has changed"
            outputs.append(output)
            state = new_state
        return torch.cat(outputs), state

    assert_close(outcome(chunked, weights, x, state), outcome(core, weights, x, state), 1e-12)


@kinds
def test_initial_state_is_zero_of_the_weights_dtype_and_device(kind):
    """(h, c) for the LSTM, (h,) for the others, and the sizes that the language model asks for."""
    core, _, _ = make(kind, 3)
    state = core.initial_state(BATCH)
    assert [tuple(part.shape) for part in state] == [(3, BATCH, NHID)] * (2 if kind == "LSTM" else 1)
    assert all(part.dtype == torch.float64 and not part.any() for part in state)
    assert {part.device.type for part in core.to("meta").initial_state(1)} == {"meta"}
    assert (core.input_size, core.output_size) == (EMSIZE, NHID)


@kinds
def test_dropout_is_a_fresh_mask_per_step_between_layers_and_nowhere_else(kind):
    """Layers of torch.nn with dropout between them draw the same masks from the same seed; evaluation drops nothing."""
    core, x, state = make(kind, 3, dropout=0.37)
    weights = dict(core.named_parameters())
    layers = [TORCH[kind](NHID if layer else EMSIZE, NHID).double() for layer in range(3)]
    for number, layer in enumerate(layers):
        for name in dict(layer.named_parameters()):
            setattr(layer, name, weights[f"rnn.{name[:-1]}{number}"])

    def seeded(compute):
        def run(x, state):
            torch.manual_seed(7)
            return compute(x, state)

        return run

    def layered(x, state):
        finals = []
        for number, layer in enumerate(layers):
            x = functional.dropout(x, 0.37) if number else x
            parts = [part[number : number + 1] for part in state]
            x, final = layer(x, tuple(parts) if kind == "LSTM" else parts[0])
            finals.append(final if kind == "LSTM" else (final,))
        return x, [torch.cat(parts) for parts in zip(*finals, strict=True)]

    want = outcome(seeded(layered), weights, x, state)
    for core.loop in (False, True):
        assert_close(outcome(seeded(core), weights, x, state), want, 1e-12)
        assert not torch.equal(core(x, state)[0], core(x, state)[0])
        core.eval()
        assert_close(outcome(core, weights, x, state), expected(kind, 3, STEPS, BATCH), 1e-12)
        core.train()


@kinds
@ways
def test_one_layer_has_nothing_to_drop_and_no_warning(kind, loop):
    """In training it gives what it gives without dropout."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        core, x, state = make(kind, 1, dropout=0.37, loop=loop)
    assert_close(outcome(core, dict(core.named_parameters()), x, state), expected(kind, 1, STEPS, BATCH), 1e-12)


@kinds
@ways
def test_state_keeps_its_dtype_under_autocast(kind, loop):
    """Products in bfloat16, the carried state in float32, all near the exact values."""
    core, x, state = make(kind, 2, loop=loop)
    core, x, state = core.float(), x.float(), tuple(part.float() for part in state)
    with torch.autocast("cpu", torch.bfloat16):
        output, final = core(x, state)
    want = expected(kind, 2, STEPS, BATCH)
    assert [part.dtype for part in final] == [torch.float32] * len(state)
    results = {"output": output, **{f"final state {i}": part for i, part in enumerate(final)}}
    assert_close(results, {name: want[name] for name in results}, 0.02)


@kinds
def test_state_dicts_of_loop_and_library_are_interchangeable(kind):
    """Same names, torch.nn's, and the same results after loading either into the other."""
    library, x, state = make(kind, 3)
    loop, _, _ = make(kind, 3, loop=True, seed=2)
    assert list(library.state_dict()) == [f"rnn.{name}" for name in TORCH[kind](EMSIZE, NHID, 3).state_dict()]
    loop.load_state_dict(library.state_dict())
    assert_close(outcome(loop, dict(loop.named_parameters()), x, state), expected(kind, 3, STEPS, BATCH), 1e-12)
    fresh, _, _ = make(kind, 3, seed=3)
    fresh.load_state_dict(loop.state_dict())
    assert torch.equal(fresh(x, state)[0], library(x, state)[0])


@pytest.mark.parametrize("nlayers", (1, 2))
def test_large_lstms_train_in_bfloat16_by_our_own_recurrence(monkeypatch, nlayers):
    """Only on a training step under autocast; outputs, states and gradients are those of float32 but for rounding."""
    torch.manual_seed(8)
    core = RNN("LSTM", emsize=5, nhid=7, nlayers=nlayers)
    x, state = torch.randn(11, 3, 5), core.initial_state(3)
    calls = []
    monkeypatch.setattr(rnn, "lstm", lambda *arguments: (calls.append(1), lstm(*arguments))[1])

    def run():
        output, final = core(x, state)
        gradients = torch.autograd.grad((output.float() ** 2).sum() + final[1].sum(), list(core.parameters()))
        return [output, *final, *gradients]

    exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        run()
        monkeypatch.setattr(rnn, "OWN_LSTM", 7)
        with torch.no_grad():
            core(x, state)
        assert not calls
        rounded = run()
    assert len(calls) == nlayers
    assert {part.dtype for part in rounded} == {torch.float32}
    names = ["output", "h", "c", *dict(core.named_parameters())]
    errors = {n: ((a - b).norm() / b.norm()).item() for n, a, b in zip(names, rounded, exact, strict=True)}
    assert not {name: error for name, error in errors.items() if not error < 2e-2}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_TANH"])
def test_gradients_in_evaluation_mode_do_not_need_the_module(kind, monkeypatch):
    """On a GPU the module's kernel has none then; the same output and gradient by way of the library's function."""
    torch.manual_seed(0)
    core = RNN(kind, 5, 7, 2, dropout=0.5)
    x, state = torch.randn(11, 3, 5, requires_grad=True), core.initial_state(3)
    twin = RNN(kind, 5, 7, 2)
    twin.load_state_dict(core.state_dict())
    expected, _ = twin(x, state)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    core.eval()
    monkeypatch.setattr(core.rnn, "forward", None)
    output, _ = core(x, state)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), x)[0], gradient)
    with torch.no_grad(), pytest.raises(TypeError):
        core(x, state)
