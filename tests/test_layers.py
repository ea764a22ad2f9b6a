"""What benchmark.py measures of recurrences and layers; peers are stood in for by files of the same names."""

import sys
from functools import partial

import pytest
import torch
from conftest import InProcess

import benchmark
from models.forget_mult import BACKENDS
from utils import UserError, layers, measurements, report, tables, workers

FORGET_MULT = """
import torch
from cupy.cuda import function
from pynvrtc.compiler import Program

class ForgetMult(torch.nn.Module):
    def forward(self, f, x, hidden=None, use_cuda=True):
        assert use_cuda is False
        h, result = hidden if hidden is not None else torch.zeros_like(x[0]), []
        for t in range(len(x)):
            h = f[t] * x[t] + (1 - f[t]) * h
            result.append(h)
        return torch.stack(result)
"""
QRNN = """
import torch
if __name__ == "__main__":
    from forget_mult import ForgetMult
else:
    from .forget_mult import ForgetMult

class QRNNLayer(torch.nn.Module):
    def __init__(self, input_size, hidden_size, window=1, use_cuda=True):
        super().__init__()
        self.linear, self.use_cuda = torch.nn.Linear(window * input_size, 3 * hidden_size), use_cuda

    def forward(self, X, hidden=None):
        z, f, o = self.linear(X).chunk(3, 2)
        c = ForgetMult()(f.sigmoid(), z.tanh(), hidden, use_cuda=self.use_cuda)
        return o.sigmoid() * c, c[-1:]
"""
SRU = """
from torch import nn

class SRU(nn.Module):
    def __init__(self, input_size, hidden_size, num_layers):
        super().__init__()
        assert num_layers == 1
        self.linear = nn.Linear(input_size, hidden_size)

    def forward(self, x):
        h = self.linear(x)
        return h, h[-1:]
"""
LOG = """
import torch
from torch import nn

class QRNNLayer(nn.Module):
    def __init__(self, input_size, hidden_size, kernel_size, mode="f", zoneout=0.0):
        super().__init__()
        self.mode = mode
        self.z_conv, self.f_conv = (nn.Conv1d(input_size, hidden_size, kernel_size) for _ in range(2))
        if mode == "fo":
            self.o_conv = nn.Conv1d(input_size, hidden_size, kernel_size)

    def forward(self, inputs):
        inputs = inputs.transpose(1, 2)
        z, f = self.z_conv(inputs).transpose(1, 2).sigmoid(), self.f_conv(inputs).transpose(1, 2).sigmoid()
        h, result = 0, []
        for t in range(z.shape[1]):
            h = f[:, t] * h + (1 - f[:, t]) * z[:, t]
            result.append(h)
        h = torch.stack(result, 1)
        return h * self.o_conv(inputs).sigmoid().transpose(1, 2) if self.mode == "fo" else h
"""


pytestmark = pytest.mark.usefixtures("settings")


@pytest.fixture
def seeds(tmp_path, monkeypatch):
    """Checkouts of both seeds with the same arithmetic written anew; small sizes."""
    files = {"torchqrnn/forget_mult.py": FORGET_MULT, "torchqrnn/qrnn.py": QRNN, "qrnn_layer.py": LOG}
    files |= {"sru/__init__.py": SRU, "sru/modules.py": ""}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "sru", raising=False)
    monkeypatch.setattr(measurements, "RECURRENCES", ((5, 3, 7),))
    monkeypatch.setattr(measurements, "LAYERS", ((5, 3, 7, 11, 1),))
    return tmp_path


def args(*flags):
    return benchmark.build_parser().parse_args(["layers", "--threads", str(torch.get_num_threads()), *flags])


@pytest.mark.parametrize("way", (*BACKENDS, "pytorch-qrnn", "log-space QRNN"))
def test_every_recurrence_is_the_same(way, seeds):
    """And one that is not is told by its difference."""
    measured = layers.Recurrence(way, (5, 3, 7), seeds, args())
    assert measured.difference() < 1e-5 and measured.step() > 0
    call = measured.call
    measured.call = lambda *leaves: call(*leaves) * 1.01
    assert measured.difference() == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("way", ("QRNN", "QRNN bf16", "nn.LSTM", *measurements.SEEDS))
