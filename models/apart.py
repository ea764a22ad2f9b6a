"""Language models taken apart into named operations, which are done in floats, watched, or done in integers.

Names are those of IntelLabs/distiller's LSTM where it has one: encoder, decoder, LAYER.fc_gate_x, LAYER.fc_gate_h,
LAYER.eltwiseadd_gate, LAYER.act_f, LAYER.eltwisemult_cell_forget, ...
"""

import torch
from torch import nn
from torch.nn import functional

from .forget_mult.pooling import CANDIDATES, MODES
from .language_model import LanguageModel, ModelError
from .qrnn import QRNNLayer
from .rmc import RMC
from .rnn import RNN, layer_weights
from .softmax import IGNORE, FullSoftmax
from .stack import Stack

ACTIVATIONS = {**CANDIDATES, "relu": torch.relu}
MATRICES = (nn.Embedding, nn.Linear, nn.RNNBase, FullSoftmax)
"""Modules with matrices to compress; gains of norms are none."""


class Floats:
    """Every operation in floats. Others do the same with integers, or look on.

    name: of the operation. feeds: the activation that nothing but the result goes into, if there is one.
    """

    def embedding(self, name, tokens, weight):
        """weight (V, E), tokens (T, B) -> (T, B, E)."""
        return functional.embedding(tokens, weight)

    def linear(self, name, x, weight, bias, feeds=None):
        """x (..., K), weight (N, K), bias (N,) or None -> (..., N)."""
        return functional.linear(x, weight, bias)

    def add(self, name, a, b, feeds=None):
        """a + b."""
        return a + b

    def subtract(self, name, a, b):
        """a - b."""
        return a - b

    def multiply(self, name, a, b):
        """a * b."""
        return a * b

    def activate(self, name, kind, x):
        """kind: of ACTIVATIONS."""
        return ACTIVATIONS[kind](x)

    def free(self, name, function, *inputs):
        """What stays in floats: a function of the inputs."""
        return function(*inputs)

    def enter(self, name, x):
        """A tensor that the operation `name` made, in an earlier window for example, as it was then."""
        return x

    def leave(self, x):
        """A tensor of floats."""
        return x

    def scale(self, x, factor):
        """x times a number, the integers staying what they are."""
        return x * factor

    def stack(self, parts):
        """Results of one operation at several steps, one upon the other."""
        return torch.stack(parts)

    def join(self, parts, dim):
        """Results of one operation, side by side."""
        return torch.cat(parts, dim)


def lstm_layer(ops, name, x, state, weights):
    """x (T, B, E), state (h, c) (B, H) each, weights as rnn.layer_weights gives them -> h (T, B, H), state after."""
    w_ih, w_hh, b_ih, b_hh = weights
    h, c = ops.enter(f"{name}.eltwisemult_hidden", state[0]), ops.enter(f"{name}.eltwiseadd_cell", state[1])
    x_gates, outputs = ops.linear(f"{name}.fc_gate_x", x, w_ih, b_ih), []
    for t in range(len(x_gates)):
        h_gates = ops.linear(f"{name}.fc_gate_h", h, w_hh, b_hh)
        gates = ops.add(f"{name}.eltwiseadd_gate", x_gates[t], h_gates, feeds="sigmoid").chunk(4, -1)
        i, f, o = (
            ops.activate(f"{name}.act_{gate}", "sigmoid", gates[n]) for gate, n in (("i", 0), ("f", 1), ("o", 3))
        )
        g = ops.activate(f"{name}.act_g", "tanh", gates[2])
        kept, new = (
            ops.multiply(f"{name}.eltwisemult_cell_forget", f, c),
            ops.multiply(f"{name}.eltwisemult_cell_input", i, g),
        )
        c = ops.add(f"{name}.eltwiseadd_cell", kept, new)
        h = ops.multiply(f"{name}.eltwisemult_hidden", o, ops.activate(f"{name}.act_h", "tanh", c))
        outputs.append(h)
    return ops.stack(outputs), (ops.leave(h), ops.leave(c))


def gru_layer(ops, name, x, state, weights):
    """As lstm_layer, with state (h,): h' = n + z (h - n)."""
    w_ih, w_hh, b_ih, b_hh = weights
    h = ops.enter(f"{name}.eltwiseadd_hidden", state[0])
    x_gates, outputs = ops.linear(f"{name}.fc_gate_x", x, w_ih, b_ih), []
    for t in range(len(x_gates)):
        x_r, x_z, x_n = x_gates[t].chunk(3, -1)
        h_r, h_z, h_n = ops.linear(f"{name}.fc_gate_h", h, w_hh, b_hh).chunk(3, -1)
        r, z = (
            ops.activate(f"{name}.act_{gate}", "sigmoid", ops.add(f"{name}.eltwiseadd_{gate}", *parts, feeds="sigmoid"))
            for gate, parts in (("r", (x_r, h_r)), ("z", (x_z, h_z)))
        )
        reset = ops.multiply(f"{name}.eltwisemult_reset", r, h_n)
        n = ops.activate(f"{name}.act_n", "tanh", ops.add(f"{name}.eltwiseadd_n", x_n, reset, feeds="tanh"))
        moved = ops.multiply(f"{name}.eltwisemult_hidden", z, ops.subtract(f"{name}.eltwisesub_hidden", h, n))
        h = ops.add(f"{name}.eltwiseadd_hidden", n, moved)
        outputs.append(h)
    return ops.stack(outputs), (ops.leave(h),)


