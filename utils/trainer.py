"""The training loop, the only one."""

import math
import os
import signal
import time
from contextlib import contextmanager
from dataclasses import replace

import torch
from tqdm import tqdm

from . import TrainingError, UserError, checkpoint, onnx_export, optim, report, runtime
from .evaluation import Score, detach, evaluate, perplexity
from .report import RULE

SUMS = ("loss", "count", "epoch_loss", "epoch_count", "bad_step", "bad_norm")
"""Kept on the device: loss and targets since the last log line and in this epoch; first non-finite batch and norm."""

STATUSES = ("running", "dry-run", "max-minutes", "interrupted")


@contextmanager
def interruptible():
    """Ctrl-C inside the `with` asks for a stop after the current batch; a second one interrupts at once.

    Yields a function that says whether it was pressed.
    """
    pressed = []

    def handler(signum, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)
        report.say("Exiting from training early; once more to stop at once")

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def training_step(model, optimizer, tokens, targets, state, args, clock):
    """Forward, backward, clip, update on one window; args needs amp, clip, average, bptt and variable_bptt.

    tokens, targets (T, B). The gradient is of the loss averaged over the targets or over the columns, which is the
    former times T; norms are clipped at that scale. The rate of a window of variable length is T / bptt times the one
    set, else short ones would count for more.
    Returns the summed loss in nats and the number of targets, 0-d tensors on the device, the gradient norm before
    clipping, the detached state after the window, and the clock's mark after the forward pass.
    """
    optimizer.zero_grad()  # first: the loss makes a gradient as large as the softmax's on its way forward
    with runtime.autocast(tokens.device, args.amp):
        loss, regularizer, count, state = model(tokens, targets, state)
    loss, count = loss.sum(), count.sum()
    forward = clock.mark()
    parts = count if args.average == "targets" else tokens.shape[1]
    (loss / parts + regularizer.mean()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
    with optim.rescaled(optimizer, len(tokens) / args.bptt if args.variable_bptt else 1.0):
        optimizer.step()
    return loss.detach(), count, norm, detach(state), forward


class Trainer:
    """One run: model, optimizer, schedule, and where it stands.

    replicas is what takes training steps: the model, or its copies on several GPUs. text: Columns or Sentences of
    utils/text.py; sos: the id that sentences begin with, None for a text that is read on and on.
    epoch counts from 1; batch is the number of windows done in it; state is carried from window to window.
    best: the epoch and score of what best.pt holds, a part of an epoch when training stopped there; whole: of the best
    at the end of an epoch, which is what a resumed run goes on with.
    pruning: the model's Pruning.
    """

    def __init__(self, args, corpus, config, model, replicas, text, sos, folder, processes, pruning):
        self.args, self.corpus, self.config = args, corpus, config
        self.processes, self.device = processes, processes.device
        self.model, self.replicas, self.text, self.sos, self.folder = model, replicas, text, sos, folder
        self.optimizer = optim.build_optimizer(args, model.parameters())
        self.schedule = optim.build_schedule(args, self.optimizer)
        self.average = optim.Average(args, model.parameters())
        self.pruning = pruning
        self.clock = runtime.Clock(self.device)
        self.epoch, self.batch, self.seconds = 1, 0, 0.0
        self.batches = text.cut(self.epoch)
        self.state = model.initial_state(text.width)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        self.timing = {"ms": 0.0, "forward_ms": 0.0, "batches": 0}
        self.history = self.shown = {"epochs": [], "points": []}
        self.best = self.whole = None
        self.status, self.commands = "running", [report.command(args.argv)]
        limit = 2 * args.eval_batch * args.bptt + 1 if args.dry_run else None
        self.valid, self.test = corpus.valid[:limit], corpus.test[:limit]

    def run(self):
        """Train until the epochs, the minutes or the user's patience are over; then evaluate the best checkpoint.

        Returns the run record; None in processes that are not the first.
        """
        self.started = time.monotonic() - self.seconds
        self.first = self.progress()
        self.began = time.monotonic()
        with interruptible() as interrupted:
            while self.epoch <= self.args.epochs and self.status == "running" and not self.average.stop:
                self.train_epoch(interrupted)
                self.end_epoch()
                if self.status == "running" and self.processes.any_of(interrupted()):
                    self.status = "interrupted"
        return self.finish() if self.processes.rank == 0 else None

    def train_epoch(self, interrupted):
        """The windows of the epoch that are left; sets status when it has to stop before the end."""
        args = self.args
        if self.batch == 0:
            self.prune()
        self.model.train()
        marks = [self.clock.mark()]
        hidden = True if self.processes.rank > 0 else None
        label = f"epoch {self.epoch}"
        with tqdm(total=self.batches, initial=self.batch, desc=label, leave=False, disable=hidden) as bar:
            for tokens, targets in self.text.batches(self.batch):
                if not self.text.carried:
                    self.state = self.model.initial_state(tokens.shape[1])
                self.schedule.start_batch(self.epoch, self.progress())
                start = self.clock.mark()
                loss, count, norm, self.state, forward = training_step(
                    self.replicas, self.optimizer, tokens, targets, self.state, args, self.clock
                )
                self.pruning.apply()
                self.average.step()
                self.batch += 1
                self.add(loss, count, norm)
                marks.append((start, forward))
                bar.update()
                if self.device.type == "cpu":
                    self.check_finite()
                if self.batch % args.log_interval == 0:
                    marks = self.log_line(marks)
                if args.checkpoint_every and self.batch % args.checkpoint_every == 0 and self.batch < self.batches:
                    self.save(self.folder.last)
                self.status = self.stop_reason(interrupted)
                if self.status != "running":
                    break
        self.account(marks)
        self.check_finite()

    def prune(self):
        """Let the pruners act that are due before the epoch; what was best with more weights is best no more."""
        acted = self.pruning.start_epoch(self.epoch - 1)
        if acted:
            self.best = self.whole = None
            part = self.pruning.count() / self.model.num_params()
            self.folder.log(f"| pruned {' '.join(acted)} | {part:.2%} of all parameters are 0", "train")

    @contextmanager
    def evaluated(self):
        """Inside the `with` the model has the weights to evaluate: the mean, if there is one, pruned."""
        with self.average.applied() as averaged:
            self.pruning.apply()
            yield averaged

    def progress(self):
        """The part of all epochs that is done, 0 to 1."""
        return min(1.0, (self.epoch - 1 + self.batch / self.batches) / self.args.epochs)

    def add(self, loss, count, norm):
        """Add one batch to the sums, without waiting for the device."""
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        first_bad = ~finite & (self.sums[4] == 0)
        loss, count = loss.double(), count.double()
        self.sums[:4] += torch.stack([loss, count, loss, count])
        self.sums[4:] += torch.where(first_bad, torch.stack([torch.full_like(loss, self.batch), norm.double()]), 0.0)

    def check_finite(self):
        """Raises TrainingError when a loss or gradient norm so far was not finite."""
        batch = int(self.sums[4])
        if batch:
            raise TrainingError(
                f"the loss or its gradient is not finite at batch {batch} of epoch {self.epoch}: "
                f"lr {self.optimizer.param_groups[0]['lr']:g}, gradient norm {self.sums[5].item():g}; "
                f"use a smaller --lr or --clip; good checkpoints, if any, are in {self.args.runs_dir}/{self.args.name}"
            )

    def stop_reason(self, interrupted):
        """Why training should stop after this batch, or "running"; all processes agree."""
        self.seconds = time.monotonic() - self.started
        late = self.args.max_minutes and self.seconds > self.args.max_minutes * 60
        reasons = (True, self.args.dry_run, late, interrupted())
        own = max(number for number, holds in enumerate(reasons) if holds)
        return STATUSES[int(self.processes.any_of(own))]

    def account(self, marks):
        """Add the time of batches to the epoch's; returns (ms, forward ms) of them. marks: a mark, then pairs."""
        begin, *pairs = marks
        elapsed = self.clock.milliseconds(begin, self.clock.mark())
        forward = sum(self.clock.milliseconds(start, end) for start, end in pairs)
        self.timing["ms"] += elapsed
        self.timing["forward_ms"] += forward
        self.timing["batches"] += len(pairs)
        return elapsed, forward

    def log_line(self, marks):
        """Print where training stands; starts the sums and marks anew."""
        elapsed, forward = self.account(marks)
        self.check_finite()
        timed = len(marks) - 1
        loss, count = self.processes.total(self.sums[:2]).tolist()
        loss /= count
        lr = self.optimizer.param_groups[0]["lr"]
        done = self.progress()
        left = (time.monotonic() - self.began) / (done - self.first) * (1 - done)
        if self.args.max_minutes:
            left = min(left, max(0.0, self.args.max_minutes * 60 - self.seconds))
        self.folder.log(
            f"| epoch {self.epoch:3d} | {self.batch:5d}/{self.batches:5d} batches | lr {report.rate(lr)} | "
            f"ms/batch {elapsed / timed:5.2f} | forward ms/batch {forward / timed:5.2f} | "
            f"loss {loss:5.2f} | ppl {perplexity(loss):8.2f} | eta {report.duration(left)}",
            "train",
        )
        self.history["points"].append([self.epoch - 1 + self.batch / self.batches, perplexity(loss), lr])
        self.sums[:2] = 0
        return [self.clock.mark()]

    def end_epoch(self):
        """Evaluate, log, save. A part of an epoch is evaluated too, but moves no schedule, position or whole."""
        start = time.monotonic()
        lr = self.optimizer.param_groups[0]["lr"]
        partial = self.status != "running" and self.batch < self.batches
        with self.evaluated() as averaged:
            score = self.score_valid()
        self.seconds = time.monotonic() - self.started
        entry = self.entry(score, lr, partial, time.monotonic() - start) | {"averaged": averaged}
        self.folder.log(RULE)
        self.folder.log(
            f"| end of epoch {self.epoch:3d} | time: {entry['seconds']:5.2f}s | valid loss {score.loss:5.2f} | "
            f"valid ppl {score.perplexity:8.2f} | eval batch {score.batch_size}"
            + (f" | weights {'averaged' if averaged else 'raw'}" if self.args.optimizer == "ntasgd" else "")
            + (f" | {self.status} after {self.batch} batches" if partial else ""),
            "train",
            "test",
        )
        self.folder.log(RULE)
        improved = self.best is None or score.loss < self.best["valid_loss"]
        if improved:
            if partial and self.whole:
                self.copy_best(self.folder.whole)
            self.best = {"epoch": self.epoch, "valid_loss": score.loss, "valid_batch": score.batch_size}
        if not partial:
            self.whole = self.best
            self.history["epochs"].append(entry)
            self.schedule.end_epoch(score.loss)
            change = self.average.end_epoch(score.loss)
            if change:
                self.folder.log(f"| {change}", "train")
            self.epoch, self.batch = self.epoch + 1, 0
            self.batches = self.text.cut(self.epoch)
            self.state = self.model.initial_state(self.text.width)
            self.sums.zero_()
            self.timing = dict.fromkeys(self.timing, 0)
        if improved:
            with self.evaluated():
                self.save(self.folder.best)
            self.copy_best(self.args.save)
        if improved and not averaged:
            self.copy_best(self.folder.last)
        else:
            self.save(self.folder.last)
        self.shown = {**self.history, "epochs": [*self.history["epochs"], *([entry] if partial else [])]}
        self.folder.write(self.record(), self.shown)

    def score_valid(self):
        """The Score of the validation split, computed by the first process."""
        score = Score(0.0, len(self.valid) - 1, self.args.eval_batch)
        if self.processes.rank == 0:
            label = f"epoch {self.epoch} valid"
            score = evaluate(self.model, self.valid, score.batch_size, self.args.amp, label, self.sos)
        return replace(score, loss=self.processes.first_of(score.loss))

    def entry(self, score, lr, partial, valid_seconds):
        """One epoch for history and metrics.csv, plain values."""
        loss, count = self.processes.total(self.sums[2:4]).tolist()
        batches = max(1, self.timing["batches"])
        seconds = self.timing["ms"] / 1000
        return {
            "epoch": self.epoch,
            "partial": partial,
            "part": self.batch / self.batches,
            "batches": self.batch,
            "lr": lr,
            "train_loss": loss / count,
            "train_ppl": perplexity(loss / count),
            "valid_loss": score.loss,
            "valid_ppl": score.perplexity,
            "valid_batch": score.batch_size,
            "seconds": seconds + valid_seconds,
            "ms_per_batch": self.timing["ms"] / batches,
            "forward_ms_per_batch": self.timing["forward_ms"] / batches,
            "tokens_per_second": count / self.batch * self.timing["batches"] / seconds,
            "peak_memory_mib": runtime.peak_memory(self.device),
        }

    def finish(self):
        """Valid and test perplexity of the best checkpoint at batch size 1, into the logs and the run record."""
        best = checkpoint.load(self.folder.best)
        checkpoint.load_weights(self.model, best, self.folder.best)
        checkpoint.copy(self.folder.best, self.args.save, link=False)
        epoch = best["best"]["epoch"]
        valid, test = (
            evaluate(self.model, ids, 1, self.args.amp, f"best epoch {epoch} {name}, batch 1", self.sos)
            for name, ids in (("valid", self.valid), ("test", self.test))
        )
        self.folder.log("=" * 89)
        self.folder.log(
            f"| best epoch {epoch:3d} ({self.folder.best.name}) | valid loss {valid.loss:5.2f} | "
            f"valid ppl {valid.perplexity:8.2f} | eval batch 1",
            "test",
        )
        self.folder.log(f"| End of training | test loss {test.loss:5.2f} | test ppl {test.perplexity:8.2f}", "test")
        self.folder.log("=" * 89)
        self.status = "finished" if self.status == "running" else self.status
        name = self.folder.best.name
        results = {"valid": report.score_record(valid, name, epoch), "test": report.score_record(test, name, epoch)}
        record = {**self.record(), "results": results}
        report.write_record(self.folder.path / "run.json", record)
        curves = self.folder.path / "curves.png"
        saved = "nothing kept (dry run)" if self.args.dry_run else f"checkpoint {self.args.save} | curves {curves}"
        report.say(f"| {saved}")
        if self.args.onnx_export:
            onnx_export.export(self.model, self.args.onnx_export)
            report.say(f"| ONNX {self.args.onnx_export}")
        return record

    def record(self):
        """The run record so far; finish adds the results."""
        epochs = self.shown["epochs"]
        flags = {name: value for name, value in vars(self.args).items() if name != "argv"}
        return {
            "kind": "training",
            "name": self.args.name,
            "processes": self.processes.size,
            "status": self.status,
            "command": self.commands[0],
            "resumed_by": self.commands[1:],
            "config": flags,
            "model": {**self.config, "parameters": self.model.num_params(), "pruned": self.pruning.count()},
            "corpus": report.corpus_record(self.corpus),
            "environment": report.environment(self.device, self.args.amp),
            "epochs": len(epochs),
            "minutes": self.seconds / 60,
            "ms_per_batch": _median(epochs, "ms_per_batch"),
            "forward_ms_per_batch": _median(epochs, "forward_ms_per_batch"),
            "tokens_per_second": _median(epochs, "tokens_per_second"),
            "peak_memory_mib": runtime.peak_memory(self.device),
            "history": self.shown,
            "results": {},
        }

    def tokens_line(self):
        """Tokens of the splits, for the log."""
        return " / ".join(f"{len(getattr(self.corpus, split)):,}" for split in self.corpus.checksums)

    def save(self, path):
        """Write a checkpoint of where training stands, unless that is not finite any more."""
        self.check_finite()
        state, sums = self.processes.all_columns(self.state), self.processes.total(self.sums)
        rng, *others = self.processes.rng_states()
        if self.processes.rank > 0:
            return
        corpus = self.corpus
        checkpoint.save(
            path,
            {
                "config": self.config,
                "vocabulary": {"words": corpus.vocabulary.words, "counts": corpus.vocabulary.counts},
                "weights": self.model.state_dict(),
                "args": {name: value for name, value in vars(self.args).items() if name != "argv"},
                "corpus": {"name": corpus.name, "checksums": corpus.checksums, "options": corpus.options},
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "average": self.average.state_dict(),
                "pruning": self.pruning.state_dict(),
                "rng": rng,
                "rng_others": others,
                "position": {
                    "epoch": self.epoch,
                    "batch": self.batch,
                    "seconds": self.seconds,
                    "state": state,
                    "sums": sums,
                    "timing": self.timing,
                    "log_sizes": self.folder.log_sizes(),
                },
                "history": self.history,
                "best": self.best,
                "whole": self.whole,
                "commands": self.commands,
            },
        )

    def copy_best(self, path):
        """Let a file be best.pt's own, too: writing a large one takes longer than an epoch on a GPU may."""
        if self.processes.rank == 0:
            checkpoint.copy(self.folder.best, path)

    def restore(self, saved):
        """Go on from a checkpoint that `save` wrote, whose weights the model has already."""
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.average.load_state_dict(saved["average"])
        position = saved["position"]
        width, before = self.text.width * self.processes.size, position["state"][0].shape[1]
        if self.text.carried and width != before:
            raise UserError(
                f"--resume {self.args.resume}: the run has {before} columns, {width} can be shared by what is here; "
                f"resume it on as many GPUs, or by as many processes, as before"
            )
        self.epoch, self.batch, self.seconds = position["epoch"], position["batch"], position["seconds"]
        self.state = tuple(self.processes.own_columns(part).to(self.device) for part in position["state"])
        if self.processes.rank == 0:
            self.sums = position["sums"].to(self.device)
        self.batches = self.text.cut(self.epoch)
        self.timing, self.best = position["timing"], saved.get("whole", saved["best"])
        self.whole = self.best
        if self.processes.rank == 0 and self.folder.whole.is_file():
            os.replace(self.folder.whole, self.folder.best)
        self.history = self.shown = saved["history"]
        self.commands = [*saved.get("commands", ()), *self.commands]
        self.processes.set_rng_states([saved["rng"], *saved.get("rng_others", ())])


def _median(epochs, key):
    """Median of one figure over epochs, None without any."""
    values = sorted(epoch[key] for epoch in epochs)
    return values[len(values) // 2] if values else None
