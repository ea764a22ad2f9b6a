"""onnxruntime gives the model's log probabilities: other lengths and batch sizes than the exported example's."""

import importlib.util

import onnxruntime
import pytest
import torch
from conftest import TINY

import train_rmc
import train_rnn
from models import build
from utils import checkpoint, onnx_export

RNN = {"emsize": 7, "nhid": 11, "nlayers": 2}
RMC = {"emsize": 7, "headsize": 5, "numheads": 3, "keysize": 2}
CONFIGS = {
    "LSTM": ("rnn", {"model": "LSTM", **RNN}),
    "GRU": ("rnn", {"model": "GRU", **RNN}),
    "RNN_TANH": ("rnn", {"model": "RNN_TANH", **RNN}),
    "RNN_RELU": ("rnn", {"model": "RNN_RELU", **RNN}),
    "LSTM loop": ("rnn", {"model": "LSTM", **RNN, "loop": True}),
    "GRU loop": ("rnn", {"model": "GRU", **RNN, "loop": True}),
    "RMC paper": ("rmc", {**RMC, "memslots": 3, "numblocks": 2}),
    "RMC port": ("rmc", {**RMC, "memslots": 2, "variant": "port", "gatestyle": "memory"}),
    "RMC one block": ("rmc", {**RMC, "memslots": 2}),
    "QRNN": ("qrnn", {**RNN, "window": 3, "zoneout": 0.2}),
    "QRNN ifo": ("qrnn", {**RNN, "window": 1, "mode": "ifo", "candidate": "softplus"}),
    "RMC no gates": ("rmc", {**RMC, "gatestyle": "none"}),
    "AWD-LSTM": ("awd", {"model": "LSTM", **RNN, "tied": True, "wdrop": 0.5, "dropouth": 0.3}),
    "AWD-GRU": ("awd", {"model": "GRU", **RNN, "tied": False, "wdrop": 0.5}),
    "AWD-QRNN": ("awd", {"model": "QRNN", **RNN, "tied": True, "wdrop": 0.5}),
}


def run(session, tokens, state, step):
    """Log probabilities and final state by onnxruntime, window by window of `step` tokens."""
    state, parts = [part.numpy() for part in state], []
    for window in tokens.split(step):
        feeds = {"tokens": window.numpy()} | {f"state_{i}": part for i, part in enumerate(state)}
        log_probs, *state = session.run(None, feeds)
        parts.append(torch.from_numpy(log_probs))
    return torch.cat(parts), state


@pytest.mark.parametrize("cutoffs", [None, [3, 7]], ids=["full", "adaptive"])
@pytest.mark.parametrize(("family", "core"), CONFIGS.values(), ids=CONFIGS)
def test_onnxruntime_agrees(family, core, cutoffs, tmp_path):
    """Over two lengths and two batch sizes, the state carried from call to call."""
    torch.manual_seed(0)
    model = build({"family": family, "core": core, "vocab_size": 13, "tied": False, "cutoffs": cutoffs}).eval()
    onnx_export.export(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    step = 1 if model.core.loop else 4
    for length, batch in ((5, 2), (8, 1), (5, 7)):
        tokens, state = torch.randint(13, (length, batch)), model.initial_state(batch)
        with torch.no_grad():
            hidden, final = model.hidden(tokens, state)
            expected = model.log_probs(hidden)
        log_probs, state = run(session, tokens, state, step)
        torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(state, final, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [train_rnn, train_rmc], ids=lambda module: module.__name__)
def test_the_flag_exports_the_best_model(module, tiny_corpus, tmp_path):
    """After training, by both scripts."""
    small = [flag for flag in TINY if "nhid" not in flag] if module is train_rmc else TINY
    places = [f"--data={tiny_corpus}", f"--runs-dir={tmp_path}", f"--save={tmp_path / 'model.pt'}"]
    module.main([*places, *small, "--epochs=1", f"--onnx-export={tmp_path / 'model.onnx'}"])
    model, _, _ = checkpoint.load_model(tmp_path / "model.pt", torch.device("cpu"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    tokens, state = torch.randint(29, (1, 5)), model.initial_state(5)
    with torch.no_grad():
        expected = model.log_probs(model.hidden(tokens, state)[0])
    torch.testing.assert_close(run(session, tokens, state, 1)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_missing_exporter_is_said_before_training(fails, monkeypatch, tiny_corpus, tmp_path):
    """One line with the command that mends it."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else found(name, *a))
    places = [f"--data={tiny_corpus}", f"--runs-dir={tmp_path / 'runs'}"]
    error = fails(train_rnn.main, *places, *TINY, "--onnx-export", tmp_path / "model.onnx")
    assert "pip install onnx" in error and not (tmp_path / "runs").exists()


def test_a_file_that_cannot_be_written(tmp_path):
    """No folder: one line."""
    model = build({"family": "rnn", "core": {"model": "LSTM", **RNN}, "vocab_size": 13, "tied": False})
    with pytest.raises(onnx_export.UserError, match=r"^cannot write --onnx-export .*choose another file$"):
        onnx_export.export(model, tmp_path / "none" / "model.onnx")
