"""Optimizers and learning rate schedules by their flags."""

import math

import torch


def build_optimizer(args, parameters):
    """SGD (with momentum) or Adam, each in one pass over its memory; weight decay is L2 added after clipping."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum, weight_decay=args.wdecay, fused=True)
    return torch.optim.Adam(parameters, lr=args.lr, weight_decay=args.wdecay, fused=True)


def build_schedule(args, optimizer):
    """The schedule that --schedule names."""
    return SCHEDULES[args.schedule](args, optimizer)


class Constant:
    """The rate stays what --lr says. Base of the other schedules."""

    def __init__(self, args, optimizer):
        self.args, self.optimizer = args, optimizer

    def start_batch(self, epoch, progress):
        """Set the rate of the next batch. epoch counts from 1; progress is the part of all epochs done, 0 to 1."""

    def end_epoch(self, valid_loss):
        """Look at the validation loss of the epoch that ended."""

    def state_dict(self):
        """What a resumed run needs, plain values; the rate itself is in the optimizer's state."""
        return {}

    def load_state_dict(self, state):
        """Put back what state_dict returned."""


class Plateau(Constant):
    """Multiply the rate by --plateau-factor after more than --plateau-patience epochs without a better validation loss.

    Better means by more than --plateau-threshold, relative. Factor 0.25, patience 0, threshold 0 is what
    word_language_model does; 0.5, 5, 1e-4 is the port.
    """

    def __init__(self, args, optimizer):
        super().__init__(args, optimizer)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "min", args.plateau_factor, args.plateau_patience, args.plateau_threshold, eps=0
        )

    def end_epoch(self, valid_loss):
        self.plateau.step(valid_loss)

    def state_dict(self):
        return self.plateau.state_dict()

    def load_state_dict(self, state):
        self.plateau.load_state_dict(state)


class Step(Constant):
    """The rate times --decay after each epoch from --decay-from on: epochs 1 to decay_from run at --lr."""

    def start_batch(self, epoch, progress):
        rate = self.args.lr * self.args.decay ** max(0, epoch - self.args.decay_from)
        for group in self.optimizer.param_groups:
            group["lr"] = rate


class OneCycle(Constant):
    """Smith & Topin 2017: up from lr/25 to --lr in the first 30% of all batches, down to lr/250,000, on cosines.

    Momentum (beta 1 of Adam) goes the other way, from 0.95 to 0.85 and back; without momentum it is left alone.
    The same curve as torch's OneCycleLR, but a function of the part of training done, so that batches may vary.
    """

    WARM, START, END, HIGH, LOW = 0.3, 1 / 25, 1 / 250_000, 0.95, 0.85

    def start_batch(self, epoch, progress):
        if progress < self.WARM:
            part = progress / self.WARM
            rate, momentum = _cosine(self.START, 1.0, part), _cosine(self.HIGH, self.LOW, part)
        else:
            part = (progress - self.WARM) / (1 - self.WARM)
            rate, momentum = _cosine(1.0, self.END, part), _cosine(self.LOW, self.HIGH, part)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * rate
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif group["momentum"]:
                group["momentum"] = momentum


def _cosine(start, end, part):
    """From start to end on half a cosine, part 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(part, 1.0))) / 2


SCHEDULES = {"plateau": Plateau, "step": Step, "onecycle": OneCycle, "constant": Constant}
