"""What benchmark.py measures of training, evaluation, corpora and layers: whom, how often, and where the figures go."""

import multiprocessing
import shutil
import statistics
import tempfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from data.corpus import Corpus, find_corpus, split_file

from . import UserError, report, runtime
from .layers import WAYS, Layer, Recurrence, Resized
from .pictures import figure4_picture
from .tables import RENDERERS, RIVALS, rival_name
from .workers import Worker, load_once, write_zipf

# The authors' settings of AWD-LSTM and AWD-QRNN on Penn Treebank.
AWD_LSTM = "--batch-size 20 --dropouti 0.4 --dropouth 0.25"
AWD_QRNN = "--model QRNN --batch-size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --dropouth 0.3 --dropouti 0.4"

# What `speed` times: a name, the train script, its flags.
CANDIDATES = {
    "LSTM, port": ("train_rnn", "--recipe port"),
    "LSTM loop, port": ("train_rnn", "--recipe port --loop"),
    "GRU, port": ("train_rnn", "--recipe port --model GRU"),
    "GRU loop, port": ("train_rnn", "--recipe port --model GRU --loop"),
    "Elman tanh, port": ("train_rnn", "--recipe port --model RNN_TANH"),
    "LSTM, example": ("train_rnn", "--recipe example"),
    "LSTM tied, example": ("train_rnn", "--recipe example --tied"),
    "LSTM 650 tied, example": ("train_rnn", "--recipe example --tied --emsize 650 --nhid 650"),
    "RMC, paper's form": ("train_rmc", "--variant paper"),
    "RMC, port's form": ("train_rmc", "--variant port"),
    "QRNN, paper": ("train_qrnn", "--recipe paper"),
    "LSTM 640, QRNN's paper": (
        "train_rnn",
        "--emsize 640 --nhid 640 --nlayers 2 --dropout 0.5 --no-tied --optimizer sgd --lr 1 --average columns "
        "--clip 10 --wdecay 2e-4 --batch-size 20 --bptt 105",
    ),
    "AWD-LSTM": ("train_awd", AWD_LSTM),
    "AWD-QRNN": ("train_awd", AWD_QRNN),
}

# Likewise, at WikiText-103's size; only for words of --only that name this corpus: a step takes most of a minute and
# gigabytes. The RMC is that of its paper (Santoro et al. 2018, A.4, key size left open there), the QRNN that of Merity
# et al. 2018.
LARGE_CORPUS = "WikiText-103"
RMC_LARGE = "--emsize 512 --headsize 625 --keysize 625 --attmlplayers 5"
LARGE = {
    "RMC, WikiText-103, full softmax": ("train_rmc", f"{RMC_LARGE} --no-tied"),
    "RMC, WikiText-103, tied": ("train_rmc", RMC_LARGE),
    "RMC, WikiText-103, adaptive": ("train_rmc", f"{RMC_LARGE} --adaptivesoftmax --cutoffs 10000 50000 100000"),
    "AWD-QRNN, WikiText-103, split": (
        "train_awd",
        "--model QRNN --nlayers 4 --nhid 2500 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.1 --dropouti 0.1 "
        "--dropout 0.1 --wdrop 0 --wdecay 0 --bptt 140 --batch-size 64 --optimizer adam --lr 1e-3",
    ),
}

# What `layers` times: sizes, and the ways to compute them.
RECURRENCES = ((105, 20, 640), (70, 20, 1550))
LAYERS = ((70, 20, 1550, 1550, 1),)
SEEDS = {"pytorch-qrnn": "qrnn", "log-space QRNN": "log_qrnn", "SRU": "sru"}
GRID = {"batch": (8, 16, 32, 64, 128, 256), "length": (32, 64, 128, 256, 512)}

