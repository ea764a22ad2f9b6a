"""One file a model: plain containers and tensors, written atomically, read without executing anything.

A checkpoint is a dictionary: format, config (for models.build), vocabulary {words, counts}, weights, args (the flags),
corpus {name, data, checksums, options}; pruning {schedule, masks}; and what training goes on from: optimizer, average,
schedule, rng (of the first process; rng_others, of torchrun's others), position, history, best, commands.
"""

import os
import pickle
import shutil
import signal
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from data.corpus import Vocabulary
from data.files import atomic_write
from models import CORES, build

from . import UserError

FORMAT, BEFORE = 3, 2
PARTS = ("config", "vocabulary", "weights")


@contextmanager
def undisturbed():
    """Ctrl-C waits for the end of the `with`: torch's writer, interrupted, may end the process without a word."""
    if threading.current_thread() is not threading.main_thread():  # it does not come there
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *given: pressed.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed and callable(before):
            before(*pressed[0])


def save(path, checkpoint):
    """Write a checkpoint; `path` holds the old file or the whole new one, never a part. Ctrl-C counts afterwards.

    Raises UserError when it can't be written (full disk, no folder, no permission).
    """
    with _written(path), undisturbed(), atomic_write(path) as file:
        torch.save({"format": FORMAT, **checkpoint}, file)


def copy(source, path, link=True):
    """Let `path` hold what `source` does, whole, as save.

    link: without writing it again where the file system allows it; what writes into the one then changes the other.
    """
    path = Path(path).resolve()
    with _written(path), undisturbed():
        if link and _linked(source, path):
            return
        with open(source, "rb") as old, atomic_write(path) as file:
            shutil.copyfileobj(old, file)


def _linked(source, path):
    """Make path another name of the file source; False where that can't be: another file system, one without links."""
    if path.exists() and not path.is_file():  # a device, a folder
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        os.link(source, temporary)
    except OSError:
        return False
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it stays where both are one file already
    return True


@contextmanager
def _written(path):
    """Inside the `with` a checkpoint is written to `path`; raises UserError when it can't be."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):  # torch's writer covers it with an error of its own
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        kept = f"; the checkpoint that was there is untouched ({path})" if Path(path).exists() else ""
        message = f"cannot save {path}: {cause.strerror}; free some space or choose another place{kept}"
        raise UserError(message) from None


def load(path):
    """The dictionary of a checkpoint, tensors on the CPU.

    Raises UserError for a missing or truncated file, one that is no checkpoint of this project, that needs another
    version, or that holds anything but plain data (which could be code).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: train a model first (python train_rnn.py), or give --checkpoint PATH")
    damaged = f"{path} is damaged or no checkpoint: expected a file that training saved"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise UserError(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: a checkpoint holds tensors and plain data only, this file holds other objects"
        ) from None
    except UserError:
        raise
    except Exception:  # a damaged file can raise almost anything
        raise UserError(damaged) from None
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(part), dict) for part in PARTS):
        raise UserError(f"{path} is no checkpoint of recurrent-lm: expected one that its train scripts wrote")
    if checkpoint.get("format") == BEFORE:
        checkpoint |= {"format": FORMAT, "pruning": {"schedule": "", "masks": {}}}
    if checkpoint.get("format") != FORMAT:
        read = f"{BEFORE} and {FORMAT}"
        raise UserError(f"{path} has checkpoint format {checkpoint.get('format')}, this version reads {read}")
    words, counts = (checkpoint["vocabulary"].get(key, ()) for key in ("words", "counts"))
    if not len(words) == len(counts) == checkpoint["config"].get("vocab_size"):
        raise UserError(
            f"{path} has {len(words)} words and {len(counts)} counts for a model of "
            f"{checkpoint['config'].get('vocab_size')} words: its parts do not belong together"
        )
    return checkpoint


def load_model(path, device, families=tuple(CORES)):
    """The model of a checkpoint in evaluation mode on `device`, its vocabulary, and the checkpoint.

    families: those that the caller can use. Raises UserError as load does, and for weights that do not fit.
    """
    checkpoint = load(path)
    expect_family(checkpoint, path, families)
    if checkpoint["config"].get("native") and torch.device(device).type != "cpu":
        raise UserError(f"{path} has weights of 8 bits for products of a CPU: leave out --cuda")
    return built(checkpoint, path).to(device).eval(), Vocabulary(**checkpoint["vocabulary"]), checkpoint


def built(checkpoint, path):
    """The model of a checkpoint with its weights. Raises UserError when it is none, path: what an error calls it."""
    try:
        model = build(checkpoint["config"])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} describes a model that this version does not know ({error})") from None
    load_weights(model, checkpoint, path)
    return model


def expect_family(checkpoint, path, families):
    """Raises UserError unless the checkpoint is of one of `families`."""
    family = checkpoint["config"].get("family")
    if family not in families:
        raise UserError(f"{path} is a checkpoint of family {family!r}, expected {' or '.join(map(repr, families))}")


def sentence_start(checkpoint, vocabulary):
    """The id of `<sos>` for a model that was trained on sentences, each from the zero state; None for any other."""
    return vocabulary.sentence_start() if checkpoint["args"].get("sentences") else None


def load_weights(model, checkpoint, path):
    """Copy the checkpoint's weights into a model. Raises UserError when names or shapes differ."""
    try:
        model.load_state_dict(checkpoint["weights"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit the model it describes: {reason}") from None
