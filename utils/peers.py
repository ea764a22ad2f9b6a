"""Other repositories' models, taking the steps that their own scripts take, from the weights of ours.

Their code is read from a checkout that the user names and runs as it is, but for lines that today's torch refuses.
"""

import math
import types
from pathlib import Path

import torch
from torch.nn import functional

from . import UserError
from .evaluation import detach

PORT = "L0SG/relational-rnn-pytorch"


def load(path, repository, repairs=()):
    """A peer's file as a module. repairs: (old, new) pieces of its text.

    Raises UserError when the file is not there.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there: name a checkout of {repository}")
    source = path.read_text(encoding="utf-8")
    for old, new in repairs:
        source = source.replace(old, new)
    module = types.ModuleType(path.stem)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


class Peer:
    """A peer's model of our model's sizes and weights. checkout: its folder. flags: our script's. model: ours."""

    repository = file = ""
    repairs = ()

    def __init__(self, checkout, flags, model):
        module = load(Path(checkout) / self.file, self.repository, self.repairs)
        self.flags, self.device = flags, model.embedding.weight.device
        self.model = self.build(module, flags, model.vocab_size).to(self.device)
        self.model.load_state_dict(self.rename(model.state_dict()))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=flags.lr)

    def loss(self, tokens, targets, state):
        """tokens, targets (T, B) -> mean loss, state."""
        output, state = self.model(tokens, state)
        return functional.cross_entropy(output.flatten(0, -2), targets.flatten()), detach(state)

    def state(self, batch_size):
        """Before the first word."""
        return self.model.init_hidden(batch_size)

    def backward(self, loss):
        """Backward, clip, update."""
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.flags.clip)
        self.update()

    def update(self):
        """Adam, as the port uses it."""
        self.optimizer.step()


class PortRMC(Peer):
    """train_rmc.py of the port."""

    repository = PORT
    file = "relational_rnn_models.py"
    repairs = (
        ("q *= (self.key_size ** -0.5)", "q = q * (self.key_size ** -0.5)"),
        ("next_memory += forget_gate * memory", "next_memory = next_memory + forget_gate * memory"),
    )
    layers = (
        ("input_projector", "input_projector"), ("qkv_projector", "qkv_projector.0"), ("attention_mlp", "mlp.0"),
        ("input_gate_projector", "input_gates"), ("memory_gate_projector", "memory_gates"),
        ("qkv_layernorm", "qkv_norm.0"), ("attended_memory_layernorm", "attention_norm.0"),
        ("attended_memory_layernorm2", "mlp_norm.0"),
    )  # fmt: skip

    def build(self, module, flags, vocab_size):
        return module.RelationalMemory(
            mem_slots=flags.memslots, head_size=flags.headsize, input_size=flags.emsize, num_tokens=vocab_size,
            num_heads=flags.numheads, num_blocks=flags.numblocks, forget_bias=flags.forgetbias,
            input_bias=flags.inputbias, gate_style=None if flags.gatestyle == "none" else flags.gatestyle,
            attention_mlp_layers=flags.attmlplayers, key_size=flags.keysize,
        )  # fmt: skip

    def rename(self, ours):
        theirs = {
            "token_to_input_encoder.weight": ours["embedding.weight"],
            "embed_to_logit_decoder.weight": ours["head.weight"],
            "embed_to_logit_decoder.bias": ours["head.bias"],
        }
        theirs["input_bias"], theirs["forget_bias"] = ours["core.memory.gate_bias"]
        for part in ("weight", "bias"):
            theirs[f"output_to_embed_decoder.{part}"] = ours[f"core.projector.{part}"]
            for their_name, our_name in self.layers:
                copies = range(self.flags.attmlplayers) if their_name == "attention_mlp" else [None]
                for number in copies:
                    full = their_name if number is None else f"{their_name}.{number}"
                    theirs[f"{full}.{part}"] = ours[f"core.memory.{our_name}.{part}"]
        return theirs

    def state(self, batch_size):
        return self.model.initial_state(batch_size, trainable=True).to(self.device)

    def loss(self, tokens, targets, state):
        return self.model(tokens.t(), state, targets.reshape(-1))


class PortRNN(Peer):
    """train_rnn.py --cudnn of the port, or without it where our flags have --loop."""

    repository = PORT
    file = "rnn_models.py"

    def build(self, module, flags, vocab_size):
        sizes = (flags.model, vocab_size, flags.emsize, flags.nhid, flags.nlayers, flags.dropout, flags.tied)
        return module.RNNModel(*sizes, use_cudnn_version=not flags.loop)

    def rename(self, ours):
        theirs = {"encoder.weight": ours["embedding.weight"]}
        theirs |= {f"decoder.{part}": ours[f"head.{part}"] for part in ("weight", "bias")}
        for name, value in ours.items():
            if name.startswith("core.rnn."):
                kind, layer = name.removeprefix("core.rnn.").rsplit("_l", 1)
                cell = f"rnn.{2 * int(layer)}.{kind}"
                theirs[cell if self.flags.loop else name.removeprefix("core.")] = value
        return theirs


class Example(PortRNN):
    """main.py."""

    repository = "pytorch/examples, word_language_model"
    file = "model.py"

    def build(self, module, flags, vocab_size):
        sizes = (flags.model, vocab_size, flags.emsize, flags.nhid, flags.nlayers, flags.dropout, flags.tied)
        return module.RNNModel(*sizes)

    def loss(self, tokens, targets, state):
        output, state = self.model(tokens, state)
        return functional.nll_loss(output, targets.reshape(-1)), detach(state)

    def update(self):
        for parameter in self.model.parameters():
            parameter.data.add_(parameter.grad, alpha=-self.flags.lr)

    @torch.no_grad()
    def evaluate(self, ids):
        """Perplexity of ids (N,) as main.py evaluates, in one column."""
        self.model.eval()
        state, total, bptt = self.state(1), 0.0, self.flags.bptt
        stream = ids[:, None]
        for begin in range(0, len(stream) - 1, bptt):
            length = min(bptt, len(stream) - 1 - begin)
            loss, state = self.loss(stream[begin : begin + length], stream[begin + 1 : begin + 1 + length], state)
            total += length * loss.item()
        return math.exp(total / (len(stream) - 1))


PEERS = {"port-rmc": PortRMC, "port-rnn": PortRNN, "example": Example}