SETTINGS = {
    "as it comes": {},
    "--threads 1": {"threads": 1},
    "--no-tune-allocator": {"tune_allocator": False},
    "--no-flush-denormal": {"flush_denormal": False},
    "--onednn": {"onednn": True},
    "--no-onednn": {"onednn": False},
    "--no-numba": {"numba": False},
    "--amp bf16": {"amp": "bf16"},
}
"""What `settings` times: a name, and the flags that differ."""
COMPILE = "--compile"
"""Likewise, a flag of the train scripts; not for a core with a loop: ten steps of an RMC take it two minutes."""

SILENT = ("a-martyn", "fastai")
"""Peers without a script that generates."""
TOLERANCE = {"off": 1e-5, "bf16": 2e-2}
"""Largest relative difference of a loss from its reference, by --amp; beyond it nothing is timed."""
LAYER_TOLERANCE = {"scan": 1e-3, "log-space QRNN": 1e-3}
LAYER_TOLERANCE |= dict.fromkeys(("QRNN bf16", "bf16", "int8, ours", "int8, torchao"), 2e-2)
LAYER_TOLERANCE |= {"int8, torch.ao": 4e-2}  # one scale for all rows of a weight
"""Of those that are less exact by nature."""


def chosen(args):
    """{name: arguments of its Candidate} for those that --only names and their peers whose checkouts are given."""
    every = {**CANDIDATES, **LARGE}
    named = {
        word: [name for name in every if word in name and (name in CANDIDATES or LARGE_CORPUS in word)]
        for word in args.only or ()
    }
    for word, found in named.items():
        if not found:
            large = f"and, for words with {LARGE_CORPUS} in them, {'; '.join(LARGE)}"
            raise UserError(f"--only {word!r} names no candidate: there are {'; '.join(CANDIDATES)}; {large}")
    names = [name for name in every if any(name in found for found in named.values())] if named else list(CANDIDATES)
    checkouts = {"port-rnn": args.port, "port-rmc": args.port, "example": args.example, "a-martyn": args.martyn}
    checkouts["fastai"] = args.fastai
    checkouts["authors"] = args.awd and (args.awd, args.qrnn)
    found = {name: (*every[name], None, None, args) for name in names}
    for peer, taken in dict.fromkeys(rival for name in names for rival in RIVALS.get(name, ())):
        if checkouts[peer]:
            found[rival_name((peer, taken))] = (*CANDIDATES[taken], peer, checkouts[peer], args)
    return found


def start_workers(args):
    """Peak memory of the chosen candidates and Workers to time them, each by name.

    A candidate whose loss is not that of its reference is left out, with a line.
    """
    candidates, workers, memory = chosen(args), {}, {}
    with ThreadPoolExecutor(len(candidates) if args.cuda else 1) as pool:  # a processor's memory is short
        started = list(pool.map(lambda candidate: Worker(*candidate), candidates.values()))
    for (name, candidate), worker in zip(candidates.items(), started, strict=True):
        difference, largest = worker("difference"), TOLERANCE["off" if candidate[2] else args.amp]
        if difference <= largest:
            workers[name] = worker
            if args.cuda:
                memory[name] = worker("memory")
            else:
                fresh = Worker(*candidate)  # memory that was used before would hide what a step needs
                memory[name] = fresh("memory")
                fresh.end()
        else:
            report.say(f"| {name}: its loss is {difference:.1e} off its reference, more than {largest:g}: not timed")
            worker.end()
    return memory, workers


def speed(args):
    """Time full training steps of the candidates and their peers, in turn; table what they take."""
    _, machine = runtime.setup(args)
    report.say(f"| {machine}")
    memory, workers = start_workers(args)
    steps, forward, products = ({name: [] for name in workers} for _ in range(3))
    ours = [name for name in workers if name in CANDIDATES or name in LARGE]
    for number in report.progress(range(args.warmup + args.rounds), "speed"):
        for name, worker in workers.items():
            taken = worker("step")[0], worker("forward")
            if number >= args.warmup:
                steps[name].append(taken[0])
                forward[name].append(taken[1])
                if name in ours:
                    products[name].append(worker("products"))
    rows = []
    for name, worker in workers.items():
        row = {"name": name, "ms": steps[name], "forward_ms": forward[name], "memory_mib": memory[name]}
        row["launches"] = worker("launches")
        if name in ours:
            row["products_ms"], row["gflop"] = [taken for taken, _ in products[name]], products[name][0][1]
            row["tokens"] = worker("tokens_a_step")
        worker.end()
        rows.append(row)
    finish(args, machine, {"kind": "speed", "vocab_size": args.vocab_size, "rows": rows})


