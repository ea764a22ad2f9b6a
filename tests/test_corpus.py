"""Text files to ids: words, vocabularies, the cache and what can befall it, errors."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import random
import tempfile
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Corpus, CorpusError, Vocabulary, corpus, find_corpus, pydocs
from data.corpus import SPLITS, encode_file

EOS, UNK = "<eos>", "<unk>"
TEXTS = {
    "train": "the fox jumps over the dog\n\n the dog\tsleeps \nfox\n" * 7,
    "valid": "the cat sees the <unk> dog\n",
    "test": "a fox sees zebras\nand the dog",
}


def expected(folder, vocab="all", vocab_size=None):
    """Words, counts and {split: ids}, the slow way: line by line, a Counter, sorted()."""
    streams = {}
    for split in SPLITS:
        with open(folder / f"{split}.txt", encoding="utf-8-sig") as file:
            streams[split] = [word for line in file for word in [*line.split(), EOS]]
    frequency = Counter(streams["train"])
    kept = [*dict.fromkeys(word for split in SPLITS for word in streams[split])]
    if vocab == "train":
        everything, kept = kept, [word for word in kept if word in frequency]
        kept += [UNK] * (len(kept) < len(everything) and UNK not in kept)
    if vocab_size is not None and vocab_size < len(kept):
        ranked = sorted(set(kept) - {EOS, UNK}, key=lambda word: (-frequency[word], kept.index(word)))
        chosen = {EOS, UNK, *ranked[: vocab_size - 2]}
        kept = [word for word in kept if word in chosen] + [UNK] * (UNK not in kept)
    known = set(kept)
    streams = {split: [word if word in known else UNK for word in stream] for split, stream in streams.items()}
    frequency = Counter(streams["train"])
    words = sorted(kept, key=lambda word: -frequency[word])
    ids = {word: i for i, word in enumerate(words)}
    return words, [frequency[word] for word in words], {s: [ids[word] for word in streams[s]] for s in SPLITS}


def contents(loaded):
    """What `expected` returns, of a Corpus."""
    arrays = {"train": loaded.train, "valid": loaded.valid, "test": loaded.test}
    return loaded.vocabulary.words, loaded.vocabulary.counts, {split: array.tolist() for split, array in arrays.items()}


def load(folder, **options):
    """contents() of a corpus, and the notices that loading it gave."""
    notices = []
    return contents(Corpus.load(folder, notice=notices.append, **options)), notices


@pytest.fixture
def make(tmp_path):
    """make(TEXTS, NAME): a new corpus folder; texts may be bytes."""

    def write(texts=TEXTS, name="corpus"):
        folder = tmp_path / name
        folder.mkdir()
        for split, text in texts.items():
            (folder / f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder

    return write


@pytest.fixture
def link(tmp_path):
    """link(FOLDER): the same texts in a new folder, where the cache may be written."""

    def make_links(folder):
        for split in SPLITS:
            (tmp_path / f"{split}.txt").symlink_to(folder / f"{split}.txt")
        return tmp_path

    return make_links


@pytest.fixture
def cached(make):
    """A corpus folder with its cache, the cache's path, and what it holds."""
    folder = make()
    fresh, _ = load(folder)
    return folder, folder / "corpus-all.pkl", fresh


@pytest.mark.parametrize(
    ("name", "tokens", "types"),
    [("penn", (929_589, 73_760, 82_430), 10_000), ("wikitext-2", (2_088_628, 217_646, 245_569), 33_278)],
)
def test_published_counts(corpus_folder, link, name, tokens, types):
    """As Mikolov et al. 2010 and Merity et al. 2016 count them, `<eos>` included."""
    loaded = Corpus.load(link(corpus_folder(name)), notice=[].append)
    assert (len(loaded.train), len(loaded.valid), len(loaded.test)) == tokens
    assert len(loaded.vocabulary) == len(set(loaded.vocabulary.words)) == types
    assert sum(loaded.vocabulary.counts) == tokens[0]


