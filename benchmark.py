"""Tables from run records, and the speed of training steps."""

import multiprocessing
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from data.corpus import SPLITS, Corpus, Vocabulary, encode_file, find_corpus, split_file
from utils import UserError, checkpoint, cli, compressed, report, runtime
from utils.distiller import Distiller
from utils.layers import WAYS, Layer, Recurrence
from utils.tables import RENDERERS, RIVALS, figure4_picture, rival_name, scores_text, seeds_text, table_text
from utils.workers import Worker, load_once, write_zipf

RESULTS = Path(__file__).parent / "results"

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

# Likewise, at WikiText-103's size; only when --only names them: a step takes most of a minute and gigabytes.
LARGE = {
    "RMC, WikiText-103, full softmax": ("train_rmc", "--emsize 512 --headsize 625 --no-tied"),
    "RMC, WikiText-103, tied": ("train_rmc", "--emsize 512 --headsize 625"),
    "RMC, WikiText-103, adaptive": (
        "train_rmc",
        "--emsize 512 --headsize 625 --adaptivesoftmax --cutoffs 10000 50000 100000",
    ),
}

# What `layers` times: sizes, and the ways to compute them.
RECURRENCES = ((105, 20, 640), (70, 20, 1550))
LAYERS = ((70, 20, 1550, 1550, 1),)
PRODUCTS = [(rows, 650, outputs) for outputs in (2600, 10000) for rows in (1, 10, 350)]
SEEDS = {"pytorch-qrnn": "qrnn", "log-space QRNN": "log_qrnn"}
GRID = {"batch": (8, 16, 32, 64, 128, 256), "length": (32, 64, 128, 256, 512)}

TOLERANCE = {"off": 1e-5, "bf16": 2e-2}
"""Largest relative difference of a loss from its reference, by --amp; beyond it nothing is timed."""
LAYER_TOLERANCE = {"scan": 1e-3, "log-space QRNN": 1e-3}
LAYER_TOLERANCE |= dict.fromkeys(("QRNN bf16", "bf16", "int8, ours", "int8, torch.ao", "int8, torchao"), 2e-2)
"""Of those that are less exact by nature."""


def table(args):
    """Copy the run records given to results/NAME/ and render all that are there between markers in results/NAME.md."""
    folder = args.results / args.name
    records = {path.stem: report.read_record(path) for path in sorted(folder.glob("*.json"))}
    added = {}
    for run in map(Path, args.runs):
        path = run / "run.json" if run.is_dir() else run
        record = report.read_record(path)
        if not record["results"]:
            raise UserError(f"{path} has no results: the run has not ended (status {record['status']})")
        added[record["name"]] = record
    records |= added
    if not records:
        raise UserError(f"{folder} holds no run records: name run folders, python benchmark.py table {args.name} RUN")
    trained, scored = [], []
    for name in sorted(records):
        (trained if records[name]["kind"] == "training" else scored).append(records[name])
    parts = [(seeds_text if args.seeds else table_text)(trained)] if trained else []
    text = "\n\n".join(parts + ([scores_text(scored)] if scored else []))
    page = args.results / f"{args.name}.md"
    folder.mkdir(parents=True, exist_ok=True)
    (report.replace_between if page.exists() else put_on_page)(page, args.name, text)
    for name, record in added.items():
        report.write_record(folder / f"{name}.json", record)
    report.say(f"| {len(records)} rows in {page}")


def chosen(args):
    """{name: arguments of its Candidate} for those that --only names and their peers whose checkouts are given."""
    every = {**CANDIDATES, **LARGE} if args.only else CANDIDATES
    names = [name for name in every if not args.only or any(word in name for word in args.only)]
    if not names:
        raise UserError(f"--only {' '.join(args.only)} names no candidate: there are {', '.join(every)}")
    checkouts = {"port-rnn": args.port, "port-rmc": args.port, "example": args.example, "a-martyn": args.martyn}
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
    workers, memory = {}, {}
    for name, candidate in chosen(args).items():
        worker = Worker(*candidate)
        difference, largest = worker("difference"), TOLERANCE["off" if candidate[2] else args.amp]
        if difference <= largest:
            workers[name] = worker
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
        (Recurrence, RECURRENCES, [*ours, *seeds]),
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
        worker.end()
        rows.append(row)
    return rows


