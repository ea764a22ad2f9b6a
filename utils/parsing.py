"""What a train script's flags mean together: recipes, the run that is resumed, the model, the corpus."""

import argparse
import os
import sys

import torch

from data import Corpus, find_corpus
from models import build
from models.language_model import check_cutoffs
from models.softmax import default_cutoffs, split_cutoffs

from . import UserError, checkpoint, report
from .cli import Parser
from .report import RunFolder

MAY_CHANGE = ("epochs", "max_minutes", "log_interval", "threads")
"""Flags that --resume lets differ (epochs not under one-cycle; other threads give up bit equality)."""
LOCATORS = ("data", "runs_dir", "resume", "name", "summary")
"""Flags that say where things are, the corpus is compared by its checksums; and one that only looks."""


def parse_training(parser, recipes, argv=None, families=()):
    """Parse a train script's command line.

    recipes: {name: {flag: default}}, the first is the default. Defaults come from the recipe, or on --resume from the
    run that is resumed, which must be of one of `families`; a flag given beats both.
    Returns the flags, and the checkpoint to go on from or None. Errors end the program with one line and exit code 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = Parser(add_help=False)
    first.add_argument("--recipe", choices=tuple(recipes), default=next(iter(recipes)))
    first.add_argument("--resume")
    first.add_argument("--runs-dir", default=parser.get_default("runs_dir"))
    first.prog = parser.prog
    early, _ = first.parse_known_args(argv)
    parser.add_argument("--recipe", choices=tuple(recipes), default=early.recipe, help="published set of defaults")
    parser.set_defaults(**{**recipes[early.recipe], "schedule": None})
    args = parser.parse_args(argv)
    given = given_flags(parser, argv, args)
    resumed = None
    if args.resume is not None:
        args, resumed = _resumed(parser, given, early, args, families)
    else:
        _settle(parser, given, args, recipes[args.recipe])
    args.argv = list(argv)
    return args, resumed


def given_flags(parser, argv, args):
    """The flags that the command line gives, {name: value}; args: what it was parsed to."""
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), _Absent))))
    return {flag: value for flag, value in given.items() if value is not _Absent}


def _settle(parser, given, args, recipe):
    """Settle what one flag means for another: the schedule of --decay and --when, the tying that is not adaptive."""
    if args.schedule is None:
        asked = "step" if "decay" in given else "when" if args.when else None
        args.schedule = asked or recipe.get("schedule", "constant")
    if "decay" not in given and args.schedule != "step":
        args.decay = 1.0  # the recipe's goes with the recipe's schedule
    if args.decay != 1 and args.schedule != "step":
        parser.error(f"--decay goes with --schedule step, got --schedule {args.schedule}")
    if (args.when is not None) != (args.schedule == "when"):
        parser.error(f"--when and --schedule when go together, got --when {args.when}, --schedule {args.schedule}")
    if args.optimizer in ("adam", "adamw") and args.schedule == "onecycle" and not 0.05 <= args.betas[0] < 0.95:
        parser.error(f"--betas {args.betas[0]:g}: onecycle moves it by 0.05 both ways, give one of 0.05 to below 0.95")
    if args.finetune and args.start_from:
        parser.error("--finetune and --start-from exclude each other: both name the weights to start from")
    if args.start_from:
        args.start_from = _start("--start-from", args.start_from, args.runs_dir)
    if args.finetune:
        if args.optimizer != "ntasgd":
            parser.error(f"--finetune averages: it goes with --optimizer ntasgd, got {args.optimizer}")
        args.finetune = _start("--finetune", args.finetune, args.runs_dir)
        args.bptt_max = args.bptt_max or args.bptt + 10
    if args.sentences and (args.variable_bptt or args.partial_shuffle or args.cuda_graphs or args.compile):
        parser.error(
            "--sentences has batches of their own lengths: leave out --variable-bptt, --partial-shuffle, "
            "--cuda-graphs and --compile"
        )
    if args.cuda_graphs and (not args.cuda or args.variable_bptt):
        parser.error("--cuda-graphs takes windows of one length on a GPU: give --cuda and --no-variable-bptt")
    if args.compile and (args.cuda_graphs or args.variable_bptt):
        parser.error("--compile takes windows of one length, without --cuda-graphs: give --no-variable-bptt for it")
    if args.compress and args.sparsity:
        parser.error("--compress and --sparsity exclude each other: a file describes all of its pruning")
    if "prune_epochs" in given and not args.sparsity:
        parser.error("--prune-epochs goes with --sparsity, which is not given")
    if args.adaptivesoftmax and given.get("splitcross"):
        parser.error("--splitcross and --adaptivesoftmax exclude each other: choose one")
    args.splitcross = args.splitcross and not args.adaptivesoftmax
    if args.cutoffs is not None and not (args.adaptivesoftmax or args.splitcross):
        parser.error("--cutoffs goes with --adaptivesoftmax or --splitcross, neither was given")
    if args.adaptivesoftmax and args.tied:
        if given.get("tied"):
            parser.error("--tied and --adaptivesoftmax exclude each other: an adaptive softmax has weights of its own")
        report.say("adaptive softmax: its weights are its own, the recipe's --tied gives way")
        args.tied = False


def _resumed(parser, given, early, args, families):
    folder = find_run("--resume", early.resume, early.runs_dir, "last.pt")
    resumed = checkpoint.load(folder.last)
    checkpoint.expect_family(resumed, folder.last, families)
    saved = resumed["args"]
    for flag in {"start_from", "finetune"} & given.keys():
        given[flag] = _start(f"--{flag.replace('_', '-')}", given[flag], early.runs_dir)
    free = set(MAY_CHANGE) | set(LOCATORS)
    if saved["schedule"] == "onecycle":
        free.discard("epochs")
    for flag, size in saved.get("proportions", {}).items():  # typed once more, beside --num-params
        if given.get(flag) == size:
            given[flag] = saved[flag]
    for flag, value in given.items():
        if flag not in free and value != saved.get(flag):
            allowed = ", ".join(f"--{name.replace('_', '-')}" for name in MAY_CHANGE if name in free)
            parser.error(
                f"--{flag.replace('_', '-')} {value} differs from the resumed run's {saved.get(flag)}: "
                f"only {allowed} may"
            )
    if saved.get("max_minutes") and resumed["position"]["seconds"] >= 60 * saved["max_minutes"]:
        saved["max_minutes"] = None  # they are over, so that what is resumed without the flag has no limit
    place = {"name": folder.path.name, "runs_dir": str(folder.path.parent), "resume": early.resume}
    return argparse.Namespace(**{**vars(args), **saved, **given, **place}), resumed


def _start(flag, run, runs_dir):
    """The file of weights to start from: the one named, or the best of a run."""
    return run if os.path.isfile(run) else str(find_run(flag, run, runs_dir, "best.pt").best)


class _Absent:
    """Stands for a flag that the command line does not give."""


def find_run(flag, run, runs_dir, file):
    """The RunFolder of a run's name or path, given by `flag`. Raises UserError when it holds no `file`."""
    for path in (os.path.join(runs_dir, run), run):
        if os.path.isfile(os.path.join(path, file)):
            return RunFolder(path)
    raise UserError(f"{flag} {run}: expected a run folder with {file}, found none at {run} nor in {runs_dir}")


