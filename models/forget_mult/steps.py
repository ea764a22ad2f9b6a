"""The recurrence by torch's operations, one a step and whole arrays otherwise: any device, any type."""

import torch

from .reference import wide


def solve(a, b, initial, reverse):
    """h_t = a_t h_{t-1} + b_t, a and b (T, B, H) in float32 or wider, initial (B, H)."""
    h, last = torch.empty_like(b), initial.to(b.dtype)
    for t in range(len(b) - 1, -1, -1) if reverse else range(len(b)):
        last = torch.addcmul(b[t], a[t], last, out=h[t])
    return h


def forward(gate, x, initial, mix, reverse, solve=solve):
    """See the package's docstring. solve: what computes the recurrence of two gates."""
    gate, values = gate.to(wide(x)), x.to(wide(x))
    if mix:
        gate, values = 1 - gate, gate * values
    return solve(gate, values, initial, reverse).to(x.dtype)


def backward(slope, gate, x, h, initial, mix, reverse, solve=solve):
    """See the package's docstring. By the same recurrence the other way: total_t = slope_t + a_{t+1} total_{t+1}."""
    gate, x_wide, h = (part.to(wide(x)) for part in (gate, x, h))
    a = 1 - gate if mix else gate
    parts = [a[-1:], a[:-1]] if reverse else [a[1:], a[:1]]  # the one in the wrong place meets the initial 0
    total = solve(torch.cat(parts), slope.to(a.dtype), torch.zeros_like(h[0]), not reverse)
    first = initial.to(h.dtype)[None]
    before = torch.cat([h[1:], first] if reverse else [first, h[:-1]])
    end = -1 if reverse else 0
    d_gate, d_x = (total * (x_wide - before), total * gate) if mix else (total * before, total)
    return d_gate.to(x.dtype), d_x.to(x.dtype), (a[end] * total[end]).to(initial.dtype)
