"""The AWD core and its language model: weight drop through every road, regularizers, sizes, against equations."""

import copy
import itertools

import pytest
import torch
from torch import nn

from models import AWD, build, rnn
from models.awd import MODELS, RecurrentLayer
from models.dropout import unit_drop
from models.language_model import LanguageModel
from models.softmax import IGNORE

STEPS, BATCH, WORDS, EMSIZE, NHID, LAYERS = 7, 5, 31, 11, 13, 3

kinds = pytest.mark.parametrize("model", MODELS)


def make(model, tied=True, **changes):
    """A core and an input in float64."""
    torch.manual_seed(1)
    core = AWD(model, EMSIZE, NHID, LAYERS, tied, **changes).double()
    return core, torch.randn(STEPS, BATCH, EMSIZE, dtype=torch.float64)


def language_model(model="LSTM", **changes):
    """A language model of the family, tokens and targets."""
    torch.manual_seed(2)
    core = {"model": model, "emsize": EMSIZE, "nhid": NHID, "nlayers": LAYERS, "tied": changes.get("tied", True)}
    core |= {name: changes.pop(name) for name in ("dropouth", "wdrop", "wdrop_units", "loop") if name in changes}
    config = {"family": "awd", "core": core, "vocab_size": WORDS, "tied": True, "locked": True, **changes}
    return build(config), *torch.randint(WORDS, (2, STEPS, BATCH))


def stack_by_hand(core, x, state):
    """The layers by torch's own modules, or for the QRNN by its equations, without dropout."""
    state = iter(state)
    for number, layer in enumerate(core.layers):
        if isinstance(layer, RecurrentLayer):
            own = [next(state) for _ in range(layer.states)]
            x, _ = layer.rnn(x, tuple(own) if layer.states == 2 else own[0])
            continue
        c, previous = next(state)[0], next(state) if number == 0 else None
        outputs = []
        for t, now in enumerate(x):
            before = x[t - 1] if t else previous[0] if number == 0 else None
            source = now if number else torch.cat([now, before], 1)
            z, f, o = (source @ layer.linear.weight.t() + layer.linear.bias).chunk(3, 1)
            f = f.sigmoid()
            c = f * z.tanh() + (1 - f) * c
            outputs.append(o.sigmoid() * c)
        x = torch.stack(outputs)
    return x


@kinds
@pytest.mark.parametrize("loop", (False, True), ids=("library", "loop"))
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
def test_equals_torch_layer_by_layer(model, loop, tied):
    """Output and every gradient, with a state that is not zero; its sizes: emsize - nhid - ... - emsize when tied."""
    core, x = make(model, tied, loop=loop)
    x.requires_grad_()
    state = tuple(torch.randn_like(part, requires_grad=True) for part in core.initial_state(BATCH))
    output, _ = core(x, state)
    assert output.shape == (STEPS, BATCH, EMSIZE if tied else NHID) and core.output_size == output.shape[2]
    want = stack_by_hand(core, x, state)
    torch.testing.assert_close(output, want, rtol=1e-10, atol=1e-12)
    leaves = {"x": x, **dict(core.named_parameters()), **{f"state {n}": part for n, part in enumerate(state)}}
    slope = torch.randn_like(output)
    ours, theirs = (torch.autograd.grad(out, leaves.values(), slope) for out in (output, want))
    for name, a, b in zip(leaves, ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm(), name


@kinds
def test_chunks_equal_the_whole(model):
    """State goes in and comes out: T = 1 at the end, B = 1 alone."""
    core, x = make(model)
    state = core.initial_state(BATCH)
    whole, last = core(x, state)
    outputs, carried = [], state
    for chunk in x.split((2, 4, 1)):
        output, carried = core(chunk, carried)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole)
    for a, b in zip(carried, last, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(core(x[:, 2:3], core.initial_state(1))[0], whole[:, 2:3])


@pytest.mark.parametrize("model", ("LSTM", "GRU"))
@pytest.mark.parametrize("loop", (False, True), ids=("library", "loop"))
def test_weight_drop_spares_the_first_step(model, loop):
    """From a zero state the hidden-to-hidden weights do nothing in step 1: two passes agree there, and not later."""
    core, x = make(model, wdrop=0.5, loop=loop)
    first, second = (core(x, core.initial_state(BATCH))[0] for _ in range(2))
    torch.testing.assert_close(first[0], second[0])
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(first[1:], second[1:], strict=True))


