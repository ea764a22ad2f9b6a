"""How a script ends: one line for what the user can mend, a traceback for a bug."""

import errno
import functools
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from utils import TrainingError, UserError, program, report


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("what; do this"), 2, "script.py: error: what; do this\n"),
        (TrainingError("not finite"), 1, "script.py: error: not finite\n"),
        (KeyboardInterrupt(), 130, "script.py: error: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a.csv"), 2, "script.py: error: cannot write: No space left "
         "on device (a.csv); free some space; files are as they were\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much. More"), 2,
         "script.py: error: CUDA out of memory; use a smaller --batch-size or --bptt\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)  # fmt: skip
def test_how_scripts_end(error, code, line, monkeypatch, capsys):
    """What the user can mend is one line; the exit code says which kind of end it was."""

    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit) as exit_info:
        program.run(main)
    assert (exit_info.value.code, capsys.readouterr().err) == (code, line)


@pytest.mark.parametrize("bug", [ZeroDivisionError(), OSError(errno.EIO, "I/O error"), RuntimeError("shape")])
def test_bugs_keep_their_traceback(bug):
    """What is nobody's input is not dressed up."""

    def main():
        raise bug

    with pytest.raises(type(bug)):
        program.run(main)


def test_words_that_the_terminal_has_no_letters_for():
    """They are shown by number: nothing that took hours ends with a traceback when it is printed."""
    code = "from utils import program; program.run(lambda: print('caf\u00e9'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "caf\\xe9\n"), done.stderr


def test_records_name_the_commit_that_a_script_began_with(monkeypatch):
    """A checkout may be updated while a script runs: what is looked up at its end is what it began with."""
    checkout, named = ["first"], []

    def main():
        checkout[0] = "second"
        named.append(report.environment(torch.device("cpu"), "off")["commit"])

    monkeypatch.setattr(program.signal, "signal", lambda *given: None)  # Ctrl-C still stops these tests
    monkeypatch.setattr(report, "git_commit", functools.cache(lambda: checkout[0]))
    program.run(main)
    assert named == ["first"]
