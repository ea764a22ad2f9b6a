"""Perplexity, the only one: exp of the summed negative log likelihood over the number of targets."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from data.batching import padded, scored_columns, sentence_batches, sentences, window_lengths, windows
from data.corpus import EOS, SOS
from models.softmax import IGNORE

from . import report, runtime

WARMUP = 1024
"""Tokens that a column reads before its first scored one, when there are several."""
STEPS = 512
"""Window length; the result does not depend on it."""
LOGITS = 1 << 24
"""Most log probabilities that a window of trace keeps: 64 MiB in float32."""


@dataclass(frozen=True)
class Score:
    """loss: mean negative log likelihood in nats; targets: how many were scored; batch_size: in how many columns."""

    loss: float
    targets: int
    batch_size: int

    @property
    def perplexity(self):
        """exp(loss); inf where that overflows."""
        return perplexity(self.loss)


def perplexity(loss):
    """exp(loss), inf where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def detach(state):
    """Cut a state, a tuple of tensors, from the graph that made it."""
    return tuple(part.detach() for part in state)


def mean_score(log_probs):
    """The Score of one column by the log probabilities of its targets (N,)."""
    return Score(-log_probs.double().mean().item(), len(log_probs), 1)


@torch.inference_mode()
def evaluate(model, ids, batch_size=1, amp="off", label=None, sos=None):
    """Score of a stream of ids (N,): each of its N-1 targets once, whatever the batch size.

    batch_size 1 is what reported figures use: one pass from the zero state to the end. With B > 1 columns, every
    column but the first reads WARMUP tokens before its own, unscored, so that its state is not cold.
    sos: None, or the id that every sentence begins with, which is a target of none; each is read from the zero state,
    B side by side.
    label: shown with progress; None shows none. The model is put into evaluation mode and back.

    Raises CorpusError when there are fewer targets than columns, or no sentences.
    """
    device = next(model.parameters()).device
    if sos is None:
        warm, *whole = (part.to(device) for part in scored_columns(ids, batch_size, WARMUP, IGNORE))
        parts = list(zip(*(each.split(STEPS) for each in whole), strict=True))
    else:
        apart = sentences(ids, sos)
        order = sentence_batches([len(part) for part in apart], batch_size)
        parts = [padded([apart[i] for i in batch], IGNORE) for batch in order]
    count = int(sum((targets != IGNORE).sum() for _, targets in parts))
    training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with runtime.autocast(device, amp):
        state = _warmed(model, warm) if sos is None else None
        for tokens, targets in report.progress(parts, label):
            before = model.initial_state(tokens.shape[1]) if sos is not None else state
            window_loss, _, _, state = model(tokens.to(device), targets.to(device), before)
            loss += window_loss.sum()
    model.train(training)
    return Score(loss.item() / count, count, batch_size)


def _warmed(model, warm):
    """The state before the first window of columns, all but the first of which have read warm (W, B-1) before."""
    first, columns = model.initial_state(1), warm.shape[1]
    if not columns:
        return first
    state = model.initial_state(columns)
    for begin in range(0, len(warm), STEPS):
        _, state = model.hidden(warm[begin : begin + STEPS], state)
    return tuple(torch.cat(parts, 1) for parts in zip(first, state, strict=True))


def trace(model, ids, steps=None, amp="off", label=None, temperatures=(1.0,), learner=None, keep=False):
    """What a model makes of each of the N-1 targets of a stream of ids (N,), in one pass from the zero state.

    Returns log_probs (N-1, len(temperatures)): the logarithm of the target's probability, each p(w) to the power of
    1 / temperature and normalized; and, to keep, the core's outputs (N-1, H), float32 or wider, else None.
    steps: the length of the windows, STEPS if None. The result depends on it only if there is a learner, an
    adaptation.Learner, which takes a step on each window's mean loss after it was scored; the weights are the trained
    ones again at the end.
    label: as in evaluate. The model is put into evaluation mode and back.
    """
    device = next(model.parameters()).device
    stream = torch.from_numpy(np.asarray(ids, np.int64)).to(device)[:, None]
    steps = steps or STEPS
    lengths = window_lengths(len(stream) - 1, steps if learner else max(1, min(steps, LOGITS // model.vocab_size)))
    training, state = model.training, model.initial_state(1)
    model.eval()
    scores = [torch.empty(0, len(temperatures), device=device)]
    outputs = [torch.empty(0, model.core.output_size, device=device)]
    try:
        with torch.inference_mode(learner is None):
            for _, (tokens, targets) in zip(report.progress(lengths, label), windows(stream, lengths), strict=True):
                with runtime.autocast(device, amp):
                    hidden, state = model.hidden(tokens, state)
                    log_probs = model.log_probs(hidden)[:, 0]
                own = log_probs.gather(1, targets)
                scores.append(torch.cat([_tempered(log_probs.detach(), own.detach(), t) for t in temperatures], 1))
                if keep:
                    outputs.append(hidden[:, 0].detach().to(own.dtype))
                state = detach(state)
                if learner:
                    learner.step(-own.mean())
    finally:
        if learner:
            learner.restore()
        model.train(training)
    return torch.cat(scores), torch.cat(outputs) if keep else None


def _tempered(log_probs, own, temperature):
    """log_probs (T, V) and those of the targets, own (T, 1) -> own at a temperature, (T, 1)."""
    if temperature == 1:
        return own
    return own / temperature - (log_probs / temperature).logsumexp(1, keepdim=True)


def score_words(vocabulary, lines, read, apart=False):
    """Log probability of every word of a text, each given all words before it; the text starts after an `<eos>`.

    lines: lists of words, without `<eos>`; each line is scored with the `<eos>` at its end. read: a function from
    ids (N,) to the log probability of the N-1 targets. apart: each line is a sentence by itself, after `<sos>`, which
    it may begin with.
    Returns for each line a list of (word, log probability in nats, whether the vocabulary has the word).
    """
    lines = [[*(line[1:] if apart and line[:1] == [SOS] else line), EOS] for line in lines]
    texts = [[SOS, *line] for line in lines] if apart else [[EOS, *itertools.chain.from_iterable(lines)]]
    log_probs = itertools.chain.from_iterable(read(vocabulary.encode(text)[0]).tolist() for text in texts)
    return [[(word, next(log_probs), word in vocabulary.ids) for word in line] for line in lines]
