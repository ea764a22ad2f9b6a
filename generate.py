"""Generate text from a checkpoint of any family."""

import io
import sys
from functools import partial

import torch

from data.corpus import EOS, SOS, UNK, some
from data.files import atomic_write
from models import products
from utils import UserError, checkpoint, cli, program, runtime

WORDS_A_LINE = 20


def restrict(log_probs, top_k=None, top_p=None):
    """Keep the likeliest words of log_probs (B, V) and set the others to -inf.

    top_k: how many. top_p: the smallest set whose probabilities sum to at least this (nucleus sampling, Holtzman et
    al. 2020); the likeliest word is always kept. With both, top_k comes first and top_p looks at what it left.
    """
    if top_k is not None and top_k < log_probs.shape[-1]:
        likeliest = log_probs.topk(top_k, dim=-1)
        log_probs = torch.full_like(log_probs, -torch.inf).scatter(-1, likeliest.indices, likeliest.values)
    if top_p is not None and top_p < 1:
        ordered, index = log_probs.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p
        log_probs = log_probs.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)
    return log_probs


def draw(probs):
    """probs (B, V) -> a word of each row by its probability, (1, B), on the CPU and by its generator.

    The first word whose sum with those before it is above a number drawn from 0 to the sum of all. torch.multinomial
    draws a number for each word.
    """
    sums = probs.cpu().double().cumsum(-1)
    total = sums[:, -1:]
    point = torch.rand(total.shape, dtype=total.dtype) * total
    point = point.minimum(total.nextafter(torch.zeros_like(total)))  # rounding must not reach the end
    return torch.searchsorted(sums, point, right=True).T


@torch.inference_mode()
def sample(
    model, prompt, words, samples=1, temperature=1.0, top_k=None, top_p=None, banned=(), report=None, sentences=None
):
    """Draw `samples` continuations of `prompt`, side by side.

    prompt: ids, at least one. banned: ids that are never drawn. temperature divides the log probabilities; above 1
    more diverse. report: called with the number of words done. sentences: None, or the ids of `<eos>`, after which the
    state is the zero state again, and of `<sos>`, which is read then. Randomness comes from torch's CPU generator.
    Returns ids, int64 (words, samples), without the prompt.
    """
    device = next(model.parameters()).device
    state = model.initial_state(samples)
    tokens = torch.tensor(prompt, device=device)[:, None].expand(-1, samples)
    banned = torch.tensor(banned, dtype=torch.int64, device=device)
    drawn = []
    with products.fixed_weights():
        for done in range(words):
            hidden, state = model.hidden(tokens, state)
            log_probs = model.log_probs(hidden[-1:])[0].float()
            if temperature != 1:  # each pass over the vocabulary is a part of a small model's time
                log_probs = log_probs / temperature
            if len(banned):
                log_probs = log_probs.index_fill(-1, banned, -torch.inf)
            tokens = draw(restrict(log_probs, top_k, top_p).softmax(-1)).to(device)
            drawn.append(tokens)
            if sentences:
                eos, sos = sentences
                ended = tokens == eos
                tokens = tokens.masked_fill(ended, sos)
                state = tuple(map(partial(_restart, ended[0]), state, model.initial_state(samples)))
            if report:
                report(done)
    return torch.cat(drawn)


def _restart(ended, part, fresh):
    """A part of a state (..., B, ...), B at dim 1, that of `fresh` in the columns that have ended (B,)."""
    return part.where(~ended.view(1, -1, *[1] * (part.dim() - 2)), fresh)


def write_text(file, vocabulary, ids):
    """Write ids (words, samples) as text: 20 words a line, a blank line between samples."""
    for number, column in enumerate(ids.T.tolist()):
        if number:
            file.write("\n")
        for start in range(0, len(column), WORDS_A_LINE):
            file.write(" ".join(vocabulary.words[i] for i in column[start : start + WORDS_A_LINE]) + "\n")


def build_parser():
    """The flags of this script."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--checkpoint", default="./model.pt", metavar="PATH", help="what training saved")
    parser.add_argument("--outf", default="generated.txt", metavar="FILE", help="where the text goes, - for the screen")
    parser.add_argument("--words", type=cli.positive_int, default=1000, metavar="N", help="words of each sample")
    parser.add_argument("--samples", type=cli.positive_int, default=1, metavar="N", help="independent texts")
    parser.add_argument("--prompt", default="", help="words to go on from; they are not repeated in the text")
    parser.add_argument("--seed", type=cli.seed_number, default=1111, help="equal seeds, equal text")
    parser.add_argument("--temperature", type=cli.number(float, 1e-3), default=1.0, help="higher is more diverse")
    parser.add_argument("--top-k", type=cli.positive_int, metavar="K", help="draw from the K likeliest words")
    parser.add_argument(
        "--top-p", type=cli.number(float, 0, 1, True), metavar="P", help="likeliest words that sum to P"
    )
    parser.add_argument("--no-unk", action="store_true", help=f"never draw {UNK}")
    parser.add_argument("--log-interval", type=cli.positive_int, default=100, metavar="N", help="words a progress line")
    parser.add_argument("--data", help="accepted for old command lines; the checkpoint holds all that is needed")
    cli.add_runtime(parser)
    return parser


def main(argv=None):
    """Parse flags, load the checkpoint, write the text."""
    args = build_parser().parse_args(argv)
    device, _ = runtime.setup(args)
    model, vocabulary, saved = checkpoint.load_model(args.checkpoint, device)
    prompt = args.prompt.split()
    unknown = [word for word in prompt if word not in vocabulary.ids]
    if unknown:
        raise UserError(f"--prompt has words that the model does not know: {some(unknown)}; see its training text")
    sos = checkpoint.sentence_start(saved, vocabulary)
    if sos is not None and EOS in prompt:
        raise UserError(f"--prompt: {args.checkpoint} was trained on sentences apart: give one that has not ended")
    sentences = None if sos is None else (vocabulary.ids[EOS], sos)
    ids = [vocabulary.ids[word] for word in [EOS if sos is None else SOS, *prompt]]
    banned = [vocabulary.ids[UNK]] if args.no_unk and UNK in vocabulary.ids else []
    banned += [] if sos is None else [sos]
    to_screen = args.outf == "-"
    log = sys.stderr if to_screen else sys.stdout

    def progress(done):
        if done % args.log_interval == 0:
            print(f"| Generated {done}/{args.words} words", file=log, flush=True)

    torch.manual_seed(args.seed)
    with runtime.autocast(device, args.amp):
        choice = args.temperature, args.top_k, args.top_p
        text = sample(model, ids, args.words, args.samples, *choice, banned, progress, sentences)
    buffer = io.StringIO()
    write_text(buffer, vocabulary, text)
    if to_screen:
        sys.stdout.write(buffer.getvalue())
        return
    try:
        with atomic_write(args.outf, "w", encoding="utf-8") as file:
            file.write(buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write --outf {args.outf}: {error.strerror}; choose another file") from None
    print(f"| {args.words * args.samples} words in {args.outf}")


if __name__ == "__main__":
    program.run(main)
