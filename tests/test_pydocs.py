import errno
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from data import pydocs
from data.files import CorpusError

ROOT = Path(__file__).parents[1]
FILES = ("train.txt", "valid.txt", "test.txt", "VERSION")
SMALL = {"train": "a b\n", "valid": "b\n", "test": "a\n"}


@pytest.fixture(scope="module")
def texts():
    return pydocs.build()


@pytest.fixture(scope="module")
def documents():
    return pydocs.documents()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """ensure() of a small text: the list of its notices, and temporary files under tmp_path/tmp."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(pydocs, "build", lambda: SMALL)
    return []


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_every_process_writes_the_same_bytes_also_when_two_write_one_folder(tmp_path):
    """Three processes at once: other hash seeds, locales and working directories; the last two share a folder."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from data import pydocs; print(pydocs.ensure(sys.argv[2]))"
    processes = []
    for seed, folder, locale in (("0", "one", "C"), ("1", "two", "C.UTF-8"), ("2", "two", "POSIX")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale, "PYTHONUTF8": "0"}
        command = [sys.executable, "-c", code, str(ROOT), str(tmp_path / folder)]
        processes.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [Path(output.strip()).name for output in outputs] == ["one", "two", "two"]
    assert set(contents(tmp_path / "one")) == set(FILES)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_every_document_is_in_one_split_and_no_sentence_in_two(texts, documents):
    assert list(documents) == sorted(documents)
    owner = {}
    lengths = dict.fromkeys(pydocs.SPLITS, 0)
    for name, sentences in documents.items():
        lengths[pydocs.split_of(name)] += len(sentences)
        for sentence in sentences:
            assert owner.setdefault(sentence, name) == name
    assert lengths == {split: text.count("\n") for split, text in texts.items()}
    train = set(texts["train"].splitlines())
    for split in ("valid", "test"):
        repeated = [line for line in texts[split].splitlines() if "<unk>" not in line and line in train]
        assert not repeated


def test_both_kinds_of_document_are_in_every_split(documents):
    for split in pydocs.SPLITS:
        kinds = {name.startswith("topic ") for name, own in documents.items() if own and pydocs.split_of(name) == split}
        assert kinds == {True, False}


def test_words_of_the_splits_are_those_that_train_has_often_enough(texts, documents):
    counts = {}
    for name, sentences in documents.items():
        if pydocs.split_of(name) == "train":
            for sentence in sentences:
                for word in sentence:
                    counts[word] = counts.get(word, 0) + 1
    for split, text in texts.items():
        words = [word for line in text.splitlines() for word in line.split()]
        raw = [w for name, own in documents.items() if pydocs.split_of(name) == split for line in own for w in line]
        assert words == [word if counts.get(word, 0) >= pydocs.MIN_COUNT else "<unk>" for word in raw]
    types = {split: set(text.split()) for split, text in texts.items()}
    assert types["valid"] | types["test"] <= types["train"]
    assert 4_000 < len(types["train"]) < 10_000


def test_size(texts):
    tokens = {split: sum(len(line.split()) + 1 for line in text.splitlines()) for split, text in texts.items()}
    total = sum(tokens.values())
    assert 300_000 < total < 600_000
    assert 0.03 < tokens["valid"] / total < 0.07
    assert 0.03 < tokens["test"] / total < 0.07
    assert texts["train"].count("<unk>") < 0.03 * tokens["train"]


def test_lines_are_prose(texts):
    for text in texts.values():
        assert text.endswith("\n") and "\n\n" not in text
        lines = [line.split(" ") for line in text.splitlines()]
        assert all(4 <= len(line) <= 100 for line in lines)
        assert not any(">>>" in line or "===" in line or "-----" in line for line in lines)
        assert "." in lines[0] and sum(line[-1] == "." for line in lines) > 0.7 * len(lines)


def test_sentences_of_a_docstring():
    text = """
        Statements
        ----------
        Return the *name* of a 32-bit value, e.g. 3.11 or :func:`os.path`.  It isn't
        built-in (since version 2.)  See below, as it is::

           value = the first of a list of values
           for value in the list: call the function

        These are the names:
          the first of them
        * the first item of all,
          which goes on
        * the second item of all
        path -- where the file is found
        mode -- how the file is opened

        >>> this is the input.
        And this is the output.
    """
    assert [" ".join(words) for words in pydocs.sentences_of(text)] == [
        "return the name of a N-bit value , e.g. N or os . path .",
        "it isn't built-in ( since version N . )",
        "see below , as it is :",
        "these are the names :",
        "the first of them",
        "the first item of all , which goes on",
        "the second item of all",
        "path -- where the file is found",
        "mode -- how the file is opened",
    ]


