"""Two processes under torchrun against one, on the CPU: weights, figures, resume, a process that dies."""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

from utils import checkpoint
from utils.distributed import Processes

RNN = ["train_rnn.py", "--emsize=11", "--nhid=11"]
RMC = ["train_rmc.py", "--emsize=16", "--headsize=5", "--numheads=3", "--keysize=2"]
PLAIN = ["--batch-size=8", "--bptt=50", "--dropout=0", "--epochs=1", "--threads=1", "--eval-batch=3"]
PLAIN += ["--log-interval=7"]
KINDS = {
    "LSTM tied, SGD": [*RNN, "--optimizer=sgd", "--lr=2", "--clip=0.2", "--tied"],
    "LSTM adaptive, Adam": [*RNN, "--adaptivesoftmax", "--cutoffs", "5", "17"],
    "QRNN, over columns": ["train_qrnn.py", "--emsize=11", "--nhid=11", "--zoneout=0", "--lr=0.05"],
    "AWD-LSTM, AR, TAR": [
        *("train_awd.py", "--emsize=11", "--nhid=13", "--nlayers=2", "--wdrop=0", "--dropouth=0", "--dropouti=0"),
        *("--dropoute=0", "--lr=2", "--no-variable-bptt", "--partial-shuffle"),
    ],
    # A small rate: at 0.1 rounding alone moves the perplexity of one process by 2e-4.
    "RMC, SGD": [*RMC, "--dropouti=0", "--optimizer=sgd", "--lr=0.005"],
}


DRIVER = """
import importlib, json, os, sys
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # whose words are of one group only
for folder, port, script, *flags in json.loads(sys.argv[1]):
    os.chdir(folder)
    os.environ["MASTER_PORT"] = port
    importlib.import_module(script.removesuffix(".py")).main(flags)
"""
"""Trainings one after the other in the same two processes, which take seconds to start."""


def free_port():
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(folder, script, *flags):
    """A script in two processes under torchrun; their output is a pipe."""
    argv = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    return start(folder, [*argv, script, *flags])


def start(folder, argv, environment=None):
    """Python with these arguments, of which a script's name stands for its path; its output is a pipe."""
    argv = [sys.executable, "-u", *(str(ROOT / part) if str(part).endswith(".py") else str(part) for part in argv)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(argv, cwd=folder, env=environment, **pipes)


def workers(process):
    """The process ids of what torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


def left_behind(folder):
    """The last checkpoint and the record of the run in a folder."""
    run = folder / "runs" / "run"
    return checkpoint.load(run / "last.pt"), json.loads((run / "run.json").read_text())


def finished(folder, flags):
    """The output of a run in two processes that ends well, and its last checkpoint and record."""
    return ended(launch(folder, *flags)), *left_behind(folder)


def ended(process):
    """The output of a process that ends well."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def in_two(tiny_corpus, tmp_path_factory):
    """{kind: its flags, the folder of its run in two processes}, all of KINDS; they print as one run each does."""
    runs = {}
    for number, (kind, flags) in enumerate(KINDS.items()):
        folder = tmp_path_factory.mktemp(f"two{number}")
        runs[kind] = [*flags, *PLAIN, "--data", str(tiny_corpus), "--name", "run"], folder
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    trainings = [[str(place), free_port(), *flags] for flags, place in runs.values()]
    output = ended(launch(folder, driver, json.dumps(trainings)))
    assert output.count("End of training") == output.count("| 2 processes") == len(KINDS)
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind, in_two, tmp_path, monkeypatch):
    """After 21 updates without dropout: weights to 1e-4, perplexities and losses to 1e-5."""
    (script, *flags), folder = in_two[kind]
    two, record_2 = left_behind(folder)
    monkeypatch.chdir(tmp_path)
    importlib.import_module(script.removesuffix(".py")).main(flags)
    one, record = left_behind(tmp_path)
    assert record["history"]["epochs"][0]["batches"] == 21 and record_2["processes"] == 2
    for name, weight in one["weights"].items():
        error = (weight - two["weights"][name]).norm() / weight.norm().clamp(min=1e-3)
        assert error < 1e-4, (name, error)
    for split in ("valid", "test"):
        ours, theirs = (r["results"][split] for r in (record, record_2))
        assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-5)
        assert theirs["targets"] == ours["targets"]
    epoch, epoch_2 = (r["history"]["epochs"][0] for r in (record, record_2))
    assert epoch_2["train_loss"] == pytest.approx(epoch["train_loss"], rel=1e-5)
    for part, part_2 in zip(one["position"]["state"], two["position"]["state"], strict=True):
        assert part.shape == part_2.shape


def test_columns_that_do_not_divide_and_resume(tiny_corpus, tmp_path):
    """Seven columns become six; a run in two processes stopped in mid-epoch goes on to where a whole one ends."""
    flags = [*RNN, *TINY, "--data", tiny_corpus, "--lr=0.01", "--checkpoint-every=20"]
    (tmp_path / "whole").mkdir()
    output, whole, _ = finished(tmp_path / "whole", [*flags, "--name=run"])
    assert "6 of 7 columns are used" in output
    (other,) = whole["rng_others"]
    assert not torch.equal(other["cpu"], whole["rng"]["cpu"]), "the same masks for both halves of the columns"
    (tmp_path / "cut").mkdir()
    process = launch(tmp_path / "cut", *flags, "--name=run")
    for line in process.stdout:
        if re.search(r"epoch   2 \|    40/", line):
            break
    for pid in (process.pid, *workers(process)):
        os.kill(pid, signal.SIGKILL)
    process.wait(60)
    _, cut, _ = finished(tmp_path / "cut", ["train_rnn.py", "--resume=run"])
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, cut["weights"][name]), name
    assert torch.equal(other["cpu"], cut["rng_others"][0]["cpu"])


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_others(lost, tiny_corpus, tmp_path):
    """Within a minute, by themselves (torchrun, which would end them too, is not there), with one line, exit code 1."""
    flags = [*RNN, *TINY, "--data", tiny_corpus, "--epochs=4000", "--name=run"]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    both = [start(tmp_path, flags, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    for line in both[0].stdout:
        if "epoch   2 " in line:
            break
    both[lost].kill()
    output = both[1 - lost].communicate(timeout=60)[0]
    both[lost].communicate()
    assert both[1 - lost].returncode == 1, output
    assert "train_rnn.py: error: another process of this run is gone" in output and "Traceback" not in output


def test_torchrun_names_a_killed_process(tiny_corpus, tmp_path):
    """Within a minute, and not as success."""
    process = launch(tmp_path, *RNN, *TINY, "--data", tiny_corpus, "--epochs=4000", "--name=run")
    for line in process.stdout:
        if "epoch   2 " in line:
            break
    os.kill(workers(process)[-1], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "SIGKILL" in output


def test_one_process_needs_no_group(monkeypatch):
    """Every method gives back what it was given."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes(torch.device("cpu"))
    tensor, state = torch.arange(12.0).view(2, 6), (torch.ones(3, 5),)
    assert (alone.rank, alone.size, alone.first_of(2.5), alone.any_of(3)) == (0, 1, 2.5, 3)
    assert torch.equal(alone.own_columns(tensor), tensor) and torch.equal(alone.total(tensor), tensor)
    assert alone.all_columns(state) is state
    model = torch.nn.Linear(2, 2)
    assert alone.replicate(model) is model and alone.leave() is None
