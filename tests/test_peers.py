"""Weights of ours under a peer's names give its model our loss; checkouts that are none are refused."""

import sys

import pytest
import torch

import train_awd
import train_rmc
import train_rnn
from models import build
from utils import UserError, optim, parsing, runtime, trainer
from utils.peers import PEERS

RNN = """
import torch
from torch import nn

class RNNModel(nn.Module):
    def __init__(self, kind, words, emsize, nhid, nlayers, dropout, tied, use_cudnn_version=True):
        super().__init__()
        self.nlayers, self.nhid, self.fused = nlayers, nhid, use_cudnn_version
        self.encoder, self.decoder = nn.Embedding(words, emsize), nn.Linear(nhid, words)
        if tied:
            self.decoder.weight = self.encoder.weight
        if self.fused:
            self.rnn = nn.LSTM(emsize, nhid, nlayers)
        else:
            self.rnn = nn.ModuleList([nn.LSTMCell(emsize, nhid), nn.Dropout(0.0), nn.LSTMCell(nhid, nhid)])

    def forward(self, tokens, state):
        x = self.encoder(tokens)
        if self.fused:
            x, state = self.rnn(x, state)
        else:
            for cell in self.rnn[::2]:
                h = c = torch.zeros(x.shape[1], self.nhid)
                steps = []
                for step in x:
                    h, c = cell(step, (h, c))
                    steps.append(h)
                x = torch.stack(steps)
        return self.decoder(x), state

    def init_hidden(self, batch):
        return tuple(torch.zeros(self.nlayers, batch, self.nhid) for _ in range(2))
"""
EXAMPLE = RNN.replace("return self.decoder(x), state", "return self.decoder(x).log_softmax(-1).flatten(0, 1), state")
RMC = """
import torch
from torch import nn

class RelationalMemory(nn.Module):
    def __init__(self, mem_slots, head_size, input_size, num_tokens, num_heads, num_blocks, forget_bias, input_bias,
                 gate_style, attention_mlp_layers, key_size):
        super().__init__()
        features, qkv = num_heads * head_size, num_heads * (2 * key_size + head_size)
        self.token_to_input_encoder = nn.Embedding(num_tokens, input_size)
        self.embed_to_logit_decoder = nn.Linear(input_size, num_tokens)
        self.output_to_embed_decoder = nn.Linear(mem_slots * features, input_size)
        self.input_projector = nn.Linear(input_size, features)
        self.qkv_projector = nn.Linear(features, qkv)
        self.attention_mlp = nn.ModuleList([nn.Linear(features, features)] * attention_mlp_layers)
        self.input_gate_projector = nn.Linear(features, 2 * features)
        self.memory_gate_projector = nn.Linear(features, 2 * features)
        self.qkv_layernorm = nn.LayerNorm([mem_slots + 1, qkv])
        self.attended_memory_layernorm = nn.LayerNorm([mem_slots + 1, features])
        self.attended_memory_layernorm2 = nn.LayerNorm([mem_slots + 1, features])
        self.input_bias, self.forget_bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        assert gate_style == "unit" and num_blocks == 1

    def scale(self, q):
        q *= (self.key_size ** -0.5)

    def initial_state(self, batch, trainable):
        return torch.zeros(batch, 1)

    def forward(self, tokens, memory, targets, require_logits=False):
        if require_logits:
            return self.token_to_input_encoder(tokens).sum() + torch.zeros(1, 13), None, memory
        assert tokens.shape[0] == memory.shape[0] and targets.dim() == 1
        return self.output_to_embed_decoder.weight.sum() + targets.sum(), memory
"""
SIZES = "--emsize 7 --nhid 7 --nlayers 2 --dropout 0 --lr 0.5 --clip 10 --batch-size 3 --bptt 5"


def make(module, arguments, vocab_size=13):
    """Flags and our model of them."""
    args, _ = parsing.parse_training(module.build_parser(), module.RECIPES, arguments.split())
    torch.manual_seed(2)
    return args, build(module.model_config(args, vocab_size))


