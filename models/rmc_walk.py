"""The Relational Memory Core's walk over time on a CPU: one step of autograd, its element-wise parts compiled.

Axes as in rmc.py; P rows leave a step's attention: the S slots in the paper's form, all R rows in the port's. Narrow is
the type of the products, everything else is float32. The rows of an example lie together: (T, B, rows, features).
"""

import math
from typing import NamedTuple

import numba
import numpy as np
import torch

from . import compiled
from .products import column_sums, linear, one_step, prepare

EPSILON = np.float32(1e-5)
"""Of a layer norm, as torch has it."""
BLOCKS = 16
"""Parts of a batch that threads share among themselves; a fixed number, so that sums do not depend on theirs."""


class Sizes(NamedTuple):
    """Of a core: S, N, K, D, the MLP's layers; joint: the port's form, whose norms span all rows of an example."""

    memslots: int
    numheads: int
    keysize: int
    headsize: int
    attmlplayers: int
    joint: bool


def walk(x, x_qkv, x_gates, memory, projected, sizes, norms, products, dtype):
    """All steps of a core with one block and gates of unit style -> the memory after each step (T, B, S, F).

    x (T, B, F), x_qkv (T, B, Q) and x_gates (T, B, 2F) are the projections of the input, x_qkv normalized in the
    paper's form; memory (B, S, F) before the first step, projected (B, S, Q) its projection, looked at only if
    one_step(x). norms: gain and bias of the layer norms of projections, attention and MLP, (1, n) in the paper's
    form, (R, n) in the port's. products: weight and bias of the projections, of the layers of the MLP (of the port's
    one) and of the gates, computed in `dtype`.
    Equations of rmc.RelationalMemory.
    """
    if one_step(x):
        return _once(x, x_qkv, x_gates, memory, projected, sizes, norms, products)
    return _Walk.apply(x, x_qkv, x_gates, memory, sizes, dtype, *norms, *products)


class _Kept:
    """What the steps leave for the way back: normalized rows, probabilities of attention, gates, the MLP's rows.

    empty: torch's, or numpy's for kernels that are called once.
    """

    def __init__(self, shape, q, sizes, dtype, empty):
        steps, batch, features = shape
        slots = sizes.memslots
        rows = slots + sizes.joint
        wide = torch.float32 if empty is torch.empty else np.float32

        def buffer(*shape, dtype=wide):
            return empty((shape[0], batch, *shape[1:]), dtype=dtype)

        self.qkv, self.attention = buffer(steps, rows, q), buffer(steps, sizes.numheads, rows, slots + 1)
        self.attended, self.finished = buffer(steps, rows, features), buffer(steps, rows, features)
        self.scales = buffer(steps, 3, rows)
        self.gates, self.news = buffer(steps, slots, 2 * features), buffer(steps, slots, features)
        self.inputs = buffer(steps, rows, features, dtype=dtype)
        # of the memory before each step and after the last
        self.narrow, self.narrow_tanh = (buffer(steps + 1, slots, features, dtype=dtype) for _ in range(2))
        self.hidden = [[] for _ in range(sizes.attmlplayers)]


def _once(x, x_qkv, x_gates, memory, projected, sizes, norms, products):
    """A single step, which nothing is kept of: to pack weights or to make tensors would take longer than the step."""
    inputs = [each.numpy() for each in (x, x_qkv, x_gates, memory)]
    kept = _Kept(x.shape, x_qkv.shape[2], sizes, np.float32, np.empty)

    def product(weight, bias, relu):
        finish = torch.relu if relu else lambda y: y
        return lambda rows: finish(linear(torch.as_tensor(rows), weight, bias)).float()

    _, *pairs = zip(_pairs(products, sizes), _relus(sizes), strict=True)
    calls = [lambda _: projected, *(product(*pair, relu) for pair, relu in pairs)]
    kept.narrow[0], kept.narrow_tanh[0] = inputs[3], np.tanh(inputs[3])
    return torch.from_numpy(_steps(*inputs, sizes, norms, calls, kept, np.empty_like(kept.news)))


