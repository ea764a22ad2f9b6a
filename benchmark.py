"""Tables from run records, and the speed of training steps."""

import statistics
from pathlib import Path

import numpy as np
import torch

import train_rmc
import train_rnn
from data.batching import columns, windows
from models import build
from utils import UserError, cli, optim, report, runtime, trainer

RESULTS = Path(__file__).parent / "results"

# What `speed` times: a name, the train script's module, its flags.
CANDIDATES = {
    "LSTM, port": (train_rnn, "--recipe port"),
    "LSTM loop, port": (train_rnn, "--recipe port --loop"),
    "GRU, port": (train_rnn, "--recipe port --model GRU"),
    "Elman tanh, port": (train_rnn, "--recipe port --model RNN_TANH"),
    "LSTM, example": (train_rnn, "--recipe example"),
    "LSTM tied, example": (train_rnn, "--recipe example --tied"),
    "RMC, paper's form": (train_rmc, "--variant paper"),
    "RMC, port's form": (train_rmc, "--variant port"),
}

COLUMNS = (
    "model", "parameters", "corpus", "recipe", "epochs", "minutes", "valid ppl", "test ppl", "forward ms", "ms/batch",
    "peak MiB", "device", "command", "commit",
)  # fmt: skip


def model_name(model):
    """Kind and sizes of a record's model, as a table shows them."""
    core = model["core"]
    if model["family"] == "rmc":
        name = f"RMC {core['variant']} {core['memslots']}x({core['numheads']}x{core['headsize']})"
    else:
        name = f"{core['model']} {core['nlayers']}x{core['nhid']}{' loop' if core['loop'] else ''}"
    return name + (" tied" if model["tied"] else "") + (" adaptive" if model.get("cutoffs") else "")


def table_row(record):
    """The cells of one run record, in the order of COLUMNS; evaluation is at the batch size the record names."""
    config, results = record["config"], record["results"]
    batch = {score["batch_size"] for score in results.values()}
    if batch != {1}:
        raise UserError(f"run {record['name']}: expected valid and test scored at batch 1, got batch sizes {batch}")
    return [
        model_name(record["model"]),
        f"{record['model']['parameters']:,}",
        record["corpus"]["name"],
        config["recipe"],
        record["epochs"],
        f"{record['minutes']:.1f}",
        f"{results['valid']['perplexity']:.2f}",
        f"{results['test']['perplexity']:.2f}",
        f"{record['forward_ms_per_batch']:.0f}",
        f"{record['ms_per_batch']:.0f}",
        f"{record['peak_memory_mib']:.0f}",
        f"{record['environment']['device']}, {record['environment']['threads']} threads",
        f"`{record['command']}`",
        (record["environment"]["commit"] or "")[:12],
    ]


def table_text(records):
    """The markdown table of run records, best test perplexity first."""
    ordered = sorted(records, key=lambda record: record["results"]["test"]["perplexity"])
    return report.markdown_table(COLUMNS, [table_row(record) for record in ordered])


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


class Candidate:
    """A model and its optimizer, ready to take training steps on made-up text."""

    def __init__(self, name, args):
        module, flags = CANDIDATES[name]
        self.name = name
        self.flags, _ = cli.parse_training(module.build_parser(), module.RECIPES, [*flags.split(), "--amp", args.amp])
        torch.manual_seed(self.flags.seed)
        device = torch.device("cuda" if args.cuda else "cpu")
        self.model = build(module.model_config(self.flags, args.vocab_size)).to(device)
        self.optimizer = optim.build_optimizer(self.flags, self.model.parameters())
        self.clock = runtime.Clock(device)
        batch, bptt = self.flags.batch_size, self.flags.bptt
        ids = np.random.default_rng(0).zipf(1.1, batch * (bptt + 1)) % args.vocab_size
        self.tokens, self.targets = next(windows(columns(ids, batch).to(device), bptt))
        self.state = self.model.initial_state(batch)
        self.full, self.forward = [], []

    def step(self, record):
        """One training step; its time is kept if `record`."""
        start = self.clock.mark()
        _, _, _, self.state, forward = trainer.training_step(
            self.model, self.optimizer, self.tokens, self.targets, self.state, self.flags, self.clock
        )
        end = self.clock.mark()
        full = self.clock.milliseconds(start, end)
        if record:
            self.full.append(full)
            self.forward.append(self.clock.milliseconds(start, forward))

    def row(self):
        """Name, sizes, median (lowest to highest) of the full step and of its forward pass, tokens a second."""
        median = statistics.median(self.full)
        return [
            self.name,
            f"{self.model.num_params():,}",
            f"{self.flags.batch_size} x {self.flags.bptt}",
            f"{median:.1f} ({min(self.full):.1f} to {max(self.full):.1f})",
            f"{statistics.median(self.forward):.1f}",
            f"{self.tokens.numel() / median * 1000:,.0f}",
        ]


def speed(args):
    """Time full training steps of the candidates, in turn, and print a table."""
    device, machine = runtime.setup(args)
    report.say(f"| {machine}")
    environment = report.environment(device, args.amp)
    report.say("| " + " | ".join(f"{key} {value}" for key, value in environment.items()))
    report.say(f"| vocabulary {args.vocab_size:,} | {args.rounds} rounds, candidates in turn")
    names = [name for name in CANDIDATES if not args.only or any(word in name for word in args.only)]
    if not names:
        raise UserError(f"--only {' '.join(args.only)} names no candidate: there are {', '.join(CANDIDATES)}")
    candidates = [Candidate(name, args) for name in names]
    for number in report.progress(range(args.warmup + args.rounds), "speed"):
        for candidate in candidates:
            candidate.step(record=number >= args.warmup)
    header = ("model", "parameters", "batch x BPTT", "ms/batch, median (range)", "forward ms", "tokens/s")
    report.say(report.markdown_table(header, [candidate.row() for candidate in candidates]))


def build_parser():
    """The sub-commands and their flags."""
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    command = commands.add_parser("table", description=table.__doc__, help="run records to a markdown table")
    command.add_argument("name", help="of the table")
    command.add_argument("runs", nargs="*", metavar="RUN", help="run folders or run records to add")
    command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where tables and records are")
    command.set_defaults(call=table)
    command = commands.add_parser("speed", description=speed.__doc__, help="time training steps")
    command.add_argument("--only", nargs="+", metavar="WORD", help="candidates whose name has one of these words")
    command.add_argument("--rounds", type=cli.positive_int, default=10, help="timed steps of each candidate")
    command.add_argument("--warmup", type=cli.positive_int, default=3, help="steps before, not timed")
    command.add_argument("--vocab-size", type=cli.number(int, 3), default=33278, help="words; WikiText-2 has 33278")
    cli.add_runtime(command)
    command.set_defaults(call=speed)
    return parser


def main(argv=None):
    """Parse flags, run the sub-command."""
    args = build_parser().parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    cli.run(main)
