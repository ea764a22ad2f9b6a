"""Structured pruning: the smaller model is the larger one with the removed units held at 0."""

import itertools

import pytest
import torch

from models import build
from utils import UserError
from utils.structured import remove_units

STACKS = [
    ("rnn", {"model": "LSTM"}),
    ("rnn", {"model": "LSTM", "loop": True}),
    ("rnn", {"model": "GRU"}),
    ("rnn", {"model": "RNN_TANH"}),
    ("rnn", {"model": "RNN_RELU"}),
    ("qrnn", {"window": 2}),
    ("qrnn", {"window": 3, "mode": "ifo"}),
    ("qrnn", {"window": 1, "mode": "f"}),
    ("awd", {"model": "LSTM"}),
    ("awd", {"model": "GRU"}),
    ("awd", {"model": "QRNN"}),
]


def config_of(family, core, tied, nlayers=3, **more):
    """A configuration of odd sizes; a tied one has equal ones where it must."""
    emsize, nhid = (13, 13) if tied and family != "awd" else (11, 17)
    core = {"emsize": emsize, "nhid": nhid, "nlayers": nlayers, **({"tied": tied} if family == "awd" else {}), **core}
    return {"family": family, "core": core, "vocab_size": 23, "tied": tied, **more}


@pytest.mark.parametrize(("stack", "tied", "nlayers"), list(itertools.product(STACKS, (True, False), (1, 3))))
def test_is_the_model_with_those_units_at_zero(stack, tied, nlayers):
    """Probabilities of both over steps and columns, in float64; sizes as asked."""
    torch.manual_seed(3)
    config = config_of(*stack, tied, nlayers)
    larger = build(config).double().eval()
    for parameter in larger.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    weights = {name: tensor.clone() for name, tensor in larger.state_dict().items()}
    small_config, small_weights, keep = remove_units(config, weights, 0.4)
    smaller = build(small_config).double().eval()
    smaller.load_state_dict(small_weights)
    zeroed = {}
    for name, tensor in weights.items():
        places = keep(name, torch.arange(tensor.numel()).view_as(tensor))
        zeroed[name] = torch.zeros_like(tensor).put_(places, tensor.flatten()[places])
        assert torch.equal(small_weights[name], tensor.flatten()[places])
    larger.load_state_dict(zeroed)
    tokens = torch.randint(23, (7, 5))
    with torch.no_grad():
        got, want = (m.log_probs(m.hidden(tokens, m.initial_state(5))[0]) for m in (smaller, larger))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for name, size in config["core"].items():
        if name == "nhid" and (nlayers > 1 or not (tied and config["family"] == "awd")):
            assert small_config["core"][name] == size - int(0.4 * size)
        elif name == "emsize":
            assert small_config["core"][name] == (size - int(0.4 * size) if tied else size)
    assert smaller.num_params() < build(config).num_params()


def test_the_weakest_units_leave():
    """Those with the least sum of squares of all that they own: gates, recurrent columns, what reads them."""
    torch.manual_seed(4)
    config = config_of("rnn", {"model": "LSTM"}, True, nlayers=2)
    model = build(config)
    rnn, size = model.core.rnn, 13
    totals = []
    for unit in range(size):
        rows = [gate * size + unit for gate in range(4)]
        own = [rnn.weight_ih_l1[rows], rnn.weight_hh_l1[rows], rnn.bias_ih_l1[rows], rnn.bias_hh_l1[rows]]
        own += [rnn.weight_hh_l1[:, unit], model.embedding.weight[:, unit], rnn.weight_ih_l0[:, unit]]
        totals.append(sum(part.double().square().sum().item() for part in own))
    strongest = sorted(sorted(range(size), key=lambda unit: -totals[unit])[:8])
    _, _, keep = remove_units(config, model.state_dict(), 0.4)
    numbers = torch.arange(size).expand(23, size)
    assert keep("embedding.weight", numbers)[0].tolist() == strongest


@pytest.mark.parametrize("gatestyle", ["unit", "memory", "none"])
@pytest.mark.parametrize(("variant", "numblocks"), [("paper", 2), ("port", 1)])
def test_heads_of_the_rmc(gatestyle, variant, numblocks):
    """Each element is marked with the least number of the heads it belongs to: what is left is of the other heads."""
    heads, keysize, headsize = 5, 2, 3
    features = heads * headsize
    core = {"emsize": 11, "memslots": 2, "headsize": headsize, "numheads": heads, "keysize": keysize}
    core |= {"gatestyle": gatestyle, "variant": variant, "numblocks": numblocks}
    config = {"family": "rmc", "core": core, "vocab_size": 23, "tied": True}
    model, none = build(config), torch.tensor([heads])
    of_features = torch.arange(features) // headsize
    of_qkv = torch.arange(heads * (2 * keysize + headsize)) // (2 * keysize + headsize)
    of = {"input_projector": (of_features, none), "qkv_projector": (of_qkv, of_features), "mlp": (of_features,) * 2}
    of |= {"qkv_norm": (none, of_qkv), "attention_norm": (none, of_features), "mlp_norm": (none, of_features)}
    rows = of_features.repeat(2) if gatestyle == "unit" else none
    of |= {"input_gates": (rows, of_features), "memory_gates": (rows, of_features)}
    of |= {"projector": (none, of_features.repeat(2))}
    marks = {}
    for name, tensor in model.state_dict().items():
        row, column = next((pair for part, pair in of.items() if part in name.split(".")), (none, none))
        if tensor.dim() == 1:
            least = column if "norm" in name else row
        else:
            least = torch.minimum(row[:, None], column[None, :])
        marks[name] = (1 + least).float().expand_as(tensor)
    smaller, weights, _ = remove_units(config, marks, 0.4)
    assert smaller["core"] == {**core, "numheads": 3}
    assert all(tensor.min() > 2 for tensor in weights.values())
    model = build(smaller)
    model.load_state_dict(weights)
    assert model.hidden(torch.zeros(3, 2, dtype=torch.int64), model.initial_state(2))[0].shape == (3, 2, 11)


def test_a_split_softmax_and_an_adaptive_one():
    """The split one's vectors of clusters lose the same features; the adaptive one's sizes cannot follow."""
    config = config_of("rnn", {"model": "GRU"}, True, cutoffs=[5, 9], splitcross=True)
    small, weights, _ = remove_units(config, build(config).state_dict(), 0.4)
    build(small).load_state_dict(weights)
    assert weights["head.tail_vectors"].shape == (2, 8)
    with pytest.raises(UserError, match="adaptive softmax"):
        remove_units({**config, "splitcross": False}, {}, 0.4)


def test_a_unit_is_left():
    """However much is asked for."""
    config = config_of("rnn", {"model": "GRU"}, False)
    small, weights, _ = remove_units(config, build(config).state_dict(), 0.999)
    assert small["core"]["nhid"] == 1 and weights["core.rnn.weight_hh_l2"].shape == (3, 1)
