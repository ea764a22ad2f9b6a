"""Flags that the scripts share, their checks, recipes, and the way a script ends."""

import argparse
import errno
import math
import os
import re
import signal
import sys
from argparse import BooleanOptionalAction

import torch
import torch.distributed as dist

from data import Corpus, CorpusError, find_corpus
from models import ModelError
from models.language_model import INITS, check_cutoffs
from models.softmax import default_cutoffs, split_cutoffs

from . import TrainingError, UserError, checkpoint, optim, report
from .pruning import Window
from .report import RunFolder
from .summary import KINDS

MAY_CHANGE = ("epochs", "max_minutes", "log_interval", "threads")
"""Flags that --resume lets differ (epochs not under one-cycle; other threads give up bit equality)."""
LOCATORS = ("data", "runs_dir", "resume", "name", "summary")
"""Flags that say where things are, the corpus is compared by its checksums; and one that only looks."""
LOST_PROCESS = re.compile("gloo|nccl|connection (closed|reset)", re.IGNORECASE)
"""What torch says in the other processes when one of a run has died."""


PORT_TRAINING = {
    "optimizer": "adam",
    "lr": 1e-3,
    "clip": 0.1,
    "batch_size": 64,
    "bptt": 100,
    "epochs": 100,
    "schedule": "plateau",
    "plateau_factor": 0.5,
    "plateau_patience": 5,
    "plateau_threshold": 1e-4,
    "log_interval": 100,
}
"""How L0SG/relational-rnn-pytorch trains, in train_rnn.py and train_rmc.py alike; for the scripts' recipes."""


class Parser(argparse.ArgumentParser):
    """argparse, with _ and - alike in long flags, defaults in the help, and errors of one line."""

    def __init__(self, **arguments):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **arguments)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, after --batch_size and the like have become --batch-size."""
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_dashes(arg) for arg in args], namespace)

    def error(self, message):
        """Print one line and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _dashes(arg):
    flag, equals, value = arg.partition("=")
    return (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite number of `kind` from `low` (or, with above, strictly above it) to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            what = "a whole number" if kind is int else "a number"
            bounds = f"above {low:g}" if above else f"of at least {low:g}"
            limit = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"expected {what} {bounds}{limit}, got {text}")
        return value

    return parse


positive_int = number(int, 1)
positive = number(float, 0, above=True)
non_negative = number(float, 0)
probability = number(float, 0, 0.999)
seed_number = number(int, 0, 2**63 - 1)


def training_parser(description):
    """A parser with the flags that every train script has."""
    parser = Parser(description=description)
    for add in (add_data, add_softmax, add_training, add_compression, add_run, add_runtime):
        add(parser)
    return parser


def add_data(parser):
    """--data, --vocab, --vocab-size."""
    group = parser.add_argument_group("corpus")
    group.add_argument(
        "--data",
        default="./data/wikitext-2",
        help="folder with train.txt, valid.txt, test.txt, or the name of one under ./data; "
        "pydocs is made from Python's own documentation",
    )
    group.add_argument(
        "--vocab",
        choices=("all", "train"),
        default="all",
        help="types of all three splits, as the papers count them, or of the training split, others become <unk>",
    )
    group.add_argument("--vocab-size", type=number(int, 3), metavar="N", help="keep the N most frequent types")


def add_softmax(parser):
    """--tied, --adaptivesoftmax, --splitcross, --cutoffs: the head, as all families have it."""
    group = parser.add_argument_group("softmax")
    group.add_argument("--tied", action=BooleanOptionalAction, help="embedding and softmax share one matrix")
    group.add_argument("--adaptivesoftmax", action="store_true", help="rare words in clusters, for large vocabularies")
    group.add_argument(
        "--splitcross",
        action=BooleanOptionalAction,
        default=False,
        help="rare words in clusters that keep the tied matrix (AWD-LSTM's split cross-entropy)",
    )
    group.add_argument(
        "--cutoffs",
        type=positive_int,
        nargs="*",
        metavar="ID",
        help="where the clusters start; if not given derived from the vocabulary, by --splitcross as its authors do: "
        "none up to 75,000 types",
    )


