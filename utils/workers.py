"""What benchmark.py measures, each in a process of its own: its settings and its memory are nobody else's."""

import contextlib
import importlib
import itertools
import multiprocessing
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.batching import columns, windows
from data.corpus import Corpus
from generate import sample
from models import build, compiled

from . import UserError, optim, parsing, runtime, timing, trainer
from .evaluation import evaluate
from .peers import PEERS, PORT, load
from .program import USER_ERRORS
from .text import epoch_lengths


class Candidate:
    """A model and its optimizer, ready to take training steps on made-up text; or a peer with the same weights."""

    def __init__(self, script, flags, peer, checkout, args):
        module = importlib.import_module(script)
        self.flags, _ = parsing.parse_training(
            module.build_parser(), module.RECIPES, [*flags.split(), "--amp", args.amp]
        )
        if peer:  # as its users run it, denormals apart
            self.device = torch.device("cuda" if args.cuda else "cpu")
            if args.threads:
                torch.set_num_threads(args.threads)
            torch.set_flush_denormal(True)
        else:
            self.device, _ = runtime.setup(args)
        parsing.settle_cutoffs(self.flags, args.vocab_size)
        torch.manual_seed(self.flags.seed)
        self.config = module.model_config(self.flags, args.vocab_size)
        self.model = build(self.config).to(self.device)
        if self.flags.compile:
            runtime.compile_passes(self.model.core)
        batch, bptt = self.flags.batch_size, self.flags.bptt
        ids = np.random.default_rng(0).zipf(1.1, batch * (bptt + 1)) % args.vocab_size
        self.tokens, self.targets = next(windows(columns(ids, batch).to(self.device), [bptt]))
        self.clock = runtime.Clock(self.device)
        self.peer = PEERS[peer](checkout, self.flags, self.model) if peer else None
        if peer:
            self.state = self.peer.state(batch)
        else:
            self.optimizer = optim.build_optimizer(self.flags, self.model.parameters())
            self.state = self.model.initial_state(batch)

    @torch.no_grad()
    def difference(self):
        """Relative difference of the loss of five steps, without dropout, from float64, all logits at once."""
        tokens, targets = self.tokens[:5], self.targets[:5]
        state = self.model.initial_state(tokens.shape[1])
        self.model.eval()
        if self.peer:
            self.peer.model.eval()
            loss, _ = self.peer.loss(tokens, targets, self.peer.state(tokens.shape[1]))
            self.peer.model.train()
        else:
            with runtime.autocast(self.device, self.flags.amp):
                loss, _, count, _ = self.model(tokens, targets, state)
            loss = loss.sum() / count.sum()
        wide = self.model.double()
        hidden, _ = wide.hidden(tokens, tuple(part.double() for part in state))
        exact = -wide.log_probs(hidden).gather(-1, targets[..., None]).mean()
        self.model.float().train()
        return abs(loss / exact - 1).item()

    def step(self):
        """One training step: its milliseconds and those of the forward pass in it."""
        start = self.clock.mark()
        if self.peer:
            loss, self.state = self.peer.loss(self.tokens, self.targets, self.state)
            forward = self.clock.mark()
            self.peer.backward(loss)
        else:
            _, _, _, self.state, forward = trainer.training_step(
                self.model, self.optimizer, self.tokens, self.targets, self.state, self.flags, self.clock
            )
        end = self.clock.mark()
        return self.clock.milliseconds(start, end), self.clock.milliseconds(start, forward)

    @torch.no_grad()
    def forward(self):
        """Milliseconds of a forward pass that no gradient will be asked of."""
        start = self.clock.mark()
        if self.peer:
            self.peer.loss(self.tokens, self.targets, self.state)
        else:
            with runtime.autocast(self.device, self.flags.amp):
                self.model(self.tokens, self.targets, self.state)
        end = self.clock.mark()
        return self.clock.milliseconds(start, end)

    def memory(self):
        """Peak MiB of two training steps above what was there before them, parameters and imports."""
        return timing.memory_above(lambda: (self.step(), self.step()), self.device)

    def parts(self):
        """Milliseconds of a training step in the core, in the softmax and loss, and in clipping and the update."""
        marks = [self.clock.mark()]

        def mark():
            marks.append(self.clock.mark())

        self.optimizer.zero_grad()
        x = self.model.embedding(self.tokens)
        hidden, _ = self.model.core(x, self.state)
        mark()
        output = hidden.detach().requires_grad_()
        (self.model.head.loss(output, self.targets) / self.tokens.shape[1]).backward()
        mark()
        hidden.backward(output.grad)
        mark()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.flags.clip)
        self.optimizer.step()
        mark()
        forward, softmax, backward, update = (self.clock.milliseconds(*pair) for pair in itertools.pairwise(marks))
        return forward + backward, softmax, update

    def train(self, ids, epochs):
        """Train on columns of ids (N,) in windows as the flags say; milliseconds of each step."""
        flags, stream, taken = self.flags, columns(ids, self.flags.batch_size).to(self.device), []
        for epoch in range(1, epochs + 1):
            batch = stream.shape[1]
            self.state = self.peer.state(batch) if self.peer else self.model.initial_state(batch)
            for self.tokens, self.targets in windows(stream, epoch_lengths(len(stream) - 1, flags, epoch)):
                taken.append(self.step()[0])
        return taken

    def score(self, ids):
        """Perplexity of ids (N,) by our evaluate, whoever trained."""
        if self.peer is None:
            return evaluate(self.model, ids, 1, self.flags.amp).perplexity
        tied = self.flags.tied if self.peer.tied is None else self.peer.tied
        model = build({**self.config, "tied": tied}).to(self.device)
        model.load_state_dict(self.peer.weights(model))
        return evaluate(model, ids, 1).perplexity

    def words(self, count):
        """Milliseconds of a word of `count` generated in one column."""
        if self.peer:
            return timing.once(lambda: self.peer.words(count), self.device) / count
        self.model.eval()
        with runtime.autocast(self.device, self.flags.amp):
            taken = timing.once(lambda: sample(self.model, [0], count), self.device)
        self.model.train()
        return taken / count

    def reading(self):
        """Milliseconds of reading once the weights that a word needs, and their MiB: all but an untied embedding."""
        weights = self.model.num_params()
        weights -= 0 if self.flags.tied else self.model.embedding.weight.numel()
        memory = torch.ones(weights, device=self.device)
        return timing.median_time(memory.sum, 0.1, self.device), weights / 2**18

    def tokens_a_step(self):
        """Targets of a training step."""
        return self.targets.numel()

    def parameters(self):
        """Parameters of our model, tied ones once."""
        return self.model.num_params()

    def launches(self):
        """Tensor operations of a training step that are no views, as a GPU gets them: without compiled kernels."""
        with compiled.torch_only():
            return timing.count(self.step).launches

    def products(self):
        """Milliseconds and GFLOP of a training step's matrix products alone."""
        return timing.products_alone(timing.count(self.step).products, self.device)

    def profile(self, rows):
        """The `rows` longest operations of a step (name, own milliseconds, calls), and the milliseconds of all.

        On a GPU its kernels and copies, by their time there.
        """
        gpu = self.device.type == "cuda"
        activities = torch.profiler.ProfilerActivity
        self.step()
        with torch.profiler.profile(activities=[activities.CPU, *[activities.CUDA] * gpu]) as profiler:
            self.step()
        events = profiler.key_averages()
        if gpu:
            events = [event for event in events if event.device_type == torch.profiler.DeviceType.CUDA]
        taken = [event.self_device_time_total if gpu else event.self_cpu_time_total for event in events]
        found = [(event.key, us / 1000, event.count) for event, us in zip(events, taken, strict=True)]
        longest = sorted(found, key=lambda row: -row[1])[:rows]
        return longest, sum(milliseconds for _, milliseconds, _ in found)

    def evaluate(self, ids):
        """Seconds and perplexity of ids (N,), in one column."""
        start = time.perf_counter()
        if self.peer:
            perplexity = self.peer.evaluate(torch.from_numpy(ids).long().to(self.device))
        else:
            perplexity = evaluate(self.model, ids, 1, self.flags.amp).perplexity
        return time.perf_counter() - start, perplexity


