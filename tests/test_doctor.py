"""What is asked of a machine before its GPU is used: the doctor, tools/gpu_check.sh."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import benchmark
import generate
import train_rmc
from models.forget_mult import cuda, doctor, nvrtc

if sys.platform != "linux":
    pytest.skip("CuPy and NVRTC are for Linux", allow_module_level=True)
import cupy


def test_the_doctor(monkeypatch, capsys, gpu):
    """Versions, every architecture, why there is no GPU; and what its self-test finds, by the stand-in."""
    monkeypatch.setattr(nvrtc, "compiled", lambda source, target, path: target)
    monkeypatch.setattr(cuda, "THREADS", 128)
    doctor.main()
    out = capsys.readouterr().out
    for said in (
        f"torch {torch.__version__}",
        f"cupy {cupy.__version__}",
        "pynvrtc",
        "NVRTC 13.",
        "sm_75: ",
        "sm_121: ",
    ):
        assert said in out
    assert torch.cuda.is_available() or "no GPU" in out
    monkeypatch.setattr(doctor, "SHAPE", (3, 2, 5))
    doctor.self_test(torch.device("cpu"))
    errors = [float(error) for error in re.findall(r"([\d.e-]+) off the reference", capsys.readouterr().out)]
    assert len(errors) == 3 and errors[0] < 1e-6 and errors[1] < 1e-14 and 1e-4 < errors[2] < 2e-2


def test_ctrl_c_ends_the_doctor_with_one_line():
    """And code 130, no traceback."""
    call = [sys.executable, "-u", "-m", "models.forget_mult.doctor"]
    process = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("NVRTC" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (130, "doctor: interrupted\n") and "no GPU" not in out


def test_the_check_for_a_gpu_asks_what_there_is(tmp_path):
    """tools/gpu_check.sh with stand-ins for its programs: our scripts know its flags; what fails ends nothing."""
    for name, code in (("python", f'echo "$@" >> {tmp_path}/asked'), ("nvidia-smi", "exit 3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [ROOT / "tools" / "gpu_check.sh", tmp_path / "out"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.startswith("| driver | failed") and summary.count("| ok |") == 8
    parsers = {"benchmark.py": benchmark, "train_rmc.py": train_rmc, "generate.py": generate}
    asked = [shlex.split(line) for line in (tmp_path / "asked").read_text().splitlines()]
    known = [parsers[script].build_parser().parse_args(flags) for script, *flags in asked if script in parsers]
    assert len(known) == 6 and all(args.cuda for args in known)
