"""Checkpoints: what goes in comes out, nothing in a file is executed, and a failed save costs nothing."""

import argparse
import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.files import atomic_write
from models import build
from utils import UserError, checkpoint

CPU = torch.device("cpu")
WORDS, SIZE = 13, 7
CONFIG = {
    "family": "rnn",
    "core": {"model": "GRU", "emsize": SIZE, "nhid": SIZE, "nlayers": 2, "dropout": 0.5, "loop": False},
    "vocab_size": WORDS,
    "tied": True,
    "dropouti": 0.5,
    "dropout": 0.5,
}
PLAIN = (dict, OrderedDict, list, tuple, str, int, float, bool, type(None), torch.Tensor)


class Mark:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Opaque:
    """Pickling this raises what it was given."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


def content(**changes):
    """A checkpoint with everything that training keeps, small."""
    torch.manual_seed(1)
    model = build(CONFIG)
    words = ["<eos>", "the", "<unk>", "naïve", "\N{SNOWMAN}", *(f"w{i}" for i in range(WORDS - 5))]
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64), model.initial_state(1))[
        0
    ].backward()
    optimizer.step()
    return {
        "config": CONFIG,
        "vocabulary": {"words": words, "counts": list(range(WORDS, 0, -1))},
        "weights": model.state_dict(),
        "args": {"name": None, "lr": 1e-3, "tied": True, "data": "somewhere"},
        "optimizer": optimizer.state_dict(),
        "rng": {"cpu": torch.get_rng_state(), "cuda": []},
        "position": {"state": (torch.randn(2, 3, SIZE),), "sums": torch.zeros(4, dtype=torch.float64), "epoch": 5},
        "best": {"valid_loss": float("inf")},
    } | changes


@pytest.fixture
def path(tmp_path):
    """Where a checkpoint may lie, in a folder of its own."""
    return tmp_path / "model.pt"


@pytest.fixture
def refused(path):
    """refused(): the message of the one-line UserError, naming the file, with which loading `path` ends."""

    def load(load=checkpoint.load):
        with pytest.raises(UserError) as info:
            load(path)
        message = str(info.value)
        assert "\n" not in message and str(path) in message, message
        return message

    return load


def load_model(path):
    return checkpoint.load_model(path, CPU)


def saved(**changes):
    """The bytes of a checkpoint."""
    buffer = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, **content(**changes)}, buffer)
    return buffer.getvalue()


def test_round_trip(path):
    """Every container, number, string and tensor comes back, of its type and on the CPU."""
    original = content()
    checkpoint.save(path, original)
    loaded = checkpoint.load(path)
    assert loaded.pop("format") == checkpoint.FORMAT
    assert str(loaded) == str(original)
    torch.testing.assert_close(loaded["weights"], original["weights"], rtol=0, atol=0)
    torch.testing.assert_close(loaded["position"]["state"], original["position"]["state"], rtol=0, atol=0)
    assert torch.equal(loaded["rng"]["cpu"], original["rng"]["cpu"])
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_model_round_trip(path):
    """The model is in evaluation mode, tied, and computes what the saved one did; the words come in order."""
    original = content()
    checkpoint.save(path, original)
    model, vocabulary, loaded = load_model(path)
    reference = build(CONFIG)
    reference.load_state_dict(original["weights"])
    tokens = torch.randint(WORDS, (5, 3))
    outputs = [m.log_probs(m.hidden(tokens, m.initial_state(3))[0]) for m in (model, reference.eval())]
    assert not any(module.training for module in model.modules())
    assert torch.equal(*outputs)
    assert model.head.weight is model.embedding.weight
    assert vocabulary.words == original["vocabulary"]["words"]
    assert vocabulary.counts == original["vocabulary"]["counts"]
    assert loaded["args"] == original["args"]


def test_what_training_saves_is_plain(tiny_checkpoint):
    """Containers, numbers, strings and tensors, all the way down."""
    heap = [checkpoint.load(tiny_checkpoint)]
    types = set()
    while heap:
        item = heap.pop()
        types.add(type(item))
        heap += (
            [*item.keys(), *item.values()] if isinstance(item, dict) else item if isinstance(item, list | tuple) else []
        )
    assert torch.Tensor in types
    assert types <= set(PLAIN)


@pytest.mark.parametrize("shape", ("zip", "old torch file", "plain pickle"))
def test_code_in_a_file_is_refused_and_not_executed(path, refused, tmp_path, shape):
    """The same file would be executed by a loader that trusts it."""
    mark = tmp_path / "executed"
    payload = content(args=Mark(mark))
    if shape == "plain pickle":
        path.write_bytes(pickle.dumps({"format": 1, "config": Mark(mark)}, 2))
    else:
        torch.save({"format": 1, **payload}, path, _use_new_zipfile_serialization=shape == "zip")
    for load in (checkpoint.load, load_model):
        refused(load)
    assert not mark.exists()
    (pickle.loads(path.read_bytes()) if shape == "plain pickle" else torch.load(path, weights_only=False))
    assert mark.exists()


@pytest.mark.parametrize("whole", (False, True), ids=("one entry", "whole file"))
@pytest.mark.parametrize("make", (lambda: argparse.Namespace(lr=1), lambda: build(CONFIG)), ids=("Namespace", "Module"))
def test_objects_are_refused(path, refused, make, whole):
    """A namespace of flags or a pickled model, as other projects save them."""
    torch.save(make() if whole else {"format": 1, **content(args=make())}, path)
    refused()


@pytest.mark.parametrize("part", (1, 2, 10, 100, 0.25, 0.5, 0.9, -100, -22, -1))
def test_truncated(path, refused, part):
    """At any length: the first or last bytes, or a part of the whole."""
    whole = saved()
    path.write_bytes(whole[: int(len(whole) * part) if isinstance(part, float) else part])
    refused()


@pytest.mark.parametrize("part", (0.0, 0.02, 0.2, 0.5, 0.8, 0.99))
def test_truncated_pickle(path, refused, part):
    """A plain pickle, or a part of it, is no checkpoint either."""
    whole = pickle.dumps({"format": 1, "config": CONFIG, "vocabulary": {"words": [], "counts": []}}, 2)
    path.write_bytes(whole[: int(len(whole) * part)])
    refused()


@pytest.mark.parametrize(
    "text",
    ("", "\n", "hello world\n", "Query\n", "Results:\n1\n", "...\n", "Good\n", "{}\n", "naïve\n", "PK\n", "(((("),
    ids=repr,
)
def test_text_is_refused(path, refused, text):
    """Whatever letter it starts with: to the unpickler each is a command."""
    path.write_text(text, encoding="utf-8")
    refused()


def test_refusals_are_in_this_projects_words(path, refused):
    """Torch's advice to load without protection, its colours and its warnings do not reach the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (argparse.Namespace(lr=1), build(CONFIG)):
            torch.save(value, path)
            message = refused()
            assert message.isprintable() and "weights_only" not in message
        for junk in (b"text\n", pickle.dumps({"format": 1, "config": CONFIG}, 4)):
            path.write_bytes(junk)
            message = refused()
            assert message.isprintable() and "weights_only" not in message


