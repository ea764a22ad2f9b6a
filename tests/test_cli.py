"""Parsing: spellings, recipes and numbers."""

import argparse
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_rnn
from utils import cli, parsing


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
        args, _ = parsing.parse_training(train_rnn.build_parser(), train_rnn.RECIPES, [f"--recipe={name}", *argv])
        for other, kept in train_rnn.RECIPES[name].items():
            assert getattr(args, other) == (given if other == flag else kept), (flag, other)
