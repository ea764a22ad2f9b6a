"""The LSTM's recurrence over time as one step of autograd."""

import torch

from .products import prepare


def lstm(x_gates, w_hh, h, c, dtype):
    """All time steps of one layer, its products in `dtype`, everything else in the type of x_gates.

    x_gates (T, B, 4H) is W_ih x + b_ih + b_hh, gates in torch's order i, f, g, o; w_hh (4H, H); h, c (B, H) before the
    first step. Returns h of every step (T, B, H) and h, c after the last. Equations of rnn.lstm_cell; the weights are
    converted and packed once, and their gradient is one product over all steps.
    """
    output, c = _LSTM.apply(x_gates, w_hh, h, c, dtype)
    return output, output[-1], c


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_gates, w_hh, h, c, dtype):
        product = prepare(w_hh.to(dtype))
        steps, batch, size = *x_gates.shape[:2], w_hh.shape[1]
        gates = torch.empty_like(x_gates)
        cells, tanhs, output = (x_gates.new_empty(steps, batch, size) for _ in range(3))
        before = h, c
        for t in range(steps):
            z = torch.add(x_gates[t], product(h.to(dtype)), out=gates[t])
            z[:, : 2 * size].sigmoid_(), z[:, 2 * size : 3 * size].tanh_(), z[:, 3 * size :].sigmoid_()
            i, f, g, o = z.chunk(4, 1)
            c = torch.mul(f, c, out=cells[t]).addcmul_(i, g)
            h = torch.mul(o, torch.tanh(c, out=tanhs[t]), out=output[t])
        ctx.save_for_backward(gates, cells, tanhs, output, w_hh, *before)
        ctx.dtype = dtype
        return output, c.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output, d_c):
        gates, cells, tanhs, output, w_hh, h, c = ctx.saved_tensors
        product = prepare(w_hh.to(ctx.dtype).t())
        size = w_hh.shape[1]
        d_gates = torch.empty_like(gates)
        d_h = torch.zeros_like(h)
        for t in range(len(gates) - 1, -1, -1):
            i, f, g, o = gates[t].chunk(4, 1)
            d_i, d_f, d_g, d_o = d_gates[t].chunk(4, 1)
            d_h = d_h + d_output[t]
            torch.mul(d_h, tanhs[t], out=d_o)
            d_c = d_c + torch.ops.aten.tanh_backward(d_h * o, tanhs[t])
            torch.mul(d_c, g, out=d_i)
            torch.mul(d_c, cells[t - 1] if t else c, out=d_f)
            torch.mul(d_c, i, out=d_g)
            z, d_z = gates[t], d_gates[t]
            for part in (slice(0, 2 * size), slice(3 * size, None)):
                torch.ops.aten.sigmoid_backward(d_z[:, part], z[:, part], grad_input=d_z[:, part])
            torch.ops.aten.tanh_backward(d_z[:, 2 * size : 3 * size], g, grad_input=d_z[:, 2 * size : 3 * size])
            d_c = d_c * f
            d_h = product(d_z.to(ctx.dtype)).to(h.dtype)
        before = torch.cat([h[None], output[:-1]]).flatten(0, 1).to(ctx.dtype)
        d_w = torch.mm(d_gates.flatten(0, 1).to(ctx.dtype).t(), before).to(w_hh.dtype)
        return d_gates, d_w, d_h, d_c, None