def model_config(args, vocab_size, family, core, dropouti):
    """The model that flags describe, for models.build. core: names of the flags that the core takes as arguments."""
    return {
        "family": family,
        "core": {name: getattr(args, name) for name in core},
        "vocab_size": vocab_size,
        "tied": args.tied,
        "cutoffs": args.cutoffs,
        "dropouti": dropouti,
        "dropout": args.dropout,
        "init": args.init,
        "splitcross": args.splitcross,
    }


def settle_width(args, widths, config):
    """Set the flags named by `widths` so that the model has --num-params parameters, or as nearly as one unit allows.

    They keep their proportions, which args.proportions has afterwards. config: () -> the dictionary for models.build
    that args describe now. Raises UserError where the narrowest model has more.
    """
    config()  # it may settle what is not given, a Transformer's heads
    sizes = [getattr(args, name) for name in widths]
    args.proportions = dict(zip(widths, sizes, strict=True))
    multiple = getattr(args, "nhead", None) or 1

    def parameters(width):
        for name, size in zip(widths, sizes, strict=True):
            setattr(args, name, multiple * max(1, round(width * size / sizes[0])))
        with torch.device("meta"):
            return build(config()).num_params()

    low, high = 1, 2
    if parameters(low) > args.num_params:
        raise UserError(
            f"--num-params {args.num_params:,.0f}: the narrowest model has {parameters(low):,}; "
            f"give more, or a smaller --vocab-size"
        )
    while parameters(high) <= args.num_params:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(middle) <= args.num_params else (low, middle)
    parameters(min((low, high), key=lambda width: abs(parameters(width) - args.num_params)))


def load_corpus(args):
    """The corpus that --data, --vocab and --vocab-size name, of its training split --train-tokens.

    Sets --cutoffs where they are to be derived from it.

    Raises CorpusError, and ModelError for cutoffs that do not fit the vocabulary.
    """
    corpus = Corpus.load(find_corpus(args.data), args.vocab, args.vocab_size, notice=report.say)
    corpus.train = corpus.train[: args.train_tokens]
    settle_cutoffs(args, len(corpus.vocabulary))
    if args.cutoffs is not None:
        kind = "adaptive" if args.adaptivesoftmax else "split"
        report.say(f"{kind} softmax: cutoffs {' '.join(map(str, args.cutoffs))}")
    return corpus


def settle_cutoffs(args, words):
    """Derive --cutoffs from the size of a vocabulary where they are to be and were not given.

    Raises ModelError for cutoffs that do not fit it.
    """
    if args.cutoffs is None and (args.adaptivesoftmax or args.splitcross):
        args.cutoffs = default_cutoffs(words) if args.adaptivesoftmax else split_cutoffs(words)
    if args.cutoffs is not None:
        check_cutoffs(args.cutoffs, words)
