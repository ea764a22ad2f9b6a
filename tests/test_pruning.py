"""Pruning: criteria against sorting, schedules against their equations, masks through training, resume, averaging."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import train_awd
import train_rnn
from models import build
from utils import UserError, checkpoint, trainer
from utils.pruning import Pruning, Window, at_once, level, matches, parse_schedule, threshold


@given(count=st.integers(1, 60), sparsity=st.floats(0, 1, allow_subnormal=False), ties=st.booleans())
def test_level(count, sparsity, ties):
    """Exactly that many of least magnitude: none that is kept is smaller than one that is not."""
    values = np.random.default_rng(count).normal(size=(count, 1)).astype(np.float32)
    weight = torch.from_numpy(values.round() if ties else values)
    mask = level(weight, sparsity)
    assert (~mask).sum() == int(sparsity * count) and mask.shape == weight.shape
    magnitudes = weight.abs()
    if 0 < (~mask).sum() < count:
        assert magnitudes[~mask].max() <= magnitudes[mask].min()


def test_threshold():
    """At most the bound is pruned, of either sign; at 0 what is 0 already."""
    weight = torch.tensor([[-0.5, 0.5, 0.25], [0.0, 0.75, -1.0]])
    assert threshold(weight, 0.5).tolist() == [[False, False, False], [False, True, True]]
    assert threshold(weight, 0.0).tolist() == [[True, True, True], [False, True, True]]


def test_window():
    """At start, start + frequency, ..., never at end."""
    assert [done for done in range(12) if Window(2, 9, 3).due(done)] == [2, 5, 8]
    assert (Window(2, 9, 3).span, Window(2, 8, 3).span, Window(2, 20, 1).span, Window(4, 5, 3).span) == (6, 3, 17, 0)


def model_of(family="rnn", **core):
    """A small model with a tied matrix."""
    torch.manual_seed(5)
    sizes = {"model": "LSTM", "emsize": 11, "nhid": 11, "nlayers": 2}
    return build({"family": family, "core": {**sizes, **core}, "vocab_size": 31, "tied": True})


AGP = """
pruners:
  cells: {class: AutomatedGradualPruner, initial_sparsity: 0.05, final_sparsity: 0.7, weights: [rnn.weight_*]}
  words: {class: AutomatedGradualPruner, initial_sparsity: 0.05, final_sparsity: 0.9, weights: [encoder.weight]}
policies:
  - {pruner: {instance_name: cells}, starting_epoch: 2, ending_epoch: 20, frequency: 1}
  - {pruner: {instance_name: words}, starting_epoch: 3, ending_epoch: 26, frequency: 3}
"""


def test_gradual_pruning_is_the_cubic():
    """Of each weight at each epoch; weights that another pruner has keep theirs; biases are never touched."""
    model = model_of()
    subject = Pruning(model, AGP)
    weight = model.core.rnn.weight_hh_l1
    for done in range(30):
        acted = subject.start_epoch(done)
        assert ("core.rnn.weight_hh_l1" in acted) == (2 <= done < 20)
        assert ("embedding.weight" in acted) == (done in range(3, 26, 3))
        for parameter, start, final, last in ((weight, 2, 0.7, 19), (model.embedding.weight, 3, 0.9, 24)):
            at = min(done, last) if start == 2 else min(start + max(0, done - start) // 3 * 3, last)
            want = final + (0.05 - final) * (1 - (at - start) / (last - start)) ** 3 if done >= start else 0
            assert int((parameter == 0).sum()) == int(want * parameter.numel())
    assert (model.head.weight == 0).sum() == (model.embedding.weight == 0).sum()
    assert all((parameter != 0).all() for name, parameter in model.named_parameters() if "rnn.bias" in name)
    assert subject.count() == sum(int((p == 0).sum()) for n, p in model.named_parameters() if "weight" in n)


BAIDU = """
pruners:
  cells: {{class: BaiduRNNPruner, q: {q}, ramp_epoch_offset: {ramp}, ramp_slope_mult: 2, weights: [rnn.weight_hh_l0]}}
policies:
  - {{pruner: {{instance_name: cells}}, starting_epoch: 4, ending_epoch: 21, frequency: 3}}
"""
LEVELS = """
pruners:
  cells: {class: SparsityLevelParameterPruner, levels: {}}
policies:
  - {pruner: {instance_name: cells}, starting_epoch: 0, ending_epoch: 1, frequency: 1}