def settings(args):
    """Time training steps of candidates as they come and with each setting of speed changed, in turn."""
    _, machine = runtime.setup(args)
    rows = []
    ours = {name: candidate for name, candidate in chosen(args).items() if not candidate[2]}  # peers have no settings
    for name, (script, flags, *_) in ours.items():
        ways = {way: Namespace(**{**vars(args), **changes}) for way, changes in SETTINGS.items()}
        workers = {way: Worker(script, flags, None, None, changed) for way, changed in ways.items()}
        if script != "train_rmc" and "--loop" not in flags:
            try:
                workers[COMPILE] = Worker(script, f"{flags} {COMPILE}", None, None, args)
            except UserError as error:  # no compiler
                report.say(f"| {COMPILE} is not timed: {error}")
        taken = {way: [] for way in workers}
        for _ in report.progress(range(args.warmup + args.rounds), name):
            for way, worker in workers.items():
                taken[way].append(worker("step")[0])
        for worker in workers.values():
            worker.end()
        rows += [{"name": name, "setting": way, "ms": ms[args.warmup :]} for way, ms in taken.items()]
    finish(args, machine, {"kind": "settings", "vocab_size": args.vocab_size, "rows": rows})


def quality(args):
    """Train the candidates and their peers alike, from the same weights; score all by our evaluation."""
    _, machine = runtime.setup(args)
    corpus = Corpus.load(find_corpus(args.data), args.vocab, args.vocab_size, notice=report.say)
    args.vocab_size, rows = len(corpus.vocabulary), []
    for name, (script, flags, *rest) in chosen(args).items():
        for seed in range(1, args.seeds + 1):
            worker = Worker(script, f"{flags} {args.flags} --seed {seed}", *rest)
            ms = worker("train", corpus.train[: args.tokens], args.epochs)
            row = {"name": name, "seed": seed, "updates": len(ms), "ms": statistics.median(ms)}
            row |= {"valid": worker("score", corpus.valid), "test": worker("score", corpus.test)}
            worker.end()
            rows.append(row)
            report.say(f"| {name} | seed {seed} | valid ppl {row['valid']:.2f} | test ppl {row['test']:.2f}")
    finish(args, machine, {"kind": "quality", "corpus": corpus.name, "epochs": args.epochs, "rows": rows}, "awd")


def memory(args):
    """Peak memory of training steps above parameters and imports, of each candidate and peer in a fresh process."""
    _, machine = runtime.setup(args)
    rows = []
    for name, candidate in chosen(args).items():
        worker = Worker(*candidate)
        rows.append({"name": name, "parameters": worker("parameters"), "memory_mib": worker("memory")})
        worker.end()
    finish(args, machine, {"kind": "memory", "vocab_size": args.vocab_size, "rows": rows})


def generate(args):
    """Time generating words one by one: candidates, peers as their scripts do it, and reading the weights once."""
    _, machine = runtime.setup(args)
    every = {name: candidate for name, candidate in chosen(args).items() if candidate[2] not in SILENT}
    workers = {name: Worker(*candidate) for name, candidate in every.items()}
    rows = {name: {"name": name, "ms": []} | ({} if each[2] else {"reading_ms": []}) for name, each in every.items()}
    for number in report.progress(range(args.warmup + args.rounds), "generate"):
        for name, worker in workers.items():
            taken = worker("words", args.words)
            alone = None if every[name][2] else worker("reading")
            if number >= args.warmup:
                rows[name]["ms"].append(taken)
                if alone:
                    rows[name]["reading_ms"].append(alone[0])
                    rows[name]["weights_mib"] = alone[1]
    for worker in workers.values():
        worker.end()
    figures = {"kind": "generate", "vocab_size": args.vocab_size, "words": args.words, "rows": list(rows.values())}
    finish(args, machine, figures)


