"""Train an Elman network, GRU or LSTM on a text corpus."""

from models.rnn import KINDS
from utils import cli, experiment, parsing, program

RECIPES = {
    # L0SG/relational-rnn-pytorch, train_rnn.py
    "port": {
        "emsize": 300,
        "nhid": 300,
        "nlayers": 1,
        "dropout": 0.5,
        "tied": True,
        **cli.PORT_TRAINING,
    },
    # pytorch/examples, word_language_model/main.py
    "example": {
        "emsize": 200,
        "nhid": 200,
        "nlayers": 2,
        "dropout": 0.2,
        "tied": False,
        "optimizer": "sgd",
        "lr": 20.0,
        "clip": 0.25,
        "batch_size": 20,
        "bptt": 35,
        "epochs": 40,
        "schedule": "plateau",
        "plateau_factor": 0.25,
        "plateau_patience": 0,
        "plateau_threshold": 0.0,
        "log_interval": 200,
    },
}


def build_parser():
    """The flags of this script."""
    parser = cli.training_parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=tuple(KINDS), default="LSTM", help="kind of recurrent layer")
    group.add_argument("--emsize", type=cli.positive_int, help="features of the word embeddings")
    group.add_argument("--nhid", type=cli.positive_int, help="hidden units of each layer")
    group.add_argument("--nlayers", type=cli.positive_int, help="recurrent layers")
    group.add_argument("--dropout", type=cli.probability, help="of embedded words, between layers and of the output")
    group.add_argument("--loop", action="store_true", help="a Python loop over cells instead of the library's kernel")
    group.add_argument("--cudnn", dest="loop", action="store_false", help="the library's kernel, as without --loop")
    return parser


CORE = ("model", "emsize", "nhid", "nlayers", "dropout", "loop")


def model_config(args, vocab_size):
    """The model that the flags describe, for models.build."""
    return parsing.model_config(args, vocab_size, "rnn", CORE, args.dropout)


def main(argv=None):
    """Train as the command line says; returns the run record."""
    return experiment.train("rnn", build_parser(), RECIPES, model_config, argv)


if __name__ == "__main__":
    program.run(main)
