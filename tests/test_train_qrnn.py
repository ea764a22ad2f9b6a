"""train_qrnn.py: its recipes, every flag, a run of each mode with resume, the adaptive softmax, the loss's scale."""

from argparse import Namespace

import pytest
import torch
from conftest import TINY, live

import train_qrnn
from models import build
from utils import parsing, runtime, trainer

PAPER = {
    "emsize": 640, "nhid": 640, "nlayers": 2, "window": 2, "zoneout": 0.1, "dropout": 0.5, "mode": "fo", "tied": False,
    "init": "lecun", "optimizer": "sgd", "lr": 1.0, "average": "columns", "clip": 10.0, "wdecay": 2e-4,
    "batch_size": 20, "bptt": 105, "epochs": 72, "schedule": "step", "decay": 0.95, "decay_from": 6,
    "candidate": "tanh", "backend": None,
}  # fmt: skip


def parse(*argv):
    """The flags of a train_qrnn.py command line."""
    return parsing.parse_training(train_qrnn.build_parser(), train_qrnn.RECIPES, list(argv), families=("qrnn",))[0]


def test_recipes():
    """The paper's is the default, and is the paper's; fast is one cycle of Adam."""
    assert {name: vars(parse())[name] for name in PAPER} == PAPER
    assert vars(parse("--recipe", "paper")) == vars(parse()) | {"argv": ["--recipe", "paper"]}
    fast = parse("--recipe=fast")
    assert (fast.optimizer, fast.schedule, fast.average, fast.tied) == ("adam", "onecycle", "targets", True)
    assert parse("--no-output-gate").mode == "f" and parse("--mode=ifo").mode == "ifo"
    model = build(train_qrnn.model_config(parse(), 10000))
    assert model.num_params() == 17_729_040


@pytest.mark.parametrize(("flags", "schedule"), [("--schedule plateau", "plateau"), ("--when 5", "when"), ("", "step")])
def test_another_schedule_than_the_recipes(flags, schedule):
    """The recipe's decay goes with the recipe's schedule."""
    args = parse(*flags.split())
    assert args.schedule == schedule and args.decay == (0.95 if schedule == "step" else 1)


CHANGES = {
    "emsize": 13, "nhid": 7, "nlayers": 3, "window": 3, "zoneout": 0.25, "mode": "ifo", "candidate": "sigmoid",
    "backend": "scan", "dropout": 0.125,
}  # fmt: skip


def test_every_model_flag_changes_the_model():
    """Each of them alone changes the built model."""
    group = next(g for g in train_qrnn.build_parser()._action_groups if g.title == "model")
    assert {action.dest for action in group._group_actions} == set(CHANGES)

    def built(*flags):
        model = build(train_qrnn.model_config(parse(*TINY, *flags), 31))
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        layer = model.core.layers[0]
        own = (layer.zoneout, layer.mode, layer.candidate, layer.backend, layer.window)
        return shapes, own, (model.dropouti, model.dropout, model.core.dropout)

    plain = built()
    for name, value in CHANGES.items():
        assert built(f"--{name}={value}") != plain, name


@pytest.mark.parametrize(
    "flags",
    [
        ["--zoneout=0.2"],
        ["--mode=ifo", "--window=3", "--candidate=sigmoid"],
        ["--no-output-gate", "--window=1", "--backend=torch", "--amp=bf16"],
        ["--adaptivesoftmax"],
    ],
)
def test_train_resume_evaluate_generate(flags, tiny_corpus, tmp_path, monkeypatch, capsys):
    """The perplexity falls; a resumed run equals a whole one; the checkpoint is scored and generates."""
    monkeypatch.chdir(tmp_path)
    common = ["--data", str(tiny_corpus), *TINY, "--recipe=fast", *flags, "--schedule=constant", "--lr", "0.01"]
    live(train_qrnn, common, tiny_corpus, capsys)


def test_loss_summed_over_the_window():
    """--average columns: gradient, norm and update are those of --average targets times the number of steps."""
    norms, changes = [], []
    for average in ("targets", "columns"):
        torch.manual_seed(3)
        model = build(train_qrnn.model_config(parse(*TINY), 31)).eval()
        before = model.head.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        tokens, targets = torch.randint(31, (13, 5)), torch.randint(31, (13, 5))
        clock = runtime.Clock(torch.device("cpu"))
        args = Namespace(amp="off", clip=0.0, average=average, bptt=13, variable_bptt=False)
        _, _, norm, _, _ = trainer.training_step(model, optimizer, tokens, targets, model.initial_state(5), args, clock)
        norms.append(norm)
        changes.append(model.head.weight.detach() - before)
    torch.testing.assert_close(norms[1], 13 * norms[0])
    torch.testing.assert_close(changes[1], 13 * changes[0], rtol=1e-3, atol=1e-6)
