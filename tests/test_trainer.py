"""The loop against one written out by hand, averaging, the best model, records, what a GPU is not asked."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from test_resume import assert_same, last, what_training_knows

import train_rnn
from data import Corpus
from data.batching import columns
from models import build, compiled
from utils import UserError, checkpoint, runtime, trainer
from utils.evaluation import Score, evaluate


def reference_loop(folder, args, weights):
    """word_language_model's main.py written out: untied LSTM, no dropout, SGD with L2, clipping by the total norm."""
    corpus = Corpus.load(folder, notice=lambda line: None)
    data = torch.tensor(corpus.train.tolist())
    length = len(data) // args.batch_size
    data = data[: length * args.batch_size].view(args.batch_size, -1).t()
    w = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    rnn = torch.nn.LSTM(args.emsize, args.nhid, args.nlayers)
    for _ in range(args.epochs):
        hidden = tuple(torch.zeros(args.nlayers, args.batch_size, args.nhid) for _ in range(2))
        for i in range(0, length - 1, args.bptt):
            steps = min(args.bptt, length - 1 - i)
            emb = w["embedding.weight"][data[i : i + steps]]
            lstm = {name.removeprefix("core.rnn."): p for name, p in w.items() if name.startswith("core")}
            out, hidden = torch.func.functional_call(rnn, lstm, (emb, tuple(h.detach() for h in hidden)))
            logits = out @ w["head.weight"].t() + w["head.bias"]
            log_probs = logits - logits.logsumexp(-1, keepdim=True)
            loss = -log_probs.gather(-1, data[i + 1 : i + 1 + steps, :, None]).mean()
            grads = torch.autograd.grad(loss, list(w.values()))
            norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
            factor = min(1.0, args.clip / (norm + 1e-6))
            with torch.no_grad():
                for p, g in zip(w.values(), grads, strict=True):
                    p -= args.lr * (g * factor + args.wdecay * p)
    return w


def test_the_loop_is_the_one_of_word_language_model(train, tmp_path, tiny_corpus):
    """Two epochs of plain SGD give the weights that a loop written out by hand gives."""
    flags = ["--recipe", "example", "--no-tied", "--dropout", "0", "--lr", "5", "--wd", "1e-3", "--nhid", "13"]
    flags += ["--schedule", "constant", "--clip", "0.03"]
    train(*flags, "--name", "ours")
    args = SimpleNamespace(**last(tmp_path, "ours")["args"])
    torch.manual_seed(args.seed)
    initial = build(train_rnn.model_config(args, 29)).state_dict()
    expected = reference_loop(tiny_corpus, args, initial)
    for name, tensor in last(tmp_path, "ours")["weights"].items():
        moved = (tensor - initial[name]).norm()
        error = (tensor - expected[name]).norm() / moved
        assert moved > 0.1 and error < 1e-4, (name, moved, error)


def test_what_is_kept_of_an_averaged_run_is_the_mean(train, tmp_path, tiny_corpus):
    """best.pt holds the mean of the weights and scores as logged; last.pt holds what training goes on from."""
    flags = ["--optimizer=ntasgd", "--lr=200", "--clip=0.25", "--nonmono=1", "--epochs=6", "--name=run"]
    record = train(*flags)
    best, end = (checkpoint.load(tmp_path / "runs" / "run" / f"{name}.pt") for name in ("best", "last"))
    assert record["history"]["epochs"][best["best"]["epoch"] - 1]["averaged"]
    names = [name for name in best["weights"] if name != "head.weight"]  # tied
    means = dict(zip(names, best["average"]["means"], strict=True))
    assert all(torch.equal(best["weights"][name], mean) for name, mean in means.items())
    assert not any(torch.equal(end["weights"][name], mean) for name, mean in means.items())
    model, _, _ = checkpoint.load_model(tmp_path / "runs" / "run" / "best.pt", torch.device("cpu"))
    corpus = Corpus.load(tiny_corpus, notice=lambda line: None)
    assert evaluate(model, corpus.valid, 3).loss == best["best"]["valid_loss"]


def test_finetune_averages_from_the_first_step_and_stops(train, tmp_path):
    """From another run's best model; the first epoch is scored averaged; the same rule ends it, for --resume too."""
    first = train("--name=first", "--lr=0.02", "--epochs=3")
    flags = ["--optimizer=ntasgd", "--lr=15", "--clip=0.25", "--nonmono=2", "--epochs=40", "--finetune=first"]
    record = train(*flags, "--name=tuned")
    epochs = record["history"]["epochs"]
    assert all(epoch["averaged"] for epoch in epochs) and 3 <= len(epochs) < 40
    losses = [epoch["valid_loss"] for epoch in epochs]
    assert losses[-1] > min(losses[:-3]) and all(losses[n] <= min(losses[: n - 2]) for n in range(3, len(losses) - 1))
    assert losses[0] < 1.1 * min(epoch["valid_loss"] for epoch in first["history"]["epochs"])
    assert "Stopping" in (tmp_path / "runs" / "tuned" / "train_log.txt").read_text()
    again = train("--resume=tuned", "--epochs=40")
    assert again["epochs"] == len(epochs) and again["results"] == record["results"]


