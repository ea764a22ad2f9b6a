"""QRNN layers against their equations in float64; the seed's call; packed and bidirectional sequences; the core."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from models import QRNN, LanguageModel, QRNNCore, QRNNLayer
from models.forget_mult.pooling import CANDIDATES, MODES

STEPS, BATCH, EMSIZE, NHID = 7, 3, 5, 11
WINDOWS = (1, 2, 3)


def layer_by_hand(layer, x, c, previous, update, keep):
    """h and c after the last step by the equations of the class: one example, one step at a time.

    x (T, B, I), c (B, H), previous (window - 1, B, I), update (T, B, H) or None, all float64.
    """
    weight, bias = layer.linear.weight, layer.linear.bias
    size, kinds, steps, window = layer.hidden_size, len(layer.linear.weight) // layer.hidden_size, len(x), layer.window
    nonlinearity = {
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "softplus": lambda z: (1 + z.exp()).log(),
        "exp": torch.exp,
    }
    rows = []
    for b in range(x.shape[1]):
        state, hs = c[b], [None] * steps
        for t in reversed(range(steps)) if layer.reverse else range(steps):
            inputs = []
            for back in range(window):
                at = t + back if layer.reverse else t - back
                if 0 <= at < steps:
                    inputs.append(x[at, b])
                else:
                    inputs.append(previous[at - steps, b] if layer.reverse else previous[at, b])
            y = weight @ torch.cat(inputs)
            y = y if bias is None else y + bias
            gates = [y[k * size : (k + 1) * size] for k in range(kinds)]
            z, f = nonlinearity[layer.candidate](gates[0]), 1 / (1 + (-gates[1]).exp())
            new = f * state + z / (1 + (-gates[3]).exp()) if layer.mode == "ifo" else f * z + (1 - f) * state
            new = keep * new + (1 - keep) * state
            state = new if update is None else torch.where(update[t, b], new, state)
            hs[t] = state / (1 + (-gates[2]).exp()) if layer.mode != "f" else state
        rows.append((torch.stack(hs), state))
    return torch.stack([h for h, _ in rows], 1), torch.stack([state for _, state in rows])


def make(
    mode="fo", window=2, reverse=False, candidate="tanh", zoneout=0.0, bias=True, steps=STEPS, batch=BATCH, backend=None
):
    """A layer in float64, x, c and the inputs before the first step."""
    torch.manual_seed(4)
    layer = QRNNLayer(
        EMSIZE,
        NHID,
        False,
        zoneout,
        window,
        mode=mode,
        candidate=candidate,
        bias=bias,
        reverse=reverse,
        backend=backend,
    )
    leaves = [
        torch.randn(shape, dtype=torch.float64)
        for shape in ((steps, batch, EMSIZE), (batch, NHID), (window - 1, batch, EMSIZE))
    ]
    return layer.double(), leaves


def outcome(compute, layer, leaves):
    """h, c and every gradient of a fixed mix of them, by name."""
    leaves = [leaf.detach().to(layer.linear.weight.dtype).requires_grad_() for leaf in leaves]
    parts = compute(*leaves)
    random = torch.Generator().manual_seed(5)
    mixes = [torch.randn(part.shape, generator=random, dtype=torch.float64).to(part.dtype) for part in parts]
    named = {**dict(layer.named_parameters()), "x": leaves[0], "c": leaves[1]}
    if layer.window > 1:
        named["previous"] = leaves[2]
    gradients = torch.autograd.grad(
        sum((m * part).sum() for m, part in zip(mixes, parts, strict=True)), [*named.values()]
    )
    return dict(zip(("h", "last c", *named), (*parts, *gradients), strict=True))


def assert_close(got, want, tolerance=1e-12):
    assert got.keys() == want.keys()
    errors = {name: ((got[name].double() - part).norm() / part.norm()).item() for name, part in want.items()}
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


CASES = list(itertools.product(MODES, WINDOWS, (False, True)))


@pytest.mark.parametrize(("mode", "window", "reverse"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-12), (torch.float32, 3e-6)), ids=("f64", "f32"))
def test_equations(mode, window, reverse, dtype, tolerance):
    """Output, state, every gradient, with c and the inputs before the first step given."""
    layer, leaves = make(mode, window, reverse)
    want = outcome(lambda *given: layer_by_hand(layer, *given, None, 1.0), layer, leaves)
    layer.to(dtype)
    assert_close(outcome(lambda *given: layer.walk(*given)[:2], layer, leaves), want, tolerance)


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("bias", (True, False))
def test_candidates_and_bias(candidate, bias):
    layer, leaves = make(candidate=candidate, bias=bias)
    want = outcome(lambda *given: layer_by_hand(layer, *given, None, 1.0), layer, leaves)
    assert_close(outcome(lambda *given: layer.walk(*given)[:2], layer, leaves), want)


@pytest.mark.parametrize(("steps", "batch"), ((1, BATCH), (STEPS, 1), (1, 1)))
def test_one_step_and_one_column(steps, batch):
    layer, leaves = make(steps=steps, batch=batch, window=3)
    want = outcome(lambda *given: layer_by_hand(layer, *given, None, 1.0), layer, leaves)
    assert_close(outcome(lambda *given: layer.walk(*given)[:2], layer, leaves), want)


@pytest.mark.parametrize("mode", MODES)
def test_zoneout(mode):
    """In training a random part of the units keeps its value; in evaluation the expected part of an update is made."""
    layer, leaves = make(mode, zoneout=0.3)

    def ours(*given):
        torch.manual_seed(6)
        return layer.walk(*given)[:2]

    torch.manual_seed(6)
    update = torch.rand(STEPS, BATCH, NHID) >= 0.3
    assert 0.6 < update.float().mean() < 0.8
    want = outcome(lambda *given: layer_by_hand(layer, *given, update, 1.0), layer, leaves)
    assert_close(outcome(ours, layer, leaves), want)
    layer.eval()
    want = outcome(lambda *given: layer_by_hand(layer, *given, None, 0.7), layer, leaves)
    assert_close(outcome(ours, layer, leaves), want)
    assert torch.equal(layer(leaves[0])[0], layer(leaves[0])[0])


@pytest.mark.parametrize("backend", ("reference", "cpu", "scan", "torch"))
def test_backends_agree(backend):
    layer, leaves = make("ifo", backend=backend)
    want = outcome(lambda *given: layer_by_hand(layer, *given, None, 1.0), layer, leaves)
    assert_close(outcome(lambda *given: layer.walk(*given)[:2], layer, leaves), want, 1e-10)


@pytest.mark.parametrize(("mode", "window", "reverse"), CASES)
def test_chunks_equal_the_whole(mode, window, reverse):
    """Chunks shorter than the window, too; state and inputs carried, gradients through them."""
    layer, (x, c, previous) = make(mode, window, reverse)
    x.requires_grad_()
    whole, last, rest = layer.walk(x, c, previous)
    outputs, chunks = [], x.split((1, 1, 4, 1))
    for chunk in reversed(chunks) if reverse else chunks:
        output, c, previous = layer.walk(chunk, c, previous)
        outputs.append(output)
    joined = torch.cat(outputs[::-1] if reverse else outputs)
    for got, want in ((joined, whole), (c, last), (previous, rest)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    mixing = torch.randn_like(whole)
    torch.testing.assert_close(*(torch.autograd.grad((part * mixing).sum(), x)[0] for part in (joined, whole)))


def test_saved_inputs():
    """save_prev_x carries the window over a chunk's end, without gradients, until reset."""
    layer, (x, _, _) = make(window=3)
    layer.save_prev_x = True
    whole = layer.walk(x)[0]
    layer(x)
    layer.reset()
    first, hidden = layer(x[:1])
    second, hidden = layer(x[1:4], hidden)
    third, _ = layer(x[4:], hidden[0])
    torch.testing.assert_close(torch.cat([first, second, third]), whole)
    assert not layer.prevX.requires_grad
    kept, _ = layer(x)
    assert not torch.allclose(kept, whole)
    layer.reset()
    assert torch.equal(layer(x)[0], whole)
    layer.save_prev_x = False
    layer.reset()
    layer(x)
    assert layer.prevX is None