@kinds
def test_one_mask_for_all_steps(model):
    """A window in one call equals one with the dropped weights written into the layers: no other mask is drawn."""
    core, x = make(model, wdrop=0.4)
    state = torch.get_rng_state()
    output, _ = core(x, core.initial_state(BATCH))
    torch.set_rng_state(state)
    fixed = copy.deepcopy(core).eval()
    with torch.no_grad():
        for layer in fixed.layers:
            layer.dropped.copy_(nn.functional.dropout(layer.dropped, 0.4))
    torch.testing.assert_close(fixed(x, fixed.initial_state(BATCH))[0], output)


@pytest.mark.parametrize(("model", "road"), [("LSTM", "compiled"), *itertools.product(("LSTM", "GRU"), (False, True))])
def test_dropped_units_do_not_come_into_the_recurrence(model, road, monkeypatch):
    """One choice of units for all steps and columns, on each road the same as their columns of W_hh written as zeros.

    The weights get their gradient through it. road: our own kernel in float32, the library's, the loop.
    """
    monkeypatch.setattr(rnn, "own_lstm", lambda *_: road == "compiled")
    core, x = make(model, wdrop=0.4, wdrop_units=True, loop=road is True)
    core, x = core.float(), x.float()
    random = torch.get_rng_state()
    output, _ = core(x, core.initial_state(BATCH))
    output.square().sum().backward()
    torch.set_rng_state(random)
    fixed = copy.deepcopy(core).eval()
    fixed.zero_grad()
    gone = []
    with torch.no_grad():
        for layer in fixed.layers:
            few, units = unit_drop(layer.dropped, 0.4, True)
            layer.dropped.zero_().index_copy_(1, units, few)
            gone.append(torch.ones(layer.hidden_size, dtype=torch.bool).index_fill(0, units, False))
    again, _ = fixed(x, fixed.initial_state(BATCH))
    torch.testing.assert_close(again, output, rtol=1e-5, atol=1e-6)
    again.square().sum().backward()
    for number, (layer, other, none) in enumerate(zip(core.layers, fixed.layers, gone, strict=True)):
        part = len(none) / (~none).sum()
        want = other.dropped.grad.masked_fill(none, 0) * part
        assert (layer.dropped.grad - want).norm() < 1e-3 * want.norm(), number
        assert not layer.dropped.grad[:, none].any() and none.any(), number


def test_a_qrnns_weights_are_dropped_one_by_one_either_way():
    """It has no hidden-to-hidden weights."""
    outputs = []
    for units in (False, True):
        core, x = make("QRNN", wdrop=0.4, wdrop_units=units)
        outputs.append(core(x, core.initial_state(BATCH))[0])
    assert torch.equal(*outputs)


@kinds
def test_raw_weights_are_untouched_and_get_the_gradient(model):
    """A forward pass changes no parameter; masked elements get no gradient, the others one."""
    core, x = make(model, wdrop=0.5)
    before = copy.deepcopy(core.state_dict())
    output, _ = core(x, core.initial_state(BATCH))
    output.pow(2).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in core.state_dict().items())
    for number, layer in enumerate(core.layers):
        part = (layer.dropped.grad != 0).double().mean()
        assert 0.35 < part < 0.65, f"layer {number}: {part}"


@kinds
def test_train_eval_train_state_dict_and_copies(model):
    """Evaluation twice is equal and without masks; training afterwards drops again (the authors' no longer does)."""
    core, x = make(model, wdrop=0.5, dropouth=0.2)
    names = list(core.state_dict())
    trained = core(x, core.initial_state(BATCH))[0]
    core.eval()
    quiet = [core(x, core.initial_state(BATCH))[0] for _ in range(2)]
    assert torch.equal(*quiet) and not torch.equal(quiet[0], trained)
    core.train()
    again = [core(x, core.initial_state(BATCH))[0] for _ in range(2)]
    assert not torch.equal(*again)
    assert list(core.state_dict()) == names and not any("raw" in name for name in names)
    twin = copy.deepcopy(core).eval()
    torch.testing.assert_close(twin(x, core.initial_state(BATCH))[0], quiet[0])
    other, _ = make(model)
    other.load_state_dict(core.state_dict())
    torch.testing.assert_close(other.eval()(x, core.initial_state(BATCH))[0], quiet[0])
    low = copy.deepcopy(core).to(torch.float32).eval()
    torch.testing.assert_close(low(x.float(), low.initial_state(BATCH))[0].double(), quiet[0], rtol=1e-4, atol=1e-5)


def test_dropouth_is_between_layers_and_locked():
    """With all but one unit of a mask gone, what the next layer sees is constant over time where it is 0."""
    core, x = make("LSTM", dropouth=0.5)
    seen = []
    carry = core.layers[1].carry
    core.layers[1].carry = lambda inputs, *rest: seen.append(inputs) or carry(inputs, *rest)
    core(x, core.initial_state(BATCH))
    zero = seen[0] == 0
    assert torch.equal(zero, zero[:1].expand_as(zero)) and 0.3 < zero.double().mean() < 0.7
    assert not torch.equal(zero[:, 0], zero[:, 1])


