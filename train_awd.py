"""Train an AWD-LSTM, AWD-QRNN or AWD-GRU on a text corpus."""

from argparse import BooleanOptionalAction

from models.awd import MODELS
from models.language_model import NORMS
from utils import cli, experiment, parsing, program

# Merity et al. 2018: the defaults of salesforce/awd-lstm-lm, main.py
PAPER = {
    "data": "data/penn",
    "emsize": 400,
    "nhid": 1150,
    "nlayers": 3,
    "dropout": 0.4,
    "dropouth": 0.3,
    "dropouti": 0.65,
    "dropoute": 0.1,
    "wdrop": 0.5,
    "wdrop_units": False,
    "alpha": 2.0,
    "beta": 1.0,
    "tied": True,
    "splitcross": True,
    "optimizer": "ntasgd",
    "lr": 30.0,
    "clip": 0.25,
    "wdecay": 1.2e-6,
    "batch_size": 80,
    "bptt": 70,
    "variable_bptt": True,
    "epochs": 8000,
    "log_interval": 200,
}
# meant for Penn Treebank in two hours of two CPU cores: fewer units, dropped whole, Adam on one cycle, bfloat16
FAST = {
    **PAPER,
    "nhid": 800,
    "dropout": 0.32,
    "dropouth": 0.2,
    "dropouti": 0.32,
    "dropoute": 0.08,
    "wdrop": 0.4,
    "wdrop_units": True,
    "optimizer": "adam",
    "lr": 5e-3,
    "betas": [0.75, 0.99],
    "batch_size": 20,
    "variable_bptt": False,
    "partial_shuffle": True,
    "schedule": "onecycle",
    "epochs": 50,
    "amp": "bf16",
}
RECIPES = {"paper": PAPER, "fast": FAST}


def build_parser():
    """The flags of this script."""
    parser = cli.training_parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=MODELS, default="LSTM", help="kind of recurrent layer")
    group.add_argument("--emsize", type=cli.positive_int, help="features of the word embeddings")
    group.add_argument("--nhid", type=cli.positive_int, help="hidden units of each layer, but the last when tied")
    group.add_argument("--nlayers", type=cli.positive_int, help="recurrent layers")
    group.add_argument("--dropout", type=cli.probability, help="of the output, a mask for all steps")
    group.add_argument("--dropouth", type=cli.probability, help="between layers, a mask for all steps")
    group.add_argument("--dropouti", type=cli.probability, help="of embedded words, a mask for all steps")
    group.add_argument("--dropoute", type=cli.probability, help="of words of the embedding, wherever they stand")
    group.add_argument("--wdrop", type=cli.probability, help="of hidden-to-hidden weights; a QRNN's all weights")
    group.add_argument(
        "--wdrop-units",
        action=BooleanOptionalAction,
        help="--wdrop of an LSTM or GRU drops whole hidden units from the recurrence, with their products",
    )
    group.add_argument("--alpha", type=cli.non_negative, help="activation regularization (AR); 0 for none")
    group.add_argument("--beta", type=cli.non_negative, help="temporal activation regularization (TAR); 0 for none")
    group.add_argument(
        "--ar-norm", choices=tuple(NORMS), default="mean", help="of AR and TAR: the code's mean of squares, or the norm"
    )
    group.add_argument("--loop", action="store_true", help="a Python loop over cells instead of the library's kernel")
    return parser


CORE = ("model", "emsize", "nhid", "nlayers", "tied", "dropouth", "wdrop", "wdrop_units", "loop")
OWN = ("dropoute", "alpha", "beta", "ar_norm")
WIDTHS = ("nhid", "emsize")


def model_config(args, vocab_size):
    """The model that the flags describe, for models.build."""
    config = parsing.model_config(args, vocab_size, "awd", CORE, args.dropouti)
    return {**config, "locked": True, **{name: getattr(args, name) for name in OWN}}


def main(argv=None):
    """Train as the command line says; returns the run record."""
    return experiment.train(("awd",), build_parser(), RECIPES, model_config, WIDTHS, argv)


if __name__ == "__main__":
    program.run(main)