def elman_layer(kind):
    """The layer of RNN_TANH or RNN_RELU, as lstm_layer, with state (h,)."""

    def layer(ops, name, x, state, weights):
        w_ih, w_hh, b_ih, b_hh = weights
        h = ops.enter(f"{name}.act_h", state[0])
        x_gates, outputs = ops.linear(f"{name}.fc_gate_x", x, w_ih, b_ih), []
        for t in range(len(x_gates)):
            h_gates = ops.linear(f"{name}.fc_gate_h", h, w_hh, b_hh)
            gates = ops.add(f"{name}.eltwiseadd_gate", x_gates[t], h_gates, feeds=kind)
            h = ops.activate(f"{name}.act_h", kind, gates)
            outputs.append(h)
        return ops.stack(outputs), (ops.leave(h),)

    return layer


LAYERS = {"LSTM": lstm_layer, "GRU": gru_layer, "RNN_TANH": elman_layer("tanh"), "RNN_RELU": elman_layer("relu")}
OUTPUTS = {"LSTM": "eltwisemult_hidden", "GRU": "eltwiseadd_hidden", "RNN_TANH": "act_h", "RNN_RELU": "act_h"}
"""The operation whose result is a layer's output."""


def qrnn_layer(ops, name, before, x, state, layer):
    """x (T, B, E), state as layer.initial_state has it, layer a QRNNLayer -> h (T, B, H), state after.

    before: the operation that made x. Modes f and fo: c' = c + f (z - c); ifo: c' = f c + i z; h = o c, or c in mode f.
    """
    steps, rest, previous = len(x), layer.window - 1, ()
    if rest:
        padded = ops.join([ops.enter(before, state[1]), x], 0)
        x, previous = ops.join([padded[n : n + steps] for n in range(rest, -1, -1)], 2), (ops.leave(padded[steps:]),)
    gates = ops.linear(f"{name}.fc_gate", x, layer.linear.weight, layer.linear.bias).chunk(MODES[layer.mode], -1)
    z, others = ops.activate(f"{name}.act_z", layer.candidate, gates[0]), zip("foi", gates[1:], strict=False)
    gates = {gate: ops.activate(f"{name}.act_{gate}", "sigmoid", part) for gate, part in others}
    c, outputs = ops.enter(f"{name}.eltwiseadd_cell", state[0][0]), []
    for t in range(steps):
        if layer.mode == "ifo":
            kept = ops.multiply(f"{name}.eltwisemult_cell_forget", gates["f"][t], c)
            new = ops.add(
                f"{name}.eltwiseadd_new", kept, ops.multiply(f"{name}.eltwisemult_input", gates["i"][t], z[t])
            )
            moved = ops.subtract(f"{name}.eltwisesub_cell", new, c)
        else:
            moved = ops.multiply(
                f"{name}.eltwisemult_cell", gates["f"][t], ops.subtract(f"{name}.eltwisesub_cell", z[t], c)
            )
        c = ops.add(f"{name}.eltwiseadd_cell", c, ops.scale(moved, 1 - layer.zoneout))
        outputs.append(ops.multiply(f"{name}.eltwisemult_hidden", gates["o"][t], c) if "o" in gates else c)
    return ops.stack(outputs), (ops.leave(c)[None], *previous)


