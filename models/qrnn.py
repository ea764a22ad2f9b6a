"""The Quasi-Recurrent Neural Network of Bradbury et al. 2017 (arXiv 1611.01576), as a layer and as a core."""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .dropout import dropout
from .forget_mult import BACKENDS
from .forget_mult.pooling import CANDIDATES, MODES, pool
from .products import linear
from .stack import Stack


class QRNNLayer(nn.Module):
    """One layer: products over a window of the inputs, then a recurrence element by element.

    With X_t the inputs of the window, x_t, x_{t-1}, ... side by side, and W in three blocks for the modes with an
    output gate (two for f, four for ifo), in this order:

        z, f, o, i = candidate(W_z X_t + b_z), sigmoid(W_f X_t + b_f), sigmoid(W_o X_t + b_o), sigmoid(W_i X_t + b_i)
        f, fo:  c_t = f_t z_t + (1 - f_t) c_{t-1}
        ifo:    c_t = f_t c_{t-1} + i_t z_t
        h_t = o_t c_t, or c_t in mode f                                    sections 2 and 2.1 of the paper

    In modes f and fo the gate f lets the candidate in, as in salesforce/pytorch-qrnn, whose weights load; in the paper
    and in LGirrbach/PyTorch-QRNN it keeps the past, which is the same with the sign of W_f and b_f turned. In mode ifo
    it keeps the past here, too.

    input_size, hidden_size: features of x and h (input_size if None). save_prev_x: keep the last inputs of a sequence
    for the window of the next one, until reset(). zoneout: probability that an element of c keeps its old value in
    training; in evaluation every update is made to the expected part. window: inputs of a product, 1 or more.
    output_gate: mode fo, or f. use_cuda: False keeps a CUDA tensor away from kernels of our own. mode: f, fo or ifo;
    beats output_gate. candidate: the nonlinearity of z, a name of CANDIDATES. bias: of the products. backend: how the
    recurrence is computed (forget_mult.BACKENDS); the fastest for the device if None. reverse: walk from the end.

    Raises ValueError for a window below 1 and for unknown names.
    """

    def __init__(
        self,
        input_size,
        hidden_size=None,
        save_prev_x=False,
        zoneout=0,
        window=1,
        output_gate=True,
        use_cuda=True,
        mode=None,
        candidate="tanh",
        bias=True,
        backend=None,
        reverse=False,
    ):
        super().__init__()
        mode = mode or ("fo" if output_gate else "f")
        for what, value, known in (
            ("mode", mode, MODES),
            ("candidate", candidate, CANDIDATES),
            ("backend", backend, BACKENDS),
        ):
            if value is not None and value not in known:
                raise ValueError(f"unknown {what} {value!r}: expected one of {', '.join(known)}")
        if window < 1:
            raise ValueError(f"expected a window of 1 input or more, got {window}")
        self.input_size, self.hidden_size = input_size, hidden_size or input_size
        self.save_prev_x, self.zoneout, self.window, self.use_cuda = save_prev_x, zoneout, window, use_cuda
        self.mode, self.candidate, self.backend, self.reverse = mode, candidate, backend, reverse
        self.states = 2 if window > 1 else 1
        self.linear = nn.Linear(window * input_size, MODES[mode] * self.hidden_size, bias)
        self.reset()

    def reset(self):
        """Forget the inputs that save_prev_x keeps: the next sequence starts anew."""
        self.prevX = None

    def forward(self, X, hidden=None):
        """X (T, B, input_size), hidden: c before the first step, (B, H) or (1, B, H), 0 if None.

        Returns h (T, B, H) and c after the last step (1, B, H), as pytorch-qrnn does.
        """
        hidden = None if hidden is None else hidden.reshape(X.shape[1], self.hidden_size)
        output, last, previous = self.walk(X, hidden, self.prevX)
        if self.save_prev_x:
            self.prevX = previous.detach()
        return output, last[None]

    @property
    def dropped(self):
        """The weights that weight drop is for."""
        return self.linear.weight

    def initial_state(self, batch_size):
        """Zeros, what `carry` starts from: c (1, B, H) and, for windows above 1, inputs (window - 1, B, input_size)."""
        zeros = self.linear.weight.new_zeros
        c = zeros(1, batch_size, self.hidden_size)
        return (c, zeros(self.window - 1, batch_size, self.input_size)) if self.window > 1 else (c,)

    def carry(self, x, state, weight=None):
        """x (T, B, input_size), state as initial_state has it -> h (T, B, H), state after the last step.

        weight: in the place of linear.weight.
        """
        previous = state[1].to(x.dtype) if self.window > 1 else None
        output, c, previous = self.walk(x, state[0][0], previous, weight=weight)
        return output, (c[None], previous) if self.window > 1 else (c[None],)

    def walk(self, x, c=None, previous=None, there=None, weight=None):
        """The layer with its whole state as argument and result.

        x (T, B, input_size); c (B, H) before the first step, 0 if None; previous (window - 1, B, input_size): the
        inputs before it in the order of time, 0 if None (with reverse: after the last step). there (T, B), bool: False
        where a sequence has ended; c stays what it is there. weight: in the place of linear.weight.
        Returns h (T, B, H), c (B, H) after the last step, and previous for what follows.
        """
        steps, batch, _ = x.shape
        if previous is None:
            previous = x.new_zeros(self.window - 1, batch, self.input_size)
        padded = torch.cat([x, previous] if self.reverse else [previous, x]) if self.window > 1 else x
        starts = range(self.window) if self.reverse else range(self.window - 1, -1, -1)
        source = torch.cat([padded[start : start + steps] for start in starts], 2) if self.window > 1 else x
        gates = linear(source, self.linear.weight if weight is None else weight, self.linear.bias)
        if c is None:
            c = x.new_zeros(batch, self.hidden_size, dtype=torch.promote_types(x.dtype, torch.float32))
        update, keep = None, 1.0
        if self.zoneout and self.training:
            update = torch.rand(steps, batch, self.hidden_size, device=x.device) >= self.zoneout
        elif self.zoneout:
            keep = 1 - self.zoneout
        if there is not None:
            there = there[..., None].expand(-1, -1, self.hidden_size)
            update = there if update is None else update & there
        backend = self.backend or ("torch" if x.is_cuda and not self.use_cuda else None)
        output, c = pool(gates, c, self.mode, self.candidate, update, keep, self.reverse, backend)
        rest = self.window - 1
        output = output.to(x.dtype)  # of bfloat16 modules bfloat16; under autocast x is what it was
        return output, c, (padded[:rest] if self.reverse else padded[len(padded) - rest :]).clone()


