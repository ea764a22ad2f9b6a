"""Runs that were stopped, killed or changed, and gone on with, against uninterrupted ones."""

import json
import re
import signal
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from test_train_rnn import background, wait_for

import train_rnn
from utils import UserError, checkpoint, trainer


def last(tmp_path, name):
    """The last checkpoint of a run."""
    return checkpoint.load(tmp_path / "runs" / name / "last.pt")


def assert_same(ours, theirs, path="checkpoint"):
    """Bit equality of nested containers; the name of what differs is in the message."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), path
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key, value in ours.items():
            assert_same(value, theirs[key], f"{path}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), path
        for index, value in enumerate(ours):
            assert_same(value, theirs[index], f"{path}[{index}]")
    else:
        assert ours == theirs, path


TIMES = ("seconds", "ms_per_batch", "forward_ms_per_batch", "tokens_per_second", "peak_memory_mib")


def what_training_knows(saved):
    """Everything of a checkpoint but clock readings, flags that may differ, and file sizes."""
    epochs = [{k: v for k, v in e.items() if k not in TIMES} for e in saved["history"]["epochs"]]
    position = {k: saved["position"][k] for k in ("epoch", "batch", "state", "sums")}
    kept = ("weights", "optimizer", "average", "schedule", "rng", "best", "vocabulary", "config")
    points = saved["history"]["points"]
    return {"epochs": epochs, "points": points, "position": position, **{k: saved[k] for k in kept}}


def numbers(log):
    """The log lines of a run without clock readings."""
    lines = [line for line in log.read_text().splitlines() if line.startswith(("| epoch", "| end of"))]
    return [re.sub(r"(ms/batch|time:|eta) +[\d.:s]+", "", line) for line in lines]


KINDS = {
    "sgd with momentum, plateau": ["--optimizer", "sgd", "--lr", "3", "--momentum", "0.5", "--schedule", "plateau"],
    "adam, decay": ["--optimizer", "adam", "--lr", "0.01", "--decay", "0.7"],
    "adam, one-cycle, partial shuffle": ["--lr=0.02", "--schedule=onecycle", "--wdecay=1e-4", "--partial-shuffle"],
    "GRU loop, two layers": ["--model", "GRU", "--loop", "--nlayers", "2", "--lr", "0.01"],
    "bf16": ["--amp", "bf16", "--lr", "0.01"],
    "ntasgd, one-sided rule": ["--optimizer", "ntasgd", "--lr", "90", "--nonmono", "1", "--nt-rule", "paper"],
}


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def train_and_die(train, monkeypatch):
    """train_and_die(BATCHES, *FLAGS): as train, but the process ends after so many batches."""

    def run(batches, *flags):
        step, done = trainer.training_step, []

        def dying_step(*args):
            if len(done) == batches:
                raise Killed
            done.append(1)
            return step(*args)

        monkeypatch.setattr(trainer, "training_step", dying_step)
        with pytest.raises(Killed):
            train(*flags)
        monkeypatch.setattr(trainer, "training_step", step)

    return run


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
def test_resume_equals_an_uninterrupted_run(flags, train, train_and_die, tmp_path):
    """A run that dies between two checkpoints, in the first epoch or the second, ends as if it had not, bit for bit."""
    flags = [*flags, "--checkpoint-every", "10", "--epochs", "3", "--plateau-patience", "0", "--train-tokens", "3200"]
    whole = train(*flags, "--name", "whole")
    runs = tmp_path / "runs"
    for batches in (23, 36 + 17):
        cut = f"cut-{batches}"
        train_and_die(batches, *flags, "--name", cut)
        assert last(tmp_path, cut)["position"]["batch"] == batches % 36 // 10 * 10
        torch.manual_seed(99)
        record = train(*flags, "--resume", cut)
        assert record["status"] == "finished" and record["epochs"] == 3
        assert_same(what_training_knows(last(tmp_path, cut)), what_training_knows(last(tmp_path, "whole")))
        for log in ("train_log.txt", "test_log.txt"):
            assert numbers(runs / cut / log) == numbers(runs / "whole" / log)
        assert record["results"] == whole["results"]


def switch(lines):
    """The number of the line that says so."""
    return next(number for number, line in enumerate(lines) if "Switching to ASGD" in line)


def test_resume_across_the_switch_to_averaging(train, train_and_die, tmp_path):
    """NT-ASGD, windows of variable length: dead and resumed before, about and after it, a run ends as if it had not."""
    flags = ["--optimizer=ntasgd", "--lr=200", "--clip=0.25", "--nonmono=1", "--variable-bptt", "--bptt-max=17"]
    flags += ["--epochs=6", "--checkpoint-every=7"]
    train(*flags, "--name", "whole")
    for batches in (40, 130, 210):
        cut = f"cut-{batches}"
        train_and_die(batches, *flags, "--name", cut)
        train("--resume", cut, "--epochs=6")
        assert_same(what_training_knows(last(tmp_path, cut)), what_training_knows(last(tmp_path, "whole")))
        logs = [numbers(tmp_path / "runs" / name / "train_log.txt") for name in (cut, "whole")]
        assert logs[0] == logs[1]
    text = (tmp_path / "runs" / cut / "train_log.txt").read_text()
    epochs = [line for line in text.splitlines() if "| end of" in line or "Switching" in line]
    at = switch(epochs)
    assert all("weights raw" in line for line in epochs[:at]) and len(epochs) > at + 1
    assert all("weights averaged" in line for line in epochs[at + 1 :])
    history = last(tmp_path, cut)["history"]["epochs"]
    assert [epoch["averaged"] for epoch in history] == [number >= at for number in range(6)]


def test_kill_minus_nine_and_resume(tmp_path, tiny_corpus):
    """The same with a real process and a real SIGKILL; the resumed one is told nothing but the run's name."""
    flags = ["--data", tiny_corpus, *TINY, "--epochs", "40", "--checkpoint-every", "7", "--lr", "0.01"]
    process = background(tmp_path, *flags, "--name", "cut")
    wait_for(process, r"epoch   2 \|    60/")
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    (tmp_path / "runs" / "cut" / ".last.pt.cut.tmp").write_bytes(b"a part")
    position = last(tmp_path, "cut")["position"]
    assert position["epoch"] < 40
    end = ["--epochs", str(position["epoch"] + 1)]
    output = background(tmp_path, "--resume", "cut", *end).communicate()[0]
    assert f"resumed runs/cut at epoch {position['epoch']}, batch {position['batch']}" in output
    output = background(tmp_path, *flags, *end, "--name", "whole").communicate()[0]
    assert "End of training" in output
    assert_same(what_training_knows(last(tmp_path, "cut")), what_training_knows(last(tmp_path, "whole")))
    runs = tmp_path / "runs"
    assert numbers(runs / "cut" / "train_log.txt") == numbers(runs / "whole" / "train_log.txt")
    assert list(runs.rglob("*.tmp")) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", "0.5"], ["--batch-size", "5"], ["--no-tied"], ["--nhid", "13"], ["--dropout", "0.1"],
        ["--seed", "5"], ["--recipe", "example"], ["--model", "GRU"], ["--amp", "bf16"], ["--vocab", "train"],
        ["--eval-batch", "7"], ["--schedule", "step"],
    ],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_resume_names_a_flag_that_differs(flags, train, fails, tmp_path):
    """One line, exit code 2, and the folder is as it was."""
    train("--name", "run")
    before = (tmp_path / "runs" / "run" / "last.pt").read_bytes()
    error = fails(train_rnn.main, "--runs-dir", tmp_path / "runs", "--resume", "run", *flags)
    assert f"error: {flags[0].replace('--no-', '--')} " in error and "--epochs" in error
    assert (tmp_path / "runs" / "run" / "last.pt").read_bytes() == before


