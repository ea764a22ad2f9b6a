"""Perplexity of a checkpoint of any family on the valid and test split of a corpus, or on any text.

As it was trained, or adapted while it reads: with a cache of recent words (--pointer), by dynamic evaluation, by both.
"""

import sys
import time

from data import find_corpus
from data.corpus import encode_file, read_blocks, split_file
from models.awd import MODELS
from utils import UserError, adaptation, checkpoint, cli, evaluation, parsing, program, report, runtime

GROUPS = {
    "pointer": ("theta", "lambdasm", "window", "pointer_start"),
    "dynamic": ("lr", "lamb", "epsilon", "max_batches"),
    "tune": ("tune_tokens",),
}
"""Flags that only mean something beside another one."""
SEGMENT = 20
"""Words that dynamic evaluation learns from at once, if --bptt does not say."""
RATE, PULL = 5e-5, 2e-3
"""Defaults of --lr and --lamb per 5 words of a segment, those of benkrause/dynamic-evaluation."""


def score_splits(model, vocabulary, folder, args, roots, sos):
    """Print loss and perplexity of valid and test, read with the model's vocabulary; returns the Score of each.

    sos: as evaluation.evaluate takes it.
    """
    adapted, scores = settings(args), {}
    for split in ("valid", "test"):
        ids, unknown = encode_file(split_file(folder, split), vocabulary)
        label, start = f"{split}, batch {args.eval_batch}", time.monotonic()
        if adapted:
            score = evaluation.mean_score(adaptation.read(model, ids, args, roots, label))
        else:
            score = evaluation.evaluate(model, ids, args.eval_batch, args.amp, label, sos)
        note = f" | {unknown:,} unknown words" if unknown else ""
        report.say(
            f"| {split:5s} | loss {score.loss:7.4f} | ppl {score.perplexity:8.2f} | {score.targets:,} targets | "
            f"batch {score.batch_size}{note}" + (f" | {adapted} | {time.monotonic() - start:.0f} s" if adapted else "")
        )
        scores[split] = score
    return scores


def settings(args):
    """The flags of the adaptation that is asked for, "" without any."""
    names = ["temperature"] if args.temperature != 1 else []
    names += GROUPS["pointer"] if args.pointer else ()
    if args.dynamic:
        names += ["dynamic", "lr", "lamb", *(["epsilon"] if args.dynamic == "rms" else []), "bptt"]
    values = ((name.replace("_", "-"), getattr(args, name)) for name in names)
    return " ".join(f"--{name} {value if isinstance(value, str) else format(value, '.4g')}" for name, value in values)


def score_text(model, vocabulary, path, args, roots, apart):
    """Print the log probability of every word of a text file, and the perplexity of each line and of the whole.

    apart: as evaluation.score_words takes it.
    """
    lines = [line.split() for block in read_blocks(path) for line in block.split("\n")[:-1]]
    total = words = unknown = 0

    def read(ids):
        return adaptation.read(model, ids, args, roots, None if apart else str(path))

    scored = evaluation.score_words(vocabulary, lines, read, apart)
    for number, line in enumerate(scored, 1):
        loss = -sum(log_prob for _, log_prob, _ in line)
        missing = sum(not known for _, _, known in line)
        total, words, unknown = total + loss, words + len(line), unknown + missing
        shown = " ".join(f"{word if known else f'[{word}]'} {log_prob:.2f}" for word, log_prob, known in line)
        report.say(
            f"| line {number} | {len(line)} words | {missing} unknown | ppl "
            f"{evaluation.perplexity(loss / len(line)):.2f} | {shown}"
        )
    report.say(
        f"| {path} | {words} words, line ends included | {unknown} unknown | loss {total / words:.4f} | "
        f"ppl {evaluation.perplexity(total / words):.2f}"
    )