@pytest.mark.parametrize(
    ("kind", "file", "source", "flags"),
    (
        ("port-rnn", "rnn_models.py", RNN, "--recipe port --tied"),
        ("port-rnn", "rnn_models.py", RNN, "--recipe port --tied --loop"),
        ("example", "model.py", EXAMPLE, "--recipe example --no-tied"),
    ),
    ids=("fused", "cells", "example"),
)
def test_the_same_loss_from_the_same_weights(tmp_path, kind, file, source, flags):
    """Two windows with carried state (the cells start from zeros), then an update that changes it."""
    (tmp_path / file).write_text(source)
    args, model = make(train_rnn, f"{flags} {SIZES}")
    peer = PEERS[kind](tmp_path, args, model)
    tokens, targets = torch.randint(13, (2, 5, 3))
    ours, theirs = model.initial_state(3), peer.state(3)
    for _ in range(1 if args.loop else 2):
        loss, _, count, ours = model(tokens, targets, tuple(part.detach() for part in ours))
        mean, theirs = peer.loss(tokens, targets, theirs)
        torch.testing.assert_close((loss / count)[0, 0], mean)
    (loss / count).sum().backward()
    peer.backward(mean)
    after, _ = peer.loss(tokens, targets, peer.state(3))
    assert after < mean
    check_scores(peer, PEERS[kind](tmp_path, args, model), model)
    torch.testing.assert_close(model.head.weight.grad, peer.model.decoder.weight.grad)


def check_scores(trained, peer, model):
    """A peer with our model's weights scores next words as the model does; what it draws moves its state."""
    model.eval()
    peer.model.eval()
    token, state = torch.tensor([[5]]), model.initial_state(1)
    with torch.no_grad():
        hidden, _ = model.hidden(token, state)
        scores, _ = peer.scores(token, peer.state(1))
    torch.testing.assert_close(scores.flatten().log_softmax(0), model.log_probs(hidden).flatten())
    seen, ask = [], trained.scores
    trained.scores = lambda token, state: seen.append((token.item(), state)) or ask(token, state)
    trained.words(7)
    assert len(seen) == 7 and len({token for token, _ in seen}) > 1 and trained.model.training
    assert trained.flags.loop or str(seen[0][1]) != str(seen[-1][1])  # the port's cells start anew
    model.train()


def test_the_example_is_evaluated_in_windows(tmp_path):
    """Each target counts once; by hand in one window."""
    (tmp_path / "model.py").write_text(EXAMPLE)
    args, model = make(train_rnn, f"--recipe example --no-tied {SIZES}")
    peer = PEERS["example"](tmp_path, args, model)
    ids = torch.randint(13, (18,))
    loss, _, count, _ = model.eval()(ids[:-1, None], ids[1:, None], model.initial_state(1))
    assert peer.evaluate(ids) == pytest.approx((loss / count).exp().item(), rel=1e-5)


def test_the_port_gets_every_weight(tmp_path):
    """Each of its parameters is ours under its own name; lines that today's torch refuses are repaired."""
    (tmp_path / "relational_rnn_models.py").write_text(RMC)
    args, model = make(train_rmc, "--variant port --emsize 7 --headsize 3 --numheads 2 --keysize 5 --batch-size 3")
    peer = PEERS["port-rmc"](tmp_path, args, model)
    peer.model.key_size = 4
    peer.model.scale(torch.ones(3, requires_grad=True))  # in place it is refused
    theirs, memory = dict(peer.model.named_parameters()), model.core.memory
    assert sum(p.numel() for p in theirs.values()) == model.num_params() + 13 * 7  # the stand-in ties nothing
    pairs = {
        "input_projector.weight": memory.input_projector.weight,
        "attention_mlp.0.bias": memory.mlp[0].bias,
        "memory_gate_projector.weight": memory.memory_gates.weight,
        "attended_memory_layernorm2.weight": memory.mlp_norm[0].weight,
        "forget_bias": memory.gate_bias[1],
        "embed_to_logit_decoder.weight": model.head.weight,
    }
    for name, ours in pairs.items():
        assert theirs[name].equal(ours), name
    tokens, targets = torch.randint(13, (2, 5, 3))
    loss, memory = peer.loss(tokens, targets, peer.state(3))
    assert memory.shape[0] == 3
    peer.words(3)
    before = theirs["output_to_embed_decoder.weight"].clone()
    peer.backward(loss)
    assert not theirs["output_to_embed_decoder.weight"].equal(before)


