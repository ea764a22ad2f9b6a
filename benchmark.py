"""Tables from run records, and the speed of training steps."""

import multiprocessing
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from data.corpus import Corpus, find_corpus, split_file
from utils import UserError, cli, report, runtime
from utils.tables import about, spread, table_text
from utils.workers import Worker, load_once, write_zipf

RESULTS = Path(__file__).parent / "results"

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

# Whom a candidate is compared with: a peer, the candidate whose flags and weights the peer takes.
RIVALS = {
    "LSTM, port": ("port-rnn", "LSTM, port"),
    "LSTM loop, port": ("port-rnn", "LSTM loop, port"),
    "LSTM 650 tied, example": ("example", "LSTM 650 tied, example"),
    "RMC, paper's form": ("port-rmc", "RMC, port's form"),
    "RMC, port's form": ("port-rmc", "RMC, port's form"),
}

TOLERANCE = {"off": 1e-5, "bf16": 2e-2}
"""Largest relative difference of a loss from its reference, by --amp; beyond it nothing is timed."""


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
    text = table_text([records[name] for name in sorted(records)])
    page = args.results / f"{args.name}.md"
    folder.mkdir(parents=True, exist_ok=True)
    if not page.exists():
        page.write_text(f"# {args.name}\n\n<!-- {args.name} -->\n<!-- /{args.name} -->\n", encoding="utf-8")
    report.replace_between(page, args.name, text)
    for name, record in added.items():
        report.write_record(folder / f"{name}.json", record)
    report.say(f"| {len(records)} rows in {page}")


def chosen(args):
    """{name: arguments of its Candidate} for those that --only names and their peers whose checkouts are given."""
    every = {**CANDIDATES, **LARGE} if args.only else CANDIDATES
    names = [name for name in every if not args.only or any(word in name for word in args.only)]
    if not names:
        raise UserError(f"--only {' '.join(args.only)} names no candidate: there are {', '.join(every)}")
    checkouts = {"port-rnn": args.port, "port-rmc": args.port, "example": args.example}
    found = {name: (*every[name], None, None, args) for name in names}
    for peer, name in dict.fromkeys(RIVALS[name] for name in names if name in RIVALS):
        if checkouts[peer]:
            found[rival_name((peer, name))] = (*CANDIDATES[name], peer, checkouts[peer], args)
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


def rival_name(rival):
    """How a table calls a peer."""
    return f"{rival[0]} ({rival[1]})"


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


SPEED_COLUMNS = (
    "model", "ms/batch, median (range)", "tokens/s", "forward only ms", "launches", "peak MiB", "products alone ms",
    "step / products", "times the peer's speed", "launches / peer's", "peak / peer's",
)  # fmt: skip


def memory(args):
    """Peak memory of training steps above parameters and imports, of each candidate and peer in a fresh process."""
    _, machine = runtime.setup(args)
    rows = []
    for name, candidate in chosen(args).items():
        worker = Worker(*candidate)
        rows.append({"name": name, "parameters": worker("parameters"), "memory_mib": worker("memory")})
        worker.end()
    finish(args, machine, {"kind": "memory", "vocab_size": args.vocab_size, "rows": rows})


def memory_text(record):
    """The markdown of a memory record."""
    header = ("model", "parameters", "parameters MiB", "peak MiB of two training steps, above the parameters")
    rows = [
        [row["name"], f"{row['parameters']:,}", f"{row['parameters'] / 2**18:,.0f}", f"{row['memory_mib']:,.0f}"]
        for row in record["rows"]
    ]
    return f"Vocabulary {record['vocab_size']:,}. " + about(record) + report.markdown_table(header, rows)


def speed_text(record):
    """The markdown of a speed record: how it was made, its table."""
    rows = {row["name"]: row for row in record["rows"]}
    table_rows = []
    for name, row in rows.items():
        median = statistics.median(row["ms"])
        cells = [name, spread(row["ms"]), "", f"{statistics.median(row['forward_ms']):,.0f}", f"{row['launches']:,}"]
        cells += [f"{row['memory_mib']:,.0f}", "", "", "", "", ""]
        if "products_ms" in row:
            cells[2] = f"{row['tokens'] / median * 1000:,.0f}"
            cells[6] = spread(row["products_ms"])
            cells[7] = spread([taken / alone for taken, alone in zip(row["ms"], row["products_ms"], strict=True)], 2)
        peer = rows.get(rival_name(RIVALS[name])) if name in RIVALS else None
        if peer:
            cells[8] = spread([theirs / ours for ours, theirs in zip(row["ms"], peer["ms"], strict=True)], 2)
            cells[9] = f"{row['launches'] / peer['launches']:.2f}"
            cells[10] = f"{row['memory_mib'] / peer['memory_mib']:.2f}"
        table_rows.append(cells)
    return f"Vocabulary {record['vocab_size']:,}. " + about(record) + report.markdown_table(SPEED_COLUMNS, table_rows)


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


def profile_text(record):
    """The markdown of a profile record: two columns a candidate, its operations by their own time."""
    header, cells = [], []
    for row in record["rows"]:
        header += [f"{row['name']}: {row['total_ms']:,.0f} ms", "calls", "ms"]
        cells.append([[name, f"{calls:,}", f"{taken:,.0f}"] for name, taken, calls in row["longest"]])
    rows = [[cell for part in parts for cell in part] for parts in zip(*cells, strict=True)]
    return f"Vocabulary {record['vocab_size']:,}. " + about(record) + report.markdown_table(header, rows)


