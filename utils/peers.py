"""Other repositories' models, taking the steps that their own scripts take, from the weights of ours.

Their code is read from a checkout that the user names and runs as it is, but for lines that today's torch refuses.
"""

import contextlib
import importlib
import io
import math
import sys
import types
import warnings
from pathlib import Path

import torch
from torch.nn import functional

from . import UserError
from .evaluation import detach

PORT = "L0SG/relational-rnn-pytorch"
AUTHORS = "salesforce/awd-lstm-lm"
QRNN_SEED = "salesforce/pytorch-qrnn"
LOG_SEED = "LGirrbach/PyTorch-QRNN"
SRU = "asappresearch/sru"


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


@contextlib.contextmanager
def _stand_ins(*names):
    """Empty modules in the place of packages that a peer imports and a CPU never calls."""
    made = {name: types.ModuleType(name) for name in names if name not in sys.modules}
    for name, module in made.items():
        module.function = module.Program = None
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def qrnn_seed(checkout):
    """pytorch-qrnn's two files as modules: forget_mult, qrnn."""
    if not checkout:
        raise UserError(f"--qrnn names no checkout of {QRNN_SEED}")
    folder = Path(checkout) / "torchqrnn"
    with _stand_ins("cupy", "cupy.cuda", "pynvrtc", "pynvrtc.compiler", "forget_mult"):
        recurrence = load(folder / "forget_mult.py", QRNN_SEED)
        sys.modules["forget_mult"].ForgetMult = recurrence.ForgetMult
        layer = load(folder / "qrnn.py", QRNN_SEED, [("from .forget_mult", "from forget_mult")])
    return recurrence, layer


def log_seed(checkout):
    """LGirrbach's layer as a module."""
    if not checkout:
        raise UserError(f"--log-qrnn names no checkout of {LOG_SEED}")
    return load(Path(checkout) / "qrnn_layer.py", LOG_SEED)


def sru(checkout):
    """asappresearch/sru's package; it compiles its kernel for a CPU at its first import, with ninja."""
    if not (Path(checkout) / "sru" / "modules.py").is_file():
        raise UserError(f"{checkout}/sru is not there: name a checkout of {SRU}")
    sys.path.insert(0, str(checkout))
    return importlib.import_module("sru")


class Peer:
    """A peer's model of our model's sizes and weights. checkout: its folder. flags: our script's. model: ours."""

    repository = file = ""
    repairs = ()
    tied = None  # whether its head and embedding share a matrix, if not as our flags say

    def __init__(self, checkout, flags, model):
        module = load(Path(checkout) / self.file, self.repository, self.repairs)
        self.flags, self.device = flags, model.embedding.weight.device
        self.model = self.build(module, flags, model.vocab_size).to(self.device)
        self.model.load_state_dict(self.rename(model.state_dict()))
        self.optimizer = self.optimize(self.model.parameters())

    def optimize(self, parameters):
        """The optimizer, as the port has it."""
        return torch.optim.Adam(parameters, lr=self.flags.lr)

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

    @torch.no_grad()
    def words(self, count):
        """Generate so many words as generate.py does: drawn by the exponentials of the scores, one after the other."""
        self.model.eval()
        state, token = self.state(1), torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for _ in range(count):
            scores, state = self.scores(token, state)
            token.fill_(torch.multinomial(scores.squeeze().exp().cpu(), 1)[0])
        self.model.train()

    def scores(self, token, state):
        """token (1, 1) -> the logits or log probabilities of the next word, state."""
        return self.model(token, state)


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

    def scores(self, token, state):
        logits, _, state = self.model(token, state, None, require_logits=True)
        return logits, state


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


