"""Perplexity of a checkpoint of any family on the valid and test split of a corpus, or on any text."""

from data import find_corpus
from data.corpus import encode_file, read_blocks, split_file
from utils import checkpoint, cli, evaluation, report, runtime


def score_splits(model, vocabulary, folder, args):
    """Print loss and perplexity of valid and test, read with the model's vocabulary."""
    for split in ("valid", "test"):
        ids, unknown = encode_file(split_file(folder, split), vocabulary)
        score = evaluation.evaluate(model, ids, args.eval_batch, args.amp, f"{split}, batch {args.eval_batch}")
        note = f" | {unknown:,} unknown words" if unknown else ""
        report.say(
            f"| {split:5s} | loss {score.loss:7.4f} | ppl {score.perplexity:8.2f} | {score.targets:,} targets | "
            f"batch {score.batch_size}{note}"
        )


def score_text(model, vocabulary, path, args):
    """Print the log probability of every word of a text file, and the perplexity of each line and of the whole."""
    lines = [line.split() for block in read_blocks(path) for line in block.split("\n")[:-1]]
    total = words = unknown = 0
    for number, line in enumerate(evaluation.score_words(model, vocabulary, lines, args.amp), 1):
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
    parser.add_argument("--checkpoint", default="./model.pt", metavar="PATH", help="what training saved")
    parser.add_argument("--data", help="corpus folder or name; the one that the model was trained on if not given")
    parser.add_argument("--text", metavar="FILE", help="score this text by line and word instead of a corpus")
    parser.add_argument(
        "--eval-batch",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help=f"columns; 1 is exact, wider is faster, each column then reads {evaluation.WARMUP} tokens before its own",
    )
    cli.add_runtime(parser)
    return parser


def main(argv=None):
    """Parse flags, load the checkpoint, score."""
    args = build_parser().parse_args(argv)
    device, _ = runtime.setup(args)
    model, vocabulary, saved = checkpoint.load_model(args.checkpoint, device)
    if args.text:
        score_text(model, vocabulary, args.text, args)
    else:
        score_splits(model, vocabulary, find_corpus(args.data or saved["args"]["data"]), args)


if __name__ == "__main__":
    cli.run(main)
