"""Optimizers, averages of the weights and learning rate schedules by their flags."""

import math
from contextlib import contextmanager

import torch

OPTIMIZERS = ("sgd", "ntasgd", "adam", "adamw")
NT_RULES = ("code", "paper")


def build_optimizer(args, parameters):
    """SGD (with momentum; ntasgd, too), Adam or AdamW, each in one pass over its memory.

    Weight decay is L2 after clipping; AdamW's is taken from the weights themselves, times the rate.
    """
    if args.optimizer in ("sgd", "ntasgd"):
        return torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum, weight_decay=args.wdecay, fused=True)
    betas = tuple(args.betas)
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=args.lr, betas=betas, weight_decay=args.wdecay, fused=True)


@contextmanager
def rescaled(optimizer, factor):
    """The optimizer's rate is `factor` times what it is, inside the `with`."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


class Average:
    """The mean of the weights after each step since a trigger: NT-ASGD (Merity et al. 2018, section 3) with SGD.

    args: needs optimizer, nonmono (n), nt_rule and finetune. Only --optimizer ntasgd ever averages: from the end of the
    first epoch on whose validation loss is worse than one before, or from the first step if it is a run's --finetune,
    which the same rule ends. The loss is compared with

        code: the best of all epochs but the last n, as in main.py of salesforce/awd-lstm-lm;
        paper: the best of the last n, as in algorithm 1,

    in either case after more than n epochs. Steps go on from the weights themselves, which are in the model but inside
    `applied`. Deviation from torch.optim.ASGD: the first step counts in the mean, and a batch's rate is its own.
    """

    def __init__(self, args, parameters):
        self.parameters, self.args = list(parameters), args
        self.losses, self.means, self.count, self.stop = [], None, 0, False
        if args.optimizer == "ntasgd" and args.finetune:
            self.start()

    def start(self):
        """Average from the next step on."""
        self.means = [parameter.detach().clone() for parameter in self.parameters]

    def step(self):
        """Take the weights after a step of the optimizer into the mean."""
        if self.means is not None:
            self.count += 1
            with torch.no_grad():
                torch._foreach_lerp_(self.means, self.parameters, 1 / self.count)

    @contextmanager
    def applied(self):
        """Inside the `with` the model has the mean, if there is one; yields whether it has."""
        if not self.count:
            yield False
            return
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self._set(self.means)
        try:
            yield True
        finally:
            self._set(kept)

    def end_epoch(self, valid_loss):
        """Look at an epoch's validation loss; returns what changes now, in words, or None."""
        n, change = self.args.nonmono, None
        recent = self.losses[-n:] if self.args.nt_rule == "paper" else self.losses[:-n]
        if self.args.optimizer == "ntasgd" and len(self.losses) > n and valid_loss > min(recent):
            if self.means is None:
                self.start()
                change = "Switching to ASGD: from here on the mean of the weights is evaluated"
            elif self.args.finetune:
                self.stop = True
                change = f"Stopping: the validation loss no longer falls (--nonmono {n}, --nt-rule {self.args.nt_rule})"
        self.losses.append(valid_loss)
        return change

    def state_dict(self):
        """What a resumed run needs: plain values and tensors."""
        return {"losses": self.losses, "means": self.means, "count": self.count, "stop": self.stop}

    def load_state_dict(self, state):
        """Put back what state_dict returned."""
        self.losses, self.count, self.stop = list(state["losses"]), state["count"], state["stop"]
        self.means = state["means"]
        if self.means is not None:
            self.means = [mean.to(own.device) for mean, own in zip(self.means, self.parameters, strict=True)]

    @torch.no_grad()
    def _set(self, values):
        torch._foreach_copy_(self.parameters, values)


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


class When(Constant):
    """The rate times 1/10 after each of the epochs that --when lists."""

    def start_batch(self, epoch, progress):
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * 0.1 ** sum(epoch > end for end in self.args.when)


class OneCycle(Constant):
    """Smith & Topin 2017: up from lr/25 to --lr in the first part of all batches, down to lr/250,000, on cosines.

    That part is --warm. Beta 1 of Adam goes the other way, from 0.05 above the one set to as much below and back, the
    momentum of SGD from 0.95 to 0.85 and back; without momentum it is left alone. With the defaults the same curve as
    torch's OneCycleLR, but a function of the part of training done, so that batches may vary.
    """

    START, END, MOMENTUM, SWING = 1 / 25, 1 / 250_000, 0.9, 0.05

    def start_batch(self, epoch, progress):
        warm = self.args.warm
        if progress < warm:
            part = progress / warm
            rate, swing = _cosine(self.START, 1.0, part), _cosine(self.SWING, -self.SWING, part)
        else:
            part = (progress - warm) / (1 - warm)
            rate, swing = _cosine(1.0, self.END, part), _cosine(-self.SWING, self.SWING, part)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * rate
            if "betas" in group:
                group["betas"] = (self.args.betas[0] + swing, *group["betas"][1:])
            elif group["momentum"]:
                group["momentum"] = self.MOMENTUM + swing


def _cosine(start, end, part):
    """From start to end on half a cosine, part 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(part, 1.0))) / 2


SCHEDULES = {"plateau": Plateau, "step": Step, "when": When, "onecycle": OneCycle, "constant": Constant}
