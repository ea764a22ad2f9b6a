"""The language model: what it holds, what it shares, and its loss against sums in float64, target by target."""

import copy
import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from models import ModelError, build
from models.softmax import IGNORE

STEPS, BATCH, WORDS, EMSIZE, NHID = 5, 3, 19, 7, 11
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

kinds = pytest.mark.parametrize("kind", tuple(GATES))
ties = pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))


def configuration(kind="LSTM", tied=False, layers=2, emsize=EMSIZE, nhid=NHID, vocab_size=WORDS, **arguments):
    """What models.build takes; tied models have one size, the hidden one."""
    core = {"model": kind, "emsize": nhid if tied else emsize, "nhid": nhid, "nlayers": layers}
    return {"family": "rnn", "core": core, "vocab_size": vocab_size, "tied": tied, **arguments}


def make(*args, **arguments):
    """A model in float64 with a bias that is not zero, tokens, targets of which some are ignored, and a state."""
    torch.manual_seed(1)
    model = build(configuration(*args, **arguments)).double()
    torch.nn.init.normal_(model.head.bias)
    tokens, targets = torch.randint(model.vocab_size, (2, STEPS, BATCH))
    targets[2] = targets[4, 1] = IGNORE
    return model, tokens, targets, tuple(torch.randn_like(part) for part in model.initial_state(BATCH))


def loss_by_hand(model, hidden, targets):
    """Sum of -log p over the scored targets, from hidden vectors, in float64."""
    rows, bias = model.head.weight.tolist(), model.head.bias.tolist()
    total = 0.0
    for t, b in (targets != IGNORE).nonzero().tolist():
        vector = hidden[t, b].tolist()
        logits = [math.fsum(map(float.__mul__, row, vector)) + shift for row, shift in zip(rows, bias, strict=True)]
        total += math.log(math.fsum(map(math.exp, logits))) - logits[targets[t, b]]
    return total


@kinds
@ties
@pytest.mark.parametrize("layers", (1, 2, 3))
def test_number_of_parameters_in_closed_form(kind, tied, layers):
    """Embedding, gates with two biases, bias of the head, and the head's matrix unless it is the embedding's."""
    model = build(configuration(kind, tied, layers))
    emsize = NHID if tied else EMSIZE
    core = sum(GATES[kind] * NHID * ((NHID if layer else emsize) + NHID + 2) for layer in range(layers))
    assert model.num_params() == WORDS * emsize + core + WORDS + (0 if tied else WORDS * NHID)
    model.embedding.weight.requires_grad_(False)
    assert model.num_params() == core + WORDS + (0 if tied else WORDS * NHID)


@pytest.mark.parametrize(
    ("size", "layers", "tied", "parameters"), ((300, 1, True, 10739078), (200, 2, False, 13987678))
)
def test_number_of_parameters_as_published(size, layers, tied, parameters):
    """LSTM on the 33,278 words of WikiText-2: the port's tied one and the example's."""
    with torch.device("meta"):
        model = build(configuration("LSTM", tied, layers, size, size, 33278))
    assert model.num_params() == parameters


def test_tied_models_share_one_matrix_whatever_happens_to_them():
    """After building, copying, casting, loading and a step."""
    model, tokens, targets, state = make(tied=True)
    models = {"built and cast to double": model, "copied": copy.deepcopy(model), "cast": copy.deepcopy(model).float()}
    models["loaded"] = build(configuration(tied=True))
    models["loaded"].load_state_dict(model.state_dict())
    models["stepped"] = copy.deepcopy(model)
    models["stepped"](tokens, targets, state)[0].sum().backward()
    torch.optim.SGD(models["stepped"].parameters(), lr=0.1).step()
    assert {name for name, model in models.items() if model.head.weight is not model.embedding.weight} == set()
    assert torch.equal(models["loaded"].head.weight, model.embedding.weight.float())
    assert models["copied"].head.weight is not model.head.weight


def test_untied_models_have_two_matrices():
    """Also where the sizes would allow to share."""
    model = build(configuration(tied=False, emsize=NHID))
    assert model.embedding.weight.data_ptr() != model.head.weight.data_ptr()