def _steps(x, x_qkv, x_gates, memory, sizes, norms, calls, kept, memories):
    """Fill `kept` and `memories` (T, B, S, F), step by step; calls: the products. Returns memories."""
    project, *mlp, gate = calls
    for t in range(len(x)):
        before = memories[t - 1] if t else memory
        _attend(
            project(kept.narrow[t]), x_qkv[t], *norms[:4], before, x[t], sizes.headsize,
            kept.qkv[t], kept.attention[t], kept.attended[t], kept.scales[t], kept.inputs[t],
        )  # fmt: skip
        z = kept.inputs[t]
        for rows, call in zip(kept.hidden, mlp, strict=True):
            z = call(z)
            rows.append(z)
        _gate(
            z, kept.attended[t], *norms[2:], gate(kept.narrow_tanh[t]), x_gates[t], before,
            kept.finished[t], kept.scales[t], kept.gates[t], kept.news[t],
            memories[t], kept.narrow[t + 1], kept.narrow_tanh[t + 1],
        )  # fmt: skip
    return memories


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x_qkv, x_gates, memory, sizes, dtype, *parameters):
        norms, pairs = parameters[:6], _pairs(parameters[6:], sizes)
        kept = _Kept(x.shape, x_qkv.shape[2], sizes, dtype, torch.empty)
        kept.narrow[0], kept.narrow_tanh[0] = memory, torch.tanh(memory)
        calls = [
            prepare(weight.to(dtype), bias.to(dtype), relu)
            for (weight, bias), relu in zip(pairs, _relus(sizes), strict=True)
        ]
        memories = _steps(x, x_qkv, x_gates, memory, sizes, norms, calls, kept, x.new_empty(kept.news.shape))
        ctx.save_for_backward(x_qkv, memory, memories, *parameters)
        ctx.kept, ctx.sizes, ctx.dtype = kept, sizes, dtype
        return memories

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_memories):
        x_qkv, memory, memories, *parameters = ctx.saved_tensors
        kept, sizes, dtype = ctx.kept, ctx.sizes, ctx.dtype
        norms, pairs = parameters[:6], _pairs(parameters[6:], sizes)
        d_memories = d_memories.contiguous()
        project, *mlp, gate = (prepare(weight.to(dtype).t()) for weight, _ in pairs)
        relus = _relus(sizes)[1:-1]
        steps, features = len(memories), memory.shape[2]
        d_x = x_qkv.new_zeros(*x_qkv.shape[:2], features)
        d_x_qkv, d_x_gates = torch.empty_like(x_qkv), x_qkv.new_empty(*x_qkv.shape[:2], 2 * features)
        d_norms = [norm.new_zeros(BLOCKS, *norm.shape) for norm in norms]
        d_gates = kept.narrow.new_empty(*kept.gates.shape)
        d_raw = kept.narrow.new_empty(steps, *memory.shape[:2], x_qkv.shape[2])
        d_finished, d_rows = torch.empty_like(kept.inputs), torch.empty_like(kept.attended[0])
        d_hidden = [[] for _ in mlp]
        d_before, d_through = torch.zeros_like(memory), torch.zeros_like(kept.narrow[0])
        for t in range(steps - 1, -1, -1):
            before = memories[t - 1] if t else memory
            _gate_back(
                d_memories[t], d_before, d_through, kept.gates[t], kept.news[t], before,
                kept.finished[t], kept.scales[t], norms[4], *d_norms[4:],
                d_gates[t], d_x_gates[t], d_finished[t], d_rows,
            )  # fmt: skip
            d_z = d_finished[t]
            for layer in range(len(mlp) - 1, -1, -1):
                if relus[layer]:
                    d_z = torch.ops.aten.threshold_backward(d_z, kept.hidden[layer][t], 0)
                d_hidden[layer].append(d_z)
                d_z = mlp[layer](d_z)
            _attend_back(
                d_z, d_rows, kept.attended[t], kept.scales[t], norms[2], kept.qkv[t], *norms[:2], x_qkv[t],
                kept.attention[t], before, gate(d_gates[t]), sizes.headsize, *d_norms[:4],
                d_raw[t], d_x_qkv[t], d_x[t], d_before,
            )  # fmt: skip
            d_through = project(d_raw[t])
        d_hidden = [torch.stack(each[::-1]) for each in d_hidden]
        hidden = [kept.inputs, *(torch.stack(each) for each in kept.hidden[:-1])]
        slopes = [d_raw, *d_hidden, d_gates]
        inputs = [kept.narrow[:-1], *hidden[: len(mlp)], kept.narrow_tanh[:-1]]
        d_products = _gradients(slopes, inputs, sizes)
        d_memory = d_before + d_through
        return d_x, d_x_qkv, d_x_gates, d_memory, None, None, *(each.sum(0) for each in d_norms), *d_products