def test_output_gate_and_mode():
    """A mode that is given beats output_gate; weights have the seed's name and shape."""
    assert QRNNLayer(5, 7).mode == "fo" and QRNNLayer(5, 7, output_gate=False).mode == "f"
    assert QRNNLayer(5, 7, output_gate=False, mode="ifo").mode == "ifo"
    shapes = {name: tuple(part.shape) for name, part in QRNN(5, 7, 2, window=2).state_dict().items()}
    assert shapes == {
        "layers.0.linear.weight": (21, 10), "layers.0.linear.bias": (21,),
        "layers.1.linear.weight": (21, 14), "layers.1.linear.bias": (21,),
    }  # fmt: skip
    assert QRNNLayer(5).hidden_size == QRNN(5).hidden_size == 5


def test_stack_is_its_layers():
    """Layers in turn, each with its own hidden state; layers that are given are used."""
    torch.manual_seed(1)
    layers = [QRNNLayer(EMSIZE, NHID, window=2), QRNNLayer(NHID, 13), QRNNLayer(13, NHID, mode="ifo")]
    qrnn = QRNN(EMSIZE, NHID, layers=layers)
    x = torch.randn(STEPS, BATCH, EMSIZE)
    assert qrnn.num_layers == 3
    h = x
    for layer in layers:
        h, _ = layer(h)
    layers[1] = QRNNLayer(NHID, NHID)
    qrnn = QRNN(EMSIZE, NHID, layers=layers[:2])
    hidden = torch.randn(2, BATCH, NHID)
    first, c0 = layers[0](x, hidden[0])
    second, c1 = layers[1](first, hidden[1])
    output, last = qrnn(x, hidden)
    assert torch.equal(output, second) and torch.equal(last, torch.cat([c0, c1]))


