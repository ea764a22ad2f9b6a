"""Train a Relational Memory Core on a text corpus."""

from models.rmc import GATE_STYLES, VARIANTS
from utils import cli, experiment, parsing, program

RECIPES = {
    # L0SG/relational-rnn-pytorch, train_rmc.py
    "port": {
        "emsize": 192,
        "memslots": 1,
        "headsize": 192,
        "numheads": 4,
        "numblocks": 1,
        "attmlplayers": 3,
        "keysize": 64,
        "forgetbias": 1.0,
        "inputbias": 0.0,
        "gatestyle": "unit",
        "dropouti": 0.5,
        "dropout": 0.5,
        "tied": True,
        **cli.PORT_TRAINING,
    },
}


def build_parser():
    """The flags of this script."""
    parser = cli.training_parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--variant", choices=VARIANTS, default="paper", help="the paper's form, or the PyTorch port's")
    group.add_argument("--emsize", type=cli.positive_int, help="features of the word embeddings")
    group.add_argument("--memslots", type=cli.positive_int, help="rows of the memory")
    group.add_argument("--headsize", type=cli.positive_int, help="features of a row in each attention head")
    group.add_argument("--numheads", type=cli.positive_int, help="attention heads")
    group.add_argument("--numblocks", type=cli.positive_int, help="times that the memory attends in each step")
    group.add_argument("--attmlplayers", type=cli.positive_int, help="layers of the MLP after the attention")
    group.add_argument("--keysize", type=cli.positive_int, help="features of queries and keys in each head")
    group.add_argument("--gatestyle", type=str.lower, choices=GATE_STYLES, help="gate every feature, slot or nothing")
    group.add_argument("--forgetbias", type=cli.number(float, -100, 100), help="of the forget gate")
    group.add_argument("--inputbias", type=cli.number(float, -100, 100), help="of the input gate")
    group.add_argument("--dropouti", type=cli.probability, help="of the embedded words")
    group.add_argument("--dropout", type=cli.probability, help="of the output before the softmax")
    return parser


CORE = ("variant", "emsize", "memslots", "headsize", "numheads", "numblocks", "attmlplayers", "keysize")
CORE += ("gatestyle", "forgetbias", "inputbias")
WIDTHS = ("headsize", "emsize", "keysize")


def model_config(args, vocab_size):
    """The model that the flags describe, for models.build."""
    return parsing.model_config(args, vocab_size, "rmc", CORE, args.dropouti)


def main(argv=None):
    """Train as the command line says; returns the run record."""
    return experiment.train(("rmc",), build_parser(), RECIPES, model_config, WIDTHS, argv)


if __name__ == "__main__":
    program.run(main)