def _relus(sizes):
    """Whether a ReLU follows each product of _pairs."""
    mlp = [sizes.joint or layer + 1 < sizes.attmlplayers for layer in range(sizes.attmlplayers)]
    return [False, *mlp, False]


def _pairs(products, sizes):
    """(weight, bias) of the projections, of every layer that the MLP applies, and of the gates."""
    first, *mlp, last = zip(products[::2], products[1::2], strict=True)
    return [first, *(mlp * sizes.attmlplayers if sizes.joint else mlp), last]


def _gradients(slopes, inputs, sizes):
    """Of every weight and bias: one product over all steps for each, (T, B, rows, n) and (T, B, rows, k)."""
    pairs = []
    for slope, rows in zip(slopes, inputs, strict=True):
        slope, rows = slope.flatten(0, 2), rows.flatten(0, 2)
        pairs.append((torch.mm(slope.t(), rows).float(), column_sums(slope)))
    if sizes.joint:  # its layers share one weight
        mlp = [sum(parts) for parts in zip(*pairs[1:-1], strict=True)]
        pairs = [pairs[0], mlp, pairs[-1]]
    return [part for pair in pairs for part in pair]


@compiled.inner
def _standardize(rows, joint, scales):
    """Rows (r, n) to mean 0 and variance 1, each, or joint; scales (r,) take 1 / deviation."""
    groups = rows.reshape(1, -1) if joint else rows
    for g in range(len(groups)):
        row = groups[g]
        total = np.float32(0)
        for c in range(len(row)):
            total += row[c]
        mean = total / np.float32(len(row))
        total = np.float32(0)
        for c in range(len(row)):
            row[c] -= mean
            total += row[c] * row[c]
        scale = np.float32(1) / np.sqrt(total / np.float32(len(row)) + EPSILON)
        for c in range(len(row)):
            row[c] *= scale
        scales[g] = scale


@compiled.inner
def _standardize_back(slopes, rows, joint, scales, gain, d_gain, d_bias):
    """Slopes (r, n) of gain * rows + bias to slopes of what _standardize made the rows of."""
    for r in range(len(slopes)):
        own = r if joint else 0
        slope, row, gains, d_gains, d_biases = slopes[r], rows[r], gain[own], d_gain[own], d_bias[own]
        for c in range(len(slope)):
            d_gains[c] += slope[c] * row[c]
            d_biases[c] += slope[c]
            slope[c] *= gains[c]
    slope_groups, row_groups = (slopes.reshape(1, -1), rows.reshape(1, -1)) if joint else (slopes, rows)
    for g in range(len(slope_groups)):
        slope, row = slope_groups[g], row_groups[g]
        first, second = np.float32(0), np.float32(0)
        for c in range(len(slope)):
            first += slope[c]
            second += slope[c] * row[c]
        first, second = first / np.float32(len(slope)), second / np.float32(len(slope))
        for c in range(len(slope)):
            slope[c] = (slope[c] - first - row[c] * second) * scales[g]


@compiled.inner
def _scale_rows(rows, gain, bias, out):
    """out (r, n) = gain * rows + bias, with gain and bias (1, n) or (r, n)."""
    for r in range(len(rows)):
        own = r if len(gain) > 1 else 0
        row, gains, biases, target = rows[r], gain[own], bias[own], out[r]
        for c in range(len(row)):
            target[c] = row[c] * gains[c] + biases[c]


