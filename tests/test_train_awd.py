"""train_awd.py: the authors' command lines, every flag, a run of each model with resume, fine-tuning."""

import pytest
from conftest import TINY, live

import train_awd
from models import build
from utils import parsing

PAPER = {
    "data": "data/penn", "model": "LSTM", "emsize": 400, "nhid": 1150, "nlayers": 3, "lr": 30.0, "clip": 0.25,
    "epochs": 8000, "batch_size": 80, "bptt": 70, "dropout": 0.4, "dropouth": 0.3, "dropouti": 0.65, "dropoute": 0.1,
    "wdrop": 0.5, "seed": 1111, "nonmono": 5, "cuda": False, "log_interval": 200, "alpha": 2.0, "beta": 1.0,
    "wdecay": 1.2e-6, "resume": None, "optimizer": "ntasgd", "when": None, "tied": True, "splitcross": True,
    "variable_bptt": True, "bptt_max": None, "schedule": "constant", "momentum": 0.0, "nt_rule": "code",
    "ar_norm": "mean", "finetune": None, "init": "uniform", "average": "targets", "loop": False,
}  # fmt: skip
PENN = "--batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epoch 500 --save PTB.pt"
QRNN = "--model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --emsize 400 --dropouth 0.3 "
QRNN += "--seed 9001 --dropouti 0.4 --epochs 550 --save PTB.pt"
PENN_FLAGS = {"batch_size": 20, "dropouti": 0.4, "dropouth": 0.25, "seed": 141, "epochs": 500, "save": "PTB.pt"}
QRNN_FLAGS = {
    "model": "QRNN", "batch_size": 20, "clip": 0.2, "wdrop": 0.1, "nhid": 1550, "nlayers": 4, "dropouth": 0.3,
    "seed": 9001, "dropouti": 0.4, "epochs": 550, "save": "PTB.pt",
}  # fmt: skip
CHARACTERS = {"alpha": 0.0, "beta": 0.0, "dropoute": 0.0, "optimizer": "adam", "schedule": "when", "batch_size": 128}


def parse(*argv):
    """The flags of a train_awd.py command line."""
    return parsing.parse_training(train_awd.build_parser(), train_awd.RECIPES, list(argv), families=("awd",))[0]


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("", {}),
        (PENN, PENN_FLAGS),
        (QRNN, QRNN_FLAGS),
        ("--epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882",
         {"epochs": 750, "data": "data/wikitext-2", "save": "WT2.pt", "dropouth": 0.2, "seed": 1882}),
        ("--epochs 500 --data data/wikitext-2 --clip 0.25 --dropouti 0.4 --dropouth 0.2 --nhid 1550 --nlayers 4 "
         "--seed 4002 --model QRNN --wdrop 0.1 --batch_size 40 --save WT2.pt",
         {"epochs": 500, "data": "data/wikitext-2", "dropouti": 0.4, "dropouth": 0.2, "nhid": 1550, "nlayers": 4,
          "seed": 4002, "model": "QRNN", "wdrop": 0.1, "batch_size": 40, "save": "WT2.pt"}),
        ("--epochs 14 --nlayers 4 --emsize 400 --nhid 2500 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.1 "
         "--dropouti 0.1 --dropout 0.1 --wdrop 0 --wdecay 0 --bptt 140 --batch_size 60 --optimizer adam --lr 1e-3 "
         "--data data/wikitext-103 --save WT103.12hr.QRNN.pt --when 12 --model QRNN",
         {"epochs": 14, "nlayers": 4, "nhid": 2500, "alpha": 0.0, "beta": 0.0, "dropoute": 0.0, "dropouth": 0.1,
          "dropouti": 0.1, "dropout": 0.1, "wdrop": 0.0, "wdecay": 0.0, "bptt": 140, "batch_size": 60,
          "optimizer": "adam", "lr": 1e-3, "data": "data/wikitext-103", "save": "WT103.12hr.QRNN.pt", "when": [12],
          "schedule": "when", "model": "QRNN"}),
        ("--epochs 50 --nlayers 3 --emsize 400 --nhid 1840 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.1 "
         "--dropouti 0.1 --dropout 0.4 --wdrop 0.2 --wdecay 1.2e-6 --bptt 200 --batch_size 128 --optimizer adam "
         "--lr 1e-3 --data data/enwik8 --save ENWIK8.pt --when 25 35",
         CHARACTERS | {"epochs": 50, "nhid": 1840, "dropouth": 0.1, "dropouti": 0.1, "dropout": 0.4, "wdrop": 0.2,
                       "bptt": 200, "lr": 1e-3, "data": "data/enwik8", "save": "ENWIK8.pt", "when": [25, 35]}),
        ("--epochs 500 --nlayers 3 --emsize 200 --nhid 1000 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.25 "
         "--dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 --batch_size 128 --optimizer adam "
         "--lr 2e-3 --data data/pennchar --save PTBC.pt --when 300 400",
         CHARACTERS | {"epochs": 500, "emsize": 200, "nhid": 1000, "dropouth": 0.25, "dropouti": 0.1, "dropout": 0.1,
                       "bptt": 150, "lr": 2e-3, "data": "data/pennchar", "save": "PTBC.pt", "when": [300, 400]}),
    ],
)  # fmt: skip
def test_published_command_lines(line, meaning):
    """What the authors' README prints for main.py, as typed there."""
    flags = vars(parse(*line.split()))
    expected = PAPER | meaning
    assert {name: flags[name] for name in expected} == expected


