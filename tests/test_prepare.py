import dataclasses
import errno
import hashlib
import io
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pooch
import pytest

from data import prepare

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "valid", "test")
TEXTS = {
    "train": b" \n = Brown fox = \n \n the <unk> fox jumps \xe2\x80\x93 over the dog \n" * 50,
    "valid": b"the dog jumps \n",
    "test": b"the fox <unk> \n over \n",
}
FILES = {f"{split}.txt": text for split, text in TEXTS.items()}
STALL = 1 << 20  # the announced length of an answer that never ends


def known(texts=TEXTS, **changes):
    """What verify() has to know of `texts`, counted here by other means than there."""
    words = [[*line.split(), "<eos>"] for split in SPLITS for line in texts[split].decode().splitlines()]
    stream = "".join(f"{word} " for line in words for word in line)
    facts = {
        "published": tuple("sha256:" + hashlib.sha256(texts[split]).hexdigest() for split in SPLITS),
        "words": hashlib.sha256(stream.encode()).hexdigest(),
        "tokens": tuple(len(texts[split].split()) + texts[split].count(b"\n") for split in SPLITS),
        "types": len(set(stream.split())),
        "licence": "tiny is licensed by nobody",
        "mirrors": (),
        "by_hand": "tiny.zip from a friend",
    }
    return prepare.Known(**(facts | changes))


def zipped(files, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Mirrors:
    """An HTTP server on 127.0.0.1. answers: {path: (status, body, announced length)} or a list of them, in turn."""

    def __init__(self):
        self.answers, self.requests, self.stalled, self.release = {}, [], threading.Event(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, self.headers["User-Agent"]))
                answer = outer.answers.get(self.path, (404, b"", 0))
                status, body, length = answer.pop(0) if isinstance(answer, list) else answer
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)
                if status == 200 and length == STALL:
                    self.wfile.flush()
                    outer.stalled.set()
                    outer.release.wait(20)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def add(self, path, body, status=200, length=None):
        self.answers[path] = (status, body, len(body) if length is None else length)
        return self.url(path)

    def url(self, path):
        return f"http://127.0.0.1:{self.server.server_port}{path}"