class Worker:
    """A Candidate, or what else `kind` makes, in a process of its own: its settings and memory are nobody else's."""

    def __init__(self, *candidate, kind=Candidate):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, kind, *candidate), daemon=True)
        self.process.start()
        other.close()
        self.receive()

    def __call__(self, method, *arguments):
        """The result of a method of the Candidate."""
        with contextlib.suppress(OSError):  # receive says so
            self.pipe.send((method, arguments))
        return self.receive()

    def receive(self):
        """What the process sends; raises the UserError that it met, or one that says that it died."""
        try:
            result = self.pipe.recv()
        except (EOFError, OSError):
            raise UserError("a process that measures has died; its message is above") from None
        if isinstance(result, UserError):
            raise result
        return result

    def end(self):
        """Let the process go."""
        self.pipe.close()
        self.process.join()


def work(pipe, kind, *candidate):
    """Build a Candidate, then do what is asked until the other end is closed."""
    try:
        candidate = kind(*candidate)
        pipe.send("ready")
    except USER_ERRORS as error:
        pipe.send(UserError(str(error)))
        return
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(candidate, method)(*arguments))
        except USER_ERRORS as error:
            pipe.send(UserError(str(error)))


def load_once(kind, folder, port):
    """Seconds and peak MiB, above what was there before, of one load, in a process of its own."""
    call = partial(Corpus.load, folder, notice=lambda line: None)
    if kind == "port":
        call = partial(load(Path(port) / "data.py", PORT).Corpus, folder)
    start = time.perf_counter()
    memory = timing.memory_above(call, torch.device("cpu"))
    return time.perf_counter() - start, memory


def write_zipf(folder, tokens, types):
    """Text of `tokens` words that follow Zipf's law over `types`, every type at least once, in lines of 25 words."""
    generator = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(types)], dtype=object)
    weights = np.cumsum(1 / np.arange(1, types + 1))
    with open(folder / "train.txt", "w", encoding="utf-8") as file:
        for ids in np.array_split(np.arange(types), 1 + types // 100_000):
            file.write(" ".join(words[ids]) + "\n")
        left = tokens - types
        while left > 0:
            ids = np.searchsorted(weights, generator.random(min(left, 1_000_000)) * weights[-1])
            file.writelines(" ".join(line) + "\n" for line in np.array_split(words[ids], max(1, len(ids) // 25)))
            left -= len(ids)
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_text(" ".join(words[:1000]) + "\n", encoding="utf-8")
