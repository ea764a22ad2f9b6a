"""Dropout as Merity et al. 2018 (arXiv 1708.02182) have it: each mask is drawn once a forward pass."""

import numba
import numpy as np
import torch
from torch.nn import functional

from . import compiled
from .products import product_dtype


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
    reaches `weight`. On a CPU the mask is a hash of each element's place and of a number that torch's generator draws,
    in the place of a random number each, which would take a fifth of a training step in bfloat16 or more.
    """
    if not training or not p:
        return weight
    if compiled.usable(weight):
        return _WeightDrop.apply(weight, p, product_dtype(weight))
    return functional.dropout(weight, p)


class _WeightDrop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, p, dtype):
        ctx.p, ctx.dtype, ctx.seed = p, weight.dtype, torch.randint(2**62, ()).item()
        dropped = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        _drop(weight.contiguous(), dropped, ctx.seed, p)
        return dropped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        d_weight = torch.empty_like(slope, dtype=ctx.dtype, memory_format=torch.contiguous_format)
        _drop(slope.contiguous(), d_weight, ctx.seed, ctx.p)
        return d_weight, None, None


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
