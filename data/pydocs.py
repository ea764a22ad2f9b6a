"""The embedded corpus: English about Python, made from the documentation that every CPython carries.

Documents are the topics of `pydoc_data.topics` and the modules of the standard library: the docstrings and comment
blocks of their source files, which are parsed, never imported. What reads as prose becomes one sentence a line, lower
case, numbers as `N`; a sentence that an earlier document has is left out, so no split repeats another. Words that the
training split has only once are `<unk>`. The same Python version always gives the same bytes.
"""

import ast
import platform
import re
import sys
import sysconfig
import tempfile
import zlib
from collections import Counter
from importlib.util import decode_source
from pathlib import Path

from .files import CorpusError, atomic_write

SPLITS = ("train", "valid", "test")
VERSION = f"{platform.python_implementation()} {platform.python_version()} format 1"
MIN_COUNT = 2
MIN_LINES = 10_000

# Not in every build, or tables rather than text.
LEFT_OUT = {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "tkinter", "turtledemo"}
FOLDERS_LEFT_OUT = {"test", "tests", "macholib"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

TOKEN = re.compile(
    r"""[ei]\.[ge]\. | [^\W\d]\w*(?:[-']\w+)* | \d[\w.,]*(?<![.,])(?:-[^\W\d]\w*)*  # e.g.  built-in  3.11  32-bit
    | --+ | \.\.+ | \(\) | [^\w\s'"`‘“”]""",
    re.VERBOSE,
)
NUMBER = re.compile(r"^\d[\w.,]*")
BULLET = re.compile(r"^( *)(?:[*+-]|\d+[.)]|\([a-z\d]\)|[a-z]\))( +)(?=\S)", re.MULTILINE)
DEFINITION = re.compile(r"\S+( -+ |: )|\S*[^\s.,:;!?]\s{2,}")  # `name -- what it is`, `name:  what it is`
MARKUP = re.compile(r":[\w:]+:`|:(?=:)|(?<!\w)\*+(?=\w[^*]*\*)|(?<=\w)\*+(?!\w)")  # :func:`name`, `::`, *name*
SENTENCE = re.compile(r"(?:(?<=[.!?])|(?<=[.!?]\))) +(?=[A-Z(])")
COMMON = {"a", "an", "and", "are", "as", "be", "by", "for", "in", "is", "it", "of", "that", "the", "this", "to", "we"}
WORD = re.compile(r"a|[a-z][a-z'-]+")
CODE = re.compile(r"[=|<>%@&~#{}\\]|//|\*\*|^(?:async|class|def|elif|except|for|if|while|with) .*:(?: |$)")


def ensure(folder, notice=print):
    """The folder that holds the corpus of this Python: `folder`, made or brought up to date where need be.

    When `folder` can't be written, a new temporary folder is used. `notice` is called with one line in that case, and
    when a corpus of another version is replaced. Raises CorpusError when this Python has no library sources.
    """
    folder = Path(folder)
    try:
        found = (folder / "VERSION").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        found = None
    if found == VERSION and all((folder / f"{split}.txt").is_file() for split in SPLITS):
        return folder
    texts = build()
    try:
        _write(folder, texts)
    except OSError as error:
        refused, folder = folder, Path(tempfile.mkdtemp(prefix="recurrent-lm-")) / "pydocs"
        _write(folder, texts)
        notice(f"{refused} cannot be written ({error.strerror}): the corpus is in {folder}")
    else:
        if found not in (None, VERSION):
            notice(f"{folder}: rebuilt for {VERSION} (was {found})")
    return folder


def _write(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "VERSION").unlink(missing_ok=True)  # while the files change, they are of no version
    for split, text in texts.items():
        with atomic_write(folder / f"{split}.txt") as file:
            file.write(text.encode(errors="replace"))  # a docstring may have lone surrogates
    with atomic_write(folder / "VERSION") as file:
        file.write(f"{VERSION}\n".encode())


def build():
    """{split: its text, a sentence a line}, rare words replaced. Raises CorpusError when there is too little text."""
    lines = {split: [] for split in SPLITS}
    for name, sentences in documents().items():
        lines[split_of(name)] += sentences
    counts = Counter(word for line in lines["train"] for word in line)
    return {
        split: "".join(" ".join(w if counts[w] >= MIN_COUNT else "<unk>" for w in line) + "\n" for line in own)
        for split, own in lines.items()
    }


def split_of(name):
    """The split of the document `name`. 1 and 17 are two twentieths of the names that are 5 % of the text each."""
    return {1: "valid", 17: "test"}.get(zlib.crc32(name.encode()) % 20, "train")


def documents():
    """{name: its sentences, tuples of words}, by name; a sentence belongs to the first document that has it.

    Raises CorpusError when there is too little text.
    """
    library = Path(sysconfig.get_path("stdlib"))
    seen, result = set(), {}
    for name, texts in sorted(_read_library(library)):
        own = dict.fromkeys(tuple(sentence) for text in texts for sentence in sentences_of(text))
        result[name] = [sentence for sentence in own if sentence not in seen]
        seen.update(own)
    if len(seen) < MIN_LINES:
        raise CorpusError(
            f"pydocs: {len(seen)} sentences in the .py files under {library}, expected over {MIN_LINES}: this Python "
            f"lacks its library's sources; use --data with a folder, or `python -m data.prepare wikitext-2`"
        )
    return result


def _read_library(library):
    """Yield (name, texts) of each topic and module, in no particular order, skipping files that can't be parsed."""
    for package in sys.stdlib_module_names - LEFT_OUT:
        for path in (library / f"{package}.py", *(library / package).rglob("*.py")):
            parts = path.relative_to(library).with_suffix("").parts
            if FOLDERS_LEFT_OUT.intersection(parts):
                continue
            try:
                source = decode_source(path.read_bytes())
                tree = ast.parse(source)
            except (OSError, ValueError, SyntaxError):
                continue
            if parts == ("pydoc_data", "topics"):
                for name, text in ast.literal_eval(tree.body[-1].value).items():
                    yield f"topic {name}", [text]
            else:
                comments = re.findall(r"(?:^ *#.*\n)+", source, re.MULTILINE)
                yield ".".join(parts), [*_docstrings(tree), *(re.sub(r"(?m)^ *#+ ?", "", text) for text in comments)]


def _docstrings(node):
    if isinstance(node, DOCUMENTED):
        yield ast.get_docstring(node) or ""
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            yield from _docstrings(child)


def sentences_of(text):
    """Yield the sentences of a text as lists of words; what looks like code, short headings and rulers are left out."""
    for paragraph in _paragraphs(text):
        for sentence in SENTENCE.split(MARKUP.sub("", paragraph)):
            words = [NUMBER.sub("N", w) if w[0].isdecimal() else w.lower() for w in TOKEN.findall(sentence)]
            plain = sum(WORD.fullmatch(word) is not None for word in words)
            prose = plain > len(words) / 2 and not CODE.search(sentence)
            if 4 <= len(words) <= 100 and prose and (words[-1] == "." or not COMMON.isdisjoint(words)):
                yield words


def _paragraphs(text):
    """Yield the paragraphs, list items and definitions of an indented text, each joined to one line."""
    text = text.expandtabs().replace("’", "'")
    text = BULLET.sub(lambda bullet: "\n" + " " * len(bullet[0]), text)
    for block in re.split(r"\n\s*\n", text):
        lines, indent = [], 0
        for line in block.split("\n"):
            start, before = len(line) - len(line.lstrip()), indent
            line, indent = line.strip(), start
            if line.startswith(">>>"):
                break
            ruler = not re.search(r"[^\W_]", line)
            deeper = start > before and lines and lines[-1].endswith(":")
            if lines and (ruler or deeper or start < before or DEFINITION.match(line)):
                yield " ".join(lines)
                lines = []
            if not ruler:
                lines.append(line)
        yield " ".join(lines)
