"""Dropout as Merity et al. 2018 (arXiv 1708.02182) have it: each mask is drawn once a forward pass."""

import torch
from torch.nn import functional


def locked_dropout(x, p, training):
    """Variational dropout (Gal & Ghahramani 2016; section 4.2): one mask for all steps, another for each column.

    x (T, B, H) -> x times a mask (1, B, H), whose elements are 0 with probability p, else 1 / (1 - p).
    """
    if not training or not p:
        return x
    return x * _mask(x, (1, *x.shape[1:]), p)


def embedding_dropout(embedding, tokens, p, training):
    """Embedded words, of which some are 0 wherever they stand (section 4.3).

    embedding: an nn.Embedding (V, E); tokens (T, B) -> (T, B, E). A word of the vocabulary is dropped with probability
    p, the others are multiplied by 1 / (1 - p); as if rows of the matrix were 0, without making that matrix.
    """
    embedded = embedding(tokens)
    if not training or not p:
        return embedded
    return embedded * _mask(embedded, (len(embedding.weight), 1), p)[tokens]


def weight_drop(weight, p, training):
    """DropConnect on a recurrent layer's weights (Wan et al. 2013; section 2), one mask for all steps and columns.

    weight, any shape -> each element 0 with probability p, else times 1 / (1 - p); the gradient reaches `weight`.
    """
    return functional.dropout(weight, p, training)


def _mask(like, shape, p):
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - p).div_(1 - p)