def test_folder_and_missing_file_are_refused(path, refused):
    """The message says how to get a checkpoint."""
    assert "train a model" in refused()
    path.mkdir()
    assert "train a model" in refused()


PARTS = ("format", "config", "vocabulary", "weights")


@pytest.mark.parametrize(
    "value",
    (
        [1, 2],
        torch.zeros(3),
        {},
        *({part: 1 for part in PARTS if part != missing} for missing in PARTS),
        dict.fromkeys(PARTS, 1),
    ),
    ids=("list", "tensor", "empty", *(f"no {part}" for part in PARTS), "numbers"),
)
def test_plain_data_of_something_else_is_refused(path, refused, value):
    """Loads safely, but is no checkpoint."""
    torch.save(value, path)
    refused()


@pytest.mark.parametrize("version", (checkpoint.FORMAT + 1, 0, None, "1"))
def test_another_format_is_refused_with_both_versions(path, refused, version):
    """What the file has and what is read."""
    path.write_bytes(saved(format=version))
    message = refused()
    assert f"format {version}" in message and f"reads {checkpoint.BEFORE} and {checkpoint.FORMAT}" in message


def test_the_format_before_is_read(path):
    """It had no pruning; nothing else differs."""
    old = {name: part for name, part in content().items() if name != "pruning"}
    torch.save({"format": checkpoint.BEFORE, **old}, path)
    assert checkpoint.load(path)["pruning"] == {"schedule": "", "masks": {}}


