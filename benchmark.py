"""The tables of published results, from runs of ours, and the speed of all of it."""

import shlex
import sys
from pathlib import Path

from data.corpus import SPLITS
from utils import UserError, ahead, cli, compressed, measurements, planned, plans, program, report, scaling
from utils.planned import RESULTS
from utils.run_tables import KINDS


def table(args):
    """Train what a published table needs and has not (--list), or add the runs given to any; render results/NAME.md.

    Records are kept in results/NAME/. Ctrl-C ends the training that is under way, the same command goes on with it.
    """
    if args.list:
        report.say(plans.listing(args.runs_dir, args.name))
        return
    if args.name is None:
        raise UserError("table: expected the name of a table, got none; --list shows those that are planned")
    if not args.name or Path(args.name).name != args.name:
        raise UserError(f"table {args.name!r}: expected a name, that of its page in --results, without a folder")
    report.make_folder("--results", args.results)
    trains, measures = (args.name in known and not args.runs for known in (plans.PLANS, plans.MEASURED))
    asked = {"only": args.only, "budget": args.budget, "seeds": args.seeds > 1, "cuda-graphs": args.cuda_graphs}
    asked |= {} if measures else {"cuda": args.cuda, "tf32": args.tf32}
    if any(asked.values()) and not trains:
        flag = next(flag for flag, given in asked.items() if given)
        raise UserError(f"--{flag} is for tables whose rows are trained, without RUN; --list shows them")
    if trains or measures:
        planned.make(args)
        return
    added = {}
    for run in map(Path, args.runs):
        path = run / "run.json" if run.is_dir() else run
        record = report.read_record(path)
        if record.get("kind") not in KINDS:
            raise UserError(f"{path} is a record of {record.get('kind')}: expected that of a training or an evaluation")
        if not record.get("results"):
            raise UserError(f"{path} has no results: the run has not ended (status {record.get('status')})")
        name = record.get("name")
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{path}: expected the name of its run, without a folder, got {name!r}")
        if name in added:
            raise UserError(f"{path}: another run given is called {name}, too; a table has one of each name")
        added[name] = record
    planned.render(args.name, args.results, added, args.differences)


def peers(args):
    """Run every measurement that a peer can be compared in, beside the peers whose checkouts are there; sum up."""
    for name, argv in ahead.commands(args):
        report.say(f"| {name} | {shlex.join(['python', 'benchmark.py', *argv])}")
        main(argv)
    ahead.summary(args.results)


def build_parser():
    """The sub-commands and their flags."""
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)

    def add(call, line):
        command = commands.add_parser(call.__name__, description=call.__doc__, help=line)
        command.set_defaults(call=call)
        return command

    command = add(table, "published tables, trained; run records to a markdown table")
    command.add_argument("name", nargs="?", help="of the table")
    command.add_argument("runs", nargs="*", metavar="RUN", help="run folders or run records to add")
    command.add_argument(
        "--differences", action="store_true", help="a row for runs that differ in their seeds only, named by flags"
    )
    command.add_argument(
        "--list", action="store_true", help="the planned tables, or NAME alone: what their rows train, and end"
    )
    command.add_argument("--only", nargs="+", metavar="ROW", help="rows of a planned table; all if not given")
    command.add_argument("--seeds", type=cli.positive_int, default=1, metavar="N", help="random seeds of each row")
    command.add_argument("--budget", type=cli.positive, metavar="MINUTES", help="most minutes of each training")
    command.add_argument("--cuda", action="store_true", help="train on the GPU")
    command.add_argument("--tf32", action="store_true", help="its float32 products with 10 bits behind the point")
    command.add_argument("--cuda-graphs", action="store_true", help="its passes replayed, for rows that have a loop")
    cli.add_runs_dir(command)
    command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where tables and records are")
    command = add(measurements.memory, "peak memory of training steps")
    add_choice(command)
    add_record(command)
    command = add(measurements.speed, "time training steps")
    add_choice(command)
    add_rounds(command)
    add_record(command)
    command = add(measurements.settings, "time training steps with settings changed")
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
    command = add(peers, "all of it beside every peer")
    command.add_argument(
        "--from", dest="source", default="..", metavar="DIR", help="folder of the peers' checkouts, see the README"
    )
    command.add_argument("--only", nargs="+", choices=ahead.RUNS, help="measurements; all if not given")
    command.add_argument("--data", default="wikitext-2", help="corpus of evaluation and load")
    command.add_argument("--quick", action="store_true", help="one round of each")
    command.add_argument("--threads", type=cli.positive_int, metavar="N", help="processor threads")
    command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where records and tables are")
    command = add(measurements.generate, "time generated words")
    add_choice(command)
    command.add_argument("--words", type=cli.positive_int, default=1000, metavar="N", help="of each text")
    add_rounds(command)
    add_record(command)
    command = add(scaling.scaling, "what steps cost as sizes grow")
    command.add_argument(
        "--axes", nargs="+", choices=(*scaling.AXES, scaling.SPARSE, scaling.PROCESSES), help="all if not given"
    )
    command.add_argument("--quick", action="store_true", help="the ends of each axis only")
    command.add_argument("--vocab-size", type=cli.number(int, 3), default=10000, help="words, but on that axis")
    command.add_argument("--data", default="pydocs", help="corpus that torchrun's processes train on")
    add_rounds(command)
    add_record(command)
    command = add(measurements.profile, "where a training step's time goes")
    add_choice(command)
    command.add_argument("--warmup", type=cli.positive_int, default=3, help="steps before")
    command.add_argument("--operations", type=cli.positive_int, default=10, help="how many of the longest")
    add_record(command)
    command = add(measurements.layers, "time the QRNN's recurrence and layer")
    command.add_argument("--qrnn", metavar="DIR", help="checkout of salesforce/pytorch-qrnn, measured beside ours")
    command.add_argument("--log-qrnn", metavar="DIR", help="checkout of LGirrbach/PyTorch-QRNN, measured beside ours")
    command.add_argument("--sru", metavar="DIR", help="checkout of asappresearch/sru, measured beside ours")
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
    parser.add_argument(
        "--only", "--families", nargs="+", metavar="WORD", help="candidates whose name has one of these words"
    )
    if made_up:
        parser.add_argument("--vocab-size", type=cli.number(int, 3), default=33278, help="words; WikiText-2 has 33278")
    parser.add_argument("--awd", metavar="DIR", help="checkout of salesforce/awd-lstm-lm, measured beside ours")
    parser.add_argument("--fastai", metavar="DIR", help="folder that fastai was installed into, measured beside ours")
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
    if getattr(args, "record", None) is not None:
        if Path(args.record).name != args.record:
            raise UserError(f"--record {args.record}: expected a name, without a folder; --results says where it goes")
        report.make_folder("--results", args.results)
    args.call(args)


if __name__ == "__main__":
    program.run(main)