def test_penn_is_what_a_slow_tokenizer_makes_of_it(corpus_folder, link):
    """Words, counts and ids; and decoded word by word it is its text again."""
    folder = link(corpus_folder("penn"))
    loaded = Corpus.load(folder, notice=[].append)
    assert contents(loaded) == expected(folder)
    words = loaded.vocabulary.words
    for split in SPLITS:
        text = (folder / f"{split}.txt").read_text(encoding="utf-8")
        decoded = " ".join(words[i] for i in getattr(loaded, split)).replace(EOS, "\n")
        assert [line.strip() for line in decoded.split("\n")] == [line.strip() for line in text.split("\n")]


def test_ids_are_int32_of_words_sorted_by_training_frequency(tiny_corpus, link):
    """Ties in order of first appearance; name, options and checksums say what was read."""
    folder = link(tiny_corpus)
    loaded = Corpus.load(folder, notice=[].append)
    assert contents(loaded) == expected(folder)
    assert {array.dtype for array in (loaded.train, loaded.valid, loaded.test)} == {np.dtype("int32")}
    assert loaded.vocabulary.counts == np.bincount(loaded.train).tolist()
    assert loaded.vocabulary.counts == sorted(loaded.vocabulary.counts, reverse=True)
    assert [loaded.vocabulary.ids[word] for word in loaded.vocabulary.words] == list(range(len(loaded.vocabulary)))
    assert (loaded.name, loaded.options) == (folder.name, {"vocab": "all", "vocab_size": None})
    assert loaded.checksums == {s: hashlib.sha256((folder / f"{s}.txt").read_bytes()).hexdigest() for s in SPLITS}