def test_every_layer_is_the_same(way, seeds):
    """Ours in both precisions, the seeds' with our weights."""
    measured = layers.Layer(way, (5, 3, 7, 11, 1), seeds, args())
    assert measured.difference() < (2e-2 if "bf16" in way else 1e-5)
    assert measured.step() > 0 and measured.inference() > 0
    assert measured.x.grad.norm() > 0
    if way == "QRNN":
        assert measured.products() > 0


def test_seeds_need_checkouts(tmp_path):
    with pytest.raises(UserError, match="name a checkout of asappresearch/sru"):
        layers.Layer("SRU", (5, 3, 7, 11, 1), tmp_path, args())
    for way, message in (("pytorch-qrnn", "--qrnn"), ("log-space QRNN", "--log-qrnn")):
        with pytest.raises(UserError, match=f"^{message} names no checkout"):
            layers.Recurrence(way, (5, 3, 7), None, args())
        with pytest.raises(UserError, match="is not there: name a checkout of"):
            layers.Layer(way, (5, 3, 7, 11, 1), tmp_path, args())


def test_layers_tables(seeds, tmp_path, capsys, monkeypatch):
    """A table a size, a row a way; kept with --record, on a page of its own; one that differs is left out."""
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(measurements, "WAYS", ("reference", "cpu", "cuda"))
    monkeypatch.setattr(measurements, "Worker", InProcess)
    text = (seeds / "qrnn_layer.py").read_text(encoding="utf-8")
    (seeds / "qrnn_layer.py").write_text(text.replace("(1 - f[:, t])", "f[:, t]"), encoding="utf-8")
    flags = ["--qrnn", str(seeds), "--log-qrnn", str(seeds), "--rounds", "2", "--warmup", "1", "--threads", "1"]
    benchmark.main(["layers", *flags, "--record", "small", "--results", str(results)])
    out = capsys.readouterr().out
    assert out.count("log-space QRNN: ") == 2 and "off its reference: not timed" in out
    record = report.read_record(results / "qrnn" / "small.json")
    assert [row["name"] for row in record["rows"]] == [
        "reference", "cpu", "pytorch-qrnn", "QRNN", "QRNN bf16", "nn.LSTM", "pytorch-qrnn",
    ]  # fmt: skip
    page = (results / "qrnn.md").read_text(encoding="utf-8")
    assert tables.layers_text(record) in page and "| cpu | " in page
    assert "recurrence, T, B, H = 5, 3, 7" in page and "layer, T, B, input, H, window = 5, 3, 7, 11, 1" in page


def test_a_layer_of_other_sizes_is_another(monkeypatch):
    """One of the same sizes stays; each takes some time."""
    made, layer = [], layers.Layer
    monkeypatch.setattr(layers, "Layer", lambda *given: made.append(given) or layer(*given))
    resized, small, large = layers.Resized("QRNN", args()), (5, 3, 7, 11, 1), (2, 3, 7, 11, 2)
    assert all(resized.inference(sizes) > 0 for sizes in (small, small, large, small))
    assert [given[1] for given in made] == [small, large, small]


def test_figure4(monkeypatch, tmp_path, capsys):
    """Parts of a training step, the grid, the picture; published figures beside ours where there are some."""
    small = "--emsize 7 --nhid 7 --nlayers 1 --batch-size 5 --bptt 3"
    every = {name: (script, f"{flags} {small}") for name, (script, flags) in measurements.CANDIDATES.items()}
    monkeypatch.setattr(measurements, "CANDIDATES", every)
    monkeypatch.setattr(measurements, "Worker", partial(InProcess, kind=workers.Candidate))
    monkeypatch.setattr(measurements, "GRID", {"batch": (8,), "length": (32, 5)})
    flags = ["--rounds", "2", "--warmup", "1", "--threads", "1", "--vocab-size", "31"]
    benchmark.main(["figure4", *flags, "--record", "f4", "--results", str(tmp_path)])
    record = report.read_record(tmp_path / "qrnn" / "f4.json")
    assert {len(taken) for taken in record["parts"].values()} == {2}
    assert all(min(parts) > 0 for taken in record["parts"].values() for parts in taken)
    text = capsys.readouterr().out
    assert "/ 5.5 |" in text and "/ - |" in text and "| QRNN (paper) | 42 | 75 | 35 | 152 |" in text
    assert (tmp_path / "qrnn" / "f4.png").read_bytes().startswith(b"\x89PNG")