@compiled.kernel
def _attend(
    raw, x_qkv, qkv_gain, qkv_bias, gain, bias, memory, x, headsize, qkv_hat, attention, attended, scales, out
):  # fmt: skip
    """Projections of the slots (B, S, Q) and of the input (B, Q) to the rows that the MLP takes, (B, P, F)."""
    batch, slots, q_size = raw.shape
    rows, features = attended.shape[1:]
    heads = attention.shape[1]
    keysize = (q_size // heads - headsize) // 2
    joint = len(gain) > 1
    scale = np.float32(1) / np.float32(math.sqrt(keysize))
    for block in numba.prange(BLOCKS):
        qkv = np.empty((slots + 1, q_size), np.float32)
        for b in range(batch * block // BLOCKS, batch * (block + 1) // BLOCKS):
            hat, projected = qkv_hat[b], raw[b]
            for s in range(slots):
                row, target = projected[s], hat[s]
                for c in range(q_size):
                    target[c] = compiled.widen(row[c])
            if joint:
                hat[slots] = x_qkv[b]
            else:
                qkv[slots] = x_qkv[b]
            _standardize(hat, joint, scales[b, 0])
            _scale_rows(hat, qkv_gain, qkv_bias, qkv)
            hidden = attended[b]
            hidden[:slots] = memory[b]
            if joint:
                hidden[slots] = x[b]
            for h in range(heads):
                start = h * (2 * keysize + headsize)
                keys, values = start + keysize, start + 2 * keysize
                for p in range(rows):
                    query, weights = qkv[p, start : start + keysize], attention[b, h, p]
                    for r in range(slots + 1):
                        key = qkv[r, keys : keys + keysize]
                        score = np.float32(0)
                        for c in range(keysize):
                            score += query[c] * key[c]
                        weights[r] = score * scale
                    top, total = weights.max(), np.float32(0)
                    for r in range(slots + 1):
                        weights[r] = compiled.exp(weights[r] - top)
                        total += weights[r]
                    target = hidden[p, h * headsize : (h + 1) * headsize]
                    for r in range(slots + 1):
                        weights[r] /= total
                        value, weight = qkv[r, values : values + headsize], weights[r]
                        for c in range(headsize):
                            target[c] += weight * value[c]
            _standardize(hidden, joint, scales[b, 1])
            for p in range(rows):
                own = p if joint else 0
                row, gains, biases, target = hidden[p], gain[own], bias[own], out[b, p]
                for c in range(features):
                    target[c] = compiled.narrow(row[c] * gains[c] + biases[c], target)


@compiled.kernel
def _gate(
    z, attended, row_gain, row_bias, gain, bias, gate_product, x_gates, before,
    finished, scales, gates, news, memory, narrow, narrow_tanh,
):  # fmt: skip
    """The MLP's rows (B, P, F) and the gates' product (B, S, 2F) to the memory after the step (B, S, F)."""
    batch, rows, features = z.shape
    slots = memory.shape[1]
    joint = len(gain) > 1
    for block in numba.prange(BLOCKS):
        new = np.empty(features, np.float32)
        for b in range(batch * block // BLOCKS, batch * (block + 1) // BLOCKS):
            hat = finished[b]
            _scale_rows(attended[b], row_gain, row_bias, hat)
            for p in range(rows):
                row, target = z[b, p], hat[p]
                for c in range(features):
                    target[c] += compiled.widen(row[c])
            _standardize(hat, joint, scales[b, 2])
            for s in range(slots):
                own = s if joint else 0
                row, gains, biases = hat[s], gain[own], bias[own]
                for c in range(features):
                    new[c] = compiled.tanh(row[c] * gains[c] + biases[c])
                news[b, s] = new
                opened, product, from_x = gates[b, s], gate_product[b, s], x_gates[b]
                for c in range(2 * features):
                    opened[c] = compiled.sigmoid(compiled.widen(product[c]) + from_x[c])
                i, f, old, after = opened[:features], opened[features:], before[b, s], memory[b, s]
                low, low_tanh = narrow[b, s], narrow_tanh[b, s]
                for c in range(features):
                    value = i[c] * new[c] + f[c] * old[c]
                    after[c] = value
                    low[c] = compiled.narrow(value, low)
                    low_tanh[c] = compiled.narrow(compiled.tanh(value), low_tanh)


@compiled.kernel
def _gate_back(
    d_memory, d_before, d_through, gates, news, before, finished, scales, gain, d_gain, d_bias,
    d_gates, d_x_gates, d_z, d_rows,
):  # fmt: skip
    """Slopes of the memory after the step (d_memory + d_before + d_through) to those of _gate's arguments.

    d_before (B, S, F) leaves with what the forget gate lets through; d_rows (B, P, F) are those of z + the rows before.
    """
    batch, rows, features = d_z.shape
    slots = d_memory.shape[1]
    joint = len(gain) > 1
    for block in numba.prange(BLOCKS):
        for b in range(batch * block // BLOCKS, batch * (block + 1) // BLOCKS):
            slopes, from_x = d_rows[b], d_x_gates[b]
            slopes[:] = 0
            from_x[:] = 0
            for s in range(slots):
                i, f = gates[b, s, :features], gates[b, s, features:]
                new, old, last, outer, through = (
                    news[b, s],
                    before[b, s],
                    d_before[b, s],
                    d_memory[b, s],
                    d_through[b, s],
                )
                d_gate, slope = d_gates[b, s], slopes[s]
                d_i, d_f, x_i, x_f = d_gate[:features], d_gate[features:], from_x[:features], from_x[features:]
                for c in range(features):
                    total = last[c] + outer[c] + compiled.widen(through[c])
                    slope[c] = total * i[c] * (np.float32(1) - new[c] * new[c])
                    last[c] = total * f[c]
                    to_i = total * new[c] * i[c] * (np.float32(1) - i[c])
                    to_f = total * old[c] * f[c] * (np.float32(1) - f[c])
                    d_i[c], d_f[c] = compiled.narrow(to_i, d_gate), compiled.narrow(to_f, d_gate)
                    x_i[c] += to_i
                    x_f[c] += to_f
            _standardize_back(slopes, finished[b], joint, scales[b, 2], gain, d_gain[block], d_bias[block])
            for p in range(rows):
                slope, target = slopes[p], d_z[b, p]
                for c in range(features):
                    target[c] = compiled.narrow(slope[c], target)


@compiled.kernel
def _attend_back(
    d_out, d_rows, attended, scales, gain, qkv_hat, qkv_gain, qkv_bias, x_qkv, attention, before, d_tanh, headsize,
    d_qkv_gain, d_qkv_bias, d_gain, d_bias, d_raw, d_x_qkv, d_x, d_before,
):  # fmt: skip
    """Slopes of the rows that the MLP takes (d_out + d_rows) to those of _attend's arguments; d_before is added to.

    d_tanh (B, S, F): of tanh of the memory before, from the gates.
    """
    batch, rows, features = d_rows.shape
    slots, q_size = d_raw.shape[1:]
    heads = attention.shape[1]
    keysize = (q_size // heads - headsize) // 2
    joint = len(gain) > 1
    scale = np.float32(1) / np.float32(math.sqrt(keysize))
    for block in numba.prange(BLOCKS):
        qkv, d_qkv = np.empty((slots + 1, q_size), np.float32), np.empty((slots + 1, q_size), np.float32)
        d_weights = np.empty(slots + 1, np.float32)
        for b in range(batch * block // BLOCKS, batch * (block + 1) // BLOCKS):
            slopes = d_rows[b]
            for p in range(rows):
                slope, part = slopes[p], d_out[b, p]
                for c in range(features):
                    slope[c] += compiled.widen(part[c])
            _standardize_back(slopes, attended[b], joint, scales[b, 1], gain, d_gain[block], d_bias[block])
            for s in range(slots):
                slope, from_gates, old, target = slopes[s], d_tanh[b, s], before[b, s], d_before[b, s]
                for c in range(features):
                    bent = compiled.tanh(old[c])
                    target[c] += slope[c] + compiled.widen(from_gates[c]) * (np.float32(1) - bent * bent)
            hat = qkv_hat[b]
            _scale_rows(hat, qkv_gain, qkv_bias, qkv)
            if joint:
                d_x[b] = slopes[slots]
            else:
                qkv[slots] = x_qkv[b]
            d_qkv[:] = 0
            for h in range(heads):
                start = h * (2 * keysize + headsize)
                keys, values = start + keysize, start + 2 * keysize
                for p in range(rows):
                    slope, weights = slopes[p, h * headsize : (h + 1) * headsize], attention[b, h, p]
                    mean = np.float32(0)
                    for r in range(slots + 1):
                        value, d_value = qkv[r, values : values + headsize], d_qkv[r, values : values + headsize]
                        total, weight = np.float32(0), weights[r]
                        for c in range(headsize):
                            total += slope[c] * value[c]
                            d_value[c] += weight * slope[c]
                        d_weights[r] = total
                        mean += weight * total
                    query, d_query = qkv[p, start : start + keysize], d_qkv[p, start : start + keysize]
                    for r in range(slots + 1):
                        d_score = weights[r] * (d_weights[r] - mean) * scale
                        key, d_key = qkv[r, keys : keys + keysize], d_qkv[r, keys : keys + keysize]
                        for c in range(keysize):
                            d_query[c] += d_score * key[c]
                            d_key[c] += d_score * query[c]
            own = d_qkv if joint else d_qkv[:slots]
            if not joint:
                d_x_qkv[b] = d_qkv[slots]
            _standardize_back(own, hat, joint, scales[b, 0], qkv_gain, d_qkv_gain[block], d_qkv_bias[block])
            if joint:
                d_x_qkv[b] = d_qkv[slots]
            for s in range(slots):
                slope, target = d_qkv[s], d_raw[b, s]
                for c in range(q_size):
                    target[c] = compiled.narrow(slope[c], target)
