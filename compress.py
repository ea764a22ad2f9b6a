"""Make a trained model smaller: prune it at once, take hidden units out, keep no zeros, halve its file, quantize it."""

import argparse
import os

from data import find_corpus
from data.corpus import SPLITS, Vocabulary, encode_file, split_file
from models.native import narrowed
from models.quantized import CLIPS, MODES
from models.sparse import SPARSE, thinned
from utils import UserError, checkpoint, cli, program, quantization, report
from utils.pruning import AT_ONCE, Pruning, at_once
from utils.structured import remove_units
from utils.summary import KINDS, summary_text

UNPRUNED = {"schedule": "", "masks": {}}
"""Of a checkpoint that can't be trained on, whose masks would only make it larger."""


def build_parser():
    """The flags of this script."""
    parser = cli.Parser(description=__doc__)
    add_model(parser)
    commands = parser.add_subparsers(dest="command", metavar="{prune,sparse,bf16,quantize}")
    prune = commands.add_parser("prune", help="set weights to zero, or with --structured remove units")
    add_model(prune, default=argparse.SUPPRESS)
    prune.add_argument("--output", default="pruned.pt", metavar="PATH", help="where the smaller checkpoint goes")
    criterion = prune.add_mutually_exclusive_group(required=True)
    criterion.add_argument("--sparsity", type=cli.probability, metavar="S", help="prune this part of each matrix")
    criterion.add_argument("--threshold", type=cli.non_negative, metavar="X", help="prune magnitudes of at most this")
    criterion.add_argument(
        "--sensitivity", type=cli.non_negative, metavar="X", help="... of this times the matrix's standard deviation"
    )
    prune.add_argument("--weights", nargs="+", metavar="NAME", help="patterns of matrices; all if not given")
    prune.add_argument(
        "--structured", action="store_true", help="remove the part --sparsity of each layer's hidden units instead"
    )
    thin = commands.add_parser("sparse", help="keep only what pruning left: rows without their zeros, faster products")
    add_model(thin, default=argparse.SUPPRESS)
    thin.add_argument("--output", default="sparse.pt", metavar="PATH", help="where the smaller checkpoint goes")
    half = commands.add_parser("bf16", help="weights of two bytes in the file, computed with in float32 as before")
    add_model(half, default=argparse.SUPPRESS)
    half.add_argument("--output", default="bf16.pt", metavar="PATH", help="where the smaller checkpoint goes")
    add_quantize(commands.add_parser("quantize", help="integers of few bits, simulated or native"))
    return parser


def add_quantize(parser):
    """How a model is quantized."""
    add_model(parser, default=argparse.SUPPRESS)
    add = parser.add_argument
    add(
        "--backend",
        choices=("simulated", "native"),
        default="simulated",
        help="every operation as integers would do it; or int8 weights in the file, and products that are faster",
    )
    add("--output", default="quantized.pt", metavar="PATH", help="where the quantized checkpoint goes")
    add("--mode", choices=MODES, default="symmetric", help="grids around 0, or from the least to the greatest number")
    add("--per-channel", action="store_true", help="a grid for each row of a matrix")
    add("--clip", choices=CLIPS, default="none", help="of what operations make: what rows reach in the mean, or ACIQ's")
    add(
        "--fp16",
        type=lambda text: [name for name in text.split(",") if name],
        default=[],
        metavar="NAME,...",
        help="operations in float16, by parts of their names (encoder, decoder, eltwise), or all",
    )
    add("--weight-bits", type=bits, default=8, metavar="N", help="2 to 8")
    add("--activation-bits", type=bits, default=8, metavar="N", help="2 to 8")
    add(
        "--data", help="corpus whose text statistics are taken from; the one that the model was trained on if not given"
    )
    add("--split", choices=SPLITS, default="train", help="of the corpus")
    add("--tokens", type=cli.number(int, 2), default=50_000, metavar="N", help="of the beginning of the split")
    add("--statistics", metavar="FILE", help="YAML to read the statistics from, or to write them to if there is none")


bits = cli.number(int, 2, 8)


def add_model(parser, **default):
    """What is made smaller, and a look at it; `default` for a command's parser, which must not undo what was given."""
    parser.add_argument(
        "--checkpoint", **({"default": "./model.pt"} | default), metavar="PATH", help="what training saved"
    )
    parser.add_argument(
        "--summary", choices=KINDS, **default, help="print a table of the model, after the command if there is one"
    )