def products(args):
    """Time products of matrices in float32, bfloat16, int8 and compressed rows, at the sizes of an LSTM of 650."""
    _, machine = runtime.setup(args)
    rows, ways = [], compressed.ways()
    for sizes in PRODUCTS:
        rows += time_ways(args, compressed.Product, sizes, ways)
    finish(args, machine, {"kind": "products", "rows": rows}, "compression")


def quantization(args):
    """Perplexity of a model in simulated integers, by ours and, on the same weights and statistics, by distiller."""
    _, machine = runtime.setup(args)
    saved = checkpoint.load(args.checkpoint)
    folder, vocabulary = find_corpus(args.data or saved["args"]["data"]), Vocabulary(**saved["vocabulary"])
    texts = {split: encode_file(split_file(folder, split), vocabulary)[0] for split in SPLITS}
    workers = {"ours": Worker(args.checkpoint, args, kind=compressed.Simulated)}
    if args.distiller:
        workers["distiller"] = Worker(args.checkpoint, args.distiller, args, kind=Distiller)
    rows = [{"name": name, "published": published} for name, (_, published) in compressed.QUANTIZATIONS.items()]
    for who, worker in workers.items():
        worker("collect", texts[args.split][: args.statistics_tokens + 1])
        for row in rows:
            settings, _ = compressed.QUANTIZATIONS[row["name"]]
            row[who] = {
                split: worker("score", settings, texts[split][: args.tokens], args.eval_batch) for split in SPLITS[1:]
            }
            report.say(f"| {who} | {row['name']} | " + " | ".join(f"{s} ppl {p:.2f}" for s, p in row[who].items()))
        worker.end()
    figures = {"kind": "quantization", "corpus": folder.name, "eval_batch": args.eval_batch, "rows": rows}
    figures["statistics"] = f"{args.statistics_tokens:,} tokens of {args.split}"
    finish(args, machine, figures, "compression")


def compression(args):
    """Size, peak memory, speed and perplexity of checkpoints, the first also in bf16: what compression really gives."""
    _, machine = runtime.setup(args)
    (_, dense), *_ = given = [place.rpartition("=")[::2] for place in args.checkpoints]
    folder = find_corpus(args.data or checkpoint.load(dense)["args"]["data"])
    candidates = {name or path: (path, args.amp, args) for name, path in given}
    candidates[f"{next(iter(candidates))}, bf16"] = (dense, "bf16", args)
    workers = {name: Worker(*candidate, kind=compressed.Measured) for name, candidate in candidates.items()}
    rows = {name: {"name": name, "memory_mib": worker("memory"), **worker("facts")} for name, worker in workers.items()}
    for name, worker in workers.items():
        for split in ("valid", "test"):
            rows[name][split] = worker("score", folder, split, args.eval_batch, args.tokens)
        report.say(f"| {name} | valid ppl {rows[name]['valid']:.2f} | test ppl {rows[name]['test']:.2f}")
        rows[name] |= {"batch_ms": [], "word_ms": []}
    for number in report.progress(range(args.warmup + args.rounds), "compression"):
        for name, worker in workers.items():
            taken = worker("batch"), worker("words")
            if number >= args.warmup:
                rows[name]["batch_ms"].append(taken[0])
                rows[name]["word_ms"].append(taken[1])
    for worker in workers.values():
        worker.end()
    figures = {"kind": "compression", "corpus": folder.name, "eval_batch": args.eval_batch}
    figures |= {"steps": compressed.STEPS, "columns": compressed.COLUMNS, "rows": list(rows.values())}
    finish(args, machine, figures, "compression")


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
    cells = []
    for batch, length in report.progress([(b, t) for b in GRID["batch"] for t in GRID["length"]], "grid"):
        sizes = (length, batch, 320, 320, 2)
        ways = {way: Worker(way, sizes, None, args, kind=Layer) for way in ("nn.LSTM", "QRNN", "QRNN bf16")}
        taken = {way: [worker("inference") for _ in range(args.warmup + args.rounds)] for way, worker in ways.items()}
        for worker in ways.values():
            worker.end()
        cells.append({"batch": batch, "length": length} | {way: times[args.warmup :] for way, times in taken.items()})
    figures = {"kind": "figure4", "vocab_size": args.vocab_size, "parts": parts, "cells": cells}
    finish(args, machine, figures, "qrnn")
    if args.record:
        figure4_picture(figures, args.results / "qrnn" / f"{args.record}.png")