SHAPES = {
    "plain": (b"a b\nc\n", f"a b {EOS} c {EOS}"),
    "no newline at the end": (b"a b\nc", f"a b {EOS} c {EOS}"),
    "CRLF": (b"a b\r\nc\r\n", f"a b {EOS} c {EOS}"),
    "CRLF, no newline at the end": (b"a b\r\n\r\nc", f"a b {EOS} {EOS} c {EOS}"),
    "BOM": (b"\xef\xbb\xbfa b\nc\n", f"a b {EOS} c {EOS}"),
    "blank lines": (b"\n\na\n \t \n\nb\n\n", f"{EOS} {EOS} a {EOS} {EOS} {EOS} b {EOS} {EOS}"),
    "one newline": (b"\n", EOS),
    "one word": (b"a", f"a {EOS}"),
    "spaces around and between": (b"  a   b \t c  \n", f"a b c {EOS}"),
    "white space beyond ASCII": ("a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g\x0bh\x0ci\x1cj\n".encode(), None),
    "no white space": ("a\u200bb\u2060c\ufeffd\n".encode(), f"a\u200bb\u2060c\ufeffd {EOS}"),
    "special words in the text": (b"a <eos> <unk>\n", f"a {EOS} {UNK} {EOS}"),
    "other scripts": ("größe Größe ГРАФ 東京 e\u0301 é 𝒳\n".encode(), f"größe Größe ГРАФ 東京 e\u0301 é 𝒳 {EOS}"),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_text(make, shape, split):
    """What separates words and ends lines, in each of the three files and in a file of its own."""
    text, words = SHAPES[shape]
    words = (words or f"a b c d e f g h i j {EOS}").split(" ")
    folder = make({**TEXTS, split: text})
    loaded = Corpus.load(folder, notice=[].append)
    assert [loaded.vocabulary.words[i] for i in getattr(loaded, split)] == words
    ids, unknown = encode_file(folder / f"{split}.txt", loaded.vocabulary)
    assert [loaded.vocabulary.words[i] for i in ids] == words
    assert (ids.dtype, unknown) == (np.int32, 0)


def test_names_of_wikitext_files(make, tmp_path):
    """wiki.train.tokens and its like are read as train.txt is; where both are there, train.txt is."""
    folder = make()
    wiki = tmp_path / "wiki"
    wiki.mkdir()
    for split in SPLITS:
        (wiki / f"wiki.{split}.tokens").write_bytes((folder / f"{split}.txt").read_bytes())
    assert load(wiki)[0] == load(folder)[0]
    (wiki / "train.txt").write_text("another\n")
    assert load(wiki)[0][2]["train"] == [load(wiki)[0][0].index(word) for word in ("another", EOS)]


LETTERS = st.text(alphabet="aab cé東\n\n\r\t\u3000\x1c", min_size=1, max_size=60)


@given(
    texts=st.tuples(LETTERS, LETTERS, LETTERS),
    vocab=st.sampled_from(["all", "train"]),
    vocab_size=st.none() | st.integers(3, 9),
    block=st.integers(1, 30),
)
def test_any_text_in_blocks_of_any_size(texts, vocab, vocab_size, block):
    """Blocks that end within a word, a CRLF or at a line's end; every vocabulary option."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(corpus, "BLOCK", block)
        for split, text in zip(SPLITS, texts, strict=True):
            (Path(name) / f"{split}.txt").write_bytes(text.encode())
        loaded, _ = load(Path(name), vocab=vocab, vocab_size=vocab_size)
        assert loaded == expected(Path(name), vocab, vocab_size)


@pytest.mark.parametrize("block", [1, 2, 13, 89])
def test_small_blocks_give_the_same_ids(tiny_corpus, link, monkeypatch, block):
    """A corpus and a file in its vocabulary, read in pieces; blocks end with a line."""
    folder = link(tiny_corpus)
    monkeypatch.setattr(corpus, "BLOCK", block)
    pieces = list(corpus.read_blocks(folder / "train.txt"))
    assert "".join(pieces) == (folder / "train.txt").read_text()
    assert len(pieces) > 30
    assert all(piece.endswith("\n") for piece in pieces)
    loaded = Corpus.load(folder, notice=[].append)
    assert contents(loaded) == expected(folder)
    ids, unknown = encode_file(folder / "test.txt", loaded.vocabulary)
    assert (ids.tolist(), unknown) == (loaded.test.tolist(), 0)


@pytest.mark.parametrize("train", [TEXTS["train"], TEXTS["train"] + "<unk>\n"], ids=["no <unk> in train", "<unk>"])
def test_vocabulary_of_train_alone(make, train):
    """Words of valid and test that train has not become `<unk>`, which is added where train has none."""
    folder = make({**TEXTS, "train": train})
    loaded = Corpus.load(folder, vocab="train", notice=[].append)
    assert contents(loaded) == expected(folder, "train")
    words = loaded.vocabulary.words
    assert sorted(words) == sorted({*train.split(), EOS, UNK})
    assert " ".join(words[i] for i in loaded.valid) == f"the {UNK} {UNK} the {UNK} dog {EOS}"
    assert " ".join(words[i] for i in loaded.test) == f"{UNK} fox {UNK} {UNK} {EOS} {UNK} the dog {EOS}"
    assert loaded.vocabulary.counts[loaded.vocabulary.ids[UNK]] == train.split().count(UNK)


def test_vocabulary_of_train_adds_no_unk_for_nothing(make):
    """Where valid and test have no other words, the vocabulary is that of the text."""
    folder = make({"train": "a b\n", "valid": "b\n", "test": "a\n"})
    assert load(folder, vocab="train")[0] == load(folder)[0] == expected(folder)


@pytest.mark.parametrize("vocab", ["all", "train"])
@pytest.mark.parametrize("size", [3, 4, 11, 28])
def test_vocabulary_size(tiny_corpus, link, vocab, size):
    """Exactly N types: `<eos>`, `<unk>` and the most frequent of the rest; no training token is lost."""
    folder = link(tiny_corpus)
    loaded = Corpus.load(folder, vocab, size, notice=[].append)
    assert contents(loaded) == expected(folder, vocab, size)
    vocabulary = loaded.vocabulary
    assert len(vocabulary) == len(set(vocabulary.words)) == size
    assert {EOS, UNK} < set(vocabulary.words)
    assert sum(vocabulary.counts) == len(loaded.train) == len(Corpus.load(folder, notice=[].append).train)
    assert vocabulary.counts == sorted(vocabulary.counts, reverse=True)
    frequency = Counter((folder / "train.txt").read_text().split())
    kept = [frequency[word] for word in vocabulary.words if word not in (EOS, UNK)]
    assert min(kept) >= max(frequency[word] for word in frequency.keys() - set(vocabulary.words))
    assert loaded.options == {"vocab": vocab, "vocab_size": size}


@pytest.mark.parametrize("size", range(3, 11))
def test_vocabulary_size_without_unk_in_the_text(make, size):
    """`<unk>` takes one of the N places; rare `<eos>` keeps its own."""
    texts = {"train": " ".join(letter * 2 for letter in "abc" * 5 + "defghij"), "valid": "aa\n", "test": "jj new\n"}
    folder = make(texts)
    loaded, _ = load(folder, vocab_size=size)
    assert loaded == expected(folder, vocab_size=size)
    assert len(loaded[0]) == size
    assert {EOS, UNK} < set(loaded[0])
    assert sum(loaded[1]) == 23


@pytest.mark.parametrize("valid", [TEXTS["valid"], "the cat\n"], ids=["<unk>", "no <unk>"])
def test_a_vocabulary_size_that_all_words_fit_in_changes_nothing(make, valid):
    """There is nothing that would have to become `<unk>`, so none is added."""
    folder = make({**TEXTS, "valid": valid})
    everything, _ = load(folder)
    assert load(folder, vocab_size=len(everything[0]))[0] == load(folder, vocab_size=1000)[0] == everything


def test_a_second_load_reads_the_cache(cached, monkeypatch):
    """The same corpus, no text read, no notice; its arrays can be written to, as the fresh ones can."""
    folder, _, fresh = cached
    first = Corpus.load(folder.parent / "corpus", notice=pytest.fail)
    monkeypatch.setattr(corpus, "_build", lambda *_: pytest.fail("tokenized again"))
    loaded = Corpus.load(folder, notice=pytest.fail)
    assert contents(loaded) == fresh == expected(folder)
    assert {array.dtype for array in (loaded.train, loaded.valid, loaded.test)} == {np.dtype("int32")}
    assert (loaded.name, loaded.options, loaded.checksums) == (first.name, first.options, first.checksums)
    loaded.train[0] = 0


def test_a_large_text_is_never_in_memory_as_a_whole(make, monkeypatch):
    """Building and reading the cache take the ids, four bytes a word, and little more; 200,000 words."""
    folder = make({**TEXTS, "train": f"{' '.join(f'w{number % 101}' for number in range(999))}\n" * 200})
    monkeypatch.setattr(corpus, "BLOCK", 1 << 12)
    for _ in ("built", "cached"):
        tracemalloc.start()
        loaded = Corpus.load(folder, notice=str)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1.6 * loaded.train.nbytes


@pytest.mark.parametrize("split", SPLITS)
def test_a_changed_text_makes_the_cache_stale(cached, split):
    """One notice says so; then the new cache holds."""
    folder, path, fresh = cached
    with open(folder / f"{split}.txt", "a") as file:
        file.write("news\n")
    changed, notices = load(folder)
    assert changed == expected(folder) != fresh
    assert [str(path) in notice and "stale" in notice for notice in notices] == [True, False]
    assert notices[1].startswith("corpus: tokenized in")
    assert load(folder) == (changed, [])


def test_another_format_makes_the_cache_stale(cached, monkeypatch):
    """A cache that another version wrote is not trusted."""
    folder, _, fresh = cached
    monkeypatch.setattr(corpus, "CACHE_FORMAT", corpus.CACHE_FORMAT + 1)
    loaded, notices = load(folder)
    assert (loaded, ["stale" in notice for notice in notices]) == (fresh, [True, False])


def test_each_vocabulary_option_has_its_own_cache(make):
    """No option's cache is taken for another's, nor makes it stale."""
    folder = make()
    options = [{"vocab": v, "vocab_size": n} for v in ("all", "train") for n in (None, 5, 7)]
    first = [load(folder, **option)[0] for option in options]
    assert [load(folder, **option) for option in options] == [(loaded, []) for loaded in first]
    assert first == [expected(folder, **option) for option in options]
    assert len(list(folder.glob("*.pkl"))) == 6


def flip(payload, position, bit):
    """The bytes with one bit inverted."""
    return payload[:position] + bytes([payload[position] ^ 1 << bit]) + payload[position + 1 :]


def sealed(content, protocol=5):
    """A cache whose checksum is right, whatever it holds."""
    payload = pickle.dumps(content, protocol)
    return payload + zlib.crc32(payload).to_bytes(4, "little")


DAMAGE = {
    "empty": lambda payload, _: b"",
    "one byte": lambda payload, _: payload[:1],
    "half": lambda payload, _: payload[: len(payload) // 2],
    "all but the last byte": lambda payload, _: payload[:-1],
    "random bytes": lambda payload, _: random.Random(37).randbytes(len(payload)),
    "random middle": lambda payload, _: payload[:200] + random.Random(41).randbytes(200) + payload[400:],
    "text": lambda payload, _: b"not a pickle\n",
    "no checksum": lambda payload, _: payload[:-4],
    "another pickle": lambda payload, _: sealed(["plain", "data"]),
    "no ids": lambda payload, _: sealed({"key": pickle.loads(payload)["key"]}),
    "a bit of the ids": lambda payload, ids: flip(payload, payload.index(ids) + len(ids) // 2, 0),
    "the last bit of the ids": lambda payload, ids: flip(payload, payload.index(ids) + len(ids) - 1, 7),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("split", SPLITS)
def test_a_damaged_cache_is_rebuilt(cached, damage, split):
    """One notice says so; the corpus is right, and so is the new cache."""
    folder, path, fresh = cached
    path.write_bytes(DAMAGE[damage](path.read_bytes(), np.array(fresh[2][split], "<i4").tobytes()))
    loaded, notices = load(folder)
    assert loaded == fresh
    assert [str(path) in notice and "damaged" in notice for notice in notices] == [True, False]
    assert all("\n" not in notice for notice in notices)
    assert load(folder) == (fresh, [])


def test_no_flipped_bit_gives_another_corpus(cached, monkeypatch):
    """Whichever byte of the cache it is in: key, words, counts, ids or between them."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    folder, path, fresh = cached
    payload = path.read_bytes()
    wrong = []
    for position in range(len(payload)):
        path.write_bytes(flip(payload, position, position % 8))
        if load(folder)[0] != fresh:
            wrong.append(position)
    assert wrong == []


class Touch:
    """Unpickled by the library's own loads(), it runs a shell command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a valid cache"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_code_in_a_cache_is_not_run(cached, tmp_path, inside, protocol):
    """It is refused with the notice of a damaged cache, and replaced."""
    folder, path, fresh = cached
    marker = tmp_path / "executed"
    content = {**pickle.loads(path.read_bytes()), "more": Touch(marker)} if inside else Touch(marker)
    path.write_bytes(sealed(content, protocol))
    pickle.loads(path.read_bytes())
    assert marker.exists()
    marker.unlink()
    loaded, notices = load(folder)
    assert loaded == fresh
    assert not marker.exists()
    assert [str(path) in notice and "damaged" in notice for notice in notices] == [True, False]
    assert b"touch" not in path.read_bytes()


@pytest.mark.parametrize("value", [np.arange(3), np.int32(3), Counter("abc"), set, Path("x")], ids=repr)
def test_a_cache_with_anything_to_import_is_refused(cached, value):
    """numpy's arrays and harmless classes of the library too: the list of what is allowed is empty."""
    folder, path, fresh = cached
    path.write_bytes(sealed({**pickle.loads(path.read_bytes()), "more": value}))
    loaded, notices = load(folder)
    assert loaded == fresh
    assert ["not plain data" in notice for notice in notices] == [True, False]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_used_without_a_cache(make, monkeypatch, code):
    """A notice gives the reason each time; nothing is left behind."""

    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(corpus, "atomic_write", refuse)
    folder = make()
    for _ in range(2):
        loaded, notices = load(folder)
        assert loaded == expected(folder)
        assert ["tokenized" in notice for notice in notices] == [True, True]
        assert notices[1].startswith(f"{folder / 'corpus-all.pkl'} can't be written ({os.strerror(code)})")
    assert sorted(path.name for path in folder.iterdir()) == ["test.txt", "train.txt", "valid.txt"]


ROUNDS = 7


def build_at_once(folder, right, barrier, reports):
    """Load folder/0, folder/1 and so on; neither process renames its cache before both have written theirs."""
    os.fsync = lambda _: barrier.wait(30)
    for number in range(ROUNDS):
        loaded, notices = load(folder / str(number))
        reports.put((number, loaded == right, len(notices)))


def test_two_processes_may_build_at_once(tiny_corpus, tmp_path):
    """Both get the right corpus, whoever reads meanwhile finds a whole cache or none, and no other file stays."""
    for number in range(ROUNDS):
        (tmp_path / str(number)).mkdir()
        for split in SPLITS:
            (tmp_path / str(number) / f"{split}.txt").write_bytes((tiny_corpus / f"{split}.txt").read_bytes())
    right = expected(tiny_corpus)
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path, right, context.Barrier(2), reports := context.Queue())
    processes = [context.Process(target=build_at_once, args=arguments, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    caches = [tmp_path / str(number) / "corpus-all.pkl" for number in range(ROUNDS)]
    answers = []
    while len(answers) < 2 * ROUNDS and all(process.exitcode in (None, 0) for process in processes):
        for cache in caches:
            if cache.exists():
                pickle.loads(cache.read_bytes())
        while not reports.empty():
            answers.append(reports.get())
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(answers) == [(number, True, 1) for number in range(ROUNDS) for _ in range(2)]
    for cache in caches:
        assert load(cache.parent) == (right, [])
        assert {path.name for path in cache.parent.iterdir()} == {cache.name, *(f"{split}.txt" for split in SPLITS)}


def refusal(call, *arguments, **options):
    """The message of the CorpusError that a call raises, one line."""
    with pytest.raises(CorpusError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_file_is_named(make, split):
    """Both names that it could have, and the folder."""
    folder = make()
    (folder / f"{split}.txt").unlink()
    message = refusal(Corpus.load, folder, notice=pytest.fail)
    assert message.startswith(f"{folder} has neither {split}.txt nor wiki.{split}.tokens")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("text", [b"", b"\xef\xbb\xbf"], ids=["0 bytes", "BOM"])
def test_an_empty_file_is_named(make, split, text):
    """Nothing is built of it, and no cache is written."""
    folder = make({**TEXTS, split: text})
    assert refusal(Corpus.load, folder, notice=pytest.fail).startswith(f"{folder / split}.txt is empty")
    assert not list(folder.glob("*.pkl"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("text", "byte"),
    [
        ("größe\n".encode("latin1"), "f6"),
        (b"a\n" * 70_001 + b"b\xffc\n", "ff"),
        ("東京"[:1].encode()[:2], "e6"),
        ("a b\n".encode("utf-16"), "ff"),
    ],
    ids=["latin1", "late", "cut", "utf-16"],
)
def test_a_file_that_is_not_utf_8_is_named(make, split, text, byte):
    """With the byte and a way to convert it."""
    message = refusal(Corpus.load, make({**TEXTS, split: text}), notice=pytest.fail)
    assert f"{split}.txt is not UTF-8: byte 0x{byte}" in message
    assert "iconv" in message


def test_files_that_cannot_be_opened_are_named(tmp_path):
    """A missing file, a folder in its place."""
    vocabulary = Vocabulary([EOS, UNK], [1, 1])
    for path, reason in ((tmp_path / "absent.txt", errno.ENOENT), (tmp_path, errno.EISDIR)):
        assert refusal(encode_file, path, vocabulary) == f"{path} cannot be read: {os.strerror(reason)}"
        assert refusal(corpus.sha256, path) == f"{path} cannot be read: {os.strerror(reason)}"


def test_unknown_words_become_unk(tmp_path, monkeypatch):
    """They are returned, in order, each time they occur; encode_file counts them over all blocks."""
    vocabulary = Vocabulary(["a", EOS, UNK, "b"], [5, 3, 2, 1])
    ids, unknown = vocabulary.encode(["a", "x", "b", UNK, "y", "x"])
    assert (ids.tolist(), ids.dtype, unknown) == ([0, 2, 3, 2, 2, 2], np.int32, ["x", "y", "x"])
    ids, unknown = vocabulary.encode([])
    assert (ids.tolist(), ids.dtype, unknown) == ([], np.int32, [])
    monkeypatch.setattr(corpus, "BLOCK", 7)
    (tmp_path / "text").write_text("a x b\n\ny x\n" * 3)
    ids, unknown = encode_file(tmp_path / "text", vocabulary)
    assert (ids.tolist(), ids.dtype, unknown) == ([0, 2, 3, 1, 1, 2, 2, 1] * 3, np.int32, 9)


def test_unknown_words_without_unk_are_named(tmp_path, monkeypatch):
    """Each once, the first ten of them, also where they stand in a late block."""
    vocabulary = Vocabulary(["a", EOS], [5, 3])
    assert vocabulary.encode(["a", EOS, "a"])[0].tolist() == [0, 1, 0]
    message = refusal(vocabulary.encode, ["a", "x", "y", "x"])
    assert message.startswith(f"3 words are not in the vocabulary, which has no {UNK}")
    assert message.endswith(": x, y")
    many = [f"x{i}" for i in range(13)]
    assert refusal(vocabulary.encode, many).endswith(f": {', '.join(many[:10])}, ...")
    monkeypatch.setattr(corpus, "BLOCK", 7)
    (tmp_path / "text").write_text("a a\n" * 11 + "zebra\n")
    assert refusal(encode_file, tmp_path / "text", vocabulary).endswith(": zebra")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder, and pydocs that is not made but recorded: the list of folders asked for."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(pydocs, "ensure", lambda folder: asked.append(folder) or folder)
    return asked


def test_a_corpus_is_found_by_path_and_by_name(elsewhere, tmp_path):
    """A folder of that name here comes first, then one under ./data."""
    (tmp_path / "data" / "mine").mkdir(parents=True)
    assert find_corpus("mine") == Path("data/mine")
    assert find_corpus("./data/mine") == Path("data/mine")
    assert find_corpus(str(tmp_path / "data" / "mine")) == tmp_path / "data" / "mine"
    (tmp_path / "mine").mkdir()
    assert find_corpus("mine") == Path("mine")
    assert elsewhere == []


def test_pydocs_is_made_when_asked_for_by_name(elsewhere, tmp_path):
    """Under ./data, also where that folder is there already (to be checked); a ./pydocs of the user comes first."""
    assert find_corpus("pydocs") == Path("data/pydocs")
    (tmp_path / "data" / "pydocs").mkdir(parents=True)
    assert find_corpus("pydocs") == Path("data/pydocs")
    assert elsewhere == [Path("data/pydocs")] * 2
    assert find_corpus("data/pydocs") == Path("data/pydocs")
    (tmp_path / "pydocs").mkdir()
    assert find_corpus("pydocs") == Path("pydocs")
    assert len(elsewhere) == 2


@pytest.mark.parametrize(
    ("name", "command"),
    [("./data/wikitext-2", "wikitext-2"), ("data/penn", "penn"), ("wikitext-103", "wikitext-103"), ("x", "wikitext-2")],
)
def test_a_missing_folder_is_named_with_what_to_run(elsewhere, tmp_path, name, command):
    """The command for that corpus where there is one, and the corpus that needs no download; files are no folders."""
    (tmp_path / "x").write_text("a file\n")
    message = refusal(find_corpus, name)
    assert message.startswith(f"no corpus folder {name}:")
    assert f"`python -m data.prepare {command}`" in message
    assert "--data pydocs" in message
    assert elsewhere == []
