"""Models taken apart into operations: equal to the models, in floats, before anything is quantized."""

import pytest
import torch

from models import CORES, ModelError, build
from models.apart import Apart, Floats

SIZES = {"emsize": 11, "nhid": 11, "nlayers": 2}
HEADS = {"emsize": 11, "headsize": 3, "numheads": 2}
MODELS = [
    *(("rnn", {**SIZES, "model": model}) for model in ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")),
    *(
        ("qrnn", {**SIZES, "window": w, "mode": m, "zoneout": z})
        for w, m, z in ((1, "f", 0), (2, "fo", 0.2), (3, "ifo", 0))
    ),
    *(("qrnn", {**SIZES, "window": 3, "mode": m, "zoneout": 0.3, "candidate": "softplus"}) for m in ("f", "ifo")),
    *(("awd", {**SIZES, "model": m, "nhid": 17, "nlayers": 3, "tied": True}) for m in ("LSTM", "GRU", "QRNN")),
    *(
        ("rmc", {**HEADS, "memslots": s, "numblocks": n, "variant": v, "gatestyle": g})
        for s, n, v, g in (
            (1, 1, "paper", "unit"), (2, 2, "paper", "memory"), (3, 1, "paper", "none"), (1, 2, "port", "unit"),
            (2, 1, "port", "memory"), (2, 2, "port", "none"), (2, 2, "paper", "unit"),
        )
    ),
]  # fmt: skip


def config_of(family, core, **more):
    """A tied model of 23 words."""
    return {"family": family, "core": core, "vocab_size": 23, "tied": True, **more}


def pair(config):
    """A model of `config` with random weights and biases, and the same one taken apart, both in float64."""
    torch.manual_seed(2)
    whole = build(config).double().eval()
    for name, parameter in whole.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    arguments = {name: value for name, value in config.items() if name not in ("family", "core")}
    apart = Apart(core=CORES[config["family"]](**config["core"]), **arguments).double().eval()
    apart.load_state_dict(whole.state_dict())
    return whole, apart


def log_probs(model, tokens, *lengths):
    """Of tokens (T, B), read in windows of these lengths."""
    state, parts = model.initial_state(tokens.shape[1]), []
    for part in tokens.split(list(lengths)):
        hidden, state = model.hidden(part, state)
        parts.append(model.log_probs(hidden))
    return torch.cat(parts)


@pytest.mark.parametrize(("family", "core"), MODELS)
def test_equals_the_model(family, core):
    """Probabilities, loss and carried states over two windows, one step long as well, in float64."""
    whole, apart = pair(config_of(family, core))
    tokens = torch.randint(23, (9, 5))
    ours = theirs = whole.initial_state(5)
    for part in tokens.split([5, 1, 3]):
        with torch.no_grad():
            hidden, new = apart.hidden(part, ours)
            want_hidden, want = whole.hidden(part, theirs)
            torch.testing.assert_close(apart.log_probs(hidden), whole.log_probs(want_hidden), rtol=1e-11, atol=1e-11)
            loss, _, count, _ = apart(part, part.flip(0), ours)
            want_loss, _, want_count, _ = whole(part, part.flip(0), theirs)
        torch.testing.assert_close(loss, want_loss, rtol=1e-11, atol=1e-11)
        assert count == want_count == part.numel()
        ours, theirs = new, want
        for got, state in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, state, rtol=1e-11, atol=1e-11)


def test_every_product_and_function_is_an_operation():
    """Of two LSTM layers: the seed's names, and nothing else."""

    class Names(Floats):
        def __init__(self):
            self.names = set()

        def __getattribute__(self, kind):
            own = super().__getattribute__(kind)
            if kind not in ("linear", "add", "multiply", "activate", "embedding", "free", "subtract"):
                return own
            return lambda name, *rest, **more: (self.names.add(name), own(name, *rest, **more))[1]

    _, apart = pair(config_of("rnn", {**SIZES, "model": "LSTM"}))
    apart.operations = Names()
    apart.log_probs(apart.hidden(torch.zeros(3, 2, dtype=torch.int64), apart.initial_state(2))[0])
    layer = ("fc_gate_x", "fc_gate_h", "eltwiseadd_gate", "act_i", "act_f", "act_g", "act_o", "act_h")
    layer += ("eltwisemult_cell_forget", "eltwisemult_cell_input", "eltwiseadd_cell", "eltwisemult_hidden")
    assert apart.operations.names == {"encoder", "decoder", *(f"layer{n}.{name}" for n in (0, 1) for name in layer)}


def test_a_softmax_in_clusters_is_refused():
    """Nothing in it could be quantized silently."""
    config = config_of("rnn", {**SIZES, "model": "LSTM"}, cutoffs=[5, 9], splitcross=True)
    with pytest.raises(ModelError, match="full softmax"):
        pair(config)