def test_a_folder_without_the_peer_is_refused(tmp_path):
    """One line that names the repository."""
    args, model = make(train_rnn, f"--recipe port {SIZES}")
    with pytest.raises(UserError, match=r"rnn_models\.py is not there: name a checkout of L0SG/[^\n]*$"):
        PEERS["port-rnn"](tmp_path, args, model)


WEIGHT_DROP = """
import torch

class WeightDrop(torch.nn.Module):
    def __init__(self, module, weights, dropout=0):
        super().__init__()
        (self.name,), self.module, self.dropout = weights, module, dropout
        raw = getattr(module, self.name)
        del module._parameters[self.name]
        module.register_parameter(self.name + "_raw", torch.nn.Parameter(raw.data))

    def forward(self, *args):
        raw = getattr(self.module, self.name + "_raw")
        setattr(self.module, self.name, torch.nn.functional.dropout(raw, p=self.dropout, training=self.training))
        return self.module.forward(*args)
"""
AUTHORS = """
import torch
from torch import nn
from embed_regularize import embedded_dropout
from locked_dropout import LockedDropout
from weight_drop import WeightDrop

class RNNModel(nn.Module):
    def __init__(self, kind, words, emsize, nhid, nlayers, dropout, dropouth, dropouti, dropoute, wdrop, tie_weights):
        super().__init__()
        sizes = [emsize] + [nhid] * (nlayers - 1) + [emsize]
        self.encoder, self.decoder = nn.Embedding(words, emsize), nn.Linear(emsize, words)
        self.decoder.weight, self.sizes, self.kind = self.encoder.weight, sizes[1:], kind
        if kind == "QRNN":
            from torchqrnn import QRNNLayer
            pairs = zip(sizes, sizes[1:], [2] + [1] * nlayers)
            self.rnns = nn.ModuleList(QRNNLayer(*pair) for pair in pairs)
            for rnn in self.rnns:
                rnn.linear = WeightDrop(rnn.linear, ["weight"], dropout=wdrop)
        else:
            self.rnns = nn.ModuleList(nn.LSTM(*pair) for pair in zip(sizes, sizes[1:]))
            if wdrop:
                self.rnns = nn.ModuleList(WeightDrop(rnn, ["weight_hh_l0"], dropout=wdrop) for rnn in self.rnns)
        print("noise")

    def reset(self):
        for rnn in self.rnns:
            rnn.before = 0

    def init_hidden(self, batch):
        zeros = [torch.zeros(1, batch, size) for size in self.sizes]
        return zeros if self.kind == "QRNN" else [(zero, zero) for zero in zeros]

    def forward(self, tokens, hidden, return_h=False):
        x, new, raw = self.encoder(tokens), [], []
        for rnn, state in zip(self.rnns, hidden):
            x, state = rnn(x, state)
            new.append(state)
            raw.append(x)
        return (x.flatten(0, 1), new, raw, raw) if return_h else (x.flatten(0, 1), new)
"""
SPLITCROSS = """
import torch

class SplitCrossEntropyLoss(torch.nn.Module):
    def __init__(self, size, splits, verbose):
        super().__init__()

    def forward(self, weight, bias, hidden, targets):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weight, bias), targets)
"""
SEED = """
import torch
from .forget_mult import ForgetMult

class QRNNLayer(torch.nn.Module):
    def __init__(self, input_size, hidden_size, window):
        super().__init__()
        self.linear, self.window = torch.nn.Linear(window * input_size, 3 * hidden_size), window

    def forward(self, X, hidden):
        if self.window == 2:
            before = torch.cat([self.before + torch.zeros_like(X[:1]), X[:-1]])
            self.before, X = X[-1:].detach(), torch.cat([X, before], 2)
        z, f, o = self.linear(X).chunk(3, 2)
        c = ForgetMult()(f.sigmoid(), z.tanh(), hidden)
        return o.sigmoid() * c, c[-1:]
"""
FORGET_MULT = """
import torch

class ForgetMult(torch.nn.Module):
    def forward(self, f, x, hidden):
        h, result = hidden[0], []
        for t in range(len(x)):
            h = f[t] * x[t] + (1 - f[t]) * h
            result.append(h)
        return torch.stack(result)
"""
MARTYN = """
import torch
from torch import nn

class Cell(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.i2h, self.h2h, self.size = nn.Linear(inputs, 4 * outputs), nn.Linear(outputs, 4 * outputs), outputs

class Dropped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.weight_raw = module, nn.Parameter(module.h2h.weight.data)

    def forward(self, x, state):
        cell = self.module
        i, f, o, g = (cell.i2h(x) + x.new_zeros(1) + state[0] @ self.weight_raw.t() + cell.h2h.bias).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

class AWD_LSTM(nn.Module):
    def __init__(self, words, emsize, nhid, device, dropout_wts, dropout_emb, dropout_inp, dropout_hid):
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(words, emsize), nn.Linear(emsize, words)
        self.sizes = (nhid, nhid, emsize)
        self.layer0, self.layer1 = Dropped(Cell(emsize, nhid)), Dropped(Cell(nhid, nhid))
        self.layer2 = Dropped(Cell(nhid, emsize))

    def init_hiddens(self, batch):
        return tuple([torch.zeros(batch, size) for size in self.sizes] for _ in range(2))

    def forward(self, tokens, state):
        (h, c), outputs = state, []
        for x in self.embedding(tokens):
            h, c = list(h), list(c)
            for number, layer in enumerate((self.layer0, self.layer1, self.layer2)):
                x = h[number], c[number] = layer(x, (h[number], c[number]))
                x = x[0]
            outputs.append(x)
        self.output = torch.stack(outputs)
        return self.decoder(self.output), (h, c)

    def activation_reg(self, alpha):
        return alpha * self.output.detach().pow(2).mean().item()

    def temporal_activation_reg(self, beta):
        return beta * 0.0
"""


