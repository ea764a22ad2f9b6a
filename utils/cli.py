"""Flags that the scripts share, with their checks, and a recipe that two of them share."""

import argparse
import math
import os
import sys
from argparse import BooleanOptionalAction

from models.language_model import INITS

from . import optim
from .pruning import Window
from .summary import KINDS

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
    parser.set_defaults(sentences=False)
    for add in (add_data, add_size, add_softmax, add_training, add_compression, add_run, add_runtime):
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


def add_sentences(parser):
    """--sentences."""
    parser.add_argument(
        "--sentences",
        action="store_true",
        help="read each sentence from the zero state, those of one length side by side, --batch-size of them, instead "
        "of --bptt steps of a text that is read on and on; their corpus is made by python -m data.sentences CORPUS",
    )


def add_size(parser):
    """--num-params."""
    group = parser.add_argument_group("size")
    group.add_argument(
        "--num-params",
        type=number(float, 1),
        metavar="N",
        help="make the model so wide that it has N parameters (11e6), its sizes in the proportions given",
    )


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
    group.add_argument(
        "--train-tokens",
        type=number(int, 2),
        metavar="N",
        help="train on the first N tokens of the training split only; the vocabulary stays the corpus's",
    )
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
    group.add_argument(
        "--cuda-graphs", action="store_true", help="record the core's passes on a GPU and replay them, one launch each"
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the core's passes by torch.compile, which unrolls its loops"
    )


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


def add_runs_dir(parser):
    """Where run folders are."""
    parser.add_argument(
        "--runs-dir",
        default=os.environ.get("RECURRENT_LM_RUNS", "runs"),
        metavar="DIR",
        help="holds the run folders; RECURRENT_LM_RUNS sets another default",
    )


def add_run(parser):
    """Where results go, how often, when to stop."""
    group = parser.add_argument_group("run")
    group.add_argument("--name", help="of the run folder; date and time if not given")
    add_runs_dir(group)
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
    group.add_argument("--tf32", action="store_true", help="float32 products of a GPU with 10 bits behind the point")
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
        help="float32 products of the CPU by oneDNN, if they stay float32; on others than Intel's if not given",
    )
    group.add_argument(
        "--numba",
        action=BooleanOptionalAction,
        default=True,
        help="element-wise work of the CPU in kernels that numba compiles once and keeps",
    )
