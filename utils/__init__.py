"""What turns a model into an experiment: flags, the loop, perplexity, checkpoints, reports."""


class UserError(Exception):
    """What the user asked for can't be done; the message is one line: expected, got, what to do."""


class TrainingError(Exception):
    """Training can't go on; the message is one line."""
