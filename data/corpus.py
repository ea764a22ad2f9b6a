"""Vocabulary and Corpus: three text files become three arrays of word ids, once, then a cache.

A corpus is a folder with train.txt, valid.txt and test.txt (or wiki.train.tokens and so on). Words are what white
space separates; `<eos>` is added after each line. Ids are int32.
"""

import hashlib
import pickle
import time
import zlib
from collections import defaultdict
from itertools import repeat
from pathlib import Path

import numpy as np

from . import pydocs
from .files import CorpusError, atomic_write

EOS = "<eos>"
SOS = "<sos>"
UNK = "<unk>"
SPLITS = ("train", "valid", "test")
CACHE_FORMAT = 1
BLOCK = 1 << 20
"""Characters, bytes or ids that are worked on at once: a large corpus does not fit into memory several times."""
SEALED = 0x2144DF1C
"""The CRC-32 of anything with its own CRC-32, four bytes with the lowest first, behind it."""


class Vocabulary:
    """The words of a model, sorted by how often the training split has them, ties in order of first appearance.

    words: list of str; id -> word.
    counts: list of int, occurrences in the training split.
    """

    def __init__(self, words, counts):
        self.words = list(words)
        self.counts = list(counts)
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    def encode(self, words):
        """Ids of `words`, int32 (N,), and the list of those that are not in the vocabulary.

        Unknown words become `<unk>` where the vocabulary has it.

        Raises CorpusError if there are unknown words and no `<unk>`.
        """
        unknown = [word for word in words if word not in self.ids]
        if unknown and UNK not in self.ids:
            raise CorpusError(
                f"{len(unknown)} words are not in the vocabulary, which has no {UNK} to stand for them: {some(unknown)}"
            )
        ids = map(self.ids.get, words, repeat(self.ids.get(UNK)))
        return np.fromiter(ids, np.int32, len(words)), unknown

    def sentence_start(self):
        """The id of `<sos>`. Raises CorpusError where no sentence begins with it."""
        if SOS not in self.ids:
            raise CorpusError(
                f"--sentences: the text has no {SOS}, which a sentence begins with; "
                f"make one that has by `python -m data.sentences CORPUS`"
            )
        return self.ids[SOS]


class Corpus:
    """A vocabulary and the ids of three splits.

    name: the folder's name. vocabulary: Vocabulary. train, valid, test: int32 arrays (N,).
    checksums: {split: SHA-256 of its file}. options: the vocabulary options it was built with.
    """

    def __init__(self, name, vocabulary, splits, checksums, options):
        self.name = name
        self.vocabulary = vocabulary
        self.train, self.valid, self.test = (splits[split] for split in SPLITS)
        self.checksums = checksums
        self.options = options

    @classmethod
    def load(cls, folder, vocab="all", vocab_size=None, notice=print):
        """Read the corpus in `folder`, from its cache where that is current, else from the text, writing the cache.

        vocab: "all" for the types of all three splits (as the papers count them), "train" for those of the training
            split alone; then unseen words of valid and test become `<unk>`.
        vocab_size: keep only this many types, the most frequent of the training split, `<eos>` and `<unk>` included.
        notice: called with one line when a corpus is built, a cache is replaced or can't be written.

        Raises CorpusError for a missing, empty or non-UTF-8 file.
        """
        folder = Path(folder)
        paths = {split: split_file(folder, split) for split in SPLITS}
        options = {"vocab": vocab, "vocab_size": vocab_size}
        key = {"format": CACHE_FORMAT, **options, "checksums": {s: sha256(path) for s, path in paths.items()}}
        cache = folder / f"corpus-{vocab}{'' if vocab_size is None else f'-{vocab_size}'}.pkl"
        content = _read_cache(cache, key, notice)
        if content is None:
            start = time.perf_counter()
            content = _build(paths, vocab, vocab_size)
            notice(f"{folder.name}: tokenized in {time.perf_counter() - start:.1f} s")
            _write_cache(cache, key, content, notice)
        words, counts, splits = content
        return cls(folder.name, Vocabulary(words, counts), splits, key["checksums"], options)


def find_corpus(data):
    """The folder that `--data` names: a folder, the name of one under ./data, or pydocs, which is made when absent.

    Raises CorpusError when there is no such folder.
    """
    if data == "pydocs" and not Path(data).is_dir():
        return pydocs.ensure(Path("data") / data)
    for folder in (Path(data), Path("data") / data):
        if folder.is_dir():
            return folder
    name = Path(data).name
    known = name if name in ("wikitext-2", "wikitext-103", "penn") else "wikitext-2"
    raise CorpusError(
        f"no corpus folder {data}: expected train.txt, valid.txt and test.txt in it; "
        f"run `python -m data.prepare {known}`, or use --data pydocs, which needs no download"
    )


def split_file(folder, split):
    """The path of one split of the corpus in `folder`. Raises CorpusError when it is missing."""
    names = (f"{split}.txt", f"wiki.{split}.tokens")
    for path in (Path(folder) / name for name in names):
        if path.is_file():
            return path
    raise CorpusError(f"{folder} has neither {names[0]} nor {names[1]}: a corpus has train, valid and test files")