def awd_peer(tmp_path, kind, flags):
    """A stand-in of a peer, flags, and our model in training without dropout."""
    for name, text in {
        "model.py": AUTHORS, "weight_drop.py": WEIGHT_DROP, "splitcross.py": SPLITCROSS,
        "embed_regularize.py": "embedded_dropout = None", "locked_dropout.py": "LockedDropout = None",
        "model/net.py" if kind == "a-martyn" else "torchqrnn/qrnn.py": MARTYN if kind == "a-martyn" else SEED,
        "torchqrnn/forget_mult.py": FORGET_MULT,
    }.items():  # fmt: skip
        if kind == "a-martyn" and name == "model.py":
            continue
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    quiet = "--dropout 0 --dropouth 0 --dropouti 0 --dropoute 0 --wdrop 0 --clip 10 --lr 1.5 --wdecay 0.01 --bptt 10"
    args, model = make(train_awd, f"--emsize 7 --nhid 11 --nlayers 3 {quiet} {flags}")
    checkout = tmp_path if kind == "a-martyn" else (tmp_path, tmp_path)
    return args, model, PEERS[kind](checkout, args, model)


def step_alike(args, model, peer, windows):
    """Both take a training step on windows of these lengths with carried state: losses with regularizers are equal."""
    optimizer = optim.build_optimizer(args, model.parameters())
    ours, theirs, clock = model.initial_state(3), peer.state(3), runtime.Clock(torch.device("cpu"))
    for steps in windows:
        tokens, targets = torch.randint(13, (2, steps, 3))
        mean, theirs = peer.loss(tokens, targets, theirs)
        peer.backward(mean)
        regularizer = model(tokens, targets, ours)[1]
        loss, count, _, ours, _ = trainer.training_step(model, optimizer, tokens, targets, ours, args, clock)
        torch.testing.assert_close(loss / count + regularizer.squeeze(), mean)


@pytest.mark.parametrize(
    ("kind", "flags"),
    (("authors", ""), ("authors", "--wdrop 0.5"), ("authors", "--model QRNN"), ("a-martyn", "--alpha 0 --beta 0")),
    ids=("LSTM", "LSTM weight drop", "QRNN", "a-martyn"),
)
def test_awd_peers_step_as_ours_and_give_their_weights_back(tmp_path, kind, flags, capsys):
    """Losses of two windows of different lengths with carried state, an update each, then their weights in ours."""
    args, model, peer = awd_peer(tmp_path, kind, flags)
    assert "noise" not in capsys.readouterr().out
    check_scores(peer, peer, model)
    if args.wdrop:
        model.eval()
        peer.model.eval()
    step_alike(args, model, peer, (5,) if kind == "a-martyn" else (5, 13))  # its matrices are two, tied no more
    untied = build({**train_awd.model_config(args, 13), "tied": kind == "authors"})
    before = untied.head.weight.clone()
    untied.load_state_dict(peer.weights(untied))
    assert not torch.equal(untied.head.weight, before)
    for name, value in untied.core.state_dict().items():
        torch.testing.assert_close(value, model.core.state_dict()[name], msg=name)


