"""What steps cost as their sizes grow: every axis, torchrun's processes too."""

from argparse import Namespace

import pytest
from conftest import InProcess

import benchmark
import train_rmc
from utils import UserError, report, scaling, tables, workers


@pytest.fixture
def axes(monkeypatch):
    """Small sizes on two axes, and the others in this process."""
    small = "--recipe port --emsize 11 --nhid 11 --batch-size 7 --bptt 13"
    lstm, untied = ("train_rnn", small), ("train_rnn", f"{small} --no-tied --adaptivesoftmax")
    found = {
        "batch": scaling.Axis("--batch-size", (3, 5, 7), {"LSTM": lstm}),
        "vocabulary": scaling.Axis("", (31, 101), {"LSTM": lstm, "adaptive": untied}),
    }
    monkeypatch.setattr(scaling, "AXES", found)
    monkeypatch.setattr(scaling, "SPARSE_SIZES", (3, 17, 23))
    monkeypatch.setattr(scaling, "Worker", lambda *args, kind=workers.Candidate: InProcess(*args, kind=kind))


def test_scaling(axes, monkeypatch, capsys, tmp_path):
    """A row a value with its floor, on every axis; kept, rendered, drawn; --quick takes the ends."""
    monkeypatch.setattr(scaling, "train_by", lambda count, args: 60.0 / count**0.5)
    monkeypatch.setattr(workers.timing, "products_alone", lambda products, device: (0.5, 1.0))
    flags = ["--rounds", "3", "--warmup", "1", "--threads", "1", "--results", str(tmp_path)]
    benchmark.main(["scaling", *flags, "--record", "s"])
    record = report.read_record(tmp_path / "speed" / "s.json")
    found = [(row["axis"], row["name"], row["value"]) for row in record["rows"]]
    assert found[:5] == [("batch", "LSTM", 3), ("batch", "LSTM", 5), ("batch", "LSTM", 7),
                         ("vocabulary", "LSTM", 31), ("vocabulary", "LSTM", 101)]  # fmt: skip
    assert [value for axis, _, value in found if axis == "zeros"] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    assert all(len(row["ms"]) == 3 and min(row["ms"]) > 0 and row["floor_ms"] > 0 for row in record["rows"])
    assert (tmp_path / "speed" / "s.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert tables.scaling_text(record) in (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert "| RMC, times an equal share of one process's | 1.00 | 1.41 |" in out
    benchmark.main(["scaling", *flags, "--quick", "--axes", "batch", "zeros"])
    out = capsys.readouterr().out
    assert "| batch | 3 | 7 |" in out and "| zeros | 0.5 | 0.95 |" in out and "vocabulary" not in out


def test_the_command_of_several_processes(monkeypatch, tiny_corpus):
    """torchrun's words name a training that runs; its milliseconds a batch come back; a failure is one line."""

    def run(command, **settings):
        script = next(number for number, word in enumerate(command) if word.endswith("train_rmc.py"))
        assert command[1:script] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        train_rmc.main([*command[script + 1 :], "--headsize", "3", "--numheads", "2", "--emsize", "7"])
        return Namespace(returncode=0)

    args = Namespace(data=str(tiny_corpus), quick=True, amp="off")
    monkeypatch.setattr(scaling, "subprocess", Namespace(run=run))
    assert scaling.train_by(2, args) > 0
    failed = Namespace(returncode=1, stderr="no port\n")
    monkeypatch.setattr(scaling, "subprocess", Namespace(run=lambda command, **settings: failed))
    with pytest.raises(UserError, match=r"^torchrun of 2 processes ended with 1: no port$"):
        scaling.train_by(2, args)
