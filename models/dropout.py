"""Dropout, plain and as Merity et al. 2018 (arXiv 1708.02182) have it: a mask for all steps of a forward pass."""

import numba
import numpy as np
import torch
from torch.nn import functional

from . import compiled
from .products import product_dtype


def dropout(x, p, training):
    """Srivastava et al. 2014: a mask for every step, column and feature; the gradient is masked alike.

    x (..., H) -> each element 0 with probability p, else times 1 / (1 - p). On a CPU the mask is a hash of each
    element's place and of one number that torch's generator draws, in the place of a random number each.
    """
    if not training or not p:
        return x
    if compiled.usable(x) and p < 1:
        return _Drop.apply(x, p, x.dtype)
    return functional.dropout(x, p)


def locked_dropout(x, p, training):
    """Variational dropout (Gal & Ghahramani 2016; section 4.2): one mask for all steps, another for each column.

    x (T, B, H) -> x times a mask (1, B, H), whose elements are 0 with probability p, else 1 / (1 - p).
    """
    if not training or not p:
        return x
    return x * _mask(x, (1, *x.shape[1:]), p)


def embedding_dropout(embedded, tokens, vocab_size, p, training):
    """Embedded words, of which some become 0 wherever they stand (section 4.3).

    embedded (T, B, E): of tokens (T, B) -> (T, B, E). A word of the vocabulary is dropped with probability p, the
    others are multiplied by 1 / (1 - p); as if rows of the embedding's matrix were 0, without making that matrix.
    """
    if not training or not p:
        return embedded
    return embedded * _mask(embedded, (vocab_size, 1), p)[tokens]


def weight_drop(weight, p, training):
    """DropConnect on a recurrent layer's weights (Wan et al. 2013; section 2), one mask for all steps and columns.

    weight (N, K) -> each element 0 with probability p, else times 1 / (1 - p), in the type of products; the gradient
    reaches `weight`. On a CPU the mask is a hash as in `dropout`; a random number for each weight would take a fifth of
    a training step in bfloat16 or more.
    """
    if not training or not p:
        return weight
    if compiled.usable(weight):
        return _Drop.apply(weight, p, product_dtype(weight))
    return functional.dropout(weight, p)


def unit_drop(weight, p, training):
    """Weight drop of whole hidden units: the products with those that are dropped need not be made.

    One choice for all steps and columns of a forward pass; Sarma et al. 2021 (arXiv 2106.12089) choose anew in each
    step. weight (N, K) -> (N, K'), K' = (1 - p) K rounded, at least 1, times K / K', in the type of products, and which
    units these are, (K',), increasing; without dropout the weight itself and None. The gradient reaches `weight`.
    """
    if not training or not p:
        return weight, None
    size = weight.shape[1]
    count = max(1, round((1 - p) * size))
    units = torch.randperm(size, device=weight.device)[:count].sort().values
    return (weight.index_select(1, units) * (size / count)).to(product_dtype(weight)), units


class _Drop(torch.autograd.Function):
    """values (..., K) with hashed zeros, in `dtype`; the mask is never kept, backward hashes anew."""

    @staticmethod
    def forward(ctx, values, p, dtype):
        ctx.p, ctx.dtype, ctx.seed = p, values.dtype, torch.randint(2**62, ()).item()
        return _dropped(values, p, dtype, ctx.seed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return _dropped(slope, ctx.p, ctx.dtype, ctx.seed), None, None


def _dropped(values, p, dtype, seed):
    """values (..., K), contiguous or not -> the same in `dtype` under the mask of a seed."""
    result = torch.empty(values.shape, dtype=dtype)
    _drop(values.flatten(0, -2).contiguous(), result.flatten(0, -2), seed, p)
    return result


@compiled.inner
def _mixed(bits):
    """A permutation of 32 bits in which each depends on all (Wellons 2018, lowbias32)."""
    bits = np.uint32(bits ^ np.uint32(bits >> np.uint32(16)))
    bits = np.uint32(bits * np.uint32(0x7FEB352D))
    bits = np.uint32(bits ^ np.uint32(bits >> np.uint32(15)))
    bits = np.uint32(bits * np.uint32(0x846CA68B))
    return np.uint32(bits ^ np.uint32(bits >> np.uint32(16)))


@compiled.kernel
def _drop(values, dropped, seed, p):
    """dropped (N, K): values, 0 where the hash of the place is below p, else times 1 / (1 - p)."""
    rows, columns = values.shape
    bound, scale = np.uint32(p * 4294967296.0), np.float32(1 / (1 - p))
    low, high = np.uint32(seed), np.uint32(seed >> 32)
    for r in numba.prange(rows):
        value, result = values[r], dropped[r]
        first = _mixed(np.uint32(np.uint32(r) ^ low))
        second = _mixed(np.uint32(first ^ high))
        for c in range(columns):
            bits = _mixed(np.uint32(_mixed(np.uint32(np.uint32(c) + first)) ^ second))
            kept = compiled.widen(value[c]) * scale if bits >= bound else np.float32(0)
            result[c] = compiled.narrow(kept, result)


def _mask(like, shape, p):
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - p).div_(1 - p)