def test_what_may_change_on_resume(train, tmp_path, fails):
    """More epochs, other minutes, log interval, threads; epochs not under one-cycle."""
    train("--name", "run")
    record = train("--resume", "run", "--epochs", "3", "--log-interval", "7", "--max-minutes", "9", "--threads", "1")
    assert record["epochs"] == 3 and len(record["history"]["points"]) == 2 * 4 + 13
    train("--name", "cycle", "--schedule", "onecycle")
    error = fails(train_rnn.main, "--runs-dir", tmp_path / "runs", "--resume", "cycle", "--epochs", "3")
    assert "--epochs 3 differs" in error


def test_the_same_command_resumes_a_width_that_was_found(train, fails, tmp_path):
    """--num-params with sizes typed as proportions, or as found; others are refused with the run's."""
    first = train("--name", "run", "--num-params", "3e3", "--nhid", "5", "--no-tied")["model"]["core"]
    assert first["nhid"] != 5 and first["emsize"] == round(11 * first["nhid"] / 5)
    for width in ("5", str(first["nhid"])):
        again = train("--resume", "run", "--num-params", "3e3", "--nhid", width, "--epochs", "3")
        assert again["model"]["core"] == first and again["epochs"] == 3
    error = fails(train_rnn.main, "--runs-dir", tmp_path / "runs", "--resume", "run", "--nhid", "7")
    assert f"--nhid 7 differs from the resumed run's {first['nhid']}" in error