"""


@pytest.mark.parametrize("q", [0.11, 0.2])
def test_baidu_pruning_is_the_ramp(q):
    """The threshold by the paper's algorithm at every epoch, with the published schedule's numbers."""
    model = model_of()
    subject, weight = Pruning(model, BAIDU.format(q=q, ramp=3)), model.core.rnn.weight_hh_l0
    start_slope = 2 * q * 3 / (2 * 3 + 3 * 14)
    for done in range(4, 21, 3):
        with torch.no_grad():
            weight.uniform_(-0.3, 0.3)
        subject.masks.clear()  # other weights: nothing of them is pruned yet
        before = weight.detach().clone()
        subject.start_epoch(done)
        if done < 7:
            bound = start_slope * (done - 4 + 1) / 3
        else:
            bound = (start_slope * (7 - 4 + 1) + 2 * start_slope * (done - 7 + 1)) / 3
        assert torch.equal(weight == 0, before.abs() <= bound)


def test_numbers_by_tensor():
    """Levels, thresholds and sensitivities by name or pattern, "*" for the other matrices."""
    policy = "policies: [{pruner: {instance_name: a}, starting_epoch: 0, ending_epoch: 1, frequency: 1}]"
    text = "pruners: {a: {class: SparsityLevelParameterPruner, levels: {rnn.weight_hh_l1: 0.5, '*': 0.25}}}\n"
    model = model_of()
    assert len(Pruning(model, text + policy).start_epoch(0)) == 5
    counts = {name: int((p == 0).sum()) / p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    assert counts["core.rnn.weight_hh_l1"] == 0.5 and counts["embedding.weight"] == pytest.approx(0.25, abs=0.01)
    text = "pruners: {a: {class: MagnitudeParameterPruner, thresholds: {rnn.weight_hh_l1: 0.1}}}\n"
    model = model_of()
    before = model.core.rnn.weight_hh_l1.detach().clone()
    assert Pruning(model, text + policy).start_epoch(0) == ["core.rnn.weight_hh_l1"]
    assert torch.equal(model.core.rnn.weight_hh_l1 == 0, before.abs() <= 0.1)
    text = "pruners: {a: {class: SensitivityPruner, sensitivities: {rnn.weight_hh_l1: 0.5}}}\n"
    model = model_of()
    before = model.core.rnn.weight_hh_l1.detach().double().numpy()
    Pruning(model, text + policy).start_epoch(0)
    pruned = (model.core.rnn.weight_hh_l1 == 0).numpy()
    assert (pruned == (np.abs(before) <= 0.5 * before.std(ddof=1))).mean() > 0.99


PUBLISHED = {
    "large-70": (0.70, 0.70, (2, 20), (2, 20), (3, 21), 1),
    "large-70b": (0.50, 0.85, (1, 25), (2, 25), (3, 26), 3),
    "large-73": (0.40, 0.85, (1, 25), (2, 25), (3, 26), 3),
    "large-80": (0.74, 0.85, (1, 25), (2, 25), (3, 26), 3),
    "large-90": (0.90, 0.90, (1, 25), (2, 25), (3, 26), 3),
    "large-95": (0.95, 0.95, (1, 25), (2, 25), (3, 26), 3),
}
"""Distiller's: sparsity of cells and of the embedding; epochs of layer 1, of layer 2, of the embedding; frequency."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules(name):
    """The files here are those settings, and prune every matrix of an LSTM of two layers."""
    cells, words, *windows, frequency = PUBLISHED[name]
    text = (ROOT / "schedules" / f"{name}.yaml").read_text()
    for (pruner, window), epochs, sparsity in zip(
        parse_schedule(text, name), windows, (cells, cells, words), strict=True
    ):
        assert (window.start, window.end, window.frequency) == (*epochs, frequency)
        assert (pruner.initial_sparsity, pruner.final_sparsity) == (0.05, sparsity)
    subject = Pruning(model_of(), text)
    for done in range(40):
        subject.start_epoch(done)
    sizes = {n: p for n, p in subject.parameters.items() if p.dim() > 1}
    for parameter_name, parameter in sizes.items():
        final = words if "embedding" in parameter_name else cells
        assert int((parameter == 0).sum()) == int(final * parameter.numel())


@pytest.mark.parametrize(
    ("name", "pattern", "found"),
    [
        ("core.rnn.weight_hh_l0", "rnn.weight_hh_l0", True),
        ("core.rnn.weight_hh_l0", "core.*", True),
        ("core.rnn.weight_hh_l0", "*_hh_l?", True),
        ("core.rnn.weight_hh_l0", "weight_hh_l0", True),
        ("core.rnn.weight_hh_l0", "nn.weight_hh_l0", False),
        ("core.rnn.weight_hh_l0", "rnn.weight_hh", False),
        ("embedding.weight", "encoder.weight", True),
        ("head.weight", "decoder.weight", True),
    ],
)
def test_patterns(name, pattern, found):
    """Whole names, what follows a dot, shell patterns; word_language_model's names."""
    assert matches(name, pattern) == found


