"""A trained model as an ONNX file: tokens and state in, log probabilities and state out."""

import importlib.util
import io
import warnings

import torch

from data.files import atomic_write

from . import UserError


class _Predictor(torch.nn.Module):
    """tokens (T, B), state -> log probabilities (T, B, V), state."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, state):
        hidden, state = self.model.hidden(tokens, state)
        return self.model.log_probs(hidden), state


def check_exporter():
    """Raises UserError when the package that torch's exporter needs is missing."""
    if importlib.util.find_spec("onnx") is None:
        raise UserError("--onnx-export needs the package onnx: pip install onnx")


def export(model, path):
    """Write the model to `path`, whole or not at all; it is put into evaluation mode on the CPU.

    Inputs: tokens (time, batch) int64, and state_0, state_1, ... with batch at dim 1, as initial_state has them.
    Outputs: log_probs (time, batch, V), new_state_0, ... Batch is dynamic everywhere, time where a library kernel walks
    it; where Python does (--loop, the RMC) the graph is one step: time is 1, and the state goes round.

    torch's exporter by tracing is used: the newer one fixes the number of steps of an LSTM (pytorch issue 191855).

    Raises UserError when the exporter's package is missing or the file can't be written.
    """
    check_exporter()
    model = model.cpu().eval()
    steps = 1 if model.core.loop else 2
    state = model.initial_state(3)
    ins, outs = ([f"{prefix}state_{i}" for i in range(len(state))] for prefix in ("", "new_"))
    axes = {name: {1: "batch"} for name in (*ins, *outs)}
    axes |= {name: {1: "batch"} if model.core.loop else {0: "time", 1: "batch"} for name in ("tokens", "log_probs")}
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Predictor(model).eval(),  # the exporter puts all of it back into the mode that it found
            (torch.zeros(steps, 3, dtype=torch.int64), state),
            buffer,
            input_names=["tokens", *ins],
            output_names=["log_probs", *outs],
            dynamic_axes=axes,
            dynamo=False,
        )
    try:
        with atomic_write(path) as file:
            file.write(buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write --onnx-export {path}: {error.strerror}; choose another file") from None