@pytest.mark.parametrize("norm", ("mean", "l2"))
def test_ar_and_tar_are_their_equations(norm):
    """Section 4.6, both norms, from the definitions; nothing of them in evaluation or for a single step's TAR."""
    model, tokens, targets = language_model(alpha=2.0, beta=3.0, ar_norm=norm, dropout=0.4)
    state = model.initial_state(BATCH)
    torch.manual_seed(9)
    regularizer = model(tokens, targets, state)[1].item()
    torch.manual_seed(9)
    hidden, _ = model.hidden(tokens, state)
    dropped = model.drop(hidden, 0.4)
    ar = tar = 0.0
    for t in range(STEPS):
        for b in range(BATCH):
            one = dropped[t, b].double()
            ar += (one**2).mean().item() if norm == "mean" else (one**2).sum().sqrt().item()
            if t:
                step = (hidden[t, b] - hidden[t - 1, b]).double()
                tar += (step**2).mean().item() if norm == "mean" else (step**2).sum().sqrt().item()
    want = 2 * ar / (STEPS * BATCH) + 3 * tar / ((STEPS - 1) * BATCH)
    assert regularizer == pytest.approx(want, rel=1e-5)
    assert model(tokens[:1], targets[:1], state)[1].isfinite()
    assert model.eval()(tokens, targets, state)[1].item() == 0


@pytest.mark.parametrize("part", ("alpha", "beta"))
@pytest.mark.parametrize("norm", ("mean", "l2"))
def test_ar_and_tar_change_the_gradient(part, norm):
    """A peer computes them on detached numbers; here the gradient of the core moves, and is finite at h = 0."""
    gradients = []
    for value in (0.0, 2.0):
        model, tokens, targets = language_model(**{part: value}, ar_norm=norm)
        loss, regularizer, _, _ = model(tokens, targets, model.initial_state(BATCH))
        (loss / targets.numel() + regularizer).sum().backward()
        gradients.append(model.core.layers[-1].dropped.grad)
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()
    with torch.no_grad():
        for parameter in model.core.parameters():
            parameter.zero_()
    model.zero_grad()
    model(tokens, targets, model.initial_state(BATCH))[1].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.core.parameters())


@kinds
@pytest.mark.parametrize(
    "change",
    [{"dropoute": 0.3}, {"dropouti": 0.3}, {"dropout": 0.3}, {"dropouth": 0.3}, {"wdrop": 0.3}],
    ids=lambda change: next(iter(change)),
)
def test_every_dropout_is_of_training_only(model, change):
    """Evaluated twice the loss is the same; in training it is not."""
    net, tokens, targets = language_model(model, **change)
    state = net.initial_state(BATCH)
    losses = [net(tokens, targets, state)[0].item() for _ in range(2)]
    net.eval()
    quiet = [net(tokens, targets, state)[0].item() for _ in range(2)]
    assert losses[0] != losses[1] and quiet[0] == quiet[1]


def test_the_output_matrix_is_not_dropped():
    """Embedding dropout takes words from the input only, though head and embedding share one matrix."""
    model, _, targets = language_model(dropoute=0.9)
    hidden = torch.randn(STEPS, BATCH, EMSIZE)
    assert torch.equal(model.head.loss(hidden, targets), model.head.loss(hidden, targets))
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("model", "sizes", "words", "parameters"),
    [
        ("LSTM", (400, 1150, 3), 10000, 24_221_600),
        ("QRNN", (400, 1550, 4), 10000, 24_020_150),
        ("LSTM", (400, 1150, 3), 33278, 33_556_078),
        ("QRNN", (400, 1550, 4), 33278, 33_354_628),
    ],
)
def test_number_of_parameters_as_published(model, sizes, words, parameters):
    """On Penn Treebank and WikiText-2."""
    with torch.device("meta"):
        assert LanguageModel(words, AWD(model, *sizes, tied=True), tied=True).num_params() == parameters


@kinds
def test_bfloat16_products_leave_state_and_loss_in_float32(model):
    """Under autocast, within its rounding of float32, gradients too."""
    net, tokens, targets = language_model(model)
    state = net.initial_state(BATCH)
    losses, gradients = [], []
    for amp in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss, _, _, after = net(tokens, targets, state)
        loss.sum().backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
        assert {part.dtype for part in after} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 0.05


def test_ignored_targets_count_nothing():
    """As in every family."""
    model, tokens, targets = language_model()
    targets[3] = IGNORE
    assert model(tokens, targets, model.initial_state(BATCH))[2].item() == (STEPS - 1) * BATCH