def evaluation(args):
    """Time the evaluation of a corpus's test split in one column: LSTM 650 tied, beside pytorch/examples."""
    _, machine = runtime.setup(args)
    corpus = Corpus.load(find_corpus(args.data), args.vocab, args.vocab_size, notice=report.say)
    args.vocab_size = len(corpus.vocabulary)
    ids = corpus.test[: args.tokens + 1]
    name = "LSTM 650 tied, example"
    workers = {name: Worker(*CANDIDATES[name], None, None, args)}
    if args.example:
        workers[rival_name(RIVALS[name])] = Worker(*CANDIDATES[name], RIVALS[name][0], args.example, args)
    results = {key: [] for key in workers}
    for _ in report.progress(range(args.rounds), "evaluation"):
        for key, worker in workers.items():
            results[key].append(worker("evaluate", ids))
    rows = [
        {"name": key, "seconds": [seconds for seconds, _ in taken], "perplexity": taken[0][1]}
        for key, taken in results.items()
    ]
    finish(args, machine, {"kind": "evaluation", "targets": len(ids) - 1, "corpus": corpus.name, "rows": rows})


def evaluation_text(record):
    """The markdown of an evaluation record."""
    ours = record["rows"][0]
    table_rows = []
    for row in record["rows"]:
        ratios = [theirs / own for own, theirs in zip(ours["seconds"], row["seconds"], strict=True)]
        table_rows.append([row["name"], spread(row["seconds"], 2), f"{row['perplexity']:.2f}", spread(ratios, 2)])
    header = ("model", f"seconds for {record['targets']:,} targets of {record['corpus']}", "perplexity", "times ours")
    return about(record) + report.markdown_table(header, table_rows)


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


def load_text(record):
    """The markdown of a load record."""
    rows = {row["name"]: row for row in record["rows"]}
    build_seconds = rows["build"]["seconds"]
    table_rows = []
    for name, row in rows.items():
        ratios = [other / own for own, other in zip(build_seconds, row["seconds"], strict=True)]
        table_rows.append([name, spread(row["seconds"], 2), f"{max(row['memory_mib']):,.0f}", spread(ratios, 2)])
    return about(record) + report.markdown_table(
        (record["corpus"], "seconds", "peak MiB", "times our build"), table_rows
    )


def finish(args, machine, figures):
    """Print the table of a measurement; with --record keep it and render it in results/speed.md."""
    environment = report.environment(torch.device("cuda" if args.cuda else "cpu"), args.amp)
    command = report.command(args.argv)
    record = {"name": args.record, "command": command, "environment": environment, "machine": machine, **figures}
    text = RENDERERS[record["kind"]](record)
    if args.record:
        page, folder = args.results / "speed.md", args.results / "speed"
        folder.mkdir(parents=True, exist_ok=True)
        if not page.exists():
            page.write_text("# Speed\n", encoding="utf-8")
        if f"<!-- {args.record} -->" not in page.read_text(encoding="utf-8"):
            with open(page, "a", encoding="utf-8") as file:
                file.write(f"\n<!-- {args.record} -->\n<!-- /{args.record} -->\n")
        report.replace_between(page, args.record, text)
        report.write_record(folder / f"{args.record}.json", record)
    report.say(text)


RENDERERS = {
    "speed": speed_text,
    "memory": memory_text,
    "profile": profile_text,
    "evaluation": evaluation_text,
    "load": load_text,
}


def build_parser():
    """The sub-commands and their flags."""
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    command = commands.add_parser("table", description=table.__doc__, help="run records to a markdown table")
    command.add_argument("name", help="of the table")
    command.add_argument("runs", nargs="*", metavar="RUN", help="run folders or run records to add")
    command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where tables and records are")
    command.set_defaults(call=table)
    command = commands.add_parser("memory", description=memory.__doc__, help="peak memory of training steps")
    add_choice(command)
    add_record(command)
    command.set_defaults(call=memory)
    command = commands.add_parser("speed", description=speed.__doc__, help="time training steps")
    add_choice(command)
    command.add_argument("--rounds", type=cli.positive_int, default=10, help="timed steps of each candidate")
    command.add_argument("--warmup", type=cli.positive_int, default=3, help="steps before, not timed")
    add_record(command)
    command.set_defaults(call=speed)
    command = commands.add_parser("profile", description=profile.__doc__, help="where a training step's time goes")
    add_choice(command)
    command.add_argument("--warmup", type=cli.positive_int, default=3, help="steps before")
    command.add_argument("--operations", type=cli.positive_int, default=10, help="how many of the longest")
    add_record(command)
    command.set_defaults(call=profile)
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


def add_choice(parser):
    """What to measure."""
    parser.add_argument("--only", nargs="+", metavar="WORD", help="candidates whose name has one of these words")
    parser.add_argument("--vocab-size", type=cli.number(int, 3), default=33278, help="words; WikiText-2 has 33278")
    add_port(parser)
    add_example(parser)


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
    parser.add_argument("--record", metavar="NAME", help="keep the figures as results/speed/NAME.json and in speed.md")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where records and tables are")
    cli.add_runtime(parser)


def main(argv=None):
    """Parse flags, run the sub-command."""
    args = build_parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    args.call(args)


if __name__ == "__main__":
    cli.run(main)