def build_parser():
    """The flags of this script."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--checkpoint", "--save", default="./model.pt", metavar="PATH", help="what training saved")
    parser.add_argument("--model", choices=MODELS, help="the AWD model that it must be; nothing else depends on it")
    parser.add_argument("--data", help="corpus folder or name; the one that the model was trained on if not given")
    parser.add_argument("--text", metavar="FILE", help="score this text by line and word instead of a corpus")
    parser.add_argument("--record", metavar="FILE", help="write the figures of a corpus to this file, for tables")
    parser.add_argument(
        "--eval-batch",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help=f"columns; 1 is exact, wider is faster, each column then reads {evaluation.WARMUP} tokens before its own",
    )
    add_adaptation(parser)
    cli.add_runtime(parser)
    return parser


def add_adaptation(parser):
    """What the model may do with the words that it has read; always in one column."""
    group = parser.add_argument_group("adaptation")
    group.add_argument(
        "--temperature", type=cli.positive, default=1.0, metavar="T", help="logits are divided by it; 1: as trained"
    )
    group.add_argument("--pointer", action="store_true", help="continuous cache of the words read last")
    group.add_argument("--theta", type=cli.non_negative, default=0.6625523432485668, help="sharpness of the cache")
    group.add_argument("--lambdasm", type=cli.probability, default=0.12785920428335693, help="weight of the cache")
    group.add_argument("--window", type=cli.positive_int, default=3785, metavar="N", help="words in the cache")
    group.add_argument(
        "--pointer-start",
        choices=adaptation.STARTS,
        default="first",
        help="the cache speaks from the first word on, or as published once its window is full",
    )
    group.add_argument(
        "--dynamic",
        nargs="?",
        const="rms",
        choices=adaptation.RULES,
        help="learn from each segment after scoring it; rms if no rule is named",
    )
    group.add_argument("--lr", type=cli.positive, help=f"rate of --dynamic; {RATE:g} for each 5 words if not given")
    group.add_argument("--lamb", type=cli.number(float, 0, 1), help=f"pull to the trained weights; likewise {PULL:g}")
    group.add_argument("--epsilon", type=cli.positive, default=2e-5, help="added to the root of squares of rule rms")
    group.add_argument(
        "--bptt",
        type=cli.positive_int,
        metavar="T",
        help=f"words of a segment of --dynamic; {SEGMENT} if not given; without --dynamic it changes nothing",
    )
    group.add_argument(
        "--max-batches", type=cli.positive_int, metavar="N", help="of the training text, for rms; all if not given"
    )
    group.add_argument(
        "--tune", action="store_true", help="choose the flags of this group that are not given on the valid split"
    )
    group.add_argument(
        "--tune-tokens", type=cli.number(int, 2), default=30_000, metavar="N", help="of its beginning; fewer are faster"
    )


def parse(argv=None):
    """The flags, and the names of those that were given. Errors end the program with one line and exit code 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    given = parsing.given_flags(parser, argv, args)
    for switch, names in GROUPS.items():
        for name in names:
            if name in given and not getattr(args, switch):
                parser.error(f"--{name.replace('_', '-')} goes with --{switch}, which is not given")
    for name in ("epsilon", "max_batches"):
        if name in given and args.dynamic == "sgd":
            parser.error(f"--{name.replace('_', '-')} goes with --dynamic rms, not with sgd")
    if args.eval_batch > 1 and (args.text or args.pointer or args.dynamic or args.tune or args.temperature != 1):
        parser.error(f"adaptation and --text read one column: leave out --eval-batch {args.eval_batch}")
    if args.record and args.text:
        parser.error("--record keeps the figures of a corpus: leave it out beside --text")
    if args.tune and args.text:
        parser.error("--tune needs the valid split of a corpus: tune without --text, then give what it chose")
    if args.dynamic:
        args.bptt = args.bptt or SEGMENT
        args.lr = args.lr or RATE * args.bptt / 5
        args.lamb = min(1.0, PULL * args.bptt / 5) if args.lamb is None else args.lamb
    args.bptt = args.bptt or evaluation.STEPS
    args.argv = sys.argv[1:] if argv is None else list(argv)
    return args, given


def main(argv=None):
    """Parse flags, load the checkpoint, tune, score."""
    args, given = parse(argv)
    start = time.monotonic()
    if args.record:
        report.check_place("--record", args.record)
    device, _ = runtime.setup(args)
    model, vocabulary, saved = checkpoint.load_model(args.checkpoint, device)
    kind = saved["config"]["core"].get("model", saved["config"]["family"])
    if args.model not in (None, kind):
        raise UserError(f"{args.checkpoint} holds a model of kind {kind}, not {args.model}: leave out --model")
    if args.dynamic and {"quantization", "native", "sparse"} & saved["config"].keys():
        raise UserError(f"--dynamic: {args.checkpoint} is compressed and can't learn; give the one it was made of")
    if args.dynamic and saved["pruning"]["masks"]:
        raise UserError(f"--dynamic: {args.checkpoint} is pruned and what it learns would not stay so; leave it out")
    sos = checkpoint.sentence_start(saved, vocabulary)
    if sos is not None and (args.tune or settings(args)):
        raise UserError(
            f"{args.checkpoint} was trained on sentences, each from the zero state: "
            f"leave out --pointer, --dynamic, --temperature and --tune, which read on and on"
        )
    folder = roots = None
    if args.dynamic == "rms" or not args.text:
        folder = find_corpus(args.data or saved["args"]["data"])
    if args.dynamic == "rms":
        text, _ = encode_file(split_file(folder, "train"), vocabulary)
        roots = adaptation.gradient_roots(model, text, args.bptt, args.amp, args.max_batches)
    if args.tune:
        ids, _ = encode_file(split_file(folder, "valid"), vocabulary)
        adaptation.tune(model, ids[: args.tune_tokens + 1], args, given, roots)
        report.say(f"| chosen on {min(args.tune_tokens, len(ids) - 1):,} words of valid | {settings(args)}")
    if args.text:
        score_text(model, vocabulary, args.text, args, roots, sos is not None)
        return
    scores = score_splits(model, vocabulary, folder, args, roots, sos)
    if args.record:
        minutes = (time.monotonic() - start) / 60
        record = report.evaluation_record(model, saved, folder.name, settings(args), scores, minutes, args)
        report.write_record(args.record, record)
        report.say(f"| record {args.record}")


if __name__ == "__main__":
    program.run(main)