def rmc_core(ops, core, x, state):
    """x (T, B, E), state (memory,), (S, B, F) -> output (T, B, E), state after; core: an RMC.

    Norms and attention stay in floats.
    """
    rmc, outputs = core.memory, []
    x = ops.linear("input_projector", x, *_weights(rmc.input_projector))
    gates = rmc.gatestyle != "none"
    if gates:
        x_gates = ops.linear("input_gates", x, *_weights(rmc.input_gates))
        bias = rmc.gate_bias.repeat_interleave(x_gates.shape[-1] // 2)
        x_gates = ops.free("gate_bias", lambda raw: raw + bias, x_gates)
    memory = ops.enter("memory", state[0].transpose(0, 1))
    for t in range(len(x)):
        rows = ops.free("rows", lambda memory, row: torch.cat([memory, row[:, None]], 1), memory, x[t])
        for block in range(rmc.numblocks):
            rows = rmc_block(ops, rmc, block, rows)
        new = ops.free("slots", lambda rows: rows[:, : rmc.memslots], rows)
        if gates:
            squashed = ops.activate("act_memory", "tanh", memory)
            raw = ops.linear("memory_gates", squashed, *_weights(rmc.memory_gates))
            raw = ops.add("eltwiseadd_gate", ops.free("x_gates", lambda row: row[:, None], x_gates[t]), raw, "sigmoid")
            i, f = ops.activate("act_gate", "sigmoid", raw).chunk(2, -1)
            kept = ops.multiply("eltwisemult_forget", f, memory)
            new = ops.multiply("eltwisemult_input", i, ops.activate("act_new", "tanh", new))
            memory = ops.add("memory", kept, new)
        else:
            memory = ops.free("memory", lambda rows: rows, new)
        outputs.append(memory)
    x = ops.linear("projector", ops.stack(outputs).flatten(2), *_weights(core.projector))
    return x, (ops.leave(memory).transpose(0, 1),)


def rmc_block(ops, rmc, block, rows):
    """One block of attention and MLP: rows (B, S + 1, F) -> the same shape."""
    own, name = (0 if rmc.port else block), f"block{block}"
    qkv = ops.linear(f"{name}.qkv_projector", rows, *_weights(rmc.qkv_projector[own]))
    qkv = ops.free(f"{name}.qkv_norm", rmc.qkv_norm[own], qkv)
    attended = ops.free(f"{name}.attention", lambda qkv: rmc.attention(qkv, qkv.shape[1]), qkv)
    rows = ops.add(f"{name}.eltwiseadd_attention", rows, attended)
    rows = ops.free(f"{name}.attention_norm", rmc.attention_norm[own], rows)
    x = rows
    for layer in range(rmc.attmlplayers):
        if layer and not rmc.port:
            x = ops.activate(f"{name}.act_mlp{layer}", "relu", x)
        x = ops.linear(f"{name}.mlp{layer}", x, *_weights(rmc.mlp[0 if rmc.port else layer]))
        if rmc.port:
            x = ops.activate(f"{name}.act_mlp{layer}", "relu", x)
    return ops.free(f"{name}.mlp_norm", rmc.mlp_norm[own], ops.add(f"{name}.eltwiseadd_mlp", rows, x))


def _weights(linear):
    return linear.weight, linear.bias


def walk(ops, core, x, state):
    """A core in operations: x (T, B, E), state as core.initial_state has it.

    Returns the output (T, B, H), the state after the last step, and the name of the operation that made the output.
    """
    if isinstance(core, RMC):
        return *rmc_core(ops, core, x, state), "projector"
    before, after = "encoder", []
    if isinstance(core, RNN):
        for number in range(core.rnn.num_layers):
            own = [part[number] for part in state]
            x, final = LAYERS[core.model](ops, f"layer{number}", x, own, layer_weights(core.rnn, number))
            after.append(final)
        return x, tuple(map(torch.stack, zip(*after, strict=True))), f"layer{number}.{OUTPUTS[core.model]}"
    parts = iter(state)
    for number, layer in enumerate(core.layers):
        own, name = [next(parts) for _ in range(layer.states)], f"layer{number}"
        if isinstance(layer, QRNNLayer):
            x, final = qrnn_layer(ops, name, before, x, own, layer)
            before = f"{name}.{'eltwiseadd_cell' if layer.mode == 'f' else 'eltwisemult_hidden'}"
        else:
            x, final = LAYERS[layer.model](ops, name, x, [part[0] for part in own], layer_weights(layer.rnn))
            final, before = [part[None] for part in final], f"{name}.{OUTPUTS[layer.model]}"
        after += final
    return x, tuple(after), before


class Apart(LanguageModel):
    """A LanguageModel whose every step is an operation of `operations` (Floats to begin with); for evaluation only.

    Arguments: LanguageModel's. What is not done in integers is done in the type of the weights, under autocast too.
    Raises ModelError for a softmax in clusters and for a Transformer.
    """

    def __init__(self, **arguments):
        super().__init__(**arguments)
        if type(self.head) is not FullSoftmax:
            raise ModelError("a model is taken apart with a full softmax only: its clusters have no operations here")
        if not isinstance(self.core, (RMC, RNN, Stack)):
            raise ModelError("a Transformer has no operations here: it can't be quantized or kept in compressed rows")
        self.operations = Floats()

    def hidden(self, tokens, state):
        with torch.autocast(tokens.device.type, enabled=False):
            x = self.operations.embedding("encoder", tokens, self.embedding.weight)
            x, after, self.made_by = walk(self.operations, self.core, x, state)
            return self.operations.leave(x), after

    def log_probs(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            x = self.operations.enter(self.made_by, hidden)
            logits = self.operations.linear("decoder", x, self.head.weight, self.head.bias)
            return self.operations.leave(logits).log_softmax(-1)

    def forward(self, tokens, targets, state):
        hidden, state = self.hidden(tokens, state)
        log_probs = self.log_probs(hidden).flatten(0, 1)
        loss = functional.nll_loss(log_probs, targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return loss.view(1, 1), loss.new_zeros(1, 1), (targets != IGNORE).sum().view(1, 1), state

    def num_params(self):
        return sum(parameter.numel() for parameter in self.parameters())


def matrices(model):
    """(PLACE.NAME, module, NAME) of every matrix to compress, a shared one once for each module that has it."""
    for place, module in model.named_modules():
        if isinstance(module, MATRICES):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2:
                    yield f"{place}.{name}", module, name
