"""Every command that README.md shows is run, in order, at reduced size, and its output checked."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, InProcess

import benchmark
import compress
import evaluate
import generate
import train_awd
import train_qrnn
import train_rmc
import train_rnn
from data import prepare, pydocs, sentences
from models.forget_mult import doctor, nvrtc
from utils import compressed, measurements, scaling, workers

BATCHES = ["--batch-size=20", "--bptt=11", "--threads=1"]
SMALL = ["--emsize=17", "--nhid=17", "--nlayers=1", *BATCHES]
SMALL_RMC = ["--emsize=17", "--headsize=5", "--numheads=3", "--keysize=2", *BATCHES]
TRAINED = {
    "train_rnn.py": (train_rnn, SMALL),
    "train_rmc.py": (train_rmc, SMALL_RMC),
    "train_qrnn.py": (train_qrnn, SMALL),
    "train_awd.py": (train_awd, SMALL),
}


def commands():
    """The lines of README.md's bash blocks, comments and line ends removed."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def check_training(script, argv, out):
    """Trains with the flags shown, at a small size; perplexity is printed, a checkpoint written, updates made."""
    small = [] if "--resume" in argv else [*TRAINED[script][1], "--epochs=2"]
    small += ["--cutoffs", "10", "100"] if "--cutoffs" in argv else []
    small += ["--nlayers=2"] if "--compress" in argv else []
    small += ["--nhead=17"] if "--nhead" in argv else []
    small += ["--num-params=200000"] if "--num-params" in argv else []
    record = TRAINED[script][0].main([flag for flag in argv if flag != "--cuda"] + small)
    assert sum(epoch["batches"] for epoch in record["history"]["epochs"]) >= 2
    assert record["results"]["test"]["batch_size"] == 1
    assert re.search(r"End of training \| test loss +[\d.]+ \| test ppl +[\d.]+", out())


def check_torchrun(argv):
    """Two processes train, one prints."""
    script = next(i for i, word in enumerate(argv) if word in TRAINED)
    small = [*argv[:script], str(ROOT / argv[script]), *argv[script + 1 :], *TRAINED[argv[script]][1], "--epochs=2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--master_port=29631", *small]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.count("End of training") == 1, run.stderr


def check_generate(argv, out):
    """Writes the number of words asked for."""
    generate.main([flag for flag in argv if flag != "--cuda"])
    words = int(argv[argv.index("--words") + 1]) if "--words" in argv else 1000
    printed = out()
    with open("generated.txt") as file:
        text = printed if "--outf" in argv else file.read()
    assert len(text.split()) == words


def check_evaluate(argv, out):
    """Prints perplexities."""
    evaluate.main(argv)
    assert len(re.findall(r"ppl +[\d.]+", out())) >= 2


def check_compress(argv, out):
    """Writes a smaller checkpoint, or prints a table."""
    compress.main(argv)
    assert "| total |" in out() if "--summary" in argv else os.path.isfile(argv[argv.index("--output") + 1])


def check_benchmark(argv, out, monkeypatch, tmp_path):
    """A table between its markers; a speed table of small models."""
    if argv == ["table", "--list"]:
        benchmark.main(argv)
        assert "wikitext2" in out()
        return
    if argv[0] == "table":
        name = argv[1]
        benchmark.main([*argv, "--results", str(tmp_path)])
        assert "| LSTM 1x17" in (tmp_path / f"{name}.md").read_text()
        return
    small = " ".join(["", *SMALL])
    candidates = {n: (m, flags + small) for n, (m, flags) in measurements.CANDIDATES.items() if m != "train_rmc"}
    monkeypatch.setattr(measurements, "CANDIDATES", candidates)
    monkeypatch.setattr(measurements, "RECURRENCES", ())
    monkeypatch.setattr(measurements, "LAYERS", ((5, 3, 7, 11, 1),))
    axis = scaling.Axis("--bptt", (3, 5), {"LSTM 17": ("train_rnn", small)})
    monkeypatch.setattr(scaling, "AXES", dict.fromkeys(scaling.AXES, axis))
    monkeypatch.setattr(measurements, "GRID", {"batch": (8,), "length": (32,)})
    monkeypatch.setattr(compressed, "PRODUCTS", ((2, 7, 11),))
    if argv[0] in ("layers", "figure4", "products", "compression", "quantization", "generate", "scaling", "settings"):
        for module in (measurements, compressed, scaling):
            monkeypatch.setattr(module, "Worker", partial(InProcess, kind=workers.Candidate))
    sizes = {"speed": ["--rounds", "2", "--vocab-size", "31"], "memory": ["--vocab-size", "31"]}
    sizes |= {"evaluation": ["--tokens", "50", "--rounds", "1"], "load": ["--rounds", "1"]}
    sizes |= {"quality": ["--seeds", "1", f"--flags={small}"]}
    sizes |= {"layers": ["--rounds", "1"], "figure4": ["--rounds", "1", "--vocab-size", "31"]}
    sizes |= {name: ["--rounds", "1", "--warmup", "1"] for name in ("compression", "products")}
    sizes |= {"generate": ["--rounds", "1", "--words", "5", "--vocab-size", "31"]}
    sizes |= {"scaling": ["--rounds", "1", "--vocab-size", "31"]}
    sizes |= {"settings": ["--rounds", "1", "--warmup", "1", "--vocab-size", "31"]}
    sizes |= {"quantization": ["--tokens", "50", "--statistics-tokens", "100"]}
    benchmark.main([*argv, *sizes[argv[0]]])
    rows = re.findall(r"^\| (LSTM|build|cached|QRNN|AWD|dense|sparse|fp32|rows|float32|int8|`--)", out(), re.M)
    assert len(rows) >= (1 if argv[0] in ("evaluation", "quality") else 2)


