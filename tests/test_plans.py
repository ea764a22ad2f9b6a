"""What planned tables run is what their scripts take, and what their records are of."""

import importlib
import itertools
import shlex
from pathlib import Path

import pytest

import benchmark
from utils import parsing, plans, report
from utils import planned as planning


@pytest.mark.parametrize("name", plans.PLANS)
def test_planned_commands_are_of_their_scripts(name, tmp_path):
    """Each parses; names are distinct; what a row goes on from is made by one before it."""
    before = []
    for row in plans.PLANS[name]:
        assert row.name not in before
        for command in row.commands:
            script, *flags = shlex.split(command.format(runs="RUNS", seed=""))
            if script == "-m":
                assert flags == ["data.sentences", "data/wikitext-2"]
                continue
            for flag, value in itertools.pairwise(flags):
                if flag in ("--start-from", "--finetune"):
                    assert value in before
                if flag == "--checkpoint":
                    assert Path(value).relative_to("RUNS").parts[0].removesuffix(".pt") in (*before, row.name)
            if script.startswith("train_"):
                training_flags(script, flags, before, tmp_path)
            else:
                importlib.import_module(script.removesuffix(".py")).build_parser().parse_args(flags)
        before.append(row.name)


def training_flags(script, flags, before, folder):
    """What a training's flags mean, {name: value}; runs that it goes on from, of names in `before`, are in folder."""
    module = importlib.import_module(script.removesuffix(".py"))
    (folder / "best.pt").touch()
    flags = [str(folder) if word in before else word for word in flags]
    return vars(parsing.parse_training(module.build_parser(), module.RECIPES, flags)[0])


ASIDE = {"argv", "name", "runs_dir", "save", "resume", "start_from", "finetune", "checkpoint_every", "log_interval"}
"""Flags that do not say what is trained; nor does onednn, which was on before it depended on the processor."""
WIDTHS = {"emsize", "nhid", "headsize", "keysize", "context"}
"""Those that are settled after parsing, by --num-params and by the length of windows."""


@pytest.mark.parametrize("name", plans.PLANS)
def test_records_are_of_what_is_planned(name, tmp_path):
    """A planned command means today what its record's run was trained with, whatever became of recipes and defaults.

    Flags that a record lacks, because they came later, are those of a start without any.
    """
    for row in plans.PLANS[name]:
        path = benchmark.RESULTS / name / f"{row.name}.json"
        script, *flags = shlex.split(row.commands[-1].format(runs="RUNS", seed=""))
        if script.startswith("train_") and path.is_file():
            means = training_flags(script, flags, [other.name for other in plans.PLANS[name]], tmp_path)
            recorded = training_flags(script, [], (), tmp_path) | report.read_record(path)["config"]
            compared = means.keys() - ASIDE - {"onednn"} - (WIDTHS if means["num_params"] else set())
            means, recorded = ({flag: plain(found[flag]) for flag in compared} for found in (means, recorded))
            assert means == recorded, row.name


def plain(value):
    """A flag's value as a record has it."""
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", plans.MEASURED)
def test_planned_measurements_are_of_benchmark(name):
    """Each parses and keeps a record."""
    for line in plans.MEASURED[name]:
        assert benchmark.build_parser().parse_args(shlex.split(line.format(runs="RUNS"))).record


def test_the_list_of_planned_tables(capsys, fails):
    """Each row with its commands and what was published; of one table, if it has a name, that table's rows alone."""
    benchmark.main(["table", "--list"])
    out = capsys.readouterr().out
    assert (
        "word-language-model-penn\n  lstm-200 (published: 117.61 test): train_rnn.py --recipe example --data penn"
        in out
    )
    assert "compress.py prune" in out and "{" not in out
    assert "evaluate.py --checkpoint runs/awd-penn/awd-fast-less/best.pt --pointer --tune\n" in out
    assert "benchmark.py quantization runs/pruning/dense/best.pt --record" in out
    for name, row in (("qrnn-penn", "lstm-72"), ("rmc-speed", "benchmark.py")):
        benchmark.main(["table", name, "--list"])
        title, *rows = capsys.readouterr().out.splitlines()
        assert title == name and rows and all(line.startswith("  ") for line in rows) and row in rows[0]
    assert "one of qrnn-speed, rmc-speed" in fails(benchmark.main, "table", "awd-pen", "--list")


@pytest.mark.parametrize("name", plans.PLANS)
def test_pages_have_a_place_for_their_planned_table(name):
    """Those that there are."""
    page = planning.RESULTS / f"{name}.md"
    assert not page.exists() or report.around(page, name)