def add_training(parser):
    """Optimizer, schedule, batches."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--optimizer",
        choices=optim.OPTIMIZERS,
        default="adam",
        help="how weights are updated; ntasgd: sgd, then averaged when the validation loss stalls",
    )
    group.add_argument("--lr", type=positive, default=1e-3, help="initial learning rate; the highest under onecycle")
    group.add_argument("--momentum", type=probability, default=0.0, help="of SGD")
    group.add_argument(
        "--betas",
        type=probability,
        nargs=2,
        default=[0.9, 0.999],
        metavar="B",
        help="of Adam; under onecycle the first goes from 0.05 above to 0.05 below and back",
    )
    group.add_argument("--clip", type=non_negative, default=0.1, help="largest gradient norm, 0 for any")
    group.add_argument(
        "--wdecay", "--wd", "--weight-decay", type=non_negative, default=0.0, help="L2 weight decay, after clipping"
    )
    group.add_argument(
        "--average",
        choices=("targets", "columns"),
        default="targets",
        help="what the loss of a window is averaged over; over columns it is summed over the steps",
    )
    group.add_argument(
        "--nonmono", type=positive_int, default=5, metavar="N", help="ntasgd: epochs that the loss may be worse for"
    )
    group.add_argument(
        "--nt-rule",
        choices=optim.NT_RULES,
        default="code",
        help="ntasgd: worse than the best before the last N epochs, or (paper) the best of the last N",
    )
    group.add_argument(
        "--finetune",
        metavar="RUN",
        help="start from the best model of this run (name or folder), average from the first step (ntasgd) and stop by "
        "the same rule",
    )
    group.add_argument(
        "--start-from",
        metavar="RUN",
        help="start from the best model of this run (name or folder) or from a checkpoint, pruned weights stay pruned",
    )
    group.add_argument("--epochs", type=positive_int, default=100, help="upper epoch limit")
    group.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="columns of text")
    group.add_argument("--bptt", type=positive_int, default=100, metavar="T", help="steps of each window")
    group.add_argument(
        "--variable-bptt",
        action=BooleanOptionalAction,
        default=False,
        help="windows of lengths drawn around --bptt, the rate of each in proportion",
    )
    group.add_argument(
        "--bptt-max",
        type=positive_int,
        metavar="T",
        help="longest window of --variable-bptt; any if not given, 10 more than --bptt with --finetune",
    )
    group.add_argument(
        "--partial-shuffle",
        action=BooleanOptionalAction,
        default=False,
        help="in each epoch every column starts at another word and ends before it",
    )
    group.add_argument(
        "--schedule",
        choices=tuple(optim.SCHEDULES),
        help="of the rate; if not given step with --decay, when with --when, else the recipe's",
    )
    group.add_argument("--plateau-factor", type=number(float, 0, 0.999, True), default=0.5, help="rate times this ...")
    group.add_argument("--plateau-patience", type=number(int, 0), default=5, help="... after more bad epochs than this")
    group.add_argument("--plateau-threshold", type=number(float, 0, 0.999), default=1e-4, help="smallest relative gain")
    group.add_argument("--decay", type=number(float, 0, 1, True), default=1.0, help="rate times this each epoch ...")
    group.add_argument("--decay-from", type=number(int, 1), default=1, metavar="EPOCH", help="... after this one")
    group.add_argument(
        "--warm", type=probability, default=0.3, metavar="PART", help="onecycle: the part of training until --lr"
    )
    group.add_argument("--when", type=positive_int, nargs="+", metavar="EPOCH", help="a tenth of the rate after these")
    group.add_argument(
        "--init",
        choices=tuple(INITS),
        default="uniform",
        help="how weights start: as torch and word_language_model have them, or normal with variance 1 / inputs",
    )
    group.add_argument("--seed", type=seed_number, default=1111, help="random seed, fixes everything")


def add_compression(parser):
    """Pruning while training, and a look at the weights."""
    group = parser.add_argument_group("compression")
    group.add_argument(
        "--summary", choices=KINDS, help="print a table of the model (--resume's, --start-from's) and end"
    )
    group.add_argument("--compress", metavar="FILE", help="prune by this schedule (YAML; published ones: schedules/)")
    group.add_argument("--sparsity", type=probability, metavar="S", help="prune every matrix gradually to this part")
    group.add_argument(
        "--prune-epochs",
        type=epochs_window,
        default=(2, 20, 1),
        metavar="START:END:EVERY",
        help="of --sparsity: when START epochs are done, then after EVERY other, for the last time before END",
    )


def epochs_window(text):
    """An argparse type: START:END:EVERY, whole numbers."""
    try:
        window = tuple(map(int, text.split(":")))
        Window(*window)
    except (ValueError, TypeError):
        expected = "START:END:EVERY with 0 <= START < END and EVERY >= 1"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}") from None
    return window


def add_run(parser):
    """Where results go, how often, when to stop."""
    group = parser.add_argument_group("run")
    group.add_argument("--name", help="of the run folder; date and time if not given")
    group.add_argument(
        "--runs-dir",
        default=os.environ.get("RECURRENT_LM_RUNS", "runs"),
        metavar="DIR",
        help="holds the run folders; RECURRENT_LM_RUNS sets another default",
    )
    group.add_argument("--save", default="./model.pt", metavar="PATH", help="also holds the best checkpoint")
    group.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run (name or folder), bit for bit on a CPU; only epochs (not under onecycle), "
        "max-minutes, log-interval and threads may differ",
    )
    group.add_argument("--onnx-export", metavar="FILE", help="write the best model as ONNX too; needs the package onnx")
    group.add_argument("--log-interval", type=positive_int, default=200, metavar="N", help="batches a log line")
    group.add_argument("--checkpoint-every", type=positive_int, metavar="BATCHES", help="also within an epoch")
    group.add_argument("--max-minutes", type=positive, metavar="M", help="stop training after this long")
    group.add_argument("--eval-batch", type=positive_int, default=10, metavar="N", help="columns between epochs")
    group.add_argument("--dry-run", action="store_true", help="one batch, a short evaluation, nothing kept")


def add_runtime(parser):
    """Device and precision."""
    group = parser.add_argument_group("machine")
    group.add_argument("--cuda", "--accel", action="store_true", help="use the GPU")
    group.add_argument("--amp", choices=("off", "bf16"), default="off", help="products in bfloat16, sums in float32")
    group.add_argument("--threads", type=positive_int, metavar="N", help="of the CPU; torch's choice if not given")
    group.add_argument(
        "--tune-allocator",
        action=BooleanOptionalAction,
        default=True,
        help="keep freed memory in the process (glibc)",
    )
    group.add_argument(
        "--flush-denormal",
        action=BooleanOptionalAction,
        default=True,
        help="numbers below 1e-38 become 0, which is faster",
    )
    group.add_argument(
        "--onednn",
        action=BooleanOptionalAction,
        default=True,
        help="float32 products of the CPU by oneDNN, if they stay float32",
    )
    group.add_argument(
        "--numba",
        action=BooleanOptionalAction,
        default=True,
        help="element-wise work of the CPU in kernels that numba compiles once and keeps",
    )


def parse_training(parser, recipes, argv=None, family=None):
    """Parse a train script's command line.

    recipes: {name: {flag: default}}, the first is the default. Defaults come from the recipe, or on --resume from the
    run that is resumed, which must be of `family`; a flag given beats both.
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
        args, resumed = _resumed(parser, given, early, args, family)
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
        asked = "step" if args.decay != 1 else "when" if args.when else None
        args.schedule = asked or recipe.get("schedule", "constant")
    if args.decay != 1 and args.schedule != "step":
        parser.error(f"--decay goes with --schedule step, got --schedule {args.schedule}")
    if (args.when is not None) != (args.schedule == "when"):
        parser.error(f"--when and --schedule when go together, got --when {args.when}, --schedule {args.schedule}")
    if args.optimizer == "adam" and args.schedule == "onecycle" and not 0.05 <= args.betas[0] < 0.95:
        parser.error(f"--betas {args.betas[0]:g}: onecycle moves it by 0.05 both ways, give one of 0.05 to below 0.95")
    if args.finetune and args.start_from:
        parser.error("--finetune and --start-from exclude each other: both name the weights to start from")
    if args.start_from and not os.path.isfile(args.start_from):
        args.start_from = str(find_run("--start-from", args.start_from, args.runs_dir, "best.pt").best)
    if args.finetune:
        if args.optimizer != "ntasgd":
            parser.error(f"--finetune averages: it goes with --optimizer ntasgd, got {args.optimizer}")
        args.finetune = str(find_run("--finetune", args.finetune, args.runs_dir, "best.pt").best)
        args.bptt_max = args.bptt_max or args.bptt + 10
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


