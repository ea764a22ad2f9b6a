"""python -m data.sentences CORPUS: a corpus of sentences, one a line, made from another corpus.

As the notebook of LGirrbach/PyTorch-QRNN: lower case, only sentences whose length is between the 5% and 95% quantiles
of the training split's. Each begins with `<sos>`, for --sentences. Deviation: a line ends a sentence and so does a word
that is ".", "!" or "?" itself; the notebook has NLTK's splitter look for them, which keeps a closing quote or bracket
with the sentence before it and goes on where it takes a full stop for an abbreviation's.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from .corpus import SOS, SPLITS, find_corpus, read_blocks, split_file
from .files import CorpusError, atomic_write, exit_status, whole_folder

ENDS = re.compile(r"(?<= [.!?]) ")
QUANTILES = (0.05, 0.95)


def sentences_of(path):
    """Yield the sentences of a text file, lists of words in lower case. Raises CorpusError as read_blocks does."""
    for block in read_blocks(path):
        for line in block.lower().splitlines():
            for sentence in ENDS.split(" " + " ".join(line.split())):
                if words := sentence.split():
                    yield words


def texts(folder):
    """{split: its text} of the sentences of the corpus in `folder`, and the least and greatest length that is kept.

    Raises CorpusError when a split is missing, can't be read or has no sentence of such a length.
    """
    found = {split: list(sentences_of(split_file(folder, split))) for split in SPLITS}
    bounds = np.quantile([len(sentence) for sentence in found["train"]] or [0], QUANTILES)
    low, high = (round(bound) for bound in bounds)
    kept = {split: [line for line in own if low <= len(line) <= high] for split, own in found.items()}
    for split, own in kept.items():
        if not own:
            raise CorpusError(f"{split_file(folder, split)} has no sentence of {low} to {high} words")
    return {split: "".join(f"{SOS} {' '.join(line)}\n" for line in own) for split, own in kept.items()}, (low, high)


def make(corpus, target=None):
    """Write the sentences of a corpus (name or folder) into the folder `target`, default CORPUS-sentences beside it.

    The folder appears whole or not at all. Returns a line that says what is there.

    Raises CorpusError for a corpus that can't be used, or when `target` holds something else; OSError when a file can't
    be read or written.
    """
    source = find_corpus(corpus)
    target = Path(target) if target else source.parent / f"{source.name}-sentences"
    wanted, (low, high) = texts(source)
    what = ", ".join(f"{split} {text.count(chr(10)):,}" for split, text in wanted.items())
    what = f"sentences of {low} to {high} words: {what}"
    if target.exists():
        for split, text in wanted.items():
            path = target / f"{split}.txt"
            if not path.is_file() or path.read_bytes() != text.encode():
                raise CorpusError(f"{target} is there already and holds something else; remove it first, or give --to")
        return f"{target} is there already: {what}"
    with whole_folder(target) as scratch:
        (scratch / "stage").mkdir()
        for split, text in wanted.items():
            with atomic_write(scratch / "stage" / f"{split}.txt") as file:
                file.write(text.encode())
    return f"{target}: {what}"


def main(argv=None):
    """Returns the exit status: 0, or 2 after one line for what the user has to mend."""
    parser = argparse.ArgumentParser(prog="python -m data.sentences", description=__doc__.partition(": ")[2])
    parser.add_argument("corpus", help="name or folder of the corpus")
    parser.add_argument("--to", metavar="DIR", help="the folder to make (default: CORPUS-sentences beside it)")
    arguments = parser.parse_args(argv)
    return exit_status("data.sentences", lambda: print(make(arguments.corpus, arguments.to)))


if __name__ == "__main__":
    sys.exit(main())
