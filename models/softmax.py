"""The heads: from hidden vectors to the distribution over the next word and its loss."""

import itertools
import warnings

import numba
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from . import compiled
from .products import linear, product_dtype

IGNORE = -1
"""A target of this value is not scored."""
CHUNK = {"cpu": 1 << 23, "cuda": 1 << 25}
"""Logits that exist at once, by device, unless the weights are more: 32 MiB of float32 on a processor, 128 on a GPU."""
WORDS = {"cpu": 1 << 12, "cuda": 1 << 16}
"""Rows of the weight's gradient that are made narrow at a time: on a processor few enough for the cache."""
BLOCKS = 16
"""Parts of a chunk's rows that threads share among themselves; a fixed number, so that sums do not depend on theirs."""


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
        losses, d_hidden, d_weight = [], [], None
        d_bias = weight.new_zeros(BLOCKS if training else 0, len(weight), dtype=wide)
        parts = (part.tensor_split(chunks) for part in (narrow_hidden, places, scored))
        for x, place, scored_part in zip(*parts, strict=True):
            logits = torch.mm(x, narrow_weight.t())
            loss, slope = _losses(logits, bias, place, scored_part, d_bias)
            losses.append(loss)
            if training:
                d_hidden.append(torch.mm(slope, narrow_weight).to(hidden.dtype))
                if len(d_hidden) == chunks:
                    del narrow_weight  # before a gradient of its size is made
                d_weight = _plus_product(d_weight, slope, x, wide)
            del logits, slope  # before the next chunk's are made
        if training:
            d_bias = None if bias is None else d_bias.sum(0).to(bias.dtype)
            ctx.save_for_backward(torch.cat(d_hidden), d_weight.to(weight.dtype), d_bias)
        return torch.cat(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        # in place where nobody will ask again: the weight's is as large as the weight
        times = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else torch.Tensor.mul_
        gradients = (None if part is None else times(part, d_loss.to(part.dtype)) for part in ctx.saved_tensors)
        return *gradients, None, None, None


def _losses(logits, bias, places, scored, d_bias):
    """-log softmax(logits + bias)[place] times scored, (R,), and its gradient in the logits (R, V), in their type.

    logits (R, V) may be overwritten; bias (V,) or None, places (R,), scored (R,): 1 or 0. d_bias (BLOCKS, V): the
    gradient's sum over R is added to its rows; without rows it asks for no gradient.
    """
    if compiled.usable(logits, scored):
        losses = torch.empty_like(scored)
        bias = scored.new_zeros(logits.shape[1]) if bias is None else bias.to(scored.dtype)
        _compiled_losses(logits, bias, places, scored, losses, d_bias)
        return losses, logits
    z = logits.to(scored.dtype) if bias is None else logits.to(scored.dtype) + bias
    p = torch.softmax(z, 1)
    # log of the sum of exponentials, by way of the largest logit and its probability
    losses = z.amax(1) - p.amax(1).log() - z.gather(1, places[:, None])[:, 0]
    if len(d_bias):
        p[torch.arange(len(p), device=p.device), places] -= 1
        d_bias[0] += torch.mm(scored[None], p)[0]
        p *= scored[:, None]
    return losses * scored, p.to(logits.dtype)


@compiled.kernel
def _compiled_losses(logits, bias, places, scored, losses, d_bias):
    rows, words = logits.shape
    for block in numba.prange(BLOCKS):
        z = np.empty(words, np.float32)
        for r in range(rows * block // BLOCKS, rows * (block + 1) // BLOCKS):
            row = logits[r]
            for word in range(words):
                z[word] = compiled.widen(row[word]) + bias[word]
            top, target = compiled.largest(z), z[places[r]]
            total = np.float32(0)
            for word in range(words):
                z[word] = compiled.exp(z[word] - top)
                total += z[word]
            losses[r] = (np.log(total) + top - target) * scored[r]
            if len(d_bias) > 0:
                z[places[r]] -= total
                scale, sums = scored[r] / total, d_bias[block]
                for word in range(words):
                    p = z[word] * scale
                    sums[word] += p
                    row[word] = compiled.narrow(p, row)


def _plus_product(total, slope, x, wide):
    """total (V, H), whose memory may be taken, or None for 0, plus slope^T x, of type `wide`.

    slope (R, V), x (R, H), which may be narrower; then the product of so many WORDS at a time is widened.
    """
    if slope.dtype == wide:
        return torch.mm(slope.t(), x) if total is None else total.addmm_(slope.t(), x)
    started, words = total is not None, WORDS[x.device.type]
    if not started:
        total = x.new_empty(slope.shape[1], x.shape[1], dtype=wide)
    for sums, columns in zip(total.split(words), slope.split(words, 1), strict=True):
        part = torch.mm(columns.t(), x)
        if not started:
            sums.copy_(part)
        elif compiled.usable(sums, part):
            _compiled_add(sums, part)
        else:
            sums += part
    return total


@compiled.kernel
def _compiled_add(total, part):
    rows, columns = part.shape
    for r in numba.prange(rows):
        sums, row = total[r], part[r]
        for column in range(columns):
            sums[column] += compiled.widen(row[column])


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
        return functional.log_softmax(_widen(linear(hidden, self.weight, self.bias)), dim=-1)

    def loss(self, hidden, targets, weight=None):
        """Sum of -log p(target), in nats, of hidden (T, B, H) and targets (T, B); targets of IGNORE count nothing.

        weight: what to differentiate in the place of the head's own, its alias.
        """
        return cross_entropy(hidden, self.weight if weight is None else weight, self.bias, targets)


class AdaptiveSoftmax(nn.Module):
    """Grave et al. 2017: rare words in clusters ("tails"), each behind one entry of a short head softmax.

    p(w) = p_head(w) for the words below the first cutoff, p_head(cluster of w) p_cluster(w) for the others; ids must be
    sorted by frequency. Tail i projects to input_size / 4^(i+1) features first, one at least. The weights are those of
    torch's AdaptiveLogSoftmaxWithLoss, which would leave such a tail none; unlike it, the loss takes IGNORE, sums in
    float32 under bfloat16, and gives every tail a gradient, of zeros where the batch has none of its words. Choosing
    rows waits for the GPU once a tail.

    cutoffs: increasing ids at which clusters start, above 0 and below vocab_size.
    """

    def __init__(self, input_size, vocab_size, cutoffs):
        super().__init__()
        with warnings.catch_warnings(action="ignore"):  # of tails without features
            self.clusters = nn.AdaptiveLogSoftmaxWithLoss(input_size, vocab_size, cutoffs)
        for tail in self.clusters.tail:
            if tail[0].out_features == 0:
                words = tail[1].out_features
                tail[0], tail[1] = nn.Linear(input_size, 1, bias=False), nn.Linear(1, words, bias=False)

    def log_probs(self, hidden):
        """(..., H) -> (..., V), natural logarithms, float32 or wider."""
        head = functional.log_softmax(_widen(linear(hidden, self.clusters.head.weight)), dim=-1)
        shortlist = self.clusters.shortlist_size
        parts = [head[..., :shortlist]]
        for number, (down, up) in enumerate(self.clusters.tail):
            own = functional.log_softmax(_widen(linear(linear(hidden, down.weight), up.weight)), dim=-1)
            parts.append(own + head[..., shortlist + number, None])
        return torch.cat(parts, dim=-1)

    def loss(self, hidden, targets):
        """Sum of -log p(target), in nats, of hidden (T, B, H) and targets (T, B); targets of IGNORE count nothing."""
        own, head = self.clusters, self.clusters.head
        entries = [own.shortlist_size + number for number in range(len(own.tail))]
        tails = [(down, up.weight, None) for down, up in own.tail]
        return clustered_loss(hidden, targets, own.cutoffs, entries, (head.weight, head.bias), tails)


class SplitSoftmax(FullSoftmax):
    """Rare words in clusters that keep the tied matrix: SplitCrossEntropyLoss of salesforce/awd-lstm-lm.

    p(w) = p_head(w) for the words below the first cutoff, p_head(tombstone of w's cluster) p_cluster(w) for the others.
    The head is the first rows of the (V, H) matrix and a row of tail_vectors for each cluster; within a cluster the
    softmax is over its rows of the matrix. Cluster k, from 1, has the k-th tombstone from the end, as there; tombstones
    start at 0. weight, bias, vocab_size, input_size: as FullSoftmax; cutoffs: as AdaptiveSoftmax, ids sorted by
    frequency (the authors' are in order of appearance).
    """

    def __init__(self, input_size, vocab_size, cutoffs, weight=None):
        super().__init__(input_size, vocab_size, weight)
        bounds = [0, *cutoffs, vocab_size]
        self.sizes = [high - low for low, high in itertools.pairwise(bounds)]
        self.cutoffs = bounds[1:]
        self.tail_vectors = nn.Parameter(torch.zeros(len(cutoffs), input_size))
        self.tail_bias = nn.Parameter(torch.zeros(len(cutoffs)))

    def parts(self, weight=None):
        """(weight, bias) of the head, and a list of those of the tails; weight: as in loss."""
        whole = self.weight if weight is None else weight
        (weight, *weights), (bias, *biases) = whole.split(self.sizes), self.bias.split(self.sizes)
        head = torch.cat([weight, self.tail_vectors]), torch.cat([bias, self.tail_bias])
        return head, list(zip(weights, biases, strict=True))

    def log_probs(self, hidden):
        """(..., H) -> (..., V), natural logarithms, float32 or wider."""
        head, tails = self.parts()
        head = functional.log_softmax(_widen(linear(hidden, *head)), dim=-1)
        parts = [head[..., : self.sizes[0]]]
        for number, tail in enumerate(tails):
            own = functional.log_softmax(_widen(linear(hidden, *tail)), dim=-1)
            parts.append(own + head[..., -1 - number, None])
        return torch.cat(parts, dim=-1)

    def loss(self, hidden, targets, weight=None):
        """As FullSoftmax's."""
        head, tails = self.parts(weight)
        entries = [self.sizes[0] + len(tails) - 1 - number for number in range(len(tails))]
        return clustered_loss(hidden, targets, self.cutoffs, entries, head, [(nn.Identity(), *tail) for tail in tails])


def clustered_loss(hidden, targets, cutoffs, entries, head, tails):
    """Sum of -log p(target) in nats where p(w) = p_head(w) or p_head(cluster of w) p_cluster(w).

    hidden (T, B, H), targets (T, B), those of IGNORE count nothing. cutoffs: where clusters start, and V. entries: of
    the clusters in the head. head: weight, bias. tails: for each cluster a function of hidden (R, H), weight, bias.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    head_targets, loss = targets.clone(), 0.0
    for entry, (low, high), (down, weight, bias) in zip(entries, itertools.pairwise(cutoffs), tails, strict=True):
        rows = ((targets >= low) & (targets < high)).nonzero()[:, 0]
        head_targets[rows] = entry
        loss = loss + cross_entropy(down(hidden[rows]), weight, bias, targets[rows] - low)
    return loss + cross_entropy(hidden, *head, head_targets)


SPLITS = ((500_000, [4200, 35_000, 180_000]), (75_000, [2800, 20_000, 76_000]))
"""Vocabularies above this size have these cutoffs in salesforce/awd-lstm-lm, smaller ones a full softmax."""


def split_cutoffs(vocab_size):
    """The authors' cutoffs of a split softmax for a vocabulary, None for a full softmax."""
    return next((cutoffs for above, cutoffs in SPLITS if vocab_size > above), None)


def default_cutoffs(vocab_size):
    """Cutoffs for a vocabulary: the most frequent 4% of the types in the head, the next 16% in the first tail."""
    return sorted({max(1, vocab_size // 25), max(2, vocab_size // 5)})


def _widen(logits):
    """bfloat16 and half become float32: the sums of the softmax are never taken in less."""
    return logits.float() if logits.element_size() < 4 else logits
