"""Beside every peer: the commands that are run, the ratios that are summed up, the page and the picture."""

from argparse import Namespace

import pytest

import benchmark
from utils import UserError, ahead, report

SPEED = {
    "kind": "speed",
    "environment": {"amp": "bf16"},
    "rows": [
        {"name": "LSTM, port", "ms": [10.0, 20.0, 10.0], "memory_mib": 50.0},
        {"name": "port-rnn (LSTM, port)", "ms": [40.0, 60.0, 50.0], "memory_mib": 200.0},
        {"name": "GRU, port", "ms": [1.0, 1.0, 1.0], "memory_mib": 5.0},
    ],
}
LAYERS = {
    "kind": "layers",
    "environment": {"amp": "off"},
    "rows": [
        {"what": "recurrence", "name": "cpu", "ms": [1.0]},
        {"what": "layer", "name": "QRNN", "ms": [10.0], "inference_ms": [4.0]},
        {"what": "layer", "name": "QRNN bf16", "ms": [5.0], "inference_ms": [2.0]},
        {"what": "layer", "name": "nn.LSTM", "ms": [35.0], "inference_ms": [8.0]},
        {"what": "layer", "name": "SRU", "ms": [900.0], "inference_ms": [3.0]},
    ],
}


def test_ratios_of_speed_are_within_a_round():
    """Of the peers that were measured only; memory beside it, twice as little to be reached."""
    step, memory = ahead.comparisons(SPEED)
    assert step == ("training step, bf16", "LSTM, port", "port-rnn (LSTM, port)", [4.0, 3.0, 5.0], 3)
    assert memory[3:] == ([4.0], 2) and memory[0].startswith("peak memory")
    (plain, _) = ahead.comparisons({**SPEED, "environment": {"amp": "off"}})
    assert plain[0] == "training step" and plain[4] == 1.5
    (word,) = ahead.comparisons({**SPEED, "kind": "generate"})
    assert word[0] == "a generated word" and word[4] == 2


def test_ratios_of_layers():
    """SRU's kernel for a CPU has no gradients: it is compared without them."""
    found = {(what, ours, peer): (ratios[0], reach) for what, ours, peer, ratios, reach in ahead.comparisons(LAYERS)}
    assert found == {
        ("layer", "QRNN", "nn.LSTM"): (3.5, 3),
        ("layer", "QRNN bf16", "nn.LSTM"): (7.0, 10),
        ("layer without gradients", "QRNN", "nn.LSTM"): (2.0, None),
        ("layer without gradients", "QRNN bf16", "nn.LSTM"): (4.0, None),
        ("layer without gradients", "QRNN", "SRU"): (0.75, 1),
        ("layer without gradients", "QRNN bf16", "SRU"): (1.5, 1),
    }


def test_ratios_of_seconds():
    """An evaluation's and a build's."""
    seconds = [{"name": "ours", "seconds": [2.0, 4.0]}, {"name": "theirs", "seconds": [6.0, 8.0]}]
    environment = {"amp": "off"}
    record = {"kind": "evaluation", "environment": environment, "rows": seconds}
    assert ahead.comparisons(record) == [("evaluation", "ours", "theirs", [3.0, 2.0], 2)]
    rows = [{"name": "build", "seconds": [1.0]}, {"name": "cached", "seconds": [0.1]}]
    record = {"kind": "load", "environment": environment, "rows": rows}
    assert ahead.comparisons(record) == []
    record["rows"] = [*rows, {"name": "port", "seconds": [7.0]}]
    assert ahead.comparisons(record) == [("corpus build", "ours", "port", [7.0], 6)]


def test_every_command_is_one_of_benchmark(tmp_path, capsys):
    """It parses, with the checkouts that are there; those that are not are named; --quick is one round."""
    for place in ("relational-rnn-pytorch", "pytorch-qrnn", "sru"):
        (tmp_path / place).mkdir()
    args = Namespace(source=str(tmp_path), only=None, quick=True, data="penn", threads=2, results=tmp_path)
    made = dict(ahead.commands(args))
    assert list(made) == list(ahead.RUNS)
    for name, argv in made.items():
        parsed = benchmark.build_parser().parse_args(argv)
        assert parsed.record == name and parsed.rounds == 1 and parsed.threads == 2
    parsed = benchmark.build_parser().parse_args(made["layers"])
    assert parsed.sru == str(tmp_path / "sru") and parsed.log_qrnn is None
    assert benchmark.build_parser().parse_args(made["load"]).data == "penn"
    assert f"{tmp_path}/awd-lstm-lm is not there: left out" in capsys.readouterr().out
    args.only = ["layers"]
    assert [name for name, _ in ahead.commands(args)] == ["layers"]


def test_the_page_of_all(tmp_path, monkeypatch):
    """Each measurement is run, then what its records say is summed up in a table and a picture."""

    def keep(args, page, record):
        (tmp_path / page).mkdir(exist_ok=True)
        report.write_record(tmp_path / page / f"{args.record}.json", record)

    def layers(args):
        keep(args, "qrnn", LAYERS)

    def speed(args):
        keep(args, "speed", SPEED)

    for call in (layers, speed):
        monkeypatch.setattr(benchmark.measurements, call.__name__, call)
    (tmp_path / "from").mkdir()
    flags = ["--from", str(tmp_path / "from"), "--results", str(tmp_path)]
    benchmark.main(["peers", *flags, "--only", "bf16", "layers"])
    text = (tmp_path / "peers.md").read_text(encoding="utf-8")
    assert "| training step, bf16 | LSTM, port | port-rnn (LSTM, port) | 4.00 (3.00 to 5.00) | 3 | yes |" in text
    assert "| layer | QRNN bf16 | nn.LSTM | 7.00 | 10 | no |" in text
    assert "| layer without gradients | QRNN | nn.LSTM | 2.00 |  |  |" in text
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_a_measurement_is_one_of_those(fails):
    assert "--only" in fails(lambda: benchmark.main(["peers", "--only", "everything"]))


def test_layers_of_which_ours_was_not_timed():
    """Those of the other type are compared."""
    rows = [row for row in LAYERS["rows"] if row["name"] != "QRNN bf16"]
    assert {ours for _, ours, *_ in ahead.comparisons({**LAYERS, "rows": rows})} == {"QRNN"}


def test_nothing_to_compare_is_one_line(tmp_path):
    """No page and no picture without a peer."""
    with pytest.raises(UserError, match="has a peer beside ours"):
        ahead.summary(tmp_path)
    assert list(tmp_path.iterdir()) == []
