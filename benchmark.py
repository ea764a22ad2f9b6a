"""Tables from run records, and the speed of training steps."""

import sys
from pathlib import Path

from data.corpus import SPLITS
from utils import UserError, cli, compressed, measurements, program, report
from utils.tables import scores_text, seeds_text, table_text

RESULTS = Path(__file__).parent / "results"


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
    (report.replace_between if page.exists() else measurements.put_on_page)(page, args.name, text)
    for name, record in added.items():
        report.write_record(folder / f"{name}.json", record)
    report.say(f"| {len(records)} rows in {page}")


def build_parser():
    """The sub-commands and their flags."""
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)

    def add(call, line):
        command = commands.add_parser(call.__name__, description=call.__doc__, help=line)
        command.set_defaults(call=call)
        return command

    command = add(table, "run records to a markdown table")
    command.add_argument("name", help="of the table")
    command.add_argument("runs", nargs="*", metavar="RUN", help="run folders or run records to add")
    command.add_argument("--seeds", action="store_true", help="a row for runs that differ in their seeds only")
    command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where tables and records are")
    command = add(measurements.memory, "peak memory of training steps")
    add_choice(command)
    add_record(command)
    command = add(measurements.speed, "time training steps")
    add_choice(command)
    add_rounds(command)
    add_record(command)
    command = add(measurements.quality, "train beside the peers, score alike")
    add_choice(command, False)
    cli.add_data(command)
    command.add_argument("--flags", default="", help="for the train scripts, after each candidate's own")
    command.add_argument(
        "--tokens", type=cli.positive_int, help="of the training split, from its start; all if not given"
    )
    command.add_argument("--epochs", type=cli.positive_int, default=1, help="passes over them")
    command.add_argument("--seeds", type=cli.positive_int, default=2, help="random seeds, from 1")
    add_record(command)
    command = add(measurements.profile, "where a training step's time goes")
    add_choice(command)
    command.add_argument("--warmup", type=cli.positive_int, default=3, help="steps before")
    command.add_argument("--operations", type=cli.positive_int, default=10, help="how many of the longest")
    add_record(command)
    command = add(measurements.layers, "time the QRNN's recurrence and layer")
    command.add_argument("--qrnn", metavar="DIR", help="checkout of salesforce/pytorch-qrnn, measured beside ours")
    command.add_argument("--log-qrnn", metavar="DIR", help="checkout of LGirrbach/PyTorch-QRNN, measured beside ours")
    add_rounds(command)
    add_record(command)
    command = add(compressed.products, "time products, compressed and not")
    add_rounds(command)
    add_record(command)
    command = add(compressed.compression, "what compressed checkpoints give")
    command.add_argument(
        "checkpoints", nargs="+", metavar="NAME=PATH", help="of one model; the others are compared with the first"
    )
    add_scores(command)
    add_rounds(command)
    add_record(command)
    command = add(compressed.quantization, "distiller's table")
    command.add_argument("checkpoint", metavar="PATH", help="of a model of float32")
    command.add_argument("--distiller", metavar="DIR", help="checkout of IntelLabs/distiller, on the same weights")
    command.add_argument("--split", choices=SPLITS, default="train", help="that statistics are taken from")
    command.add_argument(
        "--statistics-tokens", type=cli.number(int, 2), default=50_000, metavar="N", help="of its beginning"
    )
    add_scores(command)
    add_record(command)
    command = add(measurements.figure4, "the QRNN paper's figure of speed")
    command.add_argument("--vocab-size", type=cli.number(int, 3), default=10000, help="words; Penn Treebank has 10000")
    add_rounds(command)
    add_record(command)
    command = add(measurements.evaluation, "time an evaluation in one column")
    cli.add_data(command)
    command.add_argument("--tokens", type=cli.positive_int, default=20000, help="of the test split, from its start")
    command.add_argument("--rounds", type=cli.positive_int, default=3, help="evaluations of each model")
    add_example(command)
    add_record(command)
    command = add(measurements.load, "time the building of a corpus")
    cli.add_data(command)
    command.add_argument(
        "--tokens", type=cli.number(int, 0), default=0, help="make up a corpus of so many, instead of --data"
    )
    command.add_argument("--types", type=cli.positive_int, default=267735, help="of the corpus that is made up")
    command.add_argument("--rounds", type=cli.positive_int, default=3, help="how often")
    add_port(command)
    add_record(command)
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
    program.run(main)
