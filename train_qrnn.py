"""Train a Quasi-Recurrent Neural Network on a text corpus."""

from models.forget_mult import BACKENDS
from models.forget_mult.pooling import CANDIDATES, MODES
from utils import cli, experiment, parsing, program

RECIPES = {
    # Bradbury et al. 2017, section 3.2, with zoneout: the loss of a window is summed over its steps
    "paper": {
        "emsize": 640,
        "nhid": 640,
        "nlayers": 2,
        "window": 2,
        "zoneout": 0.1,
        "dropout": 0.5,
        "tied": False,
        "init": "lecun",  # Chainer's, in which the paper's model was written; from torch's the loss stalls
        "optimizer": "sgd",
        "lr": 1.0,
        "average": "columns",
        "clip": 10.0,
        "wdecay": 2e-4,
        "batch_size": 20,
        "bptt": 105,
        "epochs": 72,
        "schedule": "step",
        "decay": 0.95,
        "decay_from": 6,
        "log_interval": 100,
    },
    # a dozen epochs: Adam on one cycle, tied weights
    "fast": {
        "emsize": 640,
        "nhid": 640,
        "nlayers": 2,
        "window": 2,
        "zoneout": 0.0,
        "dropout": 0.4,
        "tied": True,
        "optimizer": "adam",
        "lr": 3e-3,
        "clip": 0.25,
        "wdecay": 1.2e-6,
        "batch_size": 40,
        "bptt": 70,
        "epochs": 12,
        "schedule": "onecycle",
        "log_interval": 100,
    },
}


def build_parser():
    """The flags of this script."""
    parser = cli.training_parser(__doc__)
    cli.add_sentences(parser)
    group = parser.add_argument_group("model")
    group.add_argument("--emsize", type=cli.positive_int, help="features of the word embeddings")
    group.add_argument("--nhid", type=cli.positive_int, help="hidden units of each layer")
    group.add_argument("--nlayers", type=cli.positive_int, help="QRNN layers")
    group.add_argument("--window", type=cli.positive_int, help="inputs that a gate sees: this one and those before it")
    group.add_argument("--zoneout", type=cli.probability, help="probability that a unit keeps its old value")
    group.add_argument("--mode", choices=tuple(MODES), default="fo", help="gates: forget, output, input")
    group.add_argument("--no-output-gate", dest="mode", action="store_const", const="f", help="as --mode f")
    group.add_argument("--candidate", choices=tuple(CANDIDATES), default="tanh", help="nonlinearity of what comes in")
    group.add_argument("--backend", choices=tuple(BACKENDS), help="of the recurrence; the fastest if not given")
    group.add_argument("--dropout", type=cli.probability, help="of embedded words, between layers and of the output")
    return parser


CORE = ("emsize", "nhid", "nlayers", "window", "zoneout", "mode", "dropout", "candidate", "backend")
WIDTHS = ("nhid", "emsize")


def model_config(args, vocab_size):
    """The model that the flags describe, for models.build."""
    return parsing.model_config(args, vocab_size, "qrnn", CORE, args.dropout)


def main(argv=None):
    """Train as the command line says; returns the run record."""
    return experiment.train(("qrnn",), build_parser(), RECIPES, model_config, WIDTHS, argv)


if __name__ == "__main__":
    program.run(main)
