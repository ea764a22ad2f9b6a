"""What a QRNN layer does after its product: activations, zoneout, recurrence, output gate."""

import numba
import numpy as np
import torch
from torch.nn import functional

from .. import compiled
from . import choose, cuda, forget_mult, recurrence
from .reference import wide

MODES = {"f": 2, "fo": 3, "ifo": 4}
"""Modes of Bradbury et al. 2017, section 2.1, and how many gates they have: z, f, then o, then i, in this order."""
CANDIDATES = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": functional.softplus, "exp": torch.exp}
"""Nonlinearities of z."""
CHUNK = 512
"""Features that a thread walks over at once."""


def pool(gates, initial, mode, candidate, update=None, keep=1.0, reverse=False, backend=None):
    """Raw gates (T, B, G * H) and the state before the first step (B, H) -> output (T, B, H), c after the last (B, H).

    With z = candidate(.), f, o, i = sigmoid(.):
        f, fo:  c_t = f_t z_t + (1 - f_t) c_{t-1}      f lets the candidate in, as in pytorch-qrnn
        ifo:    c_t = f_t c_{t-1} + i_t z_t            f keeps the past, as in the paper
        output  c_t, or o_t c_t in the modes with o
    update (T, B, H), bool: where it is False, zoneout keeps c_{t-1}. keep: the part of an update that is made, its
    expectation in evaluation: c_t = keep * (the above) + (1 - keep) c_{t-1}.
    reverse: from the last step to the first. backend: of the recurrence; by device, and in one pass over memory on a
    CPU, if None. The output is float32 or wider.
    """
    kernels = fused(gates, initial) if backend is None else None
    if kernels:
        return _Pool.apply(kernels, gates, initial, update, keep, mode, candidate, reverse)
    gates = gates.to(wide(gates)).chunk(MODES[mode], -1)
    z, f = CANDIDATES[candidate](gates[0]), torch.sigmoid(gates[1])
    backend = backend or choose(f)
    done = keep if update is None else update.to(f.dtype) * keep
    if mode == "ifo":
        kept = 1 - done + done * f
        c = recurrence(kept, done * torch.sigmoid(gates[3]) * z, initial, reverse, backend)
    else:
        c = forget_mult(done * f, z, initial, reverse, backend)
    return c * torch.sigmoid(gates[2]) if mode != "f" else c, c[0 if reverse else -1]


def fused(gates, initial):
    """The kernels (forward, backward) that make one pass over memory on a tensor's device, or None."""
    if compiled.usable(gates, initial):
        return _pool, _pool_back
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if gates.is_cuda and gates.dtype in cuda.NAMES and not traced and cuda.usable(gates.device):
        return cuda.pool, cuda.pool_back
    return None


class _Pool(torch.autograd.Function):
    """In one pass over memory; backward computes the activations again from the raw gates."""

    @staticmethod
    def forward(ctx, kernels, gates, initial, update, keep, mode, candidate, reverse):
        gates, initial = gates.contiguous(), initial.to(wide(gates)).contiguous()
        steps, batch, width = gates.shape
        features = width // MODES[mode]
        update = gates.new_empty(0, batch, features, dtype=torch.bool) if update is None else update.contiguous()
        c = initial.new_empty(steps, batch, features)
        output = torch.empty_like(c) if mode != "f" else c
        shape = keep, MODES[mode], tuple(CANDIDATES).index(candidate), reverse
        ctx.kernels = kernels
        kernels[0](gates, initial, update, *shape, c, output)
        ctx.save_for_backward(gates, initial, update)
        ctx.c, ctx.shape = (c if mode != "f" else c.clone()), shape
        return output, c[0 if reverse else -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output, d_last):
        gates, initial, update = ctx.saved_tensors
        d_gates, carried = torch.empty_like(gates), d_last.clone().contiguous()
        ctx.kernels[1](d_output.contiguous(), gates, initial, update, *ctx.shape, ctx.c, d_gates, carried)
        return None, d_gates, carried, None, None, None, None, None


@compiled.inner
def _activate(raw, kind, out):
    """out = the candidate of raw, both (n,)."""
    if kind == 0:
        for j in range(len(out)):
            out[j] = compiled.tanh(compiled.widen(raw[j]))
    elif kind == 1:
        for j in range(len(out)):
            out[j] = compiled.sigmoid(compiled.widen(raw[j]))
    elif kind == 2:
        for j in range(len(out)):
            value = compiled.widen(raw[j])
            out[j] = max(value, np.float32(0)) + np.log1p(compiled.exp(-abs(value)))
    else:
        for j in range(len(out)):
            out[j] = compiled.exp(compiled.widen(raw[j]))


@compiled.inner
def _activate_back(raw, kind, value, slope):
    """slope (n,), of the candidate, becomes that of raw."""
    one = np.float32(1)
    if kind == 0:
        for j in range(len(slope)):
            slope[j] *= one - value[j] * value[j]
    elif kind == 1:
        for j in range(len(slope)):
            slope[j] *= value[j] * (one - value[j])
    elif kind == 2:
        for j in range(len(slope)):
            slope[j] *= compiled.sigmoid(compiled.widen(raw[j]))
    else:
        for j in range(len(slope)):
            slope[j] *= value[j]