def test_files_that_cannot_be_parsed_and_tests_are_skipped(tmp_path):
    for name, source in {
        "abc.py": b'"""Of the module."""\nclass A:\n    """Of the class."""\n\n# of a\n# comment\n',
        "ast.py": b"def broken(:\n",
        "os.py": b'"""\xff"""\n',
        "re.py": b'# coding: ascii\n\n\n"""\xff"""\n',
        "encodings/ascii.py": b'"""Of a codec."""\n',
        "json/decoder.py": b'if 1:\n    def f():\n        "A function."\n',
        "json/tests/a.py": b'"""Of a test."""\n',
        "not_of_the_library.py": b'"""Of another."""\n',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(source)
    found = {name: [text for text in texts if text] for name, texts in pydocs._read_library(tmp_path)}
    assert found == {"abc": ["Of the module.", "Of the class.", "of a\ncomment\n"], "json.decoder": ["A function."]}


def test_without_library_sources_the_error_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "zipped"))
    with pytest.raises(CorpusError) as caught:
        pydocs.ensure(tmp_path / "pydocs")
    message = str(caught.value)
    assert str(tmp_path / "zipped") in message and "data.prepare wikitext-2" in message and "--data" in message
    assert "\n" not in message
    assert not (tmp_path / "pydocs").exists()


def test_a_current_corpus_is_left_alone(tmp_path, small, monkeypatch):
    folder = tmp_path / "data" / "pydocs"
    assert pydocs.ensure(folder, small.append) == folder
    assert {name: content.decode() for name, content in contents(folder).items()} == {
        **{f"{split}.txt": text for split, text in SMALL.items()},
        "VERSION": pydocs.VERSION + "\n",
    }
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    monkeypatch.setattr(pydocs, "build", lambda: pytest.fail("built again"))
    assert pydocs.ensure(folder, small.append) == folder
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert small == []


def test_a_stale_corpus_is_rebuilt_with_one_notice(tmp_path, small):
    (tmp_path / "VERSION").write_bytes(b"CPython 3.0.0 \xff format 1\n")
    for split in pydocs.SPLITS:
        (tmp_path / f"{split}.txt").write_text("old\n")
    assert pydocs.ensure(tmp_path, small.append) == tmp_path
    assert (tmp_path / "train.txt").read_text() == SMALL["train"]
    assert (tmp_path / "VERSION").read_text().strip() == pydocs.VERSION
    assert len(small) == 1 and "3.0.0" in small[0] and pydocs.VERSION in small[0] and "\n" not in small[0]


def test_a_missing_file_is_written_again(tmp_path, small):
    pydocs.ensure(tmp_path, small.append)
    (tmp_path / "valid.txt").unlink()
    pydocs.ensure(tmp_path, small.append)
    assert (tmp_path / "valid.txt").read_text() == SMALL["valid"]
    assert small == []


def test_an_interrupted_rebuild_is_not_taken_for_the_version_that_was_there(tmp_path, small, monkeypatch):
    pydocs.ensure(tmp_path, small.append)
    write = pydocs.atomic_write

    def interrupted(path):
        if path.name == "test.txt":
            raise KeyboardInterrupt
        return write(path)

    with monkeypatch.context() as patch:
        patch.setattr(pydocs, "VERSION", "CPython 99")
        patch.setattr(pydocs, "build", lambda: {"train": "new\n", "valid": "new\n", "test": "new\n"})
        patch.setattr(pydocs, "atomic_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pydocs.ensure(tmp_path, small.append)
    pydocs.ensure(tmp_path, small.append)
    assert (tmp_path / "train.txt").read_text() == SMALL["train"]


def check_fallback(folder, notices):
    """Two calls write to two fresh private folders, and say so in one line each."""
    found = [pydocs.ensure(folder, notices.append) for _ in range(2)]
    assert found[0] != found[1]
    for place, notice in zip(found, notices, strict=True):
        assert place.name == "pydocs" and place.parent.parent == Path(tempfile.gettempdir())
        assert place.parent.stat().st_mode & 0o077 == 0
        assert set(contents(place)) == set(FILES)
        assert str(folder) in notice and str(place) in notice and "\n" not in notice


def test_where_the_folder_cannot_be_created_a_temporary_one_is_used(tmp_path, small):
    (tmp_path / "data").write_text("a file")
    check_fallback(tmp_path / "data" / "pydocs", small)
    assert "Not a directory" in small[0]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_where_the_folder_cannot_be_written_a_temporary_one_is_used(tmp_path, small, monkeypatch, code):
    folder = tmp_path / "pydocs"
    folder.mkdir()
    (folder / "VERSION").write_text("CPython 3.0.0\n")
    write, unlink = pydocs.atomic_write, Path.unlink

    def refuse(change):
        def changed(path, *arguments, **options):
            if path.parent == folder:
                raise OSError(code, os.strerror(code), str(path))
            return change(path, *arguments, **options)

        return changed

    monkeypatch.setattr(pydocs, "atomic_write", refuse(write))
    monkeypatch.setattr(Path, "unlink", refuse(unlink))
    check_fallback(folder, small)
    assert os.strerror(code) in small[0]
    assert contents(folder) == {"VERSION": b"CPython 3.0.0\n"}
