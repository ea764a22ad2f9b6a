"""Parsing: spellings, recipes, numbers, and the way a script ends."""

import argparse
import errno
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_rnn
from utils import TrainingError, UserError, cli


def test_dashes_and_underscores_are_alike():
    """In long flags only; values keep theirs."""
    parser = cli.Parser()
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--name")
    for argv in (["--batch_size", "3"], ["--batch_size=3"], ["--batch-size=3"], ["--batch_s", "3"]):
        assert parser.parse_args([*argv, "--name=my_run"]) == argparse.Namespace(batch_size=3, name="my_run")
    assert parser.parse_args(["--name", "a_b"]).name == "a_b"


@given(
    st.one_of(st.floats(allow_subnormal=False), st.integers(-(10**20), 10**20)),
    st.sampled_from([int, float]),
    st.booleans(),
)
def test_numbers_are_in_their_range(value, kind, above):
    """number() lets through what lies in the range and nothing else."""
    parse = cli.number(kind, 1, 100, above)
    text = repr(value)
    whole = isinstance(value, int)
    inside = (value > 1 if above else value >= 1) and value <= 100 and not math.isnan(value)
    if inside and (whole or kind is float):
        assert parse(text) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="expected a"):
            parse(text)


@pytest.mark.parametrize("name", train_rnn.RECIPES)
def test_a_flag_beats_the_recipe(name):
    """Every value of a recipe holds where no flag is given, and gives way to one."""
    for flag, value in train_rnn.RECIPES[name].items():
        given = {bool: not value, str: "adam" if value == "sgd" else "sgd"}.get(type(value), 1)
        given = "constant" if flag == "schedule" else given
        spelled = f"--{'' if given is not False else 'no-'}{flag.replace('_', '-')}"
        argv = [spelled] if isinstance(given, bool) else [f"{spelled}={given}"]
        if isinstance(value, float) and flag != "lr" and flag != "clip":
            given, argv = 0.125, [f"{spelled}=0.125"]
        args, _ = cli.parse_training(train_rnn.build_parser(), train_rnn.RECIPES, [f"--recipe={name}", *argv])
        for other, kept in train_rnn.RECIPES[name].items():
            assert getattr(args, other) == (given if other == flag else kept), (flag, other)


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
        cli.run(main)
    assert (exit_info.value.code, capsys.readouterr().err) == (code, line)


@pytest.mark.parametrize("bug", [ZeroDivisionError(), OSError(errno.EIO, "I/O error"), RuntimeError("shape")])
def test_bugs_keep_their_traceback(bug):
    """What is nobody's input is not dressed up."""

    def main():
        raise bug

    with pytest.raises(type(bug)):
        cli.run(main)