def profile(args):
    """The operations that a training step of each candidate spends its time in, by torch's profiler."""
    _, machine = runtime.setup(args)
    rows = []
    for name, candidate in chosen(args).items():
        worker = Worker(*candidate)
        for _ in range(args.warmup):
            worker("step")
        longest, total = worker("profile", args.operations)
        worker.end()
        rows.append({"name": name, "longest": longest, "total_ms": total})
    finish(args, machine, {"kind": "profile", "vocab_size": args.vocab_size, "rows": rows})


def evaluation(args):
    """Time the evaluation of a corpus's test split in one column: LSTM 650 tied, beside pytorch/examples."""
    _, machine = runtime.setup(args)
    corpus = Corpus.load(find_corpus(args.data), args.vocab, args.vocab_size, notice=report.say)
    args.vocab_size = len(corpus.vocabulary)
    ids = corpus.test[: args.tokens + 1]
    name = "LSTM 650 tied, example"
    workers = {name: Worker(*CANDIDATES[name], None, None, args)}
    if args.example:
        (rival,) = RIVALS[name]
        workers[rival_name(rival)] = Worker(*CANDIDATES[name], rival[0], args.example, args)
    results = {key: [] for key in workers}
    for _ in report.progress(range(args.rounds), "evaluation"):
        for key, worker in workers.items():
            results[key].append(worker("evaluate", ids))
    rows = [
        {"name": key, "seconds": [seconds for seconds, _ in taken], "perplexity": taken[0][1]}
        for key, taken in results.items()
    ]
    finish(args, machine, {"kind": "evaluation", "targets": len(ids) - 1, "corpus": corpus.name, "rows": rows})


def load(args):
    """Time how a corpus becomes arrays: from its text, from the cache, by the port; one made up with --tokens."""
    if 0 < args.tokens < args.types:
        raise UserError(
            f"--tokens {args.tokens} can't hold --types {args.types}: give as many tokens as types, or more"
        )
    _, machine = runtime.setup(args)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        if args.tokens:
            write_zipf(copy, args.tokens, args.types)
            name = f"Zipf, {args.tokens:,} tokens, {args.types:,} types"
        else:
            for split in ("train", "valid", "test"):
                shutil.copy(split_file(find_corpus(args.data), split), copy / f"{split}.txt")
            name = Path(args.data).name
        kinds = ["build", "cached"] + ["port"] * bool(args.port)
        results = {kind: [] for kind in kinds}
        for _ in range(args.rounds):
            for cache in copy.glob("*.pkl"):
                cache.unlink()
            for kind in kinds:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    results[kind].append(pool.apply(load_once, (kind, str(copy), args.port)))
    rows = [
        {"name": kind, "seconds": [seconds for seconds, _ in taken], "memory_mib": [mib for _, mib in taken]}
        for kind, taken in results.items()
    ]
    finish(args, machine, {"kind": "load", "corpus": name, "rows": rows})


def layers(args):
    """Time the QRNN's recurrence in every way and its layer, beside nn.LSTM and the seeds whose checkouts are given."""
    _, machine = runtime.setup(args)
    seeds = [seed for seed, flag in SEEDS.items() if getattr(args, flag)]
    rows, ours = [], [way for way in WAYS if way != ("cpu" if args.cuda else "cuda")]
    for kind, every, ways in (
        (Recurrence, RECURRENCES, [*ours, *(seed for seed in seeds if seed != "SRU")]),
        (Layer, LAYERS, ["QRNN", "QRNN bf16", "nn.LSTM", *seeds]),
    ):
        for sizes in every:
            rows += time_ways(args, kind, sizes, ways)
    finish(args, machine, {"kind": "layers", "rows": rows}, "qrnn")


