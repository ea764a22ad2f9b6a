"""The heads: from hidden vectors to the distribution over the next word and its loss."""

import torch
from torch import nn
from torch.nn import functional

IGNORE = -1
"""A target of this value is not scored."""


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
        logits = _widen(functional.linear(hidden.flatten(0, -2), self.weight, self.bias))
        return functional.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORE)


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
            own = _widen(tail(hidden[rows]))
            loss = loss + functional.cross_entropy(own, targets[rows] - bounds[number], reduction="sum")
        head = _widen(self.clusters.head(hidden))
        return loss + functional.cross_entropy(head, head_targets, reduction="sum", ignore_index=IGNORE)


def default_cutoffs(vocab_size):
    """Cutoffs for a vocabulary: the most frequent 4% of the types in the head, the next 16% in the first tail."""
    return sorted({max(1, vocab_size // 25), max(2, vocab_size // 5)})


def _widen(logits):
    """bfloat16 and half become float32: the sums of the softmax are never taken in less."""
    return logits.float() if logits.element_size() < 4 else logits
