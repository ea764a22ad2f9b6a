"""The training text in batches: windows of columns, the state carried on, or sentences, each from the zero state."""

from data.batching import (
    column_starts,
    columns,
    padded,
    sentence_batches,
    sentences,
    variable_lengths,
    window_lengths,
    windows,
)
from models.softmax import IGNORE

from . import UserError, report


def epoch_lengths(steps, args, epoch):
    """The lengths of an epoch's windows over `steps` steps; args needs bptt, variable_bptt, bptt_max and seed."""
    if args.variable_bptt:
        return variable_lengths(steps, args.bptt, [args.seed, epoch], args.bptt_max)
    return window_lengths(steps, args.bptt)


class Columns:
    """This process's columns of the training split, all read side by side from window to window.

    parts: of equal size that the columns can be split into. width: B; carried: a batch goes on from the state after
    the one before. Raises CorpusError for a text that is too short, UserError for fewer columns than parts.
    """

    carried = True

    def __init__(self, args, corpus, parts, processes):
        stream = columns(corpus.train, args.batch_size)
        if args.batch_size % parts:
            stream = stream[:, : args.batch_size // parts * parts]
            report.say(f"| {stream.shape[1]} of {args.batch_size} columns are used: {parts} equal parts")
        if not stream.shape[1]:
            raise UserError(
                f"--batch-size {args.batch_size} can't be split into {parts} parts: give each a column or more"
            )
        self.args, self.processes = args, processes
        self.stream = processes.own_columns(stream).to(processes.device)
        self.width = self.stream.shape[1]

    def cut(self, epoch):
        """Choose where the epoch's columns start and the lengths of its windows; returns how many those are."""
        self.starts = None
        if self.args.partial_shuffle:
            length, count = self.stream.shape
            starts = column_starts(length, count * self.processes.size, [self.args.seed, epoch, 1])
            self.starts = self.processes.own_columns(starts).to(self.stream.device)
        self.lengths = epoch_lengths(len(self.stream) - 1, self.args, epoch)
        return len(self.lengths)

    def batches(self, start):
        """Yield (tokens, targets), each (T, B), from the epoch's window `start` on."""
        return windows(self.stream, self.lengths, start, self.starts)


class Sentences:
    """The sentences of the training split, those of about one length in a batch; sos: the id that each begins with.

    width: B of all batches but the last. Attributes and methods as Columns. Raises CorpusError where the text does not
    begin with sos, UserError under torchrun.
    """

    carried = False

    def __init__(self, args, corpus, sos, processes):
        if processes.size > 1:
            raise UserError("--sentences trains in one process: leave torchrun out, --cuda uses all GPUs without it")
        self.args, self.device, self.width = args, processes.device, args.batch_size
        self.sentences = sentences(corpus.train, sos)

    def cut(self, epoch):
        """Choose the epoch's batches and their order; returns how many those are."""
        lengths = [len(sentence) for sentence in self.sentences]
        self.parts = sentence_batches(lengths, self.args.batch_size, [self.args.seed, epoch])
        return len(self.parts)

    def batches(self, start):
        """Yield (tokens, targets), each (T, B), the targets of padding IGNORE, from the epoch's batch `start` on."""
        for part in self.parts[start:]:
            tokens, targets = padded([self.sentences[i] for i in part], IGNORE)
            yield tokens.to(self.device), targets.to(self.device)