def test_resume_refuses_other_text(train, tmp_path, tiny_corpus):
    """The corpus may have moved, but its content is compared."""
    train("--name", "run")
    copy = tmp_path / "copy"
    copy.mkdir()
    for split in ("train", "valid", "test"):
        (copy / f"{split}.txt").write_bytes((tiny_corpus / f"{split}.txt").read_bytes())
    assert train("--resume", "run", "--data", str(copy), "--epochs", "3")["epochs"] == 3
    (copy / "test.txt").write_text("w1 w2 w3\n" * 40)
    with pytest.raises(UserError, match="not what the run was trained on"):
        train("--resume", "run", "--data", str(copy), "--epochs", "4")


def test_resume_of_an_ended_run_evaluates_again(train):
    """A run killed in its last evaluation gets its results."""
    first = train("--name", "run")
    again = train("--resume", "run")
    assert again["results"] == first["results"] and again["epochs"] == 2


def test_max_minutes_stops_saves_and_evaluates(train, tmp_path):
    """The part of an epoch that was done is evaluated; --resume goes on after it."""
    record = train("--name", "short", "--epochs", "5", "--max-minutes", "1e-9")
    assert record["status"] == "max-minutes" and record["results"]["test"]["epoch"] == 1
    (entry,) = record["history"]["epochs"]
    assert entry["partial"] and entry["batches"] == 1 and entry["valid_batch"] == 3
    train("--name", "over", "--epochs", "2", "--max-minutes", "1e-9")
    assert train("--resume", "over")["status"] == "finished", "the minutes that are over end it again"
    train("--name", "whole", "--epochs", "2")
    train("--resume", "short", "--epochs", "2", "--max-minutes", "60")
    ours, whole = (last(tmp_path, name) for name in ("short", "whole"))
    assert_same(dict(ours["weights"]), dict(whole["weights"]))


@pytest.mark.parametrize("batches", (40, 91 + 40))
def test_the_best_in_the_middle_of_an_epoch_does_not_outlive_a_resume(batches, train, tmp_path, monkeypatch):
    """A run that stops there has it as its best; resumed it ends, best.pt and --save too, as one that never stopped."""
    score, step, calls = trainer.Trainer.score_valid, trainer.training_step, []

    def low_in_the_middle(self):
        found = score(self)
        return replace(found, loss=0.1) if self.batch < self.batches else found

    def pressed(*args):
        calls.append(1)
        if len(calls) == batches:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    train("--name=whole", "--lr=0.3", "--epochs=3")
    whole = checkpoint.load(tmp_path / "model.pt")
    with monkeypatch.context() as context:
        context.setattr(trainer.Trainer, "score_valid", low_in_the_middle)
        context.setattr(trainer, "training_step", pressed)
        stopped = train("--name=cut", "--lr=0.3", "--epochs=3")
    folder = tmp_path / "runs" / "cut"
    assert stopped["status"] == "interrupted" and last(tmp_path, "cut")["position"]["batch"] == 40
    assert checkpoint.load(folder / "best.pt")["best"]["valid_loss"] == 0.1
    assert (folder / "best-whole.pt").exists() == (batches > 91)
    record = train("--resume=cut", "--epochs=3")
    assert_same(what_training_knows(last(tmp_path, "cut")), what_training_knows(last(tmp_path, "whole")))
    for path in (folder / "best.pt", tmp_path / "model.pt"):
        assert_same(what_training_knows(checkpoint.load(path)), what_training_knows(whole), str(path))
    assert record["results"] == json.loads((tmp_path / "runs" / "whole" / "run.json").read_text())["results"]
    assert not (folder / "best-whole.pt").exists()


def test_what_is_written_into_the_saved_model_leaves_the_run_alone(train, tmp_path):
    """--save is a file of its own once training is over; best.pt and last.pt may be one."""
    train("--name=run", "--epochs=1")
    (tmp_path / "model.pt").write_bytes(b"another program's")
    assert train("--resume=run", "--epochs=2")["epochs"] == 2


def test_columns_of_another_number_of_devices(train, tmp_path):
    """A run that left columns out, because there were more devices, is not resumed with all of them: one line."""
    train("--name=run", "--epochs=1")
    path = tmp_path / "runs" / "run" / "last.pt"
    saved = checkpoint.load(path)
    saved["position"]["state"] = tuple(part[:, :6] for part in saved["position"]["state"])
    checkpoint.save(path, saved)
    with pytest.raises(UserError, match=r"^--resume run: the run has 6 columns, 7 can be shared[^\n]*$"):
        train("--resume=run", "--epochs=2")