def prune(args, model, saved):
    """The checkpoint with its matrices pruned by one criterion; what was pruned before stays so."""
    criterion = next(name for name in AT_ONCE if getattr(args, name) is not None)
    schedule = at_once(criterion, getattr(args, criterion), args.weights or ["*"])
    pruning = Pruning(model, schedule, "compress.py prune", saved["pruning"]["masks"])
    names = pruning.start_epoch(0)
    report.say(f"| pruned {' '.join(names)} | {pruning.count() / model.num_params():.2%} of all parameters are 0")
    return {
        "config": saved["config"],
        "weights": model.state_dict(),
        "pruning": {**pruning.state_dict(), "schedule": ""},
    }


def prune_units(args, model, saved):
    """The checkpoint without a part of its hidden units."""
    if args.sparsity is None or args.weights:
        raise UserError("--structured removes a part of each layer's units: give it --sparsity and no --weights")
    config, weights, keep = remove_units(saved["config"], saved["weights"], args.sparsity)
    masks = {name: keep(name, mask) for name, mask in saved["pruning"]["masks"].items()}
    return {"config": config, "weights": weights, "pruning": {"schedule": "", "masks": masks}}


def sparse(args, model, saved):
    """The checkpoint with its pruned matrices in compressed rows."""
    weights, counts = thinned(model)
    if not counts:
        raise UserError(f"{args.checkpoint} has no matrix that is more than {SPARSE:.0%} zeros: prune it first")
    report.say(f"| in compressed rows: {' '.join(counts)}")
    return {"config": {**saved["config"], "sparse": counts}, "weights": weights, "pruning": UNPRUNED}


def bf16(args, model, saved):
    """The checkpoint with its weights in bfloat16, which become float32 again where they are read; tied ones once."""
    made, parameters = {}, model.state_dict(keep_vars=True)
    weights = {name: made.setdefault(id(each), each.detach().bfloat16()) for name, each in parameters.items()}
    return {"config": saved["config"], "weights": weights, "pruning": saved["pruning"]}


def quantize(args, model, saved):
    """The checkpoint with the settings of its quantization; its weights stay what they are."""
    settings = {name: getattr(args, name) for name in quantization.SETTINGS}
    if args.backend == "native":
        changed = [
            name
            for name, value in {**quantization.SETTINGS, "statistics": None}.items()
            if getattr(args, name) != value
        ]
        if changed:
            raise UserError(f"--{changed[0].replace('_', '-')} goes with --backend simulated: native has one way only")
        config = {**saved["config"], "native": True}
        report.say(f"| {quantization.summary(config)}")
        return {"config": config, "weights": narrowed(model), "pruning": UNPRUNED}
    if args.statistics and os.path.isfile(args.statistics):
        settings["statistics"] = quantization.read_statistics(args.statistics)
    else:
        folder = find_corpus(args.data or saved["args"]["data"])
        ids, _ = encode_file(split_file(folder, args.split), Vocabulary(**saved["vocabulary"]))
        settings["statistics"] = quantization.collect(saved, ids[: args.tokens + 1])
        if args.statistics:
            quantization.write_statistics(args.statistics, settings["statistics"])
    quantization.check(settings, saved)
    config = {**saved["config"], "quantization": settings}
    report.say(f"| {quantization.summary(config)}")
    return {"config": config, **{name: saved[name] for name in ("weights", "pruning")}}


def main(argv=None):
    """Parse flags, load the checkpoint, make it smaller, write it."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.command and not args.summary:
        parser.error("nothing to do: give a command, prune, sparse, bf16 or quantize, or --summary")
    model, _, saved = checkpoint.load_model(args.checkpoint, "cpu")
    if args.command and {"native", "sparse"} & saved["config"].keys():
        raise UserError(f"{args.checkpoint} is compressed already: give the checkpoint that it was made of")
    again = args.command == "sparse" or getattr(args, "backend", None) == "native"
    if again and "quantization" in saved["config"]:
        raise UserError(f"{args.checkpoint} is quantized already: give the checkpoint that it was made of")
    if args.command:
        before = model.num_params()
        commands = {"quantize": quantize, "sparse": sparse, "bf16": bf16, "prune": prune}
        command = prune_units if getattr(args, "structured", False) else commands[args.command]
        smaller = command(args, model, saved)
        kept = {name: saved[name] for name in ("vocabulary", "args", "corpus", "best")}
        model = checkpoint.built({**kept, **smaller}, args.output).eval()  # first: what can't be built is not written
        checkpoint.save(args.output, {**kept, **smaller})
        report.say(f"| parameters {before:,} -> {model.num_params():,} | {args.output}")
    if args.summary:
        report.say(summary_text(model, args.summary))


if __name__ == "__main__":
    program.run(main)