class AWDPeer(Peer):
    """Training as AWD-LSTM's authors do it: SGD with L2, the rate of a window in proportion to its length."""

    def optimize(self, parameters):
        return torch.optim.SGD(parameters, lr=self.flags.lr, weight_decay=self.flags.wdecay)

    def rename(self, ours):
        return {theirs: self.turn(theirs, ours[name]) for theirs, name in self.names(ours).items()}

    def turn(self, theirs, value):
        """A weight of ours under their name as theirs, and theirs as ours."""
        return value

    def weights(self, model):
        """The state_dict of a model of ours, which may be untied, from their weights."""
        values = self.model.state_dict()
        names = self.names(model.state_dict())
        return {name: self.turn(theirs, values[theirs]) for theirs, name in names.items()}

    def loss(self, tokens, targets, state):
        self.factor = len(tokens) / self.flags.bptt
        loss, state = self.regularized(tokens, targets, state)
        return loss, self.cut(state)

    def cut(self, state):
        """A state, nested as theirs, out of the graph."""
        return state.detach() if torch.is_tensor(state) else type(state)(self.cut(part) for part in state)

    def update(self):
        (group,) = self.optimizer.param_groups
        group["lr"] = self.flags.lr * self.factor
        self.optimizer.step()


class Authors(AWDPeer):
    """main.py. checkout: its folder and, for a QRNN, that of pytorch-qrnn."""

    repository = AUTHORS
    file = "model.py"
    alive = ("p=self.dropout, training=self.training)", "p=self.dropout, training=self.training).clone()")

    def __init__(self, checkouts, flags, model):
        checkout, qrnn = checkouts
        for name in ("embed_regularize", "locked_dropout", "weight_drop", "splitcross"):
            sys.modules[name] = load(Path(checkout) / f"{name}.py", self.repository, [self.alive])
        if flags.model == "QRNN":
            sys.modules["torchqrnn"] = qrnn_seed(qrnn)[1]
        self.criterion = sys.modules["splitcross"].SplitCrossEntropyLoss(flags.emsize, splits=[], verbose=False)
        super().__init__(checkout, flags, model)

    def build(self, module, flags, vocab_size):
        drops = (flags.dropout, flags.dropouth, flags.dropouti, flags.dropoute, flags.wdrop)
        with contextlib.redirect_stdout(io.StringIO()):
            return module.RNNModel(
                flags.model, vocab_size, flags.emsize, flags.nhid, flags.nlayers, *drops, tie_weights=flags.tied
            )

    def names(self, ours):
        names = {"encoder.weight": "embedding.weight", "decoder.weight": "head.weight", "decoder.bias": "head.bias"}
        for name in ours:
            kind, layer, *rest = name.split(".")[1:] if name.startswith("core.") else ("",) * 3
            if kind and self.flags.model == "QRNN":
                part = "weight_raw" if rest[-1] == "weight" else "bias"
                names[f"rnns.{layer}.linear.module.{part}"] = name
            elif kind and self.flags.wdrop:
                names[f"rnns.{layer}.module.{rest[-1]}" + ("_raw" if "weight_hh" in name else "")] = name
            elif kind:
                names[f"rnns.{layer}.{rest[-1]}"] = name
        return names

    def state(self, batch_size):
        self.model.reset()
        return self.model.init_hidden(batch_size)

    def scores(self, token, state):
        """Of its decoder, which its generate.py takes for a part of the model: there it draws from the hidden units."""
        output, state = self.model(token, state)
        return self.model.decoder(output), state

    def regularized(self, tokens, targets, state):
        """Mean loss with AR and TAR in training, and the state, as main.py computes them."""
        decoder, flags = self.model.decoder, self.flags
        output, state, raw, dropped = self.model(tokens, state, return_h=True)
        loss = self.criterion(decoder.weight, decoder.bias, output, targets.reshape(-1))
        if self.model.training:
            loss = loss + flags.alpha * dropped[-1].pow(2).mean()
            loss = loss + flags.beta * (raw[-1][1:] - raw[-1][:-1]).pow(2).mean()
        return loss, state


