"""The recurrence as a loop, for reading and for checking the others."""

import torch


def wide(tensor):
    """The type that sums are carried in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def forward(gate, x, initial, mix, reverse):
    """See the package's docstring."""
    h = initial.to(wide(x))
    hs = [None] * len(x)
    for t in _order(len(x), reverse):
        g, value = gate[t].to(h.dtype), x[t].to(h.dtype)
        h = g * value + (1 - g) * h if mix else g * h + value
        hs[t] = h
    return torch.stack(hs).to(x.dtype)


def backward(slope, gate, x, h, initial, mix, reverse):
    """See the package's docstring."""
    carried = torch.zeros_like(initial, dtype=wide(x))
    d_gate, d_x = torch.empty_like(gate), torch.empty_like(x)
    for t in _order(len(x), not reverse):
        last = t + 1 if reverse else t - 1
        before = h[last] if 0 <= last < len(x) else initial
        g, value, before = gate[t].to(carried.dtype), x[t].to(carried.dtype), before.to(carried.dtype)
        total = slope[t] + carried
        d_gate[t] = total * (value - before) if mix else total * before
        d_x[t] = total * g if mix else total
        carried = total * (1 - g) if mix else total * g
    return d_gate, d_x, carried.to(initial.dtype)


def _order(steps, reverse):
    return range(steps - 1, -1, -1) if reverse else range(steps)