def test_finetune_of_what_does_not_fit(train, fails, tmp_path):
    """Another size, no such run, another optimizer: one line each, before anything is written."""
    train("--name=first", "--epochs=1")
    common = ["--data", tmp_path, "--runs-dir", tmp_path / "runs", *TINY]
    assert "expected a run folder with best.pt" in fails(
        train_rnn.main, *common, "--optimizer=ntasgd", "--finetune=other"
    )
    assert "--optimizer ntasgd" in fails(train_rnn.main, *common, "--finetune=first")
    with pytest.raises(UserError, match="does not fit"):
        train("--optimizer=ntasgd", "--finetune=first", "--nhid=7", "--no-tied", "--name=second")
    assert not (tmp_path / "runs" / "second").exists()


def test_a_window_of_variable_length_has_its_own_rate(monkeypatch):
    """Steps of lengths 5, 13 and 8 around 10 move weights at half, 1.3 and 0.8 times the rate, each its own (torch's
    ASGD would take the last one's), as a loop in float64 does; the rate itself stays."""
    torch.manual_seed(3)
    config = {"family": "rnn", "core": {"model": "GRU", "emsize": 7, "nhid": 7, "nlayers": 1}, "vocab_size": 19}
    model = build({**config, "tied": True}).double()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    args = SimpleNamespace(optimizer="ntasgd", lr=3.0, momentum=0.0, wdecay=0.01, clip=0.0, average="targets", bptt=10)
    args.variable_bptt, args.amp = True, "off"
    optimizer = trainer.optim.build_optimizer(args, model.parameters())
    state, clock = model.initial_state(5), runtime.Clock(torch.device("cpu"))
    for steps in (5, 13, 8):
        tokens, targets = torch.randint(19, (2, steps, 5))
        twin = build({**config, "tied": True}).double()
        twin.load_state_dict(model.state_dict())
        loss, _, count, _ = twin(tokens, targets, state)
        gradients = torch.autograd.grad((loss / count).sum(), list(twin.parameters()))
        for (name, value), gradient in zip(weights.items(), gradients, strict=True):
            weights[name] = value - 3.0 * steps / 10 * (gradient + 0.01 * value)
        _, _, _, state, _ = trainer.training_step(model, optimizer, tokens, targets, state, args, clock)
        for name, value in model.named_parameters():
            torch.testing.assert_close(value.detach(), weights[name], rtol=1e-10, atol=1e-12, msg=name)
    assert optimizer.param_groups[0]["lr"] == 3.0


def test_a_seed_fixes_everything(train, tmp_path):
    """Equal seeds, equal weights and history; another seed, other ones."""
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        train("--seed", seed, "--name", name)
    a, b, c = (last(tmp_path, name) for name in "abc")
    assert_same(what_training_knows(a), what_training_knows(b))
    assert not torch.equal(a["weights"]["head.weight"], c["weights"]["head.weight"])


def test_the_best_model_is_tested_not_the_last(train, tmp_path, monkeypatch, tiny_corpus):
    """Validation is best in epoch 2 of 4: best.pt, --save and the reported figures are of epoch 2."""
    scripted = iter([3.0, 1.0, 2.0, 2.5])
    weights = []

    def scripted_evaluate(model, ids, batch_size=1, amp="off", label=None, sos=None):
        if label.startswith("epoch"):
            weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return Score(next(scripted), len(ids) - 1, batch_size)
        return evaluate(model, ids, batch_size, amp)

    monkeypatch.setattr(trainer, "evaluate", scripted_evaluate)
    record = train("--name", "run", "--epochs", "4", "--lr", "0.02")
    for path in (tmp_path / "runs" / "run" / "best.pt", tmp_path / "model.pt"):
        assert_same(dict(checkpoint.load(path)["weights"]), weights[1])
    assert record["results"]["test"]["checkpoint"] == "best.pt" and record["results"]["test"]["epoch"] == 2
    model = build(checkpoint.load(tmp_path / "model.pt")["config"])
    model.load_state_dict(weights[1])
    corpus = Corpus.load(tiny_corpus)
    for split, ids in (("valid", corpus.valid), ("test", corpus.test)):
        score = evaluate(model, ids)
        result = record["results"][split]
        assert (result["loss"], result["targets"], result["batch_size"]) == (score.loss, len(ids) - 1, 1)


