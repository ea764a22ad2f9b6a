"""Train an Elman network, GRU, LSTM or, for comparison, a small Transformer on a text corpus."""

from models import ModelError
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
    cli.add_sentences(parser)
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=(*KINDS, "Transformer"), default="LSTM", help="kind of layer")
    group.add_argument("--emsize", type=cli.positive_int, help="features of the word embeddings")
    group.add_argument(
        "--nhid", type=cli.positive_int, help="hidden units of each layer, of a Transformer's inner ones"
    )
    group.add_argument("--nlayers", type=cli.positive_int, help="layers")
    group.add_argument("--dropout", type=cli.probability, help="of embedded words, between layers and of the output")
    group.add_argument("--loop", action="store_true", help="a Python loop over cells instead of the library's kernel")
    group.add_argument("--cudnn", dest="loop", action="store_false", help="the library's kernel, as without --loop")
    group.add_argument("--nhead", type=cli.positive_int, help="a Transformer's heads; 2 if not given")
    group.add_argument(
        "--context",
        type=cli.positive_int,
        help="positions a Transformer looks at, its own too; --bptt if not given",
    )
    return parser


CORE = ("model", "emsize", "nhid", "nlayers", "dropout", "loop")
TRANSFORMER = ("emsize", "nhead", "nhid", "nlayers", "context", "dropout")
WIDTHS = ("nhid", "emsize")


def model_config(args, vocab_size):
    """The model that the flags describe, for models.build. Raises ModelError for flags of the other kind of model."""
    if args.model == "Transformer":
        if args.loop:
            raise ModelError("--loop walks over time, which a Transformer does not: leave one of them out")
        args.nhead, args.context = args.nhead or 2, args.context or args.bptt
        return parsing.model_config(args, vocab_size, "transformer", TRANSFORMER, args.dropout)
    if args.nhead or args.context:
        raise ModelError(f"--nhead and --context go with --model Transformer, got --model {args.model}")
    return parsing.model_config(args, vocab_size, "rnn", CORE, args.dropout)


def main(argv=None):
    """Train as the command line says; returns the run record."""
    return experiment.train(("rnn", "transformer"), build_parser(), RECIPES, model_config, WIDTHS, argv)


if __name__ == "__main__":
    program.run(main)
