"""The heads: from hidden vectors to the distribution over the next word and its loss."""

import torch
from torch import nn
from torch.nn import functional

from .products import product_dtype

IGNORE = -1
"""A target of this value is not scored."""
CHUNK = {"cpu": 1 << 23, "cuda": 1 << 25}
"""Logits that exist at once, by device, unless the weights are more: 32 MiB of float32 on a processor, 128 on a GPU."""


def cross_entropy(hidden, weight, bias, targets):
    """Sum of -log softmax(W h + b)[target] in nats, a 0-d tensor of float32 or wider.

    hidden (..., H), weight (V, H), bias (V,) or None, targets (...), integers; those of IGNORE count nothing.
    The logits are made in chunks and forgotten; when a gradient will be asked for, it is computed while they are there.
    A chunk has H rows or more: each reads and writes the whole (V, H) gradient.
    Under autocast the products are in its type, everything else in float32.
    """
    dtype, training = product_dtype(weight), torch.is_grad_enabled()
    with torch.autocast(hidden.device.type, enabled=False):
        return _CrossEntropy.apply(hidden.flatten(0, -2), weight, bias, targets.flatten(), dtype, training)


class _CrossEntropy(torch.autograd.Function):
    """By chunks of rows: with p = softmax(logits), the gradient in the logits is p - one-hot of the target."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, training):
        wide = torch.promote_types(dtype, torch.float32)
        scored, places = (targets != IGNORE).to(wide), targets.clamp(min=0)
        narrow_hidden, narrow_weight = (hidden * scored[:, None]).to(dtype), weight.to(dtype)
        rows = max(CHUNK[hidden.device.type] // len(weight), hidden.shape[1])
        chunks = max(1, round(len(hidden) / rows))
        losses, d_hidden, d_weight, d_bias = [], [], 0, 0
        parts = (part.tensor_split(chunks) for part in (narrow_hidden, places, scored))
        for x, place, scored_part in zip(*parts, strict=True):
            logits = torch.mm(x, narrow_weight.t()).to(wide)
            if bias is not None:
                logits += bias
            # log of the sum of exponentials, by way of the largest logit and its probability
            p = torch.softmax(logits, 1)
            losses.append(logits.amax(1) - p.amax(1).log() - logits.gather(1, place[:, None])[:, 0])
            if training:
                p[torch.arange(len(p), device=p.device), place] -= 1
                if bias is not None:
                    d_bias += torch.mm(scored_part[None], p)[0]
                p = p.to(dtype)
                d_hidden.append((torch.mm(p, narrow_weight) * scored_part[:, None]).to(hidden.dtype))
                d_weight += torch.mm(p.t(), x).to(wide)
        if training:
            d_bias = None if bias is None else d_bias.to(bias.dtype)
            ctx.save_for_backward(torch.cat(d_hidden), d_weight.to(weight.dtype), d_bias)
        return torch.dot(torch.cat(losses), scored)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        gradients = (None if part is None else part * d_loss.to(part.dtype) for part in ctx.saved_tensors)
        return *gradients, None, None, None


class FullSoftmax(nn.Module):
    """log p(w | h) = log softmax(W h + b), over the whole vocabulary.

    weight: a (V, H) parameter to share (tied embeddings, Press & Wolf 2017, Inan et al. 2017), or None for an own one.
    Own weights start uniform in +-0.1, the bias at 0, as in word_language_model.
    """

    def __init__(self, input_size, vocab_size, weight=None):
        super().__init__()
        if weight is None:
            weight = nn.Parameter(torch.empty(vocab_size, input_size).uniform_(-0.1, 0.1))
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def log_probs(self, hidden):
        """(..., H) -> (..., V), natural logarithms, float32 or wider."""
        return functional.log_softmax(_widen(functional.linear(hidden, self.weight, self.bias)), dim=-1)

    def loss(self, hidden, targets):
        """Sum of -log p(target), in nats, of hidden (T, B, H) and targets (T, B); targets of IGNORE count nothing."""
        return cross_entropy(hidden, self.weight, self.bias, targets)


class AdaptiveSoftmax(nn.Module):
    """Grave et al. 2017: rare words in clusters ("tails"), each behind one entry of a short head softmax.

    p(w) = p_head(w) for the words below the first cutoff, p_head(cluster of w) p_cluster(w) for the others; ids must be
    sorted by frequency. Tail i projects to input_size / 4^(i+1) features first. The weights are those of torch's
    AdaptiveLogSoftmaxWithLoss; unlike it, the loss takes IGNORE, sums in float32 under bfloat16, and gives every tail
    a gradient, of zeros where the batch has none of its words. Choosing rows waits for the GPU once a tail.

    cutoffs: increasing ids at which clusters start, above 0 and below vocab_size.
    """

    def __init__(self, input_size, vocab_size, cutoffs):
        super().__init__()
        self.clusters = nn.AdaptiveLogSoftmaxWithLoss(input_size, vocab_size, cutoffs)

    def log_probs(self, hidden):
        """(..., H) -> (..., V), natural logarithms, float32 or wider."""
        head = functional.log_softmax(_widen(self.clusters.head(hidden)), dim=-1)
        shortlist = self.clusters.shortlist_size
        parts = [head[..., :shortlist]]
        for number, tail in enumerate(self.clusters.tail):
            own = functional.log_softmax(_widen(tail(hidden)), dim=-1)
            parts.append(own + head[..., shortlist + number, None])
        return torch.cat(parts, dim=-1)

    def loss(self, hidden, targets):
        """Sum of -log p(target), in nats, of hidden (T, B, H) and targets (T, B); targets of IGNORE count nothing."""
        hidden, targets = hidden.flatten(0, -2), targets.flatten()
        head_targets, loss = targets.clone(), 0.0
        bounds = self.clusters.cutoffs
        for number, tail in enumerate(self.clusters.tail):
            rows = ((targets >= bounds[number]) & (targets < bounds[number + 1])).nonzero()[:, 0]
            head_targets[rows] = self.clusters.shortlist_size + number
            down, up = tail
            loss = loss + cross_entropy(down(hidden[rows]), up.weight, None, targets[rows] - bounds[number])
        head = self.clusters.head
        return loss + cross_entropy(hidden, head.weight, head.bias, head_targets)


def default_cutoffs(vocab_size):
    """Cutoffs for a vocabulary: the most frequent 4% of the types in the head, the next 16% in the first tail."""
    return sorted({max(1, vocab_size // 25), max(2, vocab_size // 5)})


def _widen(logits):
    """bfloat16 and half become float32: the sums of the softmax are never taken in less."""
    return logits.float() if logits.element_size() < 4 else logits
