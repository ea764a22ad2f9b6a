"""Files that are either whole or absent, and the one exception of this package."""

import os
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path


class CorpusError(Exception):
    """What the user gave as a corpus can't be used; the message is one line: expected, got, what to do."""


@contextmanager
def atomic_write(path, mode="wb", **open_options):
    """Open a temporary file beside `path`; on success it is synced to disk and renamed to `path`.

    Readers see the old content or the new, never a part. On any error the temporary file is removed and `path`
    keeps its old content. Several processes may write the same path at once: the last one wins, whole. A link stays
    one, and what is no file, /dev/null or a pipe, is written to as it is.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        with open(path, mode, **open_options) as file:
            yield file
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(handle, mode, **open_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):  # Ctrl-C after the renaming
            os.unlink(temporary)
        raise


@contextmanager
def whole_folder(target):
    """Yield a scratch folder on the file system of `target`; its folder `stage`, made inside the `with`, becomes it.

    The target appears whole, by one renaming, or not at all.
    """
    place = Path(target).resolve()
    nearest = next(folder for folder in place.parents if folder.exists())
    with tempfile.TemporaryDirectory(dir=nearest, prefix=f".{place.name}.") as scratch:
        yield Path(scratch)
        place.parent.mkdir(parents=True, exist_ok=True)
        (Path(scratch) / "stage").rename(place)


def exit_status(name, call):
    """0 after call(), or 2 after one line, which `name` begins, for what the user or a mirror has to mend."""
    try:
        call()
        return 0
    except CorpusError as error:
        problem = str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        problem = f"{where}{error.strerror or error}; nothing is left behind"
    except KeyboardInterrupt:
        problem = "interrupted; nothing is left behind"
    print(f"{name}: {problem}", file=sys.stderr, flush=True)
    return 2
