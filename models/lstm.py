"""The LSTM's recurrence over time as one step of autograd, its element-wise parts compiled."""

import numba
import numpy as np
import torch

from . import compiled
from .products import prepare

BLOCKS = 32
"""Parts of a batch that threads share among themselves."""
ONE = np.float32(2**15 - 1)
"""What an activated gate of 1 is kept as for the backward pass: 16 bits of fixed point, half of float32's memory."""


def lstm(x_gates, w_hh, h, c, dtype, units=None):
    """All time steps of one layer on a CPU, its products in `dtype`, everything else in float32.

    x_gates (T, B, 4H) is W_ih x + b_ih + b_hh, float32 or `dtype`, gates in torch's order i, f, g, o; w_hh (4H, K);
    h, c (B, H) before the first step. units (K,): the hidden units that w_hh is for, the others do not come into the
    recurrence; all if None. Returns h of every step (T, B, H) and h, c after the last. Equations of rnn.lstm_cell; the
    weights are converted and packed once, and their gradient is one product over all steps. The backward pass has the
    gates with an error of 1.5e-5.
    """
    units = torch.arange(h.shape[1]) if units is None else units
    output, c = _LSTM.apply(x_gates, w_hh, h, c, dtype, units)
    return output, output[-1].clone(), c


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_gates, w_hh, h, c, dtype, units):
        product = prepare(w_hh.to(dtype))
        steps, batch, size = *x_gates.shape[:2], h.shape[1]
        x_gates = x_gates.contiguous()
        gates = x_gates.new_empty(x_gates.shape, dtype=torch.int16)
        cells, output = (gates.new_empty(steps, batch, size, dtype=torch.float32) for _ in range(2))
        narrow = h.new_empty(steps + 1, batch, len(units), dtype=dtype)
        narrow[0] = h[:, units]
        buffers = [compiled.array(each) for each in (x_gates, c, gates, cells, output, narrow, units)]
        for t in range(steps):
            _step(t, product(narrow[t]), *buffers)
        ctx.save_for_backward(w_hh, c, gates, cells, narrow, units)
        ctx.dtype = dtype
        return output, cells[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output, d_c):
        w_hh, c, gates, cells, narrow, units = ctx.saved_tensors
        product = prepare(w_hh.to(ctx.dtype).t())
        d_gates = torch.empty_like(gates, dtype=ctx.dtype)
        d_output, d_c, d_h = d_output.contiguous(), d_c.clone(), torch.zeros_like(narrow[0])
        buffers = [compiled.array(each) for each in (d_output, d_c, gates, cells, c, d_gates, units)]
        for t in range(len(gates) - 1, -1, -1):
            _step_back(t, d_h, *buffers)
            d_h = product(d_gates[t])
        del product  # its packed weights, before a gradient of their size is made
        d_w = torch.mm(d_gates.flatten(0, 1).t(), narrow[:-1].flatten(0, 1)).to(w_hh.dtype)
        d_h = torch.zeros_like(c).index_copy(1, units, d_h.to(c.dtype))
        return d_gates, d_w, d_h, d_c, None, None


@compiled.kernel
def _step(t, product, x_gates, first, gates, cells, output, narrow, units):
    """Step t: its gates, activated, times ONE (T, B, 4H), c and h (T, B, H), and h of the units narrow (T + 1, B, K).

    From W_hh h, product (B, 4H), and x_gates (T, B, 4H). first (B, H): c before step 0; units (K,).
    """
    batch, size = first.shape
    for block in numba.prange(BLOCKS):
        z = np.empty(4 * size, np.float32)
        i, f, g, o = z[:size], z[size : 2 * size], z[2 * size : 3 * size], z[3 * size :]
        for b in range(batch * block // BLOCKS, batch * (block + 1) // BLOCKS):
            kept, from_h, from_x = gates[t, b], product[b], x_gates[t, b]
            for j in range(4 * size):
                z[j] = compiled.widen(from_h[j]) + compiled.widen(from_x[j])
            before = first[b] if t == 0 else cells[t - 1, b]
            after, hidden, low = cells[t, b], output[t, b], narrow[t + 1, b]
            for j in range(size):
                i[j], f[j], o[j] = compiled.sigmoid(i[j]), compiled.sigmoid(f[j]), compiled.sigmoid(o[j])
                g[j] = compiled.tanh(g[j])
                c = f[j] * before[j] + i[j] * g[j]
                after[j], hidden[j] = c, o[j] * compiled.tanh(c)
            for k in range(len(units)):
                low[k] = compiled.narrow(hidden[units[k]], low)
            for j in range(4 * size):
                kept[j] = np.int16(np.rint(z[j] * ONE))


@compiled.kernel
def _step_back(t, d_h, d_output, d_c, gates, cells, first, d_gates, units):
    """Slopes of step t's gates before activation (T, B, 4H); d_c (B, H) becomes that of c before the step.

    gates (T, B, 4H), cells (T, B, H), first (B, H), units (K,) as in _step; d_h (B, K), d_output (T, B, H).
    """
    batch, size = first.shape
    for block in numba.prange(BLOCKS):
        z, to_h = np.empty(4 * size, np.float32), np.empty(size, np.float32)
        i, f, g, o = z[:size], z[size : 2 * size], z[2 * size : 3 * size], z[3 * size :]
        for b in range(batch * block // BLOCKS, batch * (block + 1) // BLOCKS):
            kept, slopes, outer, through, carried = gates[t, b], d_gates[t, b], d_output[t, b], d_h[b], d_c[b]
            for j in range(size):
                to_h[j] = outer[j]
            for k in range(len(units)):
                to_h[units[k]] += compiled.widen(through[k])
            for j in range(4 * size):
                z[j] = np.float32(kept[j]) * np.float32(1 / ONE)
            d_i, d_f, d_g, d_o = slopes[:size], slopes[size : 2 * size], slopes[2 * size : 3 * size], slopes[3 * size :]
            after, before, one = cells[t, b], first[b] if t == 0 else cells[t - 1, b], np.float32(1)
            for j in range(size):
                bent, d = compiled.tanh(after[j]), to_h[j]
                to_c = carried[j] + d * o[j] * (one - bent * bent)
                d_i[j] = compiled.narrow(to_c * g[j] * i[j] * (one - i[j]), slopes)
                d_f[j] = compiled.narrow(to_c * before[j] * f[j] * (one - f[j]), slopes)
                d_g[j] = compiled.narrow(to_c * i[j] * (one - g[j] * g[j]), slopes)
                d_o[j] = compiled.narrow(d * bent * o[j] * (one - o[j]), slopes)
                carried[j] = to_c * f[j]