def test_a_tied_matrix_by_either_name():
    """It is one parameter, pruned once."""
    for name in ("decoder.weight", "head.weight", "embedding.weight"):
        text = AGP.replace("encoder.weight", name)
        assert Pruning(model_of(), text).start_epoch(3)[-1] == "embedding.weight"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (AGP.replace("rnn.weight_*", "gru.*"), ["gru.*", "core.rnn.weight_hh_l0", "embedding.weight"]),
        (AGP.replace("AutomatedGradualPruner", "Nobody"), ["Nobody", "BaiduRNNPruner"]),
        (AGP.replace("final_sparsity", "last"), ["last"]),
        (AGP.replace("instance_name: cells", "instance_name: cell"), ["cell"]),
        (AGP.replace("ending_epoch: 20", "ending_epoch: 2"), ["from epoch 2 to 2"]),
        (AGP.replace("frequency: 1", "frequency: 0"), ["every 0"]),
        (AGP.replace("final_sparsity: 0.7", "final_sparsity: 70"), ["final_sparsity: 70, expected 0 to 1"]),
        (AGP.replace("final_sparsity: 0.7", "final_sparsity: high"), ["final_sparsity: high, expected numbers"]),
        (re.sub(r"weights: \[.*?\]", "weights: all", AGP), ["weights: all, expected a list"]),
        (LEVELS.replace("{}", "0.5"), ["levels: 0.5, expected numbers by pattern"]),
        (LEVELS.replace("{}", "{0: 0.5}"), ["levels: {0: 0.5}, expected numbers by pattern"]),
        (LEVELS.replace("{}", "{a: 50}"), ["levels: {'a': 50}, expected 0 to 1"]),
        (AGP.replace("final_sparsity: 0.7", "final_sparsity: {x: 0.5}"), ["final_sparsity", "expected a number"]),
        (BAIDU.format(q=0.1, ramp=18), ["ramp_epoch_offset: 18"]),
        ("a: [", ["not understood"]),
        ("", ["not understood"]),
        ("pruners: {a: !!python/object/apply:os.system [true]}", ["not understood", "python/object"]),
    ],
)
def test_schedules_that_are_none(text, words):
    """One line that says what was not understood; nothing in a file is executed."""
    with pytest.raises(UserError) as error:
        Pruning(model_of(), text or "{}")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_what_normalizes_is_no_matrix():
    """The port's layer norms have gains of two dimensions: "*" leaves them alone, a name does not."""
    core = {"emsize": 11, "memslots": 2, "headsize": 5, "numheads": 3, "variant": "port"}
    model = build({"family": "rmc", "core": core, "vocab_size": 31, "tied": True})
    every, one = (Pruning(model, at_once("sparsity", 0.5, [pattern])) for pattern in ("*", "mlp_norm.0.weight"))
    acted = every.start_epoch(0)
    assert acted and not any("norm" in name for name in acted)
    assert one.start_epoch(0) == ["core.memory.mlp_norm.0.weight"]


def zeros(path):
    """{name: fraction of zeros} of the matrices of a checkpoint, and the checkpoint."""
    saved = checkpoint.load(path)
    return {n: (w == 0).float().mean().item() for n, w in saved["weights"].items() if w.dim() > 1}, saved


@pytest.mark.parametrize(
    "flags",
    [["--lr=0.02"], ["--optimizer=sgd", "--lr=3", "--momentum=0.9"], ["--optimizer=ntasgd", "--lr=90", "--nonmono=1"]],
)
def test_what_is_pruned_stays_zero(flags, train, tmp_path, monkeypatch):
    """Before every forward pass and in every checkpoint, momentum and averaging or not; the best is of the final
    sparsity, and is what is tested."""
    seen, step = [], trainer.training_step

    def spy(model, *rest):
        seen.append(min((p == 0).float().mean().item() for p in model.parameters() if p.dim() > 1))
        return step(model, *rest)

    monkeypatch.setattr(trainer, "training_step", spy)
    record = train("--name=pruned", "--epochs=4", "--sparsity=0.6", "--prune-epochs=1:3:1", *flags)
    assert seen[0] == 0 and seen[-1] >= 0.59 and seen == sorted(seen)
    for name in ("best.pt", "last.pt"):
        fractions, saved = zeros(tmp_path / "runs" / "pruned" / name)
        assert all(fraction == pytest.approx(0.6, abs=0.01) for fraction in fractions.values())
        masks = saved["pruning"]["masks"]
        assert all((saved["weights"][name][~mask] == 0).all() for name, mask in masks.items())
    assert saved["best"]["epoch"] >= 3 and record["results"]["test"]["epoch"] >= 3
    assert "| pruned embedding.weight core.rnn.weight_ih_l0" in (tmp_path / "runs/pruned/train_log.txt").read_text()


