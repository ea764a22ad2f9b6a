"""Columns and BPTT windows: how a stream of ids becomes batches."""

import numpy as np
import torch

from .files import CorpusError


def columns(ids, batch_size):
    """Cut a stream (N,) into B columns of equal length that are read side by side: int32 tensor (N // B, B).

    Column b continues where column b-1 ended; the N % B ids at the end are left out (training only; evaluation uses
    scored_columns). With the alphabet and B = 4: a g m s / b h n t / c i o u / d j p v / e k q w / f l r x.

    Raises CorpusError when a column would have no target.
    """
    length = len(ids) // batch_size
    if length < 2:
        raise CorpusError(
            f"{len(ids)} tokens can't fill {batch_size} columns of at least 2 tokens: use a smaller --batch-size"
        )
    return torch.from_numpy(np.ascontiguousarray(ids[: length * batch_size].reshape(batch_size, length).T, np.int32))


def column_starts(length, count, seed):
    """Where each of `count` columns of `length` words starts, for `windows`: (1, count). seed fixes it."""
    return torch.from_numpy(np.random.default_rng(seed).integers(length, size=(1, count)))


def window_lengths(steps, bptt):
    """How `steps` steps are cut into windows of `bptt`: their lengths, the last one shorter."""
    return [min(bptt, steps - begin) for begin in range(0, steps, bptt)]


def variable_lengths(steps, bptt, seed, longest=None):
    """How `steps` steps are cut into windows whose borders are elsewhere in every epoch (Merity et al. 2018, 4.1).

    A length is normal with standard deviation 5 around bptt, in 1 of 20 cases around bptt / 2; at least 5 and at most
    `longest`, if given; the last window is what is left. seed: what numpy.random.default_rng takes; it fixes them all.
    """
    rng, lengths = np.random.default_rng(seed), []
    while steps:
        middle = bptt if rng.random() < 0.95 else bptt / 2
        length = max(5, int(rng.normal(middle, 5)))
        lengths.append(min(length, longest or length, steps))
        steps -= lengths[-1]
    return lengths


def windows(stream, lengths, first=0, starts=None):
    """Yield (tokens, targets), each (T, B) int64, of consecutive windows; targets are the tokens one step later.

    stream: (N, B), as `columns` gives it. lengths: T of each window. first: the index of the first one to yield.
    starts: (1, B), each column is read from its own start to its end and on from its beginning (the partial shuffle of
    Press 2019, arXiv 1903.04167); None: all from their beginnings.
    """
    begin = sum(lengths[:first])
    for length in lengths[first:]:
        end = begin + length
        if starts is None:
            block = stream[begin : end + 1]
        else:
            steps = torch.arange(begin, end + 1, device=stream.device)[:, None]
            block = stream.gather(0, (steps + starts) % len(stream))
        block = block.long()
        yield block[:-1], block[1:]
        begin = end


def sentences(ids, sos):
    """Cut a stream (N,) before every id `sos`: a list of arrays, each `sos` and what follows it, two ids or more.

    Raises CorpusError when it does not begin with it.
    """
    if not len(ids) or ids[0] != sos:
        raise CorpusError("a line does not begin with <sos>: make sentences by `python -m data.sentences CORPUS`")
    return [part for part in np.split(ids, np.flatnonzero(ids == sos)[1:]) if len(part) > 1]


def sentence_batches(lengths, batch_size, seed=None):
    """Which sentences are read side by side, by their lengths: a list of lists of their numbers, B in all but one.

    Those of about one length are together. seed: what numpy.random.default_rng takes; it fixes which of one length are,
    and the order of the batches; without it the shortest come first.
    """
    order = np.arange(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(np.asarray(lengths)[order], kind="stable")]
    parts = [order[begin : begin + batch_size].tolist() for begin in range(0, len(order), batch_size)]
    if seed is None:
        return parts
    return [parts[i] for i in np.random.default_rng([*seed, 1]).permutation(len(parts))]


def padded(parts, ignore):
    """Sentences, arrays of ids, side by side: tokens and targets, each (T, B), int64, of the longest's T.

    Behind the end of a sentence its tokens are 0, its targets `ignore`.
    """
    steps = max(map(len, parts)) - 1
    tokens, targets = np.zeros((steps, len(parts)), np.int64), np.full((steps, len(parts)), ignore, np.int64)
    for column, part in enumerate(parts):
        tokens[: len(part) - 1, column], targets[: len(part) - 1, column] = part[:-1], part[1:]
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def scored_columns(ids, batch_size, warmup, ignore):
    """Columns for evaluation, in which every one of the N-1 targets of a stream (N,) counts exactly once.

    Each column but the first is preceded by the `warmup` tokens before it, so that its state can be warmed up on them.
    Returns warm (W, B-1): what columns 1 to B-1 read first, unscored; tokens and targets, each (L, B),
    L = ceil((N-1) / B), int64; targets past the end of the stream are `ignore`. W = min(warmup, L).

    Raises CorpusError when there are fewer targets than columns.
    """
    count = len(ids) - 1
    if count < batch_size:
        raise CorpusError(
            f"{len(ids)} tokens have {max(count, 0)} targets, fewer than {batch_size} columns: "
            f"use a longer text or a smaller --eval-batch"
        )
    length = -(-count // batch_size)
    padded = np.zeros(length * batch_size, np.int64)
    padded[:count] = ids[:-1]
    targets = np.full(length * batch_size, ignore, np.int64)
    targets[:count] = ids[1:]
    warmup = min(warmup, length)
    before = np.arange(1, batch_size) * length
    warm = padded[before[None] + np.arange(-warmup, 0)[:, None]]
    tokens, targets = (array.reshape(batch_size, length).T for array in (padded, targets))
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in (warm, tokens, targets))