FASTAI = {
    "fastai/__init__.py": "",
    "fastai/text/__init__.py": "",
    "fastai/text/models/__init__.py": "",
    "fastai/text/models/awdlstm.py": """
import torch
from torch import nn

awd_lstm_lm_config = {"emb_sz": 400, "n_hid": 1152, "n_layers": 3, "out_bias": True, "pad_token": 1}

class Dropped(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.module = nn.LSTM(*sizes, batch_first=True)
        self.weight_hh_l0_raw = nn.Parameter(self.module.weight_hh_l0.data)
        del self.module._parameters["weight_hh_l0"]

    def forward(self, x, state):
        self.module.weight_hh_l0 = self.weight_hh_l0_raw.clone()
        return self.module(x, state)

class Embedding(nn.Module):
    def __init__(self, emb):
        super().__init__()
        self.emb = emb

class AWD_LSTM(nn.Module):
    def __init__(self, words, emb_sz, n_hid, n_layers, input_p, hidden_p, embed_p, weight_p):
        super().__init__()
        self.bs, self.sizes = 1, [emb_sz] + [n_hid] * (n_layers - 1) + [emb_sz]
        self.encoder = nn.Embedding(words, emb_sz)
        self.encoder_dp = Embedding(self.encoder)
        self.rnns = nn.ModuleList(Dropped(*pair) for pair in zip(self.sizes, self.sizes[1:]))

    def forward(self, tokens):
        x, new = self.encoder(tokens), []
        for rnn, state in zip(self.rnns, self.hidden):
            x, state = rnn(x, state)
            new.append(tuple(part.detach() for part in state))
        self.hidden = new
        return x

    def reset(self):
        self.hidden = [(torch.zeros(1, self.bs, size), torch.zeros(1, self.bs, size)) for size in self.sizes[1:]]
""",
    "fastai/text/models/core.py": """
from torch import nn

class Both(nn.Sequential):
    def reset(self):
        self[0].reset()

class Decoder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.decoder = nn.Linear(encoder.embedding_dim, encoder.num_embeddings)
        self.decoder.weight = encoder.weight

    def forward(self, x):
        return self.decoder(x), x, x

def get_language_model(arch, words, config):
    config = {k: v for k, v in config.items() if k not in ("output_p", "out_bias", "pad_token")}
    model = arch(words, **config)
    return Both(model, Decoder(model.encoder))
""",
}


def test_fastai_steps_as_ours(tmp_path, monkeypatch):
    """Losses of two windows with carried state, an update each; the same weights afterwards."""
    for name, text in FASTAI.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    quiet = "--dropout 0 --dropouth 0 --dropouti 0 --dropoute 0 --wdrop 0 --clip 10 --lr 1.5 --wdecay 0.01 --bptt 10"
    args, model = make(train_awd, f"--emsize 7 --nhid 11 --nlayers 3 {quiet}")
    with pytest.raises(UserError, match="pip install fastai --target"):
        PEERS["fastai"](tmp_path / "gone", args, model)
    monkeypatch.setattr(sys, "path", list(sys.path))
    peer = PEERS["fastai"](tmp_path, args, model)
    for name in [name for name in sys.modules if name.split(".")[0] == "fastai"]:
        monkeypatch.delitem(sys.modules, name)
    step_alike(args, model, peer, (5, 13))
    after = model.state_dict()
    before = {name: value.clone() for name, value in after.items()}
    model.load_state_dict(peer.weights(model))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=name)


def test_the_authors_weight_drop_lives_on(tmp_path):
    """One evaluation and the next training step after it, which today's torch refuses without the repair."""
    _, model, peer = awd_peer(tmp_path, "authors", "--wdrop 0.5")
    tokens, targets = torch.randint(13, (2, 5, 3))
    for training in (True, False, True):
        peer.model.train(training)
        loss, _ = peer.loss(tokens, targets, peer.state(3))
    peer.backward(loss)
    assert model.core.layers[0].dropped.shape == (44, 11)