def put_on_page(page, name, text):
    """Text between the markers of `name` on a page of markdown; page and markers are made where there are none."""
    if not page.exists():
        page.write_text(f"# {page.stem}\n", encoding="utf-8")
    if f"<!-- {name} -->" not in page.read_text(encoding="utf-8"):
        with open(page, "a", encoding="utf-8") as file:
            file.write(f"\n<!-- {name} -->\n<!-- /{name} -->\n")
    report.replace_between(page, name, text)


def finish(args, machine, figures, page="speed"):
    """Print the table of a measurement; with --record keep it in results/<page>/ and render it in results/<page>.md."""
    environment = report.environment(torch.device("cuda" if args.cuda else "cpu"), args.amp)
    command = report.command(args.argv)
    record = {"name": args.record, "command": command, "environment": environment, "machine": machine, **figures}
    text = RENDERERS[record["kind"]](record)
    if args.record:
        folder = args.results / page
        folder.mkdir(parents=True, exist_ok=True)
        put_on_page(args.results / f"{page}.md", args.record, text)
        report.write_record(folder / f"{args.record}.json", record)
    report.say(text)


def build_parser():
    """The sub-commands and their flags."""
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    command = commands.add_parser("table", description=table.__doc__, help="run records to a markdown table")
    command.add_argument("name", help="of the table")
    command.add_argument("runs", nargs="*", metavar="RUN", help="run folders or run records to add")
    command.add_argument("--seeds", action="store_true", help="a row for runs that differ in their seeds only")
    command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where tables and records are")
    command.set_defaults(call=table)
    command = commands.add_parser("memory", description=memory.__doc__, help="peak memory of training steps")
    add_choice(command)
    add_record(command)
    command.set_defaults(call=memory)
    command = commands.add_parser("speed", description=speed.__doc__, help="time training steps")
    add_choice(command)
    add_rounds(command)
    add_record(command)
    command.set_defaults(call=speed)
    command = commands.add_parser("quality", description=quality.__doc__, help="train beside the peers, score alike")
    add_choice(command, False)
    cli.add_data(command)
    command.add_argument("--flags", default="", help="for the train scripts, after each candidate's own")
    command.add_argument(
        "--tokens", type=cli.positive_int, help="of the training split, from its start; all if not given"
    )
    command.add_argument("--epochs", type=cli.positive_int, default=1, help="passes over them")
    command.add_argument("--seeds", type=cli.positive_int, default=2, help="random seeds, from 1")
    add_record(command)
    command.set_defaults(call=quality)
    command = commands.add_parser("profile", description=profile.__doc__, help="where a training step's time goes")
    add_choice(command)
    command.add_argument("--warmup", type=cli.positive_int, default=3, help="steps before")
    command.add_argument("--operations", type=cli.positive_int, default=10, help="how many of the longest")
    add_record(command)
    command.set_defaults(call=profile)
    command = commands.add_parser("layers", description=layers.__doc__, help="time the QRNN's recurrence and layer")
    command.add_argument("--qrnn", metavar="DIR", help="checkout of salesforce/pytorch-qrnn, measured beside ours")
    command.add_argument("--log-qrnn", metavar="DIR", help="checkout of LGirrbach/PyTorch-QRNN, measured beside ours")
    add_rounds(command)
    add_record(command)
    command.set_defaults(call=layers)
    command = commands.add_parser("products", description=products.__doc__, help="time products, compressed and not")
    add_rounds(command)
    add_record(command)
    command.set_defaults(call=products)
    command = commands.add_parser(
        "compression", description=compression.__doc__, help="what compressed checkpoints give"
    )
    command.add_argument(
        "checkpoints", nargs="+", metavar="NAME=PATH", help="of one model; the others are compared with the first"
    )
    add_scores(command)
    add_rounds(command)
    add_record(command)
    command.set_defaults(call=compression)
    command = commands.add_parser("quantization", description=quantization.__doc__, help="distiller's table")
    command.add_argument("checkpoint", metavar="PATH", help="of a model of float32")
    command.add_argument("--distiller", metavar="DIR", help="checkout of IntelLabs/distiller, on the same weights")
    command.add_argument("--split", choices=SPLITS, default="train", help="that statistics are taken from")
    command.add_argument(
        "--statistics-tokens", type=cli.number(int, 2), default=50_000, metavar="N", help="of its beginning"
    )
    add_scores(command)
    add_record(command)
    command.set_defaults(call=quantization)
    command = commands.add_parser("figure4", description=figure4.__doc__, help="the QRNN paper's figure of speed")
    command.add_argument("--vocab-size", type=cli.number(int, 3), default=10000, help="words; Penn Treebank has 10000")
    add_rounds(command)
    add_record(command)
    command.set_defaults(call=figure4)
    command = commands.add_parser("evaluation", description=evaluation.__doc__, help="time an evaluation in one column")
    cli.add_data(command)
    command.add_argument("--tokens", type=cli.positive_int, default=20000, help="of the test split, from its start")
    command.add_argument("--rounds", type=cli.positive_int, default=3, help="evaluations of each model")
    add_example(command)
    add_record(command)
    command.set_defaults(call=evaluation)
    command = commands.add_parser("load", description=load.__doc__, help="time the building of a corpus")
    cli.add_data(command)
    command.add_argument(
        "--tokens", type=cli.number(int, 0), default=0, help="make up a corpus of so many, instead of --data"
    )
    command.add_argument("--types", type=cli.positive_int, default=267735, help="of the corpus that is made up")
    command.add_argument("--rounds", type=cli.positive_int, default=3, help="how often")
    add_port(command)
    add_record(command)
    command.set_defaults(call=load)
    return parser