def read_blocks(path):
    """Yield a text file in pieces of about BLOCK characters that end with a line.

    Raises CorpusError when the file can't be read, is empty or not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            if not (block := file.read(BLOCK)):
                raise CorpusError(f"{path} is empty: expected text")
            while block:
                block += file.readline()
                yield block if block.endswith("\n") else block + "\n"
                block = file.read(BLOCK)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} cannot be read; convert it, "
            f"for example with `iconv -f latin1 -t utf-8`"
        ) from None
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from None


def read_words(path):
    """Yield lists of the words of a text file, `<eos>` after each line. Raises CorpusError as read_blocks does."""
    for block in read_blocks(path):
        yield block.replace("\n", f" {EOS} ").split()


def encode_file(path, vocabulary):
    """Ids of a text file in a given vocabulary, int32 (N,), and its number of unknown words.

    Raises CorpusError when the file is missing, empty or not UTF-8, or has unknown words and there is no `<unk>`.
    """
    ids, unknown = [], 0
    for words in read_words(path):
        block, missing = vocabulary.encode(words)
        ids.append(block)
        unknown += len(missing)
    return np.concatenate(ids), unknown


def sha256(path):
    """SHA-256 of a file, hexadecimal. Raises CorpusError when it can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from None


def some(words):
    """The first few different `words`, for a message."""
    distinct = list(dict.fromkeys(words))
    return ", ".join(distinct[:10]) + (", ..." if len(distinct) > 10 else "")


def _build(paths, vocab, vocab_size):
    """Words, counts and {split: ids} of the text files."""
    first_seen = defaultdict()
    first_seen.default_factory = first_seen.__len__
    splits, types = {}, {}
    for split, path in paths.items():
        ids = bytearray()
        for words in read_words(path):
            ids += np.fromiter(map(first_seen.__getitem__, words), np.int32, len(words)).tobytes()
        splits[split] = np.frombuffer(ids, np.int32)
        types[split] = len(first_seen)
    words = list(first_seen)
    counts = sum(np.bincount(part, minlength=len(words)) for part in _parts(splits["train"]))

    known = types["train"] if vocab == "train" else len(words)
    if known < len(words) or (vocab_size is not None and vocab_size < known):
        words, counts, ids = _restrict(words, counts, known, vocab_size)
    else:
        ids = np.arange(len(words))

    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    new = rank[ids]
    for array in splits.values():
        for part in _parts(array):
            part[:] = new[part]
    return [words[i] for i in order], counts[order].tolist(), splits


def _parts(array):
    """Views of an array (N,), one after another, of BLOCK elements at most."""
    return [array[begin : begin + BLOCK] for begin in range(0, len(array), BLOCK)]


def _restrict(words, counts, known, vocab_size):
    """Keep `vocab_size` (or all) of the first `known` words; the others become `<unk>`.

    Returns the kept words, their counts, and for each old id the new one.
    """
    special = [word for word in (EOS, UNK) if word in words[:known]]
    frequency = counts[:known].copy()
    frequency[[words.index(word) for word in special]] = np.iinfo(frequency.dtype).max
    size = known if vocab_size is None else min(vocab_size - (UNK not in special), known)
    kept = np.sort(np.argsort(-frequency, kind="stable")[:size])
    kept_words = [words[i] for i in kept]
    if UNK not in special:
        kept_words.append(UNK)
    unk = kept_words.index(UNK)
    ids = np.full(len(words), unk)
    ids[kept] = np.arange(len(kept))
    return kept_words, np.bincount(ids, weights=counts, minlength=len(kept_words)).astype(np.int64), ids


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, bytes, lists and dicts; whatever would have to be imported or called is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


class _Sealing:
    """What the pickler writes to: a file, and the CRC-32 of all that went into it."""

    def __init__(self, file):
        self.file, self.checksum = file, 0

    def write(self, data):
        self.checksum = zlib.crc32(data, self.checksum)
        return self.file.write(data)


def _write_cache(path, key, content, notice):
    words, counts, splits = content
    buffers = {split: pickle.PickleBuffer(array.astype("<i4", copy=False)) for split, array in splits.items()}
    try:
        with atomic_write(path) as file:
            sealing = _Sealing(file)
            pickle.dump({"key": key, "words": words, "counts": counts, "ids": buffers}, sealing, 5)
            file.write(sealing.checksum.to_bytes(4, "little"))
    except OSError as error:
        notice(f"{path} can't be written ({error.strerror}): the corpus will be tokenized again next time")


def _read_cache(path, key, notice):
    """Words, counts and {split: ids} of the cache, or None when it is absent, stale or damaged (with a notice)."""
    try:
        with open(path, "rb") as file:
            checksum = 0
            while block := file.read(BLOCK):
                checksum = zlib.crc32(block, checksum)
            if checksum != SEALED:
                raise ValueError("checksum mismatch")
            file.seek(0)
            content = _PlainUnpickler(file).load()
        if content["key"] != key:
            notice(f"{path} is stale: the text or the vocabulary options have changed; rebuilding it")
            return None
        splits = {split: np.frombuffer(content["ids"][split], "<i4") for split in SPLITS}
        return content["words"], content["counts"], splits
    except OSError:
        return None
    except Exception as error:  # a damaged pickle can raise almost anything
        notice(f"{path} is damaged ({type(error).__name__}: {error}); rebuilding it")
        return None
