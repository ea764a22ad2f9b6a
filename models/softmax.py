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


def _widen(logits):
    """bfloat16 and half become float32: the sums of the softmax are never taken in less."""
    return logits.float() if logits.element_size() < 4 else logits