def add_choice(parser, made_up=True):
    """What to measure, beside whom; made_up: of words that are drawn."""
    parser.add_argument("--only", nargs="+", metavar="WORD", help="candidates whose name has one of these words")
    if made_up:
        parser.add_argument("--vocab-size", type=cli.number(int, 3), default=33278, help="words; WikiText-2 has 33278")
    parser.add_argument("--awd", metavar="DIR", help="checkout of salesforce/awd-lstm-lm, measured beside ours")
    parser.add_argument("--martyn", metavar="DIR", help="checkout of a-martyn/awd-lstm, measured beside ours")
    parser.add_argument("--qrnn", metavar="DIR", help="checkout of salesforce/pytorch-qrnn, for --awd's QRNN")
    add_port(parser)
    add_example(parser)


def add_scores(parser):
    """On what perplexities are measured."""
    parser.add_argument("--data", help="corpus; the one that the model was trained on if not given")
    parser.add_argument("--tokens", type=cli.number(int, 2), help="of each split, from its start; all if not given")
    parser.add_argument("--eval-batch", type=cli.positive_int, default=10, metavar="N", help="columns of perplexities")


def add_rounds(parser):
    """How often."""
    parser.add_argument("--rounds", type=cli.positive_int, default=10, help="timed steps of each candidate")
    parser.add_argument("--warmup", type=cli.positive_int, default=3, help="steps before, not timed")


def add_port(parser):
    """A peer."""
    parser.add_argument("--port", metavar="DIR", help="checkout of L0SG/relational-rnn-pytorch, measured beside ours")


def add_example(parser):
    """Another peer."""
    parser.add_argument(
        "--example", metavar="DIR", help="word_language_model of pytorch/examples, measured beside ours"
    )


def add_record(parser):
    """Where to keep the figures, and the machine."""
    parser.add_argument("--record", metavar="NAME", help="keep the figures in results/ and on their page")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where records and tables are")
    cli.add_runtime(parser)


def main(argv=None):
    """Parse flags, run the sub-command."""
    args = build_parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    args.call(args)


if __name__ == "__main__":
    cli.run(main)