class QRNN(nn.Module):
    """A stack of QRNNLayers with the call of nn.LSTM and of salesforce/pytorch-qrnn: output, hidden = qrnn(X, hidden).

    input_size, hidden_size (input_size if None), num_layers, bias, batch_first (of X and output, as nn.LSTM),
    dropout (between the layers), bidirectional: as in nn.LSTM. layers: QRNNLayers to use instead of making some. The
    others are QRNNLayer's.

    Bidirectional: every layer walks both ways, h of both side by side; hidden is (2 * layers, B, H), forwards first in
    each layer. Its window reaches forwards in time then, too, so that save_prev_x and chunks have no meaning for it.
    Raises ValueError for bidirectional with save_prev_x or with layers.
    """

    def __init__(
        self,
        input_size,
        hidden_size=None,
        num_layers=1,
        bias=True,
        batch_first=False,
        dropout=0.0,
        bidirectional=False,
        layers=None,
        *,
        save_prev_x=False,
        window=1,
        zoneout=0,
        output_gate=True,
        use_cuda=True,
        mode=None,
        candidate="tanh",
        backend=None,
    ):
        super().__init__()
        hidden_size = hidden_size or input_size
        if bidirectional and (save_prev_x or layers):
            raise ValueError(
                "bidirectional goes with neither save_prev_x nor layers of your own: it needs whole sequences"
            )
        ways = 2 if bidirectional else 1

        def make(number, reverse):
            size = input_size if number == 0 else ways * hidden_size
            return QRNNLayer(
                size,
                hidden_size,
                save_prev_x,
                zoneout,
                window,
                output_gate,
                use_cuda,
                mode,
                candidate,
                bias,
                backend,
                reverse,
            )

        self.layers = nn.ModuleList(layers or (make(number, False) for number in range(num_layers)))
        self.reverse_layers = nn.ModuleList(make(number, True) for number in range(num_layers if bidirectional else 0))
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, len(self.layers)
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional

    def reset(self):
        """Forget the inputs that save_prev_x keeps."""
        for layer in self.layers:
            layer.reset()

    def forward(self, input, hidden=None):
        """input (T, B, input_size), (B, T, input_size) with batch_first, or a PackedSequence; hidden (layers, B, H).

        Returns h of the last layer in the form of the input, and c of every layer after the last step of each
        sequence, (layers, B, H). Raises ValueError for a PackedSequence with save_prev_x.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hidden)
        if self.batch_first:
            input = input.transpose(0, 1)
        output, hidden = self._stack(input, hidden, None)
        return output.transpose(0, 1) if self.batch_first else output, hidden

    def _packed(self, packed, hidden):
        if any(layer.save_prev_x for layer in self.layers):
            raise ValueError("a PackedSequence ends its sequences: make the QRNN without save_prev_x")
        x, lengths = pad_packed_sequence(packed)
        there = (torch.arange(len(x))[:, None] < lengths).to(x.device)
        output, hidden = self._stack(x, hidden, there)
        order = packed.sorted_indices
        if order is not None:
            output, lengths = output[:, order], lengths[order.cpu()]
        data = pack_padded_sequence(output, lengths).data
        return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices), hidden

    def _stack(self, x, hidden, there):
        ways = (self.layers, self.reverse_layers) if self.bidirectional else (self.layers,)
        lasts = []
        for number in range(self.num_layers):
            outputs = []
            for way in ways:
                layer = way[number]
                c = None if hidden is None else hidden[len(lasts)]
                if there is None:
                    output, last = layer(x, c)
                else:
                    output, last, _ = layer.walk(x, c, there=there)
                    output, last = output * there[..., None], last[None]  # a window must not see what is behind an end
                outputs.append(output)
                lasts.append(last)
            x = torch.cat(outputs, 2) if self.bidirectional else outputs[0]
            if number + 1 < self.num_layers:
                x = dropout(x, self.dropout, self.training)
        return x, torch.cat(lasts)


class QRNNCore(Stack):
    """The core of the QRNN language model: a stack of QRNNLayers whose state goes in and comes out.

    emsize: E. nhid: H of every layer. nlayers. window, zoneout, mode, candidate, backend: of every layer.
    dropout: between the layers. State, layer after layer: c (1, B, H) and, for windows above 1, the last inputs
    (window - 1, B, features).
    """

    def __init__(
        self, emsize, nhid, nlayers, window=2, zoneout=0.0, mode="fo", dropout=0.0, candidate="tanh", backend=None
    ):
        super().__init__(
            QRNNLayer(
                nhid if number else emsize,
                nhid,
                zoneout=zoneout,
                window=window,
                mode=mode,
                candidate=candidate,
                backend=backend,
            )
            for number in range(nlayers)
        )
        self.input_size, self.output_size, self.dropout = emsize, nhid, dropout
        self.loop = True

    def between(self, x):
        return dropout(x, self.dropout, self.training)