def check_prepare(argv, out, source):
    """Puts the corpus into data/NAME; from a folder here, since tests use no network."""
    name = argv[0]
    shutil.rmtree(f"data/{name}", ignore_errors=True)
    if "--from" in argv:
        archive = argv[argv.index("--from") + 1]
        shutil.make_archive(archive.removesuffix(".tgz"), "gztar", source)
        shutil.move(archive.removesuffix(".tgz") + ".tar.gz", archive)
    else:
        argv = [*argv, "--from", str(source)]
    assert not prepare.main(argv)
    assert "verified" in out()


@pytest.mark.skipif(torch.cuda.is_available(), reason="written for a machine without a GPU")
def test_every_command_of_the_readme(tmp_path, monkeypatch, capsys, corpus_folder, tiny_corpus, settings):
    """All blocks in one folder, top to bottom, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RECURRENT_LM_RUNS", raising=False)
    shutil.copytree(corpus_folder("penn"), "data/penn", ignore=shutil.ignore_patterns("*.pkl"))
    small_splits(tmp_path / "data" / "penn")
    shutil.copy(ROOT / "README.md", "README.md")
    shutil.copytree(ROOT / "schedules", "schedules")
    os.mkdir("results")
    shutil.copy(ROOT / "results" / "rmc-wikitext-2.pt", "results")
    small_splits(pydocs.ensure(tmp_path / "data" / "pydocs"))
    run = 0

    def out():
        return capsys.readouterr().out

    for line in commands():
        program, *argv = shlex.split(line)
        out()
        if program == "pip":
            assert argv == ["install", "-r", "requirements.txt"] and (ROOT / argv[2]).is_file()
        elif argv[:2] == ["-m", "data.prepare"]:
            check_prepare(argv[2:], out, corpus_folder(argv[2]))
            small_splits(tmp_path / "data" / argv[2])
        elif argv[:2] == ["-m", "data.sentences"]:
            assert not sentences.main(argv[2:])
            assert "sentences of" in out()
        elif argv == ["-m", "models.forget_mult.doctor"]:
            monkeypatch.setattr(nvrtc, "architectures", lambda path: [80])
            doctor.main()
            assert re.search(r"sm_80: [\d,]+ bytes", out())
        elif program == "torchrun":
            check_torchrun(argv)
        elif argv[0] in TRAINED:
            check_training(argv[0], argv[1:], out)
        elif argv[0] == "generate.py":
            check_generate(argv[1:], out)
        elif argv[0] == "evaluate.py":
            check_evaluate(argv[1:], out)
        elif argv[0] == "compress.py":
            check_compress(argv[1:], out)
        else:
            assert argv[0] == "benchmark.py", line
            check_benchmark(argv[1:], out, monkeypatch, tmp_path)
        run += 1
    assert run >= 15


def test_the_python_of_the_readme():
    """Its block runs as it is, with the package's name for models/ as `pip install .` gives it (test_package.py)."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    names = {}
    exec(block.replace("recurrent_lm", "models"), names)
    assert names["output"].shape == names["h"].shape == (7, 20, 256) and names["hidden"].shape == (2, 20, 256)
    torch.testing.assert_close(names["h"], names["ForgetMult"]()(names["f"], names["x"]))


def small_splits(folder):
    """Cut a corpus to its first lines, so that an epoch is a few updates."""
    for split, lines in (("train", 120), ("valid", 15), ("test", 15)):
        path = folder / f"{split}.txt"
        text = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(text[:lines]), encoding="utf-8")


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_targets_exist(target):
    """The README's `make` targets say what they would do."""
    planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"demo": "train_rmc.py --data pydocs", "test": "pytest"}[target] in planned