def _resumed(parser, given, early, args, family):
    folder = find_run("--resume", early.resume, early.runs_dir, "last.pt")
    resumed = checkpoint.load(folder.last)
    checkpoint.expect_family(resumed, folder.last, [family])
    saved = resumed["args"]
    free = set(MAY_CHANGE) | set(LOCATORS)
    if saved["schedule"] == "onecycle":
        free.discard("epochs")
    for flag, value in given.items():
        if flag not in free and value != saved.get(flag):
            allowed = ", ".join(f"--{name.replace('_', '-')}" for name in MAY_CHANGE if name in free)
            parser.error(
                f"--{flag.replace('_', '-')} {value} differs from the resumed run's {saved.get(flag)}: "
                f"only {allowed} may"
            )
    place = {"name": folder.path.name, "runs_dir": str(folder.path.parent), "resume": early.resume}
    return argparse.Namespace(**{**vars(args), **saved, **given, **place}), resumed


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


def load_corpus(args):
    """The corpus that --data, --vocab and --vocab-size name; sets --cutoffs where they are to be derived from it.

    Raises CorpusError, and ModelError for cutoffs that do not fit the vocabulary.
    """
    corpus = Corpus.load(find_corpus(args.data), args.vocab, args.vocab_size, notice=report.say)
    words = len(corpus.vocabulary)
    if args.cutoffs is None and (args.adaptivesoftmax or args.splitcross):
        args.cutoffs = default_cutoffs(words) if args.adaptivesoftmax else split_cutoffs(words)
    if args.cutoffs is not None:
        check_cutoffs(args.cutoffs, words)
        kind = "adaptive" if args.adaptivesoftmax else "split"
        report.say(f"{kind} softmax: cutoffs {' '.join(map(str, args.cutoffs))}")
    return corpus


def run(main):
    """Call a script's main; what the user did wrong ends with one line and exit code 2, bugs keep their traceback."""
    prog = os.path.basename(sys.argv[0])
    try:
        main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is written: a late Ctrl-C would only show torch's clean-up
    except (UserError, CorpusError, ModelError) as error:
        sys.exit(_fail(prog, error, 2))
    except TrainingError as error:
        sys.exit(_fail(prog, error, 1))
    except torch.OutOfMemoryError as error:
        first = str(error).split(". ", 1)[0]
        sys.exit(_fail(prog, f"{first}; use a smaller --batch-size or --bptt", 2))
    except RuntimeError as error:
        if not (dist.is_initialized() and LOST_PROCESS.search(str(error))):
            raise
        sys.exit(_fail(prog, "another process of this run is gone; see its message, then --resume the run", 1))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_fail(prog, f"cannot write: {error.strerror}{where}; free some space; files are as they were", 2))
    except KeyboardInterrupt:
        sys.exit(_fail(prog, "interrupted", 130))


def _fail(prog, error, code):
    print(f"{prog}: error: {error}", file=sys.stderr)
    return code