def test_batch_first_and_dropout():
    torch.manual_seed(1)
    qrnn = QRNN(EMSIZE, NHID, 2, batch_first=True, dropout=0.5)
    x = torch.randn(BATCH, STEPS, EMSIZE)
    output, hidden = qrnn(x)
    assert output.shape == (BATCH, STEPS, NHID) and hidden.shape == (2, BATCH, NHID)
    assert not torch.equal(output, qrnn(x)[0])
    qrnn.eval()
    assert torch.equal(qrnn(x)[0], qrnn(x)[0])
    qrnn.batch_first = False
    torch.testing.assert_close(qrnn(x.transpose(0, 1))[0].transpose(0, 1), QRNN.forward(_batch_first(qrnn), x)[0])


def _batch_first(qrnn):
    qrnn.batch_first = True
    return qrnn


@pytest.mark.parametrize("window", WINDOWS)
def test_bidirectional_is_both_directions_side_by_side(window):
    """h forwards and h of the sequence turned round; hidden as nn.LSTM orders it."""
    torch.manual_seed(2)
    qrnn = QRNN(EMSIZE, NHID, 2, bidirectional=True, window=window).double()
    x, hidden = torch.randn(STEPS, BATCH, EMSIZE).double(), torch.randn(4, BATCH, NHID).double()
    output, last = qrnn(x, hidden)
    assert output.shape == nn.LSTM(EMSIZE, NHID, 2, bidirectional=True)(x.float())[0].shape and last.shape == (
        4,
        BATCH,
        NHID,
    )
    h = x
    for number in range(2):
        there, back = qrnn.layers[number], QRNNLayer(h.shape[2], NHID, window=window).double()
        back.load_state_dict(qrnn.reverse_layers[number].state_dict())
        forwards, c = there(h, hidden[2 * number])
        backwards, d = back(h.flip(0), hidden[2 * number + 1])
        torch.testing.assert_close(last[2 * number : 2 * number + 2], torch.cat([c, d]))
        h = torch.cat([forwards, backwards.flip(0)], 2)
    torch.testing.assert_close(output, h)