def test_the_record_holds_what_a_table_needs(train, tmp_path, tiny_corpus, curves):
    """run.json, metrics.csv and curves.png agree with each other."""
    train("--name", "run", "--lr", "0.02")
    folder = tmp_path / "runs" / "run"
    record = json.loads((folder / "run.json").read_text())
    assert record["kind"] == "training" and record["status"] == "finished"
    assert record["command"].startswith("python ") and "--name run" in record["command"]
    assert record["model"]["parameters"] == 1404 and record["corpus"]["types"] == 29
    assert record["corpus"]["tokens"] == {"train": 8265, "valid": 810, "test": 785}
    assert set(record["corpus"]["checksums"]) == {"train", "valid", "test"}
    assert {"device", "threads", "amp", "torch", "commit"} <= record["environment"].keys()
    for figure in ("minutes", "ms_per_batch", "forward_ms_per_batch", "tokens_per_second", "peak_memory_mib"):
        assert record[figure] > 0, figure
    assert record["forward_ms_per_batch"] < record["ms_per_batch"]
    for split, targets in (("valid", 809), ("test", 784)):
        result = record["results"][split]
        assert (result["batch_size"], result["targets"]) == (1, targets)
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = record["history"]["epochs"]
    assert [float(row["valid_ppl"]) for row in rows] == [epoch["valid_ppl"] for epoch in epochs]
    assert [epoch["batches"] for epoch in epochs] == [91, 91]
    assert epochs[1]["train_ppl"] < epochs[0]["train_ppl"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_training_loss_is_weighted_by_targets(train, tmp_path, tiny_corpus):
    """With a rate of nearly 0 the epoch's training loss is the loss of the untrained model over all its targets."""
    train("--name", "run", "--lr", "1e-12", "--dropout", "0", "--epochs", "1")
    saved = last(tmp_path, "run")
    model = build(saved["config"])
    model.load_state_dict(saved["weights"])
    stream = columns(Corpus.load(tiny_corpus).train, 7)
    loss, _, count, _ = model(stream[:-1], stream[1:], model.initial_state(7))
    assert saved["history"]["epochs"][0]["train_loss"] == pytest.approx((loss / count).item(), rel=1e-5)


def test_a_gpu_is_not_waited_for_in_every_batch(train, monkeypatch):
    """Between log lines nothing reads a tensor's value: the reads of an epoch do not grow with its batches."""
    reads = []
    for name in ("item", "tolist", "__int__", "__float__", "__bool__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, original=original, **k: reads.append(1) or original(*a, **k))
    counts = []
    train_epoch = trainer.Trainer.train_epoch

    def counted(self, interrupted):
        device, self.device = self.device, SimpleNamespace(type="cuda")
        reads.clear()
        train_epoch(self, interrupted)
        counts.append((self.batch, len(reads)))
        self.device = device

    monkeypatch.setattr(trainer.Trainer, "train_epoch", counted)
    monkeypatch.setattr(compiled, "usable", lambda *tensors: False)  # a GPU has no kernels of numba
    train("--epochs", "1", "--bptt", "13", "--log-interval", "1000", "--optimizer", "sgd")
    train("--epochs", "1", "--bptt", "5", "--log-interval", "1000", "--optimizer", "sgd")
    (few, reads_few), (many, reads_many) = counts
    assert many > 2 * few and reads_few == reads_many < 10


def test_a_non_finite_gradient_is_found_on_a_gpu_too(train, monkeypatch):
    """Where batches are not waited for, the sums remember the first bad step and its gradient norm."""
    step, seen = trainer.training_step, []

    def bad_third_step(*args):
        loss, count, norm, *rest = step(*args)
        seen.append(1)
        return (loss, count, torch.tensor(float("inf")) if len(seen) >= 3 else norm, *rest)

    monkeypatch.setattr(trainer, "training_step", bad_third_step)
    check = trainer.Trainer.check_finite
    late = lambda self: check(self) if self.batch % 20 == 0 else None  # noqa: E731
    monkeypatch.setattr(trainer.Trainer, "check_finite", late)
    with pytest.raises(trainer.TrainingError, match=r"batch 3 of epoch 1: lr 0.001, gradient norm inf"):
        train()
    assert len(seen) == 20


def test_dropped_settings_do_not_leak(train):
    """Flushing denormals can be switched off."""
    train("--dry-run", "--no-flush-denormal", "--no-tune-allocator")
    assert (torch.tensor(1e-39) * 1.0).item() != 0
    train("--dry-run")
    assert (torch.tensor(1e-39) * 1.0).item() == 0
    assert runtime.peak_memory(torch.device("cpu")) > 50
