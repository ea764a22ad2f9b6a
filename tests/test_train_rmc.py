"""train_rmc.py: the port's command lines, every flag, a run of both forms with resume, the adaptive softmax."""

import pytest
from conftest import TINY, live

import train_rmc
from models import build
from utils import parsing

SMALL = [flag for flag in TINY if "nhid" not in flag] + ["--headsize=5", "--numheads=3", "--keysize=2"]
PORT = {
    "emsize": 192, "memslots": 1, "headsize": 192, "numheads": 4, "numblocks": 1, "attmlplayers": 3, "keysize": 64,
    "forgetbias": 1.0, "inputbias": 0.0, "gatestyle": "unit", "lr": 0.001, "clip": 0.1, "epochs": 100,
    "batch_size": 64, "bptt": 100, "dropouti": 0.5, "dropout": 0.5, "tied": True, "optimizer": "adam", "seed": 1111,
    "cuda": False, "schedule": "plateau", "plateau_factor": 0.5, "plateau_patience": 5, "cutoffs": None,
}  # fmt: skip


def parse(*argv):
    """The flags of a train_rmc.py command line."""
    return parsing.parse_training(train_rmc.build_parser(), train_rmc.RECIPES, list(argv), families=("rmc",))[0]


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("--cuda ", {"cuda": True}),
        ("--cuda --adaptivesoftmax --cutoffs 1000 5000 20000",
         {"cuda": True, "adaptivesoftmax": True, "cutoffs": [1000, 5000, 20000], "tied": False}),
        ("--adaptivesoftmax --cutoff 1000 5000 --no-tied", {"cutoffs": [1000, 5000], "tied": False}),
        ("--gatestyle None", {"gatestyle": "none"}),
        ("--gatestyle memory --variant port", {"gatestyle": "memory", "variant": "port"}),
    ],
)  # fmt: skip
def test_published_command_lines(line, meaning):
    """What the port's README prints for train_rmc.py, and its spellings."""
    flags = vars(parse(*line.split()))
    expected = PORT | {"variant": "paper"} | meaning
    assert {name: flags[name] for name in expected} == expected


CHANGES = {
    "variant": "port", "emsize": 13, "memslots": 2, "headsize": 7, "numheads": 5, "numblocks": 3, "attmlplayers": 4,
    "keysize": 11, "gatestyle": "memory", "forgetbias": 2.5, "inputbias": -1.5, "dropouti": 0.25, "dropout": 0.125,
}  # fmt: skip


def test_every_model_flag_changes_the_model():
    """Each of them alone changes the built model: its weights' shapes, its gate biases or its dropout."""
    group = next(g for g in train_rmc.build_parser()._action_groups if g.title == "model")
    assert {action.dest for action in group._group_actions} == set(CHANGES)

    def built(*flags):
        model = build(train_rmc.model_config(parse(*SMALL, "--no-tied", *flags), 31))
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        core = model.core.memory
        return shapes, core.gate_bias.tolist(), (model.dropouti, model.dropout), (core.numblocks, core.attmlplayers)

    plain = built()
    for name, value in CHANGES.items():
        assert built(f"--{name}={value}") != plain, name


@pytest.mark.parametrize("flags", [["--variant=port"], ["--memslots=2", "--gatestyle=none"], ["--adaptivesoftmax"]])
def test_train_resume_evaluate_generate(flags, tiny_corpus, tmp_path, monkeypatch, capsys):
    """The perplexity falls; a resumed run equals a whole one; the checkpoint is scored and generates."""
    monkeypatch.chdir(tmp_path)
    common = ["--data", str(tiny_corpus), *SMALL, *flags, "--lr", "0.01", "--train-tokens", "4000"]
    live(train_rmc, common, tiny_corpus, capsys)


def test_cutoffs_are_derived_and_said(tiny_corpus, capsys):
    """From the vocabulary's size; the recipe's tying gives way with a line."""
    args = parse("--data", str(tiny_corpus), "--adaptivesoftmax")
    parsing.load_corpus(args)
    out = capsys.readouterr().out
    assert args.cutoffs == [1, 5] and "cutoffs 1 5" in out and "gives way" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adaptivesoftmax", "--tied"], ["--tied", "--adaptivesoftmax"]),
        (["--adaptivesoftmax", "--cutoffs", "5", "29"], ["5 29", "29"]),
        (["--adaptivesoftmax", "--cutoffs", "7", "7"], ["increase", "7 7"]),
        (["--adaptivesoftmax", "--cutoffs"], ["got none"]),
        (["--cutoffs", "5"], ["--adaptivesoftmax"]),
        (["--gatestyle", "most"], ["--gatestyle", "unit"]),
        (["--memslots", "0"], ["--memslots"]),
        (["--cuda-graphs"], ["--cuda-graphs", "give --cuda"]),
        (["--cuda-graphs", "--cuda", "--variable-bptt"], ["--no-variable-bptt"]),
        (["--compile", "--variable-bptt"], ["--compile", "give --no-variable-bptt"]),
    ],
    ids=str,
)
def test_wrong_flags_end_with_one_line(flags, words, fails, tiny_corpus, tmp_path):
    """Before anything is built."""
    error = fails(train_rmc.main, "--data", tiny_corpus, "--runs-dir", tmp_path / "runs", *SMALL, *flags)
    assert all(word in error for word in words)
    assert not (tmp_path / "runs").exists()


def test_a_run_of_another_family_is_not_resumed(train, fails, tmp_path):
    """train_rmc.py --resume of an LSTM's run says so."""
    train("--name", "lstm")
    error = fails(train_rmc.main, "--runs-dir", tmp_path / "runs", "--resume", "lstm")
    assert "family 'rnn', expected 'rmc'" in error