@pytest.mark.parametrize(
    ("bidirectional", "window", "mode"), list(itertools.product((False, True), WINDOWS, ("fo", "ifo")))
)
@pytest.mark.parametrize("sort", (True, False))
def test_packed_sequences_equal_each_sequence_alone(bidirectional, window, mode, sort):
    """Outputs, final states, gradients; padding is never seen."""
    torch.manual_seed(3)
    qrnn = QRNN(EMSIZE, NHID, 2, bidirectional=bidirectional, window=window, mode=mode).double()
    lengths = (7, 5, 5, 1) if sort else (5, 1, 7, 5)
    sequences = [torch.randn(length, EMSIZE, dtype=torch.float64, requires_grad=True) for length in lengths]
    hidden = torch.randn(4 if bidirectional else 2, 4, NHID, dtype=torch.float64)
    packed = pack_sequence(sequences, enforce_sorted=sort)
    output, last = qrnn(packed, hidden)
    assert isinstance(output, PackedSequence) and torch.equal(output.batch_sizes, packed.batch_sizes)
    padded, found = pad_packed_sequence(output)
    assert found.tolist() == list(lengths)
    own = []
    for number, sequence in enumerate(sequences):
        alone, state = qrnn(sequence[:, None], hidden[:, number, None].contiguous())
        torch.testing.assert_close(padded[: lengths[number], number], alone[:, 0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(last[:, number], state[:, 0], rtol=1e-12, atol=1e-12)
        own.append(torch.autograd.grad(alone.sin().sum() + state.sum(), sequence)[0])
    together = torch.autograd.grad(output.data.sin().sum() + last.sum(), sequences)
    for got, want in zip(together, own, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_packed_sequences_of_an_lstm_can_be_replaced():
    """The same PackedSequence goes into nn.LSTM and into QRNN, and comes out in the same form."""
    x = torch.randn(STEPS, BATCH, EMSIZE)
    packed = pack_padded_sequence(x, [2, 7, 4], enforce_sorted=False)
    theirs, (h, _) = nn.LSTM(EMSIZE, NHID)(packed)
    ours, c = QRNN(EMSIZE, NHID)(packed)
    assert ours.data.shape == theirs.data.shape and c.shape == h.shape
    assert torch.equal(ours.sorted_indices, theirs.sorted_indices)


def test_bfloat16_weights():
    """Two layers converted as nn.LSTM may be: its dtype comes out, near float32."""
    torch.manual_seed(3)
    module, x = QRNN(5, 7, 2, window=2).eval(), torch.randn(11, 3, 5)
    want = module(x)[0]
    got = module.bfloat16()(x.bfloat16())[0]
    assert got.dtype == torch.bfloat16 and (got.float() - want).norm() < 0.02 * want.norm()


def test_what_is_refused():
    for call, message in (
        (lambda: QRNNLayer(5, window=0), "window of 1"),
        (lambda: QRNNLayer(5, mode="foi"), "unknown mode 'foi': expected one of f, fo, ifo"),
        (lambda: QRNNLayer(5, candidate="relu"), "unknown candidate"),
        (lambda: QRNNLayer(5, backend="cuda"), "unknown backend"),
        (lambda: QRNN(5, bidirectional=True, save_prev_x=True), "bidirectional goes with neither"),
        (lambda: QRNN(5, save_prev_x=True)(pack_sequence([torch.zeros(2, 5)])), "without save_prev_x"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_example_of_the_seed():
    """Its README's example with the import line changed, without .cuda()."""
    seq_len, batch_size, hidden_size = 7, 20, 256
    X = torch.autograd.Variable(torch.rand(seq_len, batch_size, hidden_size), requires_grad=True)
    qrnn = QRNN(hidden_size, hidden_size, num_layers=2, dropout=0.4)
    output, hidden = qrnn(X)
    assert list(output.size()) == [7, 20, 256] and list(hidden.size()) == [2, 20, 256]


def test_the_multi_gpu_example_of_the_seed():
    """Its model over DataParallel(dim=1): what comes out has time first and batch second, states too."""
    embedding, rnn = nn.Embedding(100, 16), nn.DataParallel(QRNN(16, 16, num_layers=3), dim=1)
    x = torch.randint(0, 100, (8, 50))
    out, hidden = rnn(embedding(x))
    assert out[:-1].shape == (7, 50, 16) and hidden.shape == (3, 50, 16)


def test_compiles_without_a_break():
    """A layer under torch.compile with fullgraph: the same results."""
    layer, leaves = make("ifo", window=2)
    compiled_layer = torch.compile(lambda *given: layer.walk(*given)[:2], fullgraph=True, backend="aot_eager")
    want = outcome(lambda *given: layer.walk(*given)[:2], layer, leaves)
    assert_close(outcome(compiled_layer, layer, leaves), want, 1e-10)
    torch.compiler.reset()


@pytest.mark.parametrize("window", WINDOWS)
def test_core(window):
    """State in, state out: chunks equal the whole, names and shapes of the state, dtype under autocast."""
    torch.manual_seed(7)
    core = QRNNCore(EMSIZE, NHID, 2, window=window, zoneout=0.2).eval()
    state = core.initial_state(BATCH)
    shapes = []
    for size in (EMSIZE, NHID):
        shapes += [(1, BATCH, NHID), (window - 1, BATCH, size)][: 2 if window > 1 else 1]
    assert [tuple(part.shape) for part in state] == shapes and not any(part.any() for part in state)
    x = torch.randn(STEPS, BATCH, EMSIZE)
    whole, last = core(x, state)
    qrnn = QRNN(EMSIZE, NHID, 2, window=window, zoneout=0.2).eval()
    qrnn.load_state_dict(core.state_dict())
    torch.testing.assert_close(qrnn(x)[0], whole)
    outputs, carried = [], state
    for chunk in x.split((1, 2, 4)):
        output, carried = core(chunk, carried)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(carried, last, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        low, states = core(x, state)
    assert {part.dtype for part in states} == {torch.float32}
    assert ((low - whole).norm() / whole.norm()).item() < 0.02


def test_parameters_of_the_paper():
    """17.7 million at its sizes on Penn Treebank."""
    model = LanguageModel(10000, QRNNCore(640, 640, 2, window=2), tied=False)
    expected = 2 * 10000 * 640 + 10000 + 2 * (3 * 640 * 2 * 640 + 3 * 640)
    assert model.num_params() == expected == 17_729_040
