"""Weights of ours under a peer's names give its model our loss; checkouts that are none are refused."""

import pytest
import torch

import train_rmc
import train_rnn
from models import build
from utils import UserError, cli
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

    def forward(self, tokens, memory, targets):
        assert tokens.shape[0] == memory.shape[0] and targets.dim() == 1
        return self.output_to_embed_decoder.weight.sum() + targets.sum(), memory
"""
SIZES = "--emsize 7 --nhid 7 --nlayers 2 --dropout 0 --lr 0.5 --clip 10 --batch-size 3 --bptt 5"


def make(module, arguments, vocab_size=13):
    """Flags and our model of them."""
    args, _ = cli.parse_training(module.build_parser(), module.RECIPES, arguments.split())
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
    torch.testing.assert_close(model.head.weight.grad, peer.model.decoder.weight.grad)


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
    before = theirs["output_to_embed_decoder.weight"].clone()
    peer.backward(loss)
    assert not theirs["output_to_embed_decoder.weight"].equal(before)


def test_a_folder_without_the_peer_is_refused(tmp_path):
    """One line that names the repository."""
    args, model = make(train_rnn, f"--recipe port {SIZES}")
    with pytest.raises(UserError, match=r"rnn_models\.py is not there: name a checkout of L0SG/[^\n]*$"):
        PEERS["port-rnn"](tmp_path, args, model)
