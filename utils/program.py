"""How a script ends: what the user did wrong in one line, bugs with their traceback."""

import errno
import io
import os
import re
import signal
import sys

import torch
import torch.distributed as dist

from data import CorpusError
from models import ModelError

from . import TrainingError, UserError, report

USER_ERRORS = (UserError, CorpusError, ModelError)
"""What the user did wrong, in the words of each package."""
LOST_PROCESS = re.compile("gloo|nccl|connection (closed|reset)", re.IGNORECASE)
"""What torch says in the other processes when one of a run has died."""


def run(main):
    """Call a script's main; what the user did wrong ends with one line and exit code 2, bugs keep their traceback."""
    prog = os.path.basename(sys.argv[0])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without a word's letters shows their numbers
            stream.reconfigure(errors="backslashreplace")
    try:
        report.git_commit()  # of the code that was loaded, whatever is checked out by the end
        main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is written: a late Ctrl-C would only show torch's clean-up
    except USER_ERRORS as error:
        sys.exit(_fail(prog, error, 2))
    except TrainingError as error:
        sys.exit(_fail(prog, error, 1))
    except torch.OutOfMemoryError as error:
        first = str(error).split(". ", 1)[0]
        sys.exit(_fail(prog, f"{first}; use a smaller --batch-size or --bptt", 2))
    except RuntimeError as error:
        if not (dist.is_initialized() and LOST_PROCESS.search(str(error))):
            raise
        sys.exit(_fail(prog, "another process of this run is gone; see its message, then --resume the run", 1))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_fail(prog, f"cannot write: {error.strerror}{where}; free some space; files are as they were", 2))
    except KeyboardInterrupt:
        sys.exit(_fail(prog, "interrupted", 130))


def _fail(prog, error, code):
    print(f"{prog}: error: {error}", file=sys.stderr)
    return code
