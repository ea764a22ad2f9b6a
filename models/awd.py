"""The core of AWD-LSTM, AWD-GRU and AWD-QRNN (Merity et al. 2018, arXiv 1708.02182 and 1803.08240)."""

from torch import nn

from .dropout import locked_dropout, unit_drop, weight_drop
from .qrnn import QRNNLayer
from .rnn import KINDS, layer_weights, run_layer
from .stack import Stack

MODELS = ("LSTM", "QRNN", "GRU")


class RecurrentLayer(nn.Module):
    """One LSTM or GRU layer whose hidden-to-hidden weights can be others for a pass.

    model: a name of rnn.KINDS. loop: walk over time in Python, cell by cell.
    """

    def __init__(self, model, input_size, hidden_size, loop):
        super().__init__()
        library, arguments, _ = KINDS[model]
        self.rnn = library(input_size, hidden_size, **arguments)
        self.model, self.hidden_size, self.loop = model, hidden_size, loop
        self.states = 2 if model == "LSTM" else 1

    @property
    def dropped(self):
        """The weights that weight drop is for."""
        return self.rnn.weight_hh_l0

    def initial_state(self, batch_size):
        """Zeros: h and, of an LSTM, c, (1, B, H) each."""
        shape = (1, batch_size, self.hidden_size)
        return tuple(self.dropped.new_zeros(shape) for _ in range(self.states))

    def carry(self, x, state, weight, units=None):
        """x (T, B, input_size), state, the hidden-to-hidden weights -> output (T, B, H), state after the last step.

        units: those that the weights are for, as run_layer has it.
        """
        w_ih, _, *biases = layer_weights(self.rnn)
        return run_layer(self.model, x, (w_ih, weight, *biases), state, self.loop, units)


class AWD(Stack):
    """A stack of LSTM, GRU or QRNN layers with weight drop inside and locked dropout between.

    model: LSTM, QRNN or GRU. emsize: features of the input and, if tied, of the output (section 4.5, independent
    sizes). nhid: units of the other layers. nlayers. dropouth: between layers, a mask for all steps. wdrop: of the
    hidden-to-hidden weights (section 2), of all weights of a QRNN layer, a mask for a forward pass; the weights
    themselves stay what they are. wdrop_units: instead, the part wdrop of an LSTM's or GRU's hidden units does not come
    into the recurrence, the same ones for all columns, and models/lstm.py leaves their products out; a QRNN has none,
    nothing changes. loop: LSTM and GRU in a Python loop over readable cells, with the same results.

    A QRNN's first layer has a window of 2, the others of 1, output gates, no zoneout. State: layer after layer, h and c
    of an LSTM, h of a GRU, c of a QRNN's and the first one's last input; (1, B, units) each.
    """

    def __init__(self, model, emsize, nhid, nlayers, tied, dropouth=0.0, wdrop=0.0, loop=False, wdrop_units=False):
        sizes = [emsize, *[nhid] * (nlayers - 1), emsize if tied else nhid]
        if model == "QRNN":
            layers = (QRNNLayer(*sizes[n : n + 2], window=1 if n else 2) for n in range(nlayers))
        else:
            layers = (RecurrentLayer(model, *sizes[n : n + 2], loop) for n in range(nlayers))
        super().__init__(layers)
        self.input_size, self.output_size, self.dropouth, self.wdrop = emsize, sizes[-1], dropouth, wdrop
        self.loop = loop or model == "QRNN"
        self.wdrop_units = wdrop_units and model != "QRNN"

    def carry(self, layer, x, state):
        if self.wdrop_units:
            return layer.carry(x, state, *unit_drop(layer.dropped, self.wdrop, self.training))
        return layer.carry(x, state, weight_drop(layer.dropped, self.wdrop, self.training))

    def between(self, x):
        return locked_dropout(x, self.dropouth, self.training)