def time_ways(args, kind, sizes, ways):
    """Rows of a table: each way in a process of its own, in turn; differences from the reference, milliseconds."""
    workers, differences = {}, {}
    for way in ways:
        checkout = getattr(args, SEEDS[way]) if way in SEEDS else None
        worker = Worker(way, sizes, checkout, args, kind=kind)
        differences[way] = worker("difference")
        if differences[way] <= LAYER_TOLERANCE.get(way, TOLERANCE["off"]):
            workers[way] = worker
        else:
            report.say(f"| {way}: {differences[way]:.1e} off its reference: not timed")
            worker.end()
    taken = {way: [] for way in workers}
    for number in report.progress(range(args.warmup + args.rounds), f"{kind.__name__.lower()} {sizes}"):
        for way, worker in workers.items():
            milliseconds = worker("step")
            if number >= args.warmup:
                taken[way].append(milliseconds)
    rows = []
    for way, worker in workers.items():
        row = {"what": kind.__name__.lower(), "sizes": list(sizes), "name": way, "ms": taken[way]}
        row["difference"] = differences[way]
        if kind is Layer and way.startswith("QRNN"):
            row["products_ms"] = [worker("products") for _ in range(args.rounds)]
        rows.append(row)
    if kind is Layer:
        for row in rows:
            row["inference_ms"] = []
        for _ in range(args.rounds):
            for row in rows:
                row["inference_ms"].append(workers[row["name"]]("inference"))
    for worker in workers.values():
        worker.end()
    return rows


def figure4(args):
    """Figure 4 of the QRNN's paper: a training step's parts, and a layer's speed without gradients over nn.LSTM's."""
    _, machine = runtime.setup(args)
    workers = {name: Worker(*CANDIDATES[name], None, None, args) for name in ("LSTM 640, QRNN's paper", "QRNN, paper")}
    parts = {name: [] for name in workers}
    for number in report.progress(range(args.warmup + args.rounds), "training steps"):
        for name, worker in workers.items():
            taken = worker("parts")
            if number >= args.warmup:
                parts[name].append(taken)
    for worker in workers.values():
        worker.end()
    workers = {way: Worker(way, args, kind=Resized) for way in ("nn.LSTM", "QRNN", "QRNN bf16")}
    cells = []
    for batch, length in report.progress([(b, t) for b in GRID["batch"] for t in GRID["length"]], "grid"):
        sizes = (length, batch, 320, 320, 2)
        rounds = range(args.warmup + args.rounds)
        taken = {way: [worker("inference", sizes) for _ in rounds] for way, worker in workers.items()}
        cells.append({"batch": batch, "length": length} | {way: times[args.warmup :] for way, times in taken.items()})
    for worker in workers.values():
        worker.end()
    figures = {"kind": "figure4", "vocab_size": args.vocab_size, "parts": parts, "cells": cells}
    finish(args, machine, figures, "qrnn")
    if args.record:
        figure4_picture(figures, args.results / "qrnn" / f"{args.record}.png")


def finish(args, machine, figures, page="speed"):
    """Print the table of a measurement; with --record keep it in results/<page>/ and render it in results/<page>.md."""
    environment = report.environment(torch.device("cuda" if args.cuda else "cpu"), args.amp)
    command = report.command(args.argv)
    record = {"name": args.record, "command": command, "environment": environment, "machine": machine, **figures}
    text = RENDERERS[record["kind"]](record)
    if args.record:
        folder = args.results / page
        folder.mkdir(parents=True, exist_ok=True)
        report.write_record(folder / f"{args.record}.json", record)
        report.put_on_page(args.results / f"{page}.md", args.record, text)
    report.say(text)