def test_family_is_checked(path, refused):
    """By load_model for what it knows or is told to expect, and by expect_family; names found and expected."""
    checkpoint.save(path, content(config={**CONFIG, "family": "rmx"}))
    message = refused(load_model)
    assert "'rmx'" in message and "'rnn'" in message
    loaded = checkpoint.load(path)
    message = refused(lambda path: checkpoint.expect_family(loaded, path, ["one", "two"]))
    assert "'rmx'" in message and "'one'" in message and "'two'" in message
    checkpoint.expect_family(loaded, path, ["one", "rmx"])
    checkpoint.save(path, content())
    refused(lambda path: checkpoint.load_model(path, CPU, ["rmx"]))


def test_models_that_this_version_does_not_know(path, refused):
    """A name, a kind or a size that nothing here has: one line."""
    core = {"emsize": 5, "memslots": 1, "headsize": 5, "numheads": 1}
    for own in ({"depth": 3}, {"variant": "paper-2"}, {"gatestyle": "half"}):
        checkpoint.save(path, content(config={**CONFIG, "family": "rmc", "core": {**core, **own}}))
        assert "that this version does not know" in refused(load_model)


@pytest.mark.parametrize(
    "changes",
    (
        {"config": {**CONFIG, "vocab_size": WORDS + 1}},
        {"config": {**CONFIG, "core": {**CONFIG["core"], "nlayers": 3}}},
        {"config": {**CONFIG, "core": {**CONFIG["core"], "model": "LSTM"}}},
        {"config": {**CONFIG, "core": {**CONFIG["core"], "from_a_later_version": 1}}},
        {"weights": {}},
        {"vocabulary": {"words": ["<eos>", "<unk>"], "counts": [2, 1]}},
        {"vocabulary": {"words": [f"w{i}" for i in range(WORDS + 1)], "counts": [1] * (WORDS + 1)}},
        {"vocabulary": {"words": [f"w{i}" for i in range(WORDS)]}},
    ),
    ids=("other V", "more layers", "other cell", "later core", "no weights", "few words", "many words", "no counts"),
)
def test_parts_that_do_not_fit_each_other_are_refused(path, refused, changes):
    """Configuration, weights and vocabulary have to be of one model."""
    checkpoint.save(path, content(**changes))
    refused(load_model)


FULL_DISK = """
import resource, sys
from utils import UserError, checkpoint, program
path, *limits = sys.argv[1:]
new = {**checkpoint.load(path), "best": None}
for limit in map(int, limits):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save(path, new)
    except UserError as error:
        print(error)
program.run(lambda: checkpoint.save(path, new))
"""


def test_full_disk_keeps_the_checkpoint_that_was_there(path):
    """A limit on the size of files stands for the disk: one line, exit code 2, old bytes, nothing else left."""
    checkpoint.save(path, content(position={"state": (torch.zeros(50_000),)}))
    before = path.read_bytes()
    limits = [str(int(len(before) * part)) for part in (0, 0.001, 0.1, 0.5, 0.95)]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, path, *limits], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    messages = done.stdout.splitlines()
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"-c: error: {messages[-1]}\n"
    assert len(messages) == len(limits)
    assert all(str(path) in line and "free some space" in line and "untouched" in line for line in messages)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_places_where_nothing_can_be_written(path, tmp_path):
    """A folder that is missing, a file in place of a folder, a folder in place of the file."""
    path.write_text("a file")
    (tmp_path / "folder" / "occupied").mkdir(parents=True)
    for place in (tmp_path / "missing" / "model.pt", path / "model.pt", tmp_path / "folder"):
        with pytest.raises(UserError) as info:
            checkpoint.save(place, content())
        assert str(place) in str(info.value) and "\n" not in str(info.value)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["folder", "model.pt", "occupied"]
    assert path.read_text() == "a file"


