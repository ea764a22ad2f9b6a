"""Perplexity, the only one: exp of the summed negative log likelihood over the number of targets."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from data.batching import scored_columns, window_lengths, windows
from data.corpus import EOS
from models.softmax import IGNORE

from . import report, runtime

WARMUP = 1024
"""Tokens that a column reads before its first scored one, when there are several."""
STEPS = 512
"""Window length; the result does not depend on it."""
LOGITS = 1 << 24
"""Most log probabilities that a window of score_words keeps: 64 MiB in float32."""


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


@torch.inference_mode()
def evaluate(model, ids, batch_size=1, amp="off", label=None):
    """Score of a stream of ids (N,): each of its N-1 targets once, whatever the batch size.

    batch_size 1 is what reported figures use: one pass from the zero state to the end. With B > 1 columns, every
    column but the first reads WARMUP tokens before its own, unscored, so that its state is not cold.
    label: shown with progress; None shows none. The model is put into evaluation mode and back.

    Raises CorpusError when there are fewer targets than columns.
    """
    device = next(model.parameters()).device
    warm, tokens, targets = (part.to(device) for part in scored_columns(ids, batch_size, WARMUP, IGNORE))
    training = model.training
    model.eval()
    state = model.initial_state(batch_size)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with runtime.autocast(device, amp):
        if batch_size > 1:
            state = model.initial_state(batch_size - 1)
            for begin in range(0, len(warm), STEPS):
                _, state = model.hidden(warm[begin : begin + STEPS], state)
            state = tuple(torch.cat(parts, 1) for parts in zip(model.initial_state(1), state, strict=True))
        for begin in report.progress(range(0, len(tokens), STEPS), label):
            window = slice(begin, begin + STEPS)
            window_loss, _, _, state = model(tokens[window], targets[window], state)
            loss += window_loss.sum()
    model.train(training)
    count = len(ids) - 1
    return Score(loss.item() / count, count, batch_size)


@torch.inference_mode()
def score_words(model, vocabulary, lines, amp="off"):
    """Log probability of every word of a text, each given all words before it; the text starts after an `<eos>`.

    lines: lists of words, without `<eos>`; each line is scored with the `<eos>` at its end.
    Returns for each line a list of (word, log probability in nats, whether the vocabulary has the word).
    """
    device = next(model.parameters()).device
    model.eval()
    state = model.initial_state(1)
    steps = max(1, min(STEPS, LOGITS // model.vocab_size))
    previous = vocabulary.encode([EOS])[0]
    scored = []
    with runtime.autocast(device, amp):
        for line in lines:
            words = [*line, EOS]
            ids, _ = vocabulary.encode(words)
            stream = torch.from_numpy(np.concatenate([previous, ids]).astype(np.int64)).to(device)[:, None]
            log_probs = []
            for tokens, targets in windows(stream, window_lengths(len(stream) - 1, steps)):
                hidden, state = model.hidden(tokens, state)
                log_probs += model.log_probs(hidden).gather(-1, targets[..., None]).flatten().tolist()
            scored.append([(word, lp, word in vocabulary.ids) for word, lp in zip(words, log_probs, strict=True)])
            previous = ids[-1:]
    return scored
