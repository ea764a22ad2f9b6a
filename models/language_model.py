"""Embedding -> core -> head: the language model that every family shares."""

import itertools

import torch
from torch import nn
from torch.nn import functional

from .dropout import dropout, embedding_dropout, locked_dropout
from .softmax import IGNORE, AdaptiveSoftmax, FullSoftmax, SplitSoftmax


class ModelError(Exception):
    """Sizes or names that can't make a model; the message is one line: expected, got, what to do."""


def check_cutoffs(cutoffs, vocab_size):
    """Raises ModelError unless 0 < cutoffs, increasing, < vocab_size."""
    bounds = [0, *cutoffs, vocab_size]
    if not cutoffs or any(low >= high for low, high in itertools.pairwise(bounds)):
        shown = " ".join(map(str, cutoffs)) or "none"
        raise ModelError(
            f"--cutoffs must increase, be above 0 and below the vocabulary's {vocab_size}, got {shown}; "
            f"leave them out for cutoffs that fit"
        )


def lecun_(model):
    """Start a LanguageModel as Chainer does (LeCun et al. 1998): matrices (N, K) normal with variance 1 / K, biases 0.

    The embedding's variance is 1, unless it is the head's matrix too. What normalizes (of the RMC's port in two
    dimensions), gates' constants and a split softmax's tombstones stay.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and name != "tail_vectors":
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif name.startswith("bias"):
                nn.init.zeros_(parameter)
    if not model.tied:
        nn.init.normal_(model.embedding.weight)


INITS = {"uniform": lambda model: None, "lecun": lecun_}
"""How weights start: uniform in the ranges that torch and word_language_model choose, as they are made, or lecun_."""


NORMS = {"mean": lambda x: x.pow(2).mean(), "l2": lambda x: torch.linalg.vector_norm(x, dim=-1).mean()}
"""What AR and TAR measure of (T, B, H): the mean of squares of the authors' code, the paper's norm in the mean."""


class _Tied(torch.autograd.Function):
    """The rows of a matrix (V, E) that tokens (T, B) name, and the matrix for the head, whose gradient takes theirs.

    torch's own way makes a second gradient of the matrix's size, nearly all of it zeros, and adds the two.
    """

    @staticmethod
    def forward(ctx, weight, tokens):
        ctx.save_for_backward(tokens)
        return functional.embedding(tokens, weight), weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_rows, d_weight):
        (tokens,) = ctx.saved_tensors
        # in place: the head's backward has just made it, and keeps another if it will be asked again
        if d_weight.is_cuda:  # where index_add_ has no fixed order
            return d_weight.index_put_((tokens,), d_rows, accumulate=True), None
        return d_weight.index_add_(0, tokens.flatten(), d_rows.flatten(0, -2)), None


class LanguageModel(nn.Module):
    """p(w_1 ... w_T) by a recurrent core over embedded words.

    vocab_size: V. core: a module with input_size, output_size, initial_state(B) and
    (x (T, B, E), state) -> (output (T, B, H), state), state a tuple of tensors with B at dim 1.
    tied: head and embedding share one matrix. dropouti: on the embedded words. dropout: on the core's output.
    cutoffs: of an adaptive softmax, which has weights of its own, or with splitcross of one that has those of the full
    one; None for the full one. init: a name of INITS; under uniform, embedding and full head start in +-0.1, as in
    word_language_model.

    Of Merity et al. 2018: dropoute, of words of the embedding (section 4.3); locked, a mask for all steps in the place
    of dropouti's and dropout's (4.2); alpha, beta: activation and temporal activation regularization of the core's
    output (4.6), alpha * norm(dropped h_t) + beta * norm(h_{t+1} - h_t) with ar_norm: "mean", the mean of squares over
    steps, columns and units, as the authors' code has it, or "l2", the paper's norm over units, in the mean over the
    others.

    Raises ModelError when tied and the core's input and output sizes differ, or the softmax is adaptive; for cutoffs
    that do not increase from above 0 to below V.
    """

    def __init__(
        self,
        vocab_size,
        core,
        tied,
        dropouti=0.0,
        dropout=0.0,
        cutoffs=None,
        init="uniform",
        splitcross=False,
        dropoute=0.0,
        locked=False,
        alpha=0.0,
        beta=0.0,
        ar_norm="mean",
    ):
        super().__init__()
        if cutoffs is not None:
            check_cutoffs(cutoffs, vocab_size)
            if tied and not splitcross:
                raise ModelError("an adaptive softmax has weights of its own: give --no-tied beside --adaptivesoftmax")
        if tied and core.input_size != core.output_size:
            raise ModelError(
                f"tied weights need equal sizes: the embedding has {core.input_size} features, the output "
                f"{core.output_size}; give both one size, or --no-tied"
            )
        self.embedding = nn.Embedding(vocab_size, core.input_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.core = core
        shared = self.embedding.weight if tied else None
        if cutoffs is None:
            self.head = FullSoftmax(core.output_size, vocab_size, shared)
        elif splitcross:
            self.head = SplitSoftmax(core.output_size, vocab_size, cutoffs, shared)
        else:
            self.head = AdaptiveSoftmax(core.output_size, vocab_size, cutoffs)
        self.vocab_size, self.tied, self.dropouti, self.dropout = vocab_size, tied, dropouti, dropout
        self.dropoute, self.locked, self.alpha, self.beta, self.ar_norm = dropoute, locked, alpha, beta, ar_norm
        INITS[init](self)

    def initial_state(self, batch_size):
        """The state before the first word, as the core defines it."""
        return self.core.initial_state(batch_size)

    def hidden(self, tokens, state):
        """tokens (T, B), state -> the core's output before dropout (T, B, H), state after the last token."""
        return self._core(self.embedding(tokens), tokens, state)

    def _core(self, embedded, tokens, state):
        x = embedding_dropout(embedded, tokens, self.vocab_size, self.dropoute, self.training)
        return self.core(self.drop(x, self.dropouti), state)

    def drop(self, x, p):
        """Dropout of x (T, B, features) in training, with a fresh mask for every step unless it is locked."""
        return (locked_dropout if self.locked else dropout)(x, p, self.training)

    def log_probs(self, hidden):
        """(T, B, H) -> (T, B, V): natural logarithm of the probability of each next word."""
        return self.head.log_probs(hidden)

    def forward(self, tokens, targets, state):
        """One window of training.

        tokens, targets (T, B), integers; a target of IGNORE is not scored.
        Returns the loss summed over the targets in nats, the regularizer to add to the mean loss, the number of
        targets, each (1, 1) so that DataParallel can gather them along dim 1, and the state after the last token.
        """
        if self.tied:
            embedded, *shared = _Tied.apply(self.embedding.weight, tokens)
        else:
            embedded, shared = self.embedding(tokens), []
        hidden, state = self._core(embedded, tokens, state)
        dropped = self.drop(hidden, self.dropout)
        loss = self.head.loss(dropped, targets, *shared)
        count = (targets != IGNORE).sum()
        return loss.view(1, 1), self.regularizer(hidden, dropped).to(loss.dtype).view(1, 1), count.view(1, 1), state

    def regularizer(self, hidden, dropped):
        """AR of the dropped and TAR of the whole output (T, B, H); 0-d, 0 without them or outside training."""
        norm, total = NORMS[self.ar_norm], hidden.new_zeros(())
        if self.training and self.alpha:
            total = total + self.alpha * norm(dropped)
        if self.training and self.beta and len(hidden) > 1:
            total = total + self.beta * norm(hidden[1:] - hidden[:-1])
        return total

    def num_params(self):
        """Parameters that are trained, a tied matrix counted once."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