@pytest.mark.parametrize(("line", "meaning"), [(PENN, PENN_FLAGS), (QRNN, QRNN_FLAGS)], ids=("LSTM", "QRNN"))
def test_published_fine_tuning(line, meaning, tmp_path):
    """finetune.py's lines are main.py's; ours takes --finetune in addition. Windows are cut at 10 more than bptt."""
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "best.pt").touch()
    flags = vars(parse(*line.split(), "--runs-dir", str(tmp_path / "runs"), "--finetune", "first"))
    expected = PAPER | meaning | {"bptt_max": 80, "finetune": str(tmp_path / "runs" / "first" / "best.pt")}
    assert {name: flags[name] for name in expected} == expected


CHANGES = {
    "model": "GRU", "emsize": 13, "nhid": 7, "nlayers": 2, "dropout": 0.125, "dropouth": 0.125, "dropouti": 0.125,
    "dropoute": 0.25, "wdrop": 0.25, "alpha": 1.0, "beta": 3.0, "ar_norm": "l2",
}  # fmt: skip


def test_every_model_flag_changes_the_model():
    """Each of them alone changes the built model."""
    group = next(g for g in train_awd.build_parser()._action_groups if g.title == "model")
    assert {action.dest for action in group._group_actions} == {*CHANGES, "loop", "wdrop_units"}

    def built(*flags):
        model = build(train_awd.model_config(parse(*TINY, *flags), 31))
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        own = (model.dropouti, model.dropout, model.dropoute, model.alpha, model.beta, model.ar_norm, model.locked)
        return shapes, own, (model.core.dropouth, model.core.wdrop, model.core.loop, model.core.wdrop_units)

    plain = built()
    for name, value in CHANGES.items():
        assert built(f"--{name}={value}") != plain, name
    assert (
        built("--loop") != plain != built("--wdrop-units")
        and built("--no-tied") != plain
        and built("--cutoffs", "3", "7") != plain
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--model=LSTM", "--cutoffs", "5", "17", "--wdrop-units"],
        ["--model=QRNN", "--amp=bf16", "--no-tied", "--ar-norm=l2"],
        ["--model=GRU", "--loop", "--adaptivesoftmax", "--no-variable-bptt"],
    ],
)
def test_train_resume_evaluate_generate(flags, tiny_corpus, tmp_path, monkeypatch, capsys):
    """The perplexity falls; a resumed run equals a whole one; the checkpoint is scored and generates."""
    monkeypatch.chdir(tmp_path)
    common = ["--data", str(tiny_corpus), *TINY, "--optimizer=adam", "--lr=0.01", "--wdrop=0.1", "--dropouti=0.1"]
    common += ["--dropout=0.1", "--dropouth=0.1"]
    live(train_awd, [*common, *flags], tiny_corpus, capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--splitcross", "--adaptivesoftmax"], ["--splitcross", "--adaptivesoftmax"]),
        (["--cutoffs", "5", "29"], ["5 29", "29"]),
        (["--when", "0"], ["--when"]),
        (["--when", "3", "--schedule", "onecycle"], ["--when", "onecycle"]),
        (["--schedule", "when"], ["--when"]),
        (["--model", "RNN_TANH"], ["--model", "QRNN"]),
        (["--finetune", "nothing"], ["--finetune nothing", "best.pt"]),
    ],
    ids=str,
)
def test_wrong_flags_end_with_one_line(flags, words, fails, tiny_corpus, tmp_path):
    """Before anything is built."""
    error = fails(train_awd.main, "--data", tiny_corpus, "--runs-dir", tmp_path / "runs", *TINY, *flags)
    assert all(word in error for word in words)
    assert not (tmp_path / "runs").exists()