@pytest.fixture
def mirrors():
    server = Mirrors()
    yield server
    server.release.set()
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory, a corpus called tiny, no pause before a retry, no address but 127.0.0.1."""
    connect = socket.socket.connect

    def connect_here(self, address):
        assert address[0] == "127.0.0.1", f"a test wants to reach {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(pooch.core, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(prepare.CORPORA, "tiny", known())
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def use(monkeypatch, *urls, **changes):
    monkeypatch.setitem(prepare.CORPORA, "tiny", known(mirrors=urls, **changes))


def start(arguments, facts, before=""):
    """main() in its own process, in the working directory, with `facts` about tiny and after the code `before`."""
    code = (
        f"import sys; from data import prepare; {before}\n"
        f"prepare.CORPORA['tiny'] = prepare.Known(**{dataclasses.asdict(facts)!r})\n"
        f"sys.exit(prepare.main({arguments!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=pipe, stderr=pipe, text=True)


def refused_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_first_mirror_that_has_the_corpus_is_used_and_the_others_are_named(place, mirrors, monkeypatch, capsys):
    other = {**FILES, "train.txt": TEXTS["train"].replace(b"fox", b"cat")}
    broken = bytearray(zipped(FILES, zipfile.ZIP_STORED))
    broken[broken.index(b"over \n") + 1] ^= 1  # in test.txt: the first two are copied before it is noticed
    dead = {
        f"http://127.0.0.1:{refused_port()}/tiny.zip": "Connection refused",
        mirrors.url("/gone.zip"): "HTTP 404 Not Found",
        mirrors.add("/forbidden.zip", b"no", 403): "HTTP 403 Forbidden",
        mirrors.add("/page.zip", b"<html>This site has moved</html>"): "neither a folder nor a whole zip or tar",
        mirrors.add("/cut.tgz", tarred(FILES)[:-60]): "a damaged archive: ",
        mirrors.add("/broken.zip", bytes(broken)): "a damaged archive: Bad CRC-32 for file 'test.txt'",
        mirrors.add("/short.zip", zipped(FILES)[:100], length=900): "IncompleteRead(100 bytes read, 800 more expected)",
        mirrors.add("/other.zip", zipped(other)): "it has 11 different words, expected 10",
        mirrors.add("/raw.zip", zipped({f"wiki.{s}.raw": TEXTS[s] for s in SPLITS})): "this is raw WikiText",
    }
    good = mirrors.add("/good.zip", zipped({f"tiny/wiki.{split}.tokens": TEXTS[split] for split in SPLITS}))
    never = mirrors.add("/never.zip", zipped(FILES))
    use(monkeypatch, *dead, good, never)
    assert prepare.main(["tiny"]) == 0
    out, err = capsys.readouterr()
    for line, (url, reason) in zip(err.splitlines(), dead.items(), strict=True):
        assert line.startswith(f"data.prepare: {url}: {reason}")
    assert "tiny is licensed by nobody" in out
    assert out.endswith("data/tiny: verified: identical to the published files\n".replace("/", os.sep))
    assert contents(place) == {f"data/tiny/{name}": content for name, content in FILES.items()}
    assert [path for path, _ in mirrors.requests if path == "/never.zip"] == []


def test_a_mirror_of_three_files_counts_only_with_all_three(place, mirrors, monkeypatch, capsys):
    for split in SPLITS:
        mirrors.add(f"/all/ptb.{split}.txt", TEXTS[split])
        mirrors.add(f"/two/{split}.txt", TEXTS[split], 500 if split == "test" else 200)
    use(monkeypatch, mirrors.url("/two/{split}.txt"), mirrors.url("/all/ptb.{split}.txt"))
    assert prepare.main(["tiny", "--to", "here"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"data.prepare: {mirrors.url('/two/{split}.txt')}: HTTP 500 Internal Server Error"
    assert contents(place) == {f"here/{name}": content for name, content in FILES.items()}


def test_no_mirror_left_says_what_to_do_and_leaves_nothing(place, mirrors, monkeypatch, capsys):
    urls = (mirrors.url("/one.zip"), mirrors.url("/{split}.txt"), mirrors.add("/three.tgz", tarred(FILES)[:200]))
    use(monkeypatch, *urls)
    assert prepare.main(["tiny"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(url in line for url, line in zip(urls, lines, strict=False))
    assert lines[-1] == (
        "data.prepare: tiny: no mirror has it; get tiny.zip from a friend, "
        "then run `python -m data.prepare tiny --from FILE`"
    )
    assert list(place.iterdir()) == []


def test_a_broken_connection_is_tried_again_as_a_browser_would(place, mirrors, monkeypatch, capsys):
    body = zipped(FILES)
    mirrors.answers["/tiny.zip"] = [(200, body[:50], len(body)), (200, body, len(body))]
    use(monkeypatch, mirrors.url("/tiny.zip"))
    assert prepare.main(["tiny"]) == 0
    assert capsys.readouterr().err == ""
    assert [path for path, _ in mirrors.requests] == ["/tiny.zip"] * 2
    assert all(agent.startswith("Mozilla/5.0 ") and "python" not in agent for _, agent in mirrors.requests)
    assert len(contents(place)) == 3


SHAPES = {
    "plain.zip": zipped(FILES),
    "wiki.zip": zipped({f"wikitext/wiki.{split}.tokens": TEXTS[split] for split in SPLITS}),
    "dots.zip": zipped({f"./tiny/{name}": content for name, content in FILES.items()}),
    "wiki.tgz": tarred({f"wiki.{split}.tokens": TEXTS[split] for split in SPLITS}),
    "plain.tar": tarred(FILES, "w:"),
    # as Mikolov's archive: names that start with ./, character level files beside, other files of such names
    "examples.tgz": tarred(
        {f"./simple-examples/data/ptb.{split}.txt": TEXTS[split] for split in SPLITS}
        | {f"./simple-examples/data/ptb.char.{split}.txt": b"t h e\n" for split in SPLITS}
        | {f"./simple-examples/data/{split}.txt": b"others\n" for split in SPLITS}
        | {"./simple-examples/1-train/train.txt": b"alone\n"}
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_from_an_archive(place, tmp_path, shape, capsys):
    write(tmp_path, {shape: SHAPES[shape]})
    assert prepare.main(["tiny", "--from", str(tmp_path / shape)]) == 0
    assert "identical to the published files" in capsys.readouterr().out
    assert contents(place) == {f"data/tiny/{name}": content for name, content in FILES.items()}


@pytest.mark.parametrize("pattern", ["{}.txt", "wiki.{}.tokens", "ptb.{}.txt", "inside/{}.txt", "inside/ptb.{}.txt"])
def test_from_a_folder(place, tmp_path, pattern):
    write(tmp_path / "mine", {pattern.format(split): TEXTS[split] for split in SPLITS})
    before = contents(tmp_path / "mine")
    assert prepare.main(["tiny", "--from", str(tmp_path / "mine"), "--to", "a/b"]) == 0
    assert contents(place) == {f"a/b/{name}": content for name, content in FILES.items()}
    assert contents(tmp_path / "mine") == before


def test_from_a_folder_of_several_corpora_the_right_one_is_taken(place, tmp_path):
    write(tmp_path / "mine", {f"another/{split}.txt": b"other words\n" for split in SPLITS})
    write(tmp_path / "mine", {f"tiny/{name}": content for name, content in FILES.items()})
    write(tmp_path / "mine", {f"zebra/{split}.txt": b"more words\n" for split in SPLITS})
    assert prepare.main(["tiny", "--from", str(tmp_path / "mine")]) == 0
    assert contents(place / "data" / "tiny") == FILES


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("prefix", ["../../", "/{place}/"])
def test_member_names_do_not_choose_where_anything_is_written(place, tmp_path, pack, prefix):
    prefix = prefix.format(place=place)
    evil = {f"{prefix}{name}": content for name, content in FILES.items()} | {f"{prefix}evil.txt": b"evil"}
    write(tmp_path, {"evil": pack(evil)})
    before = contents(tmp_path)
    assert prepare.main(["tiny", "--from", str(tmp_path / "evil")]) == 0
    assert contents(tmp_path) == before | {f"place/data/tiny/{name}": content for name, content in FILES.items()}


def refusals():
    swapped = TEXTS["train"].replace(b"fox jumps", b"jumps fox", 1)
    latin = {**FILES, "valid.txt": b"the d\xf6g jumps \n"}
    encrypted = bytearray(zipped(FILES))
    for start in (b"PK\x03\x04", b"PK\x01\x02"):  # set the flag of encryption in every header
        offset = -1
        while (offset := encrypted.find(start, offset + 1)) >= 0:
            encrypted[offset + (6 if start == b"PK\x03\x04" else 8)] |= 1
    links = io.BytesIO()
    with tarfile.open(fileobj=links, mode="w:gz") as archive:
        for name in FILES:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, str(ROOT / "pyproject.toml")
            archive.addfile(member)
    astray = bytearray(zipped(FILES))
    astray[-6:-2] = (int.from_bytes(astray[-6:-2], "little") + 99).to_bytes(4, "little")  # where the directory is
    yield "raw", {f"wiki.{split}.raw": TEXTS[split] for split in SPLITS}, "raw WikiText, for characters"
    yield "raw.zip", zipped({f"wikitext-2-raw/wiki.{split}.raw": TEXTS[split] for split in SPLITS}), "raw WikiText"
    yield "count", {**FILES, "valid.txt": b"the dog \n"}, "valid has 3 words, expected 4 with one <eos> a line"
    yield "types", {**FILES, "valid.txt": b"a dog jumps \n"}, "it has 11 different words, expected 10 with <eos>"
    yield "order", {**FILES, "train.txt": swapped}, "right number of words, but they are not the published ones"
    yield "latin", latin, "mine/latin: valid is not UTF-8: byte 0xf6"
    yield "two", {name: FILES[name] for name in ("train.txt", "test.txt")}, "no folder in it has train, valid and test"
    yield "apart", {f"{name[0]}/{name}": FILES[name] for name in FILES}, "no folder in it has train, valid and test"
    yield "empty", {}, "no folder in it has train, valid and test"
    yield "cut.zip", zipped(FILES)[:-30], "neither a folder nor a whole zip or tar archive"
    yield "cut.tgz", tarred(FILES)[:-60], "a damaged archive: Compressed file ended"
    yield "locked.zip", bytes(encrypted), "a damaged archive: File <ZipInfo"
    yield "links.tgz", links.getvalue(), "no folder in it has train, valid and test"
    yield "astray.zip", bytes(astray), "a damaged archive: [Errno 22]"
    yield "text.txt", TEXTS["train"], "neither a folder nor a whole zip or tar archive"
    yield "missing", None, "No such file or directory; nothing is left behind"


@pytest.mark.parametrize("name", [name for name, _, _ in refusals()])
def test_what_is_not_the_corpus_is_refused_with_one_line(place, tmp_path, name, capsys):
    content, reason = next(rest for first, *rest in refusals() if first == name)
    path = tmp_path / "mine" / name
    if isinstance(content, dict):
        path.mkdir(parents=True)
        write(path, content)
    elif content is not None:
        write(path.parent, {name: content})
    assert prepare.main(["tiny", "--from", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.prepare: tiny: {path}: ") and reason in line
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("change", ["\r\n", "stripped", "no last newline", "byte order mark"])
def test_other_white_space_is_accepted_and_said(place, tmp_path, change, capsys):
    changes = {
        "\r\n": lambda text: text.replace(b"\n", b"\r\n"),
        "stripped": lambda text: b"\n".join(b"  ".join(line.split()) for line in text.split(b"\n")),
        "no last newline": lambda text: text[:-1],
        "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    }
    files = {name: changes[change](content) for name, content in FILES.items()}
    assert prepare.main(["tiny", "--from", str(write(tmp_path / "mine", files))]) == 0
    assert "verified: the same words as the published files, other white space" in capsys.readouterr().out
    assert contents(place / "data" / "tiny") == files


def test_a_corpus_of_which_only_numbers_are_known_is_verified_by_them(place, tmp_path, monkeypatch, capsys):
    """As WikiText-103, with SHA-1 instead of SHA-256 and no digest of the words."""
    published = tuple("sha1:" + hashlib.sha1(TEXTS[split]).hexdigest() for split in SPLITS)
    use(monkeypatch, published=published, words=None)
    write(tmp_path / "same", FILES)
    write(tmp_path / "other", {**FILES, "valid.txt": b"the dog  jumps\n"})
    write(tmp_path / "wrong", {**FILES, "valid.txt": b"the dog jumps higher\n"})
    assert prepare.main(["tiny", "--from", str(tmp_path / "same"), "--to", "same"]) == 0
    assert "identical to the published files" in capsys.readouterr().out
    assert prepare.main(["tiny", "--from", str(tmp_path / "other"), "--to", "other"]) == 0
    assert "the published numbers of words and of different words" in capsys.readouterr().out
    assert prepare.main(["tiny", "--from", str(tmp_path / "wrong"), "--to", "wrong"]) == 2
    assert sorted(path.name for path in place.iterdir()) == ["other", "same"]


@pytest.mark.parametrize("pattern", ["{}.txt", "wiki.{}.tokens"])
def test_a_corpus_that_is_there_is_verified_and_left_alone(place, pattern, capsys):
    files = {pattern.format(split): TEXTS[split] for split in SPLITS} | {"corpus-all.pkl": b"a cache"}
    folder = write(place / "data" / "tiny", files)
    inodes = {path: path.stat().st_ino for path in folder.iterdir()}
    assert prepare.main(["tiny"]) == 0  # it has no mirror
    out, err = capsys.readouterr()
    assert "is there already: verified: identical" in out and err == ""
    assert {path: path.stat().st_ino for path in folder.iterdir()} == inodes


@pytest.mark.parametrize("files", [{**FILES, "test.txt": b"my own\n"}, {"train.txt": TEXTS["train"]}, {"notes": b"x"}])
def test_something_else_that_is_there_is_not_overwritten(place, tmp_path, files, capsys):
    folder = write(place / "data" / "tiny", files)
    assert prepare.main(["tiny", "--from", str(write(tmp_path / "mine", FILES))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is there already and is not tiny" in line and line.endswith("; remove it first")
    assert contents(folder) == files


def test_a_file_where_the_folder_should_be_is_not_overwritten(place, tmp_path, capsys):
    write(place, {"data/tiny": b"mine"})
    assert prepare.main(["tiny", "--from", str(write(tmp_path / "mine", FILES))]) == 2
    assert "is there already and is not tiny" in capsys.readouterr().err
    assert contents(place) == {"data/tiny": b"mine"}


def test_an_empty_folder_and_a_link_to_one_are_filled(place, tmp_path):
    mine = write(tmp_path / "mine", FILES)
    (place / "empty").mkdir()
    (tmp_path / "disk").mkdir()
    (place / "link").symlink_to(tmp_path / "disk")
    assert prepare.main(["tiny", "--from", str(mine), "--to", "empty"]) == 0
    assert prepare.main(["tiny", "--from", str(mine), "--to", "link"]) == 0
    assert contents(place / "empty") == contents(tmp_path / "disk") == FILES
    assert (place / "link").is_symlink()


def test_the_files_are_readable_by_all_that_the_umask_allows(place, tmp_path):
    old = os.umask(0o022)
    try:
        assert prepare.main(["tiny", "--from", str(write(tmp_path / "mine", FILES))]) == 0
    finally:
        os.umask(old)
    folder = place / "data" / "tiny"
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


@pytest.mark.parametrize("source", ["mirror", "folder"])
def test_a_full_disk_is_one_line_and_leaves_nothing(place, tmp_path, mirrors, source):
    """No file may grow beyond 1 kB: the download fails, or the copy."""
    facts = known(mirrors=(mirrors.add("/tiny.tar", tarred(FILES, "w:")),))
    arguments = ["tiny"] + (["--from", str(write(tmp_path / "mine", FILES))] if source == "folder" else [])
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1024, {resource.RLIM_INFINITY}))"
    process = start(arguments, facts, limit)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err == f"data.prepare: tiny: {os.strerror(errno.EFBIG)}; nothing is left behind\n"
    assert list(place.iterdir()) == []


def test_ctrl_c_in_a_download_leaves_nothing(place, mirrors):
    facts = known(mirrors=(mirrors.add("/tiny.zip", zipped(FILES), length=STALL),))
    process = start(["tiny"], facts)
    assert mirrors.stalled.wait(20)
    assert list(place.iterdir()) != []
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (2, "data.prepare: tiny: interrupted; nothing is left behind\n")
    assert list(place.iterdir()) == []


def test_a_bug_keeps_its_traceback_and_leaves_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "verify", lambda paths, name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.main(["tiny", "--from", str(write(tmp_path / "mine", FILES))])
    assert list(place.iterdir()) == []


def test_an_unknown_name_is_an_error_of_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare.main(["wikitext-3"])
    assert "wikitext-103" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wikitext-2", "penn"])
def test_the_real_corpora(place, tmp_path, corpus_folder, name):
    """The command line, with files as published, then with the line ends of another system."""
    source = corpus_folder(name)
    command = [sys.executable, "-m", "data.prepare", name, "--from"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for split in SPLITS:
        write(tmp_path, {f"same/{split}.txt": (source / f"{split}.txt").read_bytes()})
        write(tmp_path, {f"dos/{split}.txt": (source / f"{split}.txt").read_bytes().replace(b" \n", b"\r\n")})
    for folder, result in (("same", "identical to the published files"), ("dos", "same words as the published files")):
        arguments = [str(tmp_path / folder), "--to", folder]
        run = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=60)
        assert (run.returncode, run.stderr) == (0, "") and result in run.stdout
        assert contents(place / folder) == contents(tmp_path / folder)
        shutil.rmtree(place / folder)