@compiled.inner
def _open(raw, out):
    """out = sigmoid of raw, both (n,)."""
    for j in range(len(out)):
        out[j] = compiled.sigmoid(compiled.widen(raw[j]))


@compiled.kernel
def _pool(gates, initial, update, keep, kinds, candidate, reverse, c, output):
    """gates (T, B, G * H); initial (B, H); update (T or 0, B, H); c, output (T, B, H), one array if there is no o."""
    steps, batch, features = c.shape
    chunks = (features + CHUNK - 1) // CHUNK
    part = np.float32(keep)
    for turn in numba.prange(batch * chunks):
        b, start = turn // chunks, turn % chunks * CHUNK
        end = min(features, start + CHUNK)
        state = initial[b, start:end].copy()
        z, f, i, m = np.empty_like(state), np.empty_like(state), np.empty_like(state), np.empty_like(state)
        m[:] = part
        for step in range(steps):
            t = steps - 1 - step if reverse else step
            raw, kept, out = gates[t, b], c[t, b, start:end], output[t, b, start:end]
            _activate(raw[start:end], candidate, z)
            _open(raw[features + start : features + end], f)
            if len(update) > 0:
                allowed = update[t, b, start:end]
                for j in range(len(m)):
                    m[j] = part if allowed[j] else np.float32(0)
            if kinds == 4:
                _open(raw[3 * features + start : 3 * features + end], i)
                for j in range(len(state)):
                    state[j] += m[j] * (i[j] * z[j] - (np.float32(1) - f[j]) * state[j])
            else:
                for j in range(len(state)):
                    state[j] += m[j] * f[j] * (z[j] - state[j])
            for j in range(len(state)):
                kept[j] = state[j]
            if kinds > 2:
                o = raw[2 * features + start : 2 * features + end]
                for j in range(len(state)):
                    out[j] = state[j] * compiled.sigmoid(compiled.widen(o[j]))


@compiled.kernel
def _pool_back(d_output, gates, initial, update, keep, kinds, candidate, reverse, c, d_gates, carried):
    """carried (B, H), the slope of c after the last step, becomes that of the state before the first."""
    steps, batch, features = c.shape
    chunks = (features + CHUNK - 1) // CHUNK
    part, one = np.float32(keep), np.float32(1)
    for turn in numba.prange(batch * chunks):
        b, start = turn // chunks, turn % chunks * CHUNK
        end = min(features, start + CHUNK)
        sums = carried[b, start:end]
        z, f, i, m = np.empty_like(sums), np.empty_like(sums), np.empty_like(sums), np.empty_like(sums)
        d_z, total = np.empty_like(sums), np.empty_like(sums)
        m[:] = part
        for step in range(steps - 1, -1, -1):
            t = steps - 1 - step if reverse else step
            last = t + 1 if reverse else t - 1
            raw, slopes, outer = gates[t, b], d_gates[t, b], d_output[t, b, start:end]
            before = initial[b, start:end] if step == 0 else c[last, b, start:end]
            _activate(raw[start:end], candidate, z)
            _open(raw[features + start : features + end], f)
            if len(update) > 0:
                allowed = update[t, b, start:end]
                for j in range(len(m)):
                    m[j] = part if allowed[j] else np.float32(0)
            if kinds > 2:
                o, d_o, state = (
                    raw[2 * features + start : 2 * features + end],
                    slopes[2 * features + start :],
                    c[t, b, start:end],
                )
                for j in range(len(total)):
                    gate = compiled.sigmoid(compiled.widen(o[j]))
                    total[j] = sums[j] + outer[j] * gate
                    d_o[j] = compiled.narrow(outer[j] * state[j] * gate * (one - gate), slopes)
            else:
                for j in range(len(total)):
                    total[j] = sums[j] + outer[j]
            d_f = slopes[features + start :]
            if kinds == 4:
                _open(raw[3 * features + start : 3 * features + end], i)
                d_i = slopes[3 * features + start :]
                for j in range(len(total)):
                    d = total[j] * m[j]
                    d_z[j] = d * i[j]
                    d_i[j] = compiled.narrow(d * z[j] * i[j] * (one - i[j]), slopes)
                    d_f[j] = compiled.narrow(d * before[j] * f[j] * (one - f[j]), slopes)
                    sums[j] = total[j] - d * (one - f[j])
            else:
                for j in range(len(total)):
                    d = total[j] * m[j]
                    d_z[j] = d * f[j]
                    d_f[j] = compiled.narrow(d * (z[j] - before[j]) * f[j] * (one - f[j]), slopes)
                    sums[j] = total[j] - d * f[j]
            _activate_back(raw[start:end], candidate, z, d_z)
            d_raw = slopes[start:end]
            for j in range(len(d_z)):
                d_raw[j] = compiled.narrow(d_z[j], slopes)
