"""The recurrence compiled for a CPU: columns side by side, each in one pass over its steps."""

import numba
import numpy as np
import torch

from .. import compiled

CHUNK = 512
"""Columns that a thread walks over at once: their states stay in the first cache."""


def forward(gate, x, initial, mix, reverse):
    """See the package's docstring."""
    h = torch.empty_like(x)
    _forward(*(part.flatten(1) for part in (gate, x)), _state(initial, x), mix, reverse, h.flatten(1))
    return h


def backward(slope, gate, x, h, initial, mix, reverse):
    """See the package's docstring."""
    d_gate, d_x = torch.empty_like(gate), torch.empty_like(x)
    state = _state(initial, x)
    carried = torch.zeros_like(state)
    given, made = (slope, gate, x, h), (d_gate, d_x)
    _backward(*(part.flatten(1) for part in given), state, mix, reverse, *(part.flatten(1) for part in made), carried)
    return d_gate, d_x, carried.reshape(initial.shape).to(initial.dtype)


def _state(initial, x):
    """The first state, (B * H,), in the type that sums are carried in."""
    return initial.to(torch.promote_types(x.dtype, torch.float32)).flatten()


@compiled.kernel
def _forward(gate, x, initial, mix, reverse, h):
    """Everything (T, C), initial (C,)."""
    steps, columns = x.shape
    for chunk in numba.prange((columns + CHUNK - 1) // CHUNK):
        start, end = chunk * CHUNK, min(columns, (chunk + 1) * CHUNK)
        state = initial[start:end].copy()
        for step in range(steps):
            t = steps - 1 - step if reverse else step
            g, value, out = gate[t, start:end], x[t, start:end], h[t, start:end]
            if mix:
                for c in range(len(state)):
                    state[c] += compiled.widen(g[c]) * (compiled.widen(value[c]) - state[c])
                    out[c] = compiled.narrow(state[c], out)
            else:
                for c in range(len(state)):
                    state[c] = compiled.widen(g[c]) * state[c] + compiled.widen(value[c])
                    out[c] = compiled.narrow(state[c], out)


@compiled.kernel
def _backward(slope, gate, x, h, initial, mix, reverse, d_gate, d_x, carried):
    """Everything (T, C), initial and carried (C,); carried, 0 at first, becomes the gradient in the initial state."""
    steps, columns = x.shape
    for chunk in numba.prange((columns + CHUNK - 1) // CHUNK):
        start, end = chunk * CHUNK, min(columns, (chunk + 1) * CHUNK)
        sums, before = carried[start:end], np.empty(end - start, carried.dtype)
        for step in range(steps - 1, -1, -1):
            t = steps - 1 - step if reverse else step
            last = t + 1 if reverse else t - 1
            if step == 0:
                before[:] = initial[start:end]
            else:
                old = h[last, start:end]
                for c in range(len(before)):
                    before[c] = compiled.widen(old[c])
            s, g, value = slope[t, start:end], gate[t, start:end], x[t, start:end]
            to_g, to_x = d_gate[t, start:end], d_x[t, start:end]
            if mix:
                for c in range(len(sums)):
                    total, own = compiled.widen(s[c]) + sums[c], compiled.widen(g[c])
                    to_g[c] = compiled.narrow(total * (compiled.widen(value[c]) - before[c]), to_g)
                    to_x[c] = compiled.narrow(total * own, to_x)
                    sums[c] = total - total * own
            else:
                for c in range(len(sums)):
                    total = compiled.widen(s[c]) + sums[c]
                    to_g[c] = compiled.narrow(total * before[c], to_g)
                    to_x[c] = compiled.narrow(total, to_x)
                    sums[c] = total * compiled.widen(g[c])