def test_sizes_that_cannot_be_tied_are_named():
    """ModelError, one line, with both sizes."""
    config = configuration(emsize=23, nhid=29)
    with pytest.raises(ModelError, match=r"^[^\n]*\b23\b[^\n]*\b29\b[^\n]*$"):
        build({**config, "tied": True})


def test_an_unknown_family_is_named():
    """ModelError with what there is; the configuration is left as it was."""
    config = {**configuration(), "family": "rmx"}
    before = copy.deepcopy(config)
    with pytest.raises(ModelError, match=r"^[^\n]*'rmx'[^\n]*\brnn\b[^\n]*$"):
        build(config)
    assert config == before


def test_building_leaves_the_configuration_as_it_was():
    """It is what the checkpoint keeps."""
    config = configuration()
    before = copy.deepcopy(config)
    build(config)
    assert config == before


@ties
def test_everything_is_trained_by_an_optimizer_of_the_parameters(tied):
    """The head too: a step moves every tensor of the state dict."""
    model, tokens, targets, state = make(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert {"head.weight", "head.bias", "embedding.weight"} < before.keys()
    model(tokens, targets, state)[0].sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]


@kinds
@ties
def test_loss_is_the_sum_over_scored_targets(kind, tied):
    """With carried state; the shapes are those that DataParallel can gather, and the regularizer is nothing yet."""
    model, tokens, targets, state = make(kind, tied)
    loss, regularizer, count, new_state = model(tokens, targets, state)
    words = torch.stack([torch.stack([model.embedding.weight[token] for token in row]) for row in tokens])
    hidden, last = model.core(words, state)
    want = loss_by_hand(model, hidden, targets)
    assert abs(loss.item() - want) < 1e-12 * want
    assert loss.shape == regularizer.shape == count.shape == (1, 1)
    assert regularizer.item() == 0
    assert count.item() == STEPS * BATCH - BATCH - 1
    assert all(map(torch.equal, new_state, last))


@pytest.mark.parametrize(("steps", "batch"), ((1, 3), (5, 1), (1, 1)))
def test_one_step_and_one_column(steps, batch):
    """The loss of a corner of the window."""
    model, tokens, targets, _ = make()
    tokens, targets, state = tokens[:steps, :batch], targets[:steps, :batch], model.initial_state(batch)
    hidden, _ = model.hidden(tokens, state)
    loss, _, count, _ = model(tokens, targets, state)
    want = loss_by_hand(model, hidden, targets)
    assert abs(loss.item() - want) < 1e-12 * want
    assert count.item() == (targets != IGNORE).sum()


