"""Elman, GRU and LSTM: the library's kernels, or the same weights in a Python loop over readable cells."""

import contextlib

import torch
from torch import nn
from torch.nn import functional

from . import compiled
from .dropout import dropout
from .lstm import lstm
from .products import linear, one_step, product_dtype, step_linear


def elman_cell(nonlinearity):
    """The step h' = g(W_ih x + b_ih + W_hh h + b_hh), g = `nonlinearity` (Elman 1990).

    Of every cell: x_gates (B, gates) is W_ih x + b_ih, product is h -> W_hh h + b_hh; returns the state after the step.
    """

    def cell(x_gates, state, product):
        return (nonlinearity(x_gates + product(state[0])),)

    return cell


def gru_cell(x_gates, state, product):
    """Cho et al. 2014, with the reset gate after the product, as cuDNN and torch have it. Gate order r, z, n.

    r = sigmoid(.), z = sigmoid(.), n = tanh(x_n + r * (W_hn h + b_hn)), h' = (1 - z) n + z h.
    """
    (h,) = state
    x_r, x_z, x_n = x_gates.chunk(3, dim=-1)
    h_r, h_z, h_n = product(h).chunk(3, dim=-1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (n + z * (h - n),)


def lstm_cell(x_gates, state, product):
    """Hochreiter & Schmidhuber 1997, with forget gate, no peepholes. Gate order i, f, g, o.

    c' = f c + i g, h' = o tanh(c'), with i, f, o = sigmoid(.), g = tanh(.).
    """
    h, c = state
    i, f, g, o = (x_gates + product(h)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


OWN_LSTM = 400
"""Hidden units from which models/lstm.py trains faster in bfloat16 on a CPU than the library's kernel."""
KINDS = {
    "LSTM": (nn.LSTM, {}, lstm_cell),
    "GRU": (nn.GRU, {}, gru_cell),
    "RNN_TANH": (nn.RNN, {"nonlinearity": "tanh"}, elman_cell(torch.tanh)),
    "RNN_RELU": (nn.RNN, {"nonlinearity": "relu"}, elman_cell(torch.relu)),
}


LIBRARY = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}
"""The library's kernels, which take weights as arguments."""


def full_range(x):
    """Inside the `with` a GPU's kernels for whole recurrences compute in the weights' own type, under autocast, too.

    cuDNN has none in bfloat16, so autocast would take float16, whose smallest gradients are 0. runtime.setup lets
    products of float32 be TF32 instead, bfloat16's range with three bits more.
    """
    return torch.autocast("cuda", enabled=False) if x.is_cuda else contextlib.nullcontext()


class RNN(nn.Module):
    """A stack of recurrent layers: core(x, state) -> output, state.

    model: LSTM, GRU, RNN_TANH or RNN_RELU. emsize: features of the input. nhid: hidden units of each layer.
    dropout: between layers, a fresh mask for every time step. loop: walk over time in Python, cell by cell, instead of
    calling the library's kernel; weights, their names and the results are the same. Where it is faster, an LSTM is
    trained by models/lstm.py instead, likewise.

    Deviation from L0SG's port in the loop: W_ih x of all steps is one product before it.
    """

    def __init__(self, model, emsize, nhid, nlayers, dropout=0.0, loop=False):
        super().__init__()
        library, arguments, _ = KINDS[model]
        between = dropout if nlayers > 1 else 0.0
        self.rnn = library(emsize, nhid, nlayers, dropout=between, **arguments)
        self.model, self.input_size, self.output_size, self.loop = model, emsize, nhid, loop

    def initial_state(self, batch_size):
        """Zeros: (h, c) of the LSTM, (h,) of the others, each (layers, B, H)."""
        weight = self.rnn.weight_hh_l0
        shape = (self.rnn.num_layers, batch_size, self.output_size)
        return tuple(weight.new_zeros(shape) for _ in range(2 if self.model == "LSTM" else 1))

    def forward(self, x, state):
        """x (T, B, E), state as initial_state gives it -> output (T, B, H), state after the last step in its dtype."""
        # cuDNN differentiates only what it is told is training, which the module ties to dropout
        learning = torch.is_grad_enabled() and not self.training
        if self.loop or learning or own_lstm(self.model, x, self.output_size) or one_step(x):
            output, new_state = self._stack(x, state)
        else:
            with full_range(x):
                if self.model == "LSTM":
                    output, new_state = self.rnn(x, state)
                else:
                    output, *new_state = self.rnn(x, *state)
        return output, tuple(new.to(old.dtype) for new, old in zip(new_state, state, strict=True))

    def _stack(self, x, state):
        finals = []
        for number in range(self.rnn.num_layers):
            weights = layer_weights(self.rnn, number)
            own = tuple(part[number : number + 1] for part in state)
            x, final = run_layer(self.model, x, weights, own, self.loop)
            if number + 1 < self.rnn.num_layers:
                x = dropout(x, self.rnn.dropout, self.training)
            finals.append(final)
        return x, [torch.cat(parts) for parts in zip(*finals, strict=True)]


def layer_weights(module, number=0):
    """W_ih, W_hh, b_ih, b_hh of a layer of nn.LSTM, nn.GRU or nn.RNN."""
    return [getattr(module, f"{name}_l{number}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def own_lstm(model, x, size):
    """Whether models/lstm.py trains this layer faster than the library: x (T, B, E), `size` hidden units."""
    if model != "LSTM" or size < OWN_LSTM or not compiled.usable(x):
        return False
    return torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def run_layer(model, x, weights, state, loop=False, units=None):
    """One layer of `model`, a name of KINDS, with weights that are arguments: in the loop, or the fastest way.

    x (T, B, E), weights as layer_weights gives them, state (1, B, H) each -> output (T, B, H), state after the last.
    units (K,): those that the columns of W_hh, only so many, are of; None for all.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    size, walked = state[0].shape[2], loop or one_step(x)
    if not walked and own_lstm(model, x, size):
        x_gates = functional.linear(x, w_ih, b_ih + b_hh)
        output, *final = lstm(x_gates, w_hh, *(part[0] for part in state), product_dtype(w_hh), units)
        return output, [part[None] for part in final]
    if units is not None:
        w_hh = w_hh.new_zeros(len(w_hh), size).index_copy(1, units, w_hh)
    weights = w_ih, w_hh, b_ih, b_hh
    if walked:
        return _walk(KINDS[model][2], x, weights, state)
    states = state if model == "LSTM" else state[0]
    with full_range(x):
        if x.is_cuda:
            x, *weights = (part.to(w_ih.dtype) for part in (x, *weights))
        output, *final = LIBRARY[model](x, states, weights, True, 1, 0.0, torch.is_grad_enabled(), False, False)
    return output, final


def _walk(cell, x, weights, state):
    w_ih, w_hh, b_ih, b_hh = weights
    state = tuple(part[0] for part in state)
    gates = linear(x, w_ih, b_ih).to(state[0].dtype)  # the recurrence is never narrower
    product, outputs = step_linear(w_hh, b_hh), []
    for x_gates in gates.unbind(0):
        state = cell(x_gates, state, product)
        outputs.append(state[0])
    return torch.stack(outputs), [part[None] for part in state]