@pytest.mark.parametrize("links", (True, False))
def test_a_copy(path, tmp_path, monkeypatch, links):
    """It is whole, is not changed by a later checkpoint at the old place, and leaves nothing else behind; with links
    it takes no space; what fails ends like a checkpoint that can't be written."""
    if not links:
        monkeypatch.setattr("os.link", lambda *given: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    copied = tmp_path / "copy.pt"
    copied.write_text("an old one")
    checkpoint.save(path, content())
    checkpoint.copy(path, copied)
    assert copied.samefile(path) == links
    checkpoint.copy(path, path)
    before = path.read_bytes()
    checkpoint.save(path, content(best=None))
    assert copied.read_bytes() == before != path.read_bytes()
    checkpoint.copy(path, copied)
    assert checkpoint.load(copied)["best"] is None
    with pytest.raises(UserError, match=r"^cannot save [^\n]*missing[^\n]*No such file[^\n]*$"):
        checkpoint.copy(path, tmp_path / "missing" / "copy.pt")
    (tmp_path / "folder" / "occupied").mkdir(parents=True)
    with pytest.raises(UserError, match="folder"):
        checkpoint.copy(path, tmp_path / "folder")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted({"copy.pt", "folder", path.name})


def test_a_copy_into_a_pipe(path, tmp_path):
    """What is no file is written to, and stays what it is."""
    checkpoint.save(path, content())
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    checkpoint.copy(path, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and os.read(reader, 1 << 20) == path.read_bytes()
    os.close(reader)


@pytest.mark.parametrize("step", ("tempfile.mkstemp", "os.fsync", "os.replace"))
def test_any_failing_step_keeps_the_checkpoint_that_was_there(path, monkeypatch, step):
    """No permission in the folder, a disk that can't sync, a rename that fails: the reason is in the message."""
    checkpoint.save(path, content())
    before = path.read_bytes()

    def fail(*args, **arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as broken:
        broken.setattr(step, fail)
        with pytest.raises(UserError, match=r"^[^\n]*Permission denied[^\n]*untouched[^\n]*$"):
            checkpoint.save(path, content(best=None))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    checkpoint.save(path, content(best=None))
    assert checkpoint.load(path)["best"] is None


@pytest.mark.parametrize("writes", range(1, 12))
def test_ctrl_c_while_writing_is_ctrl_c(path, monkeypatch, writes):
    """Not the error that torch's writer makes of it, which would end with a traceback; the old file stays."""
    checkpoint.save(path, content())
    before = path.read_bytes()
    make = checkpoint.atomic_write

    @contextmanager
    def pressed(place):
        with make(place) as file:
            calls = []

            def write(data):
                calls.append(1)
                if len(calls) == writes:
                    raise KeyboardInterrupt
                return file.write(data)

            yield SimpleNamespace(write=write, flush=file.flush)

    monkeypatch.setattr(checkpoint, "atomic_write", pressed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, content())
    assert path.read_bytes() == before


def test_ctrl_c_waits_for_the_file(path, monkeypatch):
    """Pressed while torch writes, and right after the renaming: the new file is whole, then it is the interruption."""
    checkpoint.save(path, content())
    for number, (module, name) in enumerate(((torch, "save"), (os, "replace"))):
        call = getattr(module, name)

        def pressed(*arguments, call=call):
            signal.raise_signal(signal.SIGINT)
            call(*arguments)
            signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as context:
            context.setattr(module, name, pressed)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(path, content(args={"number": number}))
        assert checkpoint.load(path)["args"] == {"number": number}
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_ctrl_c_after_the_renaming_is_no_other_error(tmp_path, monkeypatch):
    """Of a file that is no checkpoint: the new content is there, and what comes out is the interruption."""
    replace = os.replace

    def pressed(*names):
        replace(*names)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", pressed)
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file", "w") as file:
        file.write("new")
    assert (tmp_path / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", (pickle.PicklingError("opaque"), RuntimeError("opaque")), ids=repr)
def test_what_cannot_be_saved_is_a_bug_and_keeps_the_checkpoint_that_was_there(path, error):
    """Its own exception, not the user's fault; the old file stays."""
    checkpoint.save(path, content())
    before = path.read_bytes()
    with pytest.raises(type(error), match="opaque"):
        checkpoint.save(path, content(args=Opaque(error)))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_tied_weights_are_stored_once(path):
    """The file is about one matrix; untied it is about two."""
    sizes = []
    for tied in (True, False):
        model = build({**CONFIG, "vocab_size": 4999, "tied": tied})
        checkpoint.save(path, {"config": {}, "vocabulary": {}, "weights": model.state_dict()})
        sizes.append(path.stat().st_size / model.embedding.weight.nbytes)
    assert 1 < sizes[0] < 1.3
    assert 2 < sizes[1] < 2.3