def test_windows_and_columns_can_be_cut_anywhere():
    """Two windows with the state carried, and two groups of columns gathered along dim 1, sum to the whole."""
    model, tokens, targets, state = make()
    loss, _, count, last = model(tokens, targets, state)
    first, _, first_count, between = model(tokens[:2], targets[:2], state)
    second, _, second_count, end = model(tokens[2:], targets[2:], between)
    cuts = (slice(0, 1), slice(1, 3))
    parts = [model(tokens[:, cut], targets[:, cut], tuple(part[:, cut] for part in state)) for cut in cuts]
    losses, counts = (torch.cat([part[i] for part in parts], 1) for i in (0, 2))
    states = [torch.cat(halves, 1) for halves in zip(*(part[3] for part in parts), strict=True)]
    torch.testing.assert_close((first + second, end), (loss, last), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((losses.sum(1, keepdim=True), tuple(states)), (loss, last), rtol=1e-12, atol=1e-12)
    assert first_count + second_count == counts.sum() == count


@pytest.mark.parametrize("kind", ("LSTM", "GRU"))
@ties
def test_gradcheck(kind, tied):
    """Every parameter, shared or not, and every tensor of the initial state against finite differences."""
    model, tokens, targets, state = make(kind, tied, emsize=2, nhid=3, vocab_size=5)
    leaves = (*model.parameters(), *(part.requires_grad_() for part in state))
    assert len(leaves) == (10 if tied else 11) + len(state)

    def compute(*_):
        loss, _, _, new_state = model(tokens, targets, state)
        return loss, *new_state

    assert torch.autograd.gradcheck(compute, leaves)


class Sizes(TorchDispatchMode):
    """Inside the `with`: the memory of every tensor of so many elements that an operation returns."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.found = elements, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.elements:
            self.found.add(result.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("cutoffs", (None, [7, 13]), ids=("full", "split"))
def test_a_tied_matrix_has_one_gradient(cutoffs):
    """That of embedding and head together, in the memory of the head's; with the graph kept, twice the same."""
    model, tokens, targets, state = make(tied=True, cutoffs=cutoffs, splitcross=cutoffs is not None)
    hidden, _ = model.core(functional.embedding(tokens, model.embedding.weight), state)
    logs = model.log_probs(hidden)[targets != IGNORE]
    want = torch.autograd.grad(-logs.gather(-1, targets[targets != IGNORE][:, None]).sum(), [*model.parameters()])
    loss = model(tokens, targets, state)[0]
    first = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    with Sizes(model.embedding.weight.numel()) as sizes:
        second = torch.autograd.grad(loss, [*model.parameters()])
    for (name, _), got, again, right in zip(model.named_parameters(), first, second, want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12, msg=name)
        assert torch.equal(got, again), name
    assert sizes.found == {second[0].data_ptr()}


def test_log_probs_are_normalized_and_give_the_loss():
    """What generation draws from is what training scores."""
    model, tokens, targets, state = make()
    log_probs = model.log_probs(model.hidden(tokens, state)[0])
    scored = targets != IGNORE
    loss = -log_probs[scored].gather(-1, targets[scored][:, None]).sum()
    assert log_probs.shape == (STEPS, BATCH, WORDS)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(STEPS, BATCH, dtype=torch.float64))
    torch.testing.assert_close(loss, model(tokens, targets, state)[0].squeeze(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("place", ("dropouti", "dropout"))
def test_dropout_is_of_training_only(place):
    """Of the embedded words or of the output: two passes differ in training and are equal bit for bit in evaluation."""
    model, tokens, targets, state = make(**{place: 0.37})
    plain, *_ = make()
    first, second = (model(tokens, targets, state)[0] for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (model(tokens, targets, state)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, plain(tokens, targets, state)[0])


@pytest.mark.parametrize("place", ("dropouti", "dropout"))
def test_dropout_is_where_it_should_be(place):
    """On the embedded words before the core, or on the output after `hidden`, one mask an element."""
    model, tokens, targets, state = make(**{place: 0.37})
    torch.manual_seed(2)
    loss = model(tokens, targets, state)[0].item()
    torch.manual_seed(2)
    words = model.embedding(tokens)
    output, _ = model.core(functional.dropout(words, 0.37) if place == "dropouti" else words, state)
    torch.manual_seed(2)
    torch.testing.assert_close(model.hidden(tokens, state)[0], output, rtol=1e-12, atol=1e-12)
    torch.manual_seed(2)
    want = loss_by_hand(model, functional.dropout(output, 0.37) if place == "dropout" else output, targets)
    assert abs(loss - want) < 1e-12 * want


@kinds
def test_bfloat16_products_leave_the_loss_in_float32(kind):
    """Under autocast the loss and the state are float32, near the float64 ones, but not equal to the float32 ones."""
    model, tokens, targets, state = make(kind)
    want = model(tokens, targets, state)[0].item()
    model, state = model.float(), tuple(part.float() for part in state)
    full = model(tokens, targets, state)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss, regularizer, _, new_state = model(tokens, targets, state)
    assert {value.dtype for value in (loss, regularizer, *new_state)} == {torch.float32}
    assert abs(full - want) < 1e-5 * want
    assert full != loss.item()
    assert abs(loss.item() - want) < 0.01 * want


@ties
def test_matrices_start_uniform_and_the_bias_at_zero(tied):
    """Within +-0.1 and filling it."""
    model = build(configuration(tied=tied, vocab_size=997))
    matrices = {model.embedding.weight, model.head.weight}
    assert len(matrices) == (1 if tied else 2)
    for matrix in matrices:
        assert 0.099 < matrix.max() <= 0.1
        assert -0.099 > matrix.min() >= -0.1
        assert abs(matrix.mean()) < 0.005
    assert not model.head.bias.any()


@ties
def test_lecun_start(tied):
    """Matrices of variance 1 / inputs, biases 0, an embedding that is not the head's of variance 1."""
    torch.manual_seed(5)
    model = build(configuration("LSTM", tied, emsize=97, nhid=101, vocab_size=503, init="lecun"))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert not parameter.any(), name
        else:
            std = 1.0 if name == "embedding.weight" and not tied else parameter.shape[1] ** -0.5
            assert abs(parameter.std().item() / std - 1) < 0.02, name
            assert abs(parameter.mean().item()) < 0.02 * std, name


@pytest.mark.parametrize("variant", ("paper", "port"))
def test_lecun_start_leaves_what_normalizes_and_gate_constants(variant):
    """Of the RMC: layer norms, the port's of two dimensions, and gate biases are what they are without it."""
    core = {"emsize": 13, "memslots": 2, "headsize": 5, "numheads": 3, "variant": variant}
    models = [
        build({"family": "rmc", "core": core, "vocab_size": 19, "tied": False, "init": init})
        for init in ("uniform", "lecun")
    ]
    states = [model.state_dict() for model in models]
    same = [name for name, value in states[0].items() if torch.equal(value, states[1][name])]
    assert any("norm" in name for name in same) and not any("norm" in name for name in set(states[0]) - set(same))
    assert "embedding.weight" not in same and "head.weight" not in same


def test_lecun_start_leaves_tombstones():
    """A split softmax's are zeros, as it makes them."""
    config = {"family": "rnn", "core": {"model": "LSTM", "emsize": 13, "nhid": 13, "nlayers": 1}, "vocab_size": 19}
    model = build({**config, "tied": True, "splitcross": True, "cutoffs": [7], "init": "lecun"})
    assert model.head.tail_vectors.shape == (1, 13) and not model.head.tail_vectors.any()


SIZES = {"emsize": EMSIZE, "nhid": 401, "nlayers": 2}
CARRIED = {
    "LSTM": ("rnn", {"model": "LSTM", **SIZES}),
    "LSTM loop": ("rnn", {"model": "LSTM", **SIZES, "loop": True}),
    "GRU": ("rnn", {"model": "GRU", **SIZES}),
    "RMC": ("rmc", {"emsize": EMSIZE, "headsize": 5, "numheads": 3}),
    "RMC, port, slots": ("rmc", {"emsize": EMSIZE, "headsize": 5, "numheads": 3, "variant": "port", "memslots": 2}),
    "QRNN": ("qrnn", {**SIZES, "window": 3}),
    "AWD-LSTM": ("awd", {"model": "LSTM", **SIZES, "tied": False, "wdrop": 0.5}),
    "AWD-QRNN": ("awd", {"model": "QRNN", **SIZES, "tied": False, "wdrop": 0.5}),
    "Transformer": ("transformer", {"emsize": 6, "nhead": 2, "nhid": 5, "nlayers": 1, "context": 3}),
}


@pytest.mark.parametrize("amp", (False, True), ids=("float32", "bfloat16"))
@pytest.mark.parametrize(("family", "core"), CARRIED.values(), ids=CARRIED)
def test_the_state_keeps_no_more_than_itself(family, core, amp):
    """It lives until the next window ends; a view of what a whole window made would keep all of that as long."""
    model = build({"family": family, "core": core, "vocab_size": WORDS, "tied": False})
    tokens = torch.randint(WORDS, (STEPS, BATCH))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        *_, state = model(tokens, tokens, model.initial_state(BATCH))
    assert [part.untyped_storage().nbytes() for part in state] == [part.nbytes for part in state]