def test_a_schedule_that_is_none_leaves_the_name_free(train, tmp_path):
    """It is found before there is a run folder."""
    file = tmp_path / "schedule.yaml"
    file.write_text(AGP.replace("rnn.weight_*", "gru.*"))
    for text in (AGP.replace("rnn.weight_*", "gru.*"), AGP.replace("0.7", "70")):
        file.write_text(text)
        with pytest.raises(UserError):
            train("--name=run", "--compress", str(file))
        assert not (tmp_path / "runs").exists()


def test_fewer_epochs_than_were_begun(train, tmp_path):
    """Resumed to end before the epoch in which pruning made all before it no best any more: best.pt is scored."""
    train("--name=run", "--epochs=2")
    path = tmp_path / "runs" / "run" / "last.pt"
    checkpoint.save(path, {**checkpoint.load(path), "best": None, "whole": None})
    assert train("--resume=run", "--epochs=1")["results"]["test"]["epoch"] == 2


def test_a_resumed_run_needs_no_schedule_file(train, tmp_path):
    """The schedule lies in the checkpoint: what is pruned goes on from where it stood, as in one run."""
    file = tmp_path / "schedule.yaml"
    file.write_text(AGP.replace("starting_epoch: 2, ending_epoch: 20", "starting_epoch: 0, ending_epoch: 3"))
    train("--name=whole", "--compress", str(file), "--epochs=3")
    train("--name=cut", "--compress", str(file), "--epochs=2")
    file.unlink()
    train("--resume=cut", "--epochs=3")
    whole, cut = (zeros(tmp_path / "runs" / name / "last.pt")[1]["weights"] for name in ("whole", "cut"))
    assert (cut["core.rnn.weight_hh_l0"] == 0).sum() == int(0.7 * 484)
    assert all(torch.equal(weight, cut[name]) for name, weight in whole.items())


def test_weight_drop_does_not_hide_what_is_pruned(tiny_corpus, tmp_path):
    """AWD's raw recurrent weights are the ones that become zero."""
    places = ["--data", str(tiny_corpus), "--runs-dir", str(tmp_path), "--save", str(tmp_path / "m.pt"), "--name=awd"]
    sizes = ["--emsize=11", "--nhid=13", "--nlayers=2", "--batch-size=7", "--bptt=13", "--epochs=1", "--eval-batch=3"]
    train_awd.main([*places, *sizes, "--threads=1", "--sparsity=0.5", "--prune-epochs=0:1:1"])
    fractions, _ = zeros(tmp_path / "awd" / "best.pt")
    assert fractions["core.layers.0.rnn.weight_hh_l0"] == pytest.approx(0.5, abs=0.01)
    assert len(fractions) == 6 and all(value == pytest.approx(0.5, abs=0.01) for value in fractions.values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--compress", "gone.yaml"], ["--compress gone.yaml", "YAML"]),
        (["--compress", str(ROOT / "schedules" / "large-70.yaml"), "--sparsity", "0.5"], ["--sparsity", "--compress"]),
        (["--prune-epochs", "1:2:1"], ["--prune-epochs goes with --sparsity"]),
        (["--sparsity", "0.5", "--prune-epochs", "2:1:1"], ["START:END:EVERY", "2:1:1"]),
        (["--sparsity", "1"], ["--sparsity"]),
        (["--nlayers", "1", "--compress", str(ROOT / "schedules" / "large-70.yaml")], ["rnn.weight_ih_l1"]),
    ],
)
def test_mistakes_are_one_line(flags, words, fails, tiny_corpus, tmp_path):
    """Files that are not there, flags that exclude each other, weights that the model does not have."""
    places = ["--data", tiny_corpus, "--runs-dir", tmp_path / "runs", "--save", tmp_path / "model.pt"]
    message = fails(train_rnn.main, *places, "--emsize=11", "--nhid=11", *flags)
    assert all(word in message for word in words), message