class Martyn(AWDPeer):
    """main.py of a-martyn/awd-lstm: untied, three layers, its dropout of the output is that between layers."""

    repository = "a-martyn/awd-lstm"
    file = "model/net.py"
    tied = False

    def build(self, module, flags, vocab_size):
        drops = {"wts": flags.wdrop, "emb": flags.dropoute, "inp": flags.dropouti, "hid": flags.dropouth}
        drops = {f"dropout_{name}": value for name, value in drops.items()}
        return module.AWD_LSTM(vocab_size, flags.emsize, flags.nhid, device=self.device, **drops)

    def names(self, ours):
        names = {"embedding.weight": "embedding.weight", "decoder.weight": "head.weight", "decoder.bias": "head.bias"}
        for layer in range(3):
            for kind, product in (("ih", "i2h"), ("hh", "h2h")):
                for part in ("weight", "bias"):
                    names[f"layer{layer}.module.{product}.{part}"] = f"core.layers.{layer}.rnn.{part}_{kind}_l0"
            names[f"layer{layer}.weight_raw"] = f"core.layers.{layer}.rnn.weight_hh_l0"
        return names

    def turn(self, theirs, value):
        if not theirs.startswith("layer"):
            return value
        i, f, g, o = value.chunk(4)  # theirs has i, f, o, g
        return torch.cat([i, f, o, g])

    def state(self, batch_size):
        return self.model.init_hiddens(batch_size)

    def backward(self, loss):
        with warnings.catch_warnings():  # its dropped weights are among its parameters
            warnings.simplefilter("ignore")
            super().backward(loss)

    def regularized(self, tokens, targets, state):
        """Mean loss with AR and TAR in training, which have no gradient there, and the state."""
        output, state = self.model(tokens, state)
        loss = functional.cross_entropy(output.flatten(0, -2), targets.flatten())
        if self.model.training:
            loss = loss + self.model.activation_reg(self.flags.alpha)
            loss = loss + self.model.temporal_activation_reg(self.flags.beta)
        return loss, state


class Fastai(AWDPeer):
    """fastai's AWD_LSTM as its language_model_learner trains it: AR and TAR on the loss, states kept in the model.

    checkout: a folder that pip has installed fastai into (--target).
    """

    repository = "fastai"
    tied = True

    def __init__(self, checkout, flags, model):
        if not (Path(checkout) / "fastai" / "text" / "models" / "awdlstm.py").is_file():
            raise UserError(f"{checkout}/fastai is not there: pip install fastai --target {checkout}")
        sys.path.append(str(checkout))
        self.flags, self.device = flags, model.embedding.weight.device
        module = importlib.import_module("fastai.text.models.awdlstm")
        sizes = {"emb_sz": flags.emsize, "n_hid": flags.nhid, "n_layers": flags.nlayers, "output_p": flags.dropout}
        drops = {"input_p": flags.dropouti, "hidden_p": flags.dropouth, "embed_p": flags.dropoute}
        config = {**module.awd_lstm_lm_config, **sizes, **drops, "weight_p": flags.wdrop}
        build = importlib.import_module("fastai.text.models.core").get_language_model
        self.model = build(module.AWD_LSTM, model.vocab_size, config).to(self.device)
        values = model.state_dict()
        self.model.load_state_dict({theirs: values[ours] for theirs, ours in self.names(values).items()})
        self.optimizer = self.optimize(self.model.parameters())

    def names(self, ours):
        names = dict.fromkeys(("0.encoder.weight", "0.encoder_dp.emb.weight"), "embedding.weight")
        names |= {f"1.decoder.{part}": f"head.{part}" for part in ("weight", "bias")}
        for name in ours:
            if name.startswith("core."):
                _, _, layer, *_, part = name.split(".")
                raw = part == "weight_hh_l0"
                names[f"0.rnns.{layer}." + (f"{part}_raw" if raw else f"module.{part}")] = name
        return names

    def state(self, batch_size):
        self.model[0].bs = batch_size
        self.model.reset()

    def cut(self, state):
        return state

    def regularized(self, tokens, targets, state):
        """Mean loss with AR and TAR in training, as its RNNCallback adds them."""
        logits, raw, dropped = self.model(tokens.t())
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.t().flatten())
        if self.model.training:
            loss = loss + self.flags.alpha * dropped.pow(2).mean()
            loss = loss + self.flags.beta * (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
        return loss, state


PEERS = {
    "port-rmc": PortRMC,
    "port-rnn": PortRNN,
    "example": Example,
    "authors": Authors,
    "a-martyn": Martyn,
    "fastai": Fastai,
}
