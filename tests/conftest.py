"""Corpora, checkpoints and script runs that the tests share."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch

import evaluate
import generate
import train_rnn
from data import sentences
from models import compiled
from models.forget_mult import cuda
from utils import checkpoint, program, report

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and hand that on


@pytest.fixture
def corpus_folder():
    """corpus_folder(NAME): a real corpus, in data/ or the folder that RECURRENT_LM_DATA names; skips if absent."""

    def find(name):
        for parent in (ROOT / "data", Path(os.environ.get("RECURRENT_LM_DATA", ROOT / "data"))):
            if (parent / name / "train.txt").is_file():
                return parent / name
        pytest.skip(f"no corpus {name}: neither in data/ nor in the folder that RECURRENT_LM_DATA names")

    return find


def write_tiny_corpus(folder):
    """Made-up text of 29 words with some structure: 1,500 lines of train, 150 of valid and test."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    words = [f"w{i}" for i in range(26)] + ["<unk>", "the"]
    for split, lines in (("train", 1500), ("valid", 150), ("test", 150)):
        with open(folder / f"{split}.txt", "w", encoding="utf-8") as file:
            for _ in range(lines):
                start = int(rng.integers(len(words)))
                line = [words[(start + 3 * i) % len(words)] for i in range(int(rng.integers(1, 9)))]
                file.write(" ".join(line) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A small made-up corpus, written once."""
    return write_tiny_corpus(tmp_path_factory.mktemp("corpora") / "tiny")


@pytest.fixture(scope="session")
def tiny_sentences(tiny_corpus, tmp_path_factory):
    """The lines of tiny_corpus as sentences, of 30 words with <sos>."""
    folder = tmp_path_factory.mktemp("sentences") / "tiny-sentences"
    sentences.make(str(tiny_corpus), folder)
    return folder


TINY = ["--emsize=11", "--nhid=11", "--batch-size=7", "--bptt=13", "--epochs=2", "--eval-batch=3", "--threads=1"]
TINY += ["--log-interval=20"]


@pytest.fixture(scope="session")
def tiny_run(tiny_corpus, tmp_path_factory):
    """The run folder of a small tied LSTM trained on tiny_corpus for two epochs; its model.pt lies in it too."""
    runs = tmp_path_factory.mktemp("runs")
    folder = runs / "tiny"
    argv = ["--data", str(tiny_corpus), "--runs-dir", str(runs), "--name", "tiny", "--save", str(runs / "model.pt")]
    train_rnn.main([*argv, *TINY, "--lr", "0.02"])
    (runs / "model.pt").rename(folder / "model.pt")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_run):
    """A checkpoint of tiny_run; do not change it."""
    return tiny_run / "model.pt"


@pytest.fixture
def train(tiny_corpus, tmp_path):
    """train(*FLAGS): train_rnn.py in this process on tiny_corpus at a small size, all files under tmp_path."""

    def run(*flags):
        places = [
            "--data",
            str(tiny_corpus),
            "--runs-dir",
            str(tmp_path / "runs"),
            "--save",
            str(tmp_path / "model.pt"),
        ]
        return train_rnn.main([*places, *TINY, *flags])

    return run


@pytest.fixture
def fails(capsys, monkeypatch):
    """fails(MAIN, *ARGV): what a script's main says when it ends with exit code 2 and one line on standard error."""

    def call(main, *argv, code=2):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
        with pytest.raises(SystemExit) as exit_info:
            program.run(main)
        error = capsys.readouterr().err
        assert exit_info.value.code == code
        said = re.match(r"script\.py( speed| prune| quantize| peers)?: error: ", error)
        assert said and error.count("\n") == 1, error
        return error

    return call


@pytest.fixture
def script(tmp_path):
    """script(NAME, *ARGS): run a script of the repository in a process of its own, in an empty folder."""

    def run(name, *args, timeout=240, **environment):
        return subprocess.run(
            [sys.executable, str(ROOT / name), *map(str, args)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        )

    return run


def live(script, common, corpus, capsys):
    """A train script's run from start to end: the perplexity falls; a resumed run equals a whole one; the checkpoint
    is scored and generates. common: flags, with --data corpus."""
    whole = script.main([*common, "--name", "whole"])
    script.main([*common, "--name", "cut", "--epochs", "1"])
    resumed = script.main(["--resume", "cut", "--epochs", "2"])
    assert resumed["results"] == whole["results"]
    first, second = (epoch["valid_ppl"] for epoch in whole["history"]["epochs"])
    assert second < first < 29
    a, b = (checkpoint.load(f"runs/{name}/last.pt")["weights"] for name in ("whole", "cut"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    capsys.readouterr()
    evaluate.main(["--data", str(corpus)])
    assert f"ppl {whole['results']['test']['perplexity']:8.2f}" in capsys.readouterr().out
    generate.main(["--words", "40", "--outf", "-"])
    assert len(capsys.readouterr().out.split()) == 40


class InProcess:
    """Stands for benchmark.py's Worker where a process of its own would prove nothing."""

    def __init__(self, *candidate, kind):
        self.candidate = kind(*candidate)

    def __call__(self, method, *arguments):
        return getattr(self.candidate, method)(*arguments)

    def end(self):
        pass


@pytest.fixture
def curves():
    """A test that asks for this draws the curves of its trainings; see no_curves."""


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """A training draws its curves after every epoch, which is half of the time of one as small as these: not here."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(report, "draw_curves", lambda path, history, title: Path(path).touch())


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in order."""
    kept = []
    save = matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **arguments):
        kept.append(figure)
        return save(figure, *args, **arguments)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return kept


@pytest.fixture
def settings():
    """Puts threads, denormals, products and kernels back."""
    threads, kept = torch.get_num_threads(), bool((torch.tensor([1e-40]) * 1).item())
    yield
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    compiled.use(True)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(not kept)


def cells(text):
    """The rows of a markdown table, {column: cell}; the line below the header is left out."""
    header, rule, *rows = [
        line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.strip().splitlines()
    ]
    assert all(set(cell) <= {":", "-"} for cell in rule)
    return [dict(zip(header, row, strict=True)) for row in rows]


def files(folder):
    """Path and bytes of all that is in a folder."""
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def kernels():
    """The CUDA kernels as NVRTC's PTX, parsed."""
    import on_numpy

    return on_numpy.kernels()


@pytest.fixture
def gpu(kernels, monkeypatch):
    """The kernels run on numpy, with blocks of few threads, so that there are several."""
    from on_numpy import OnNumpy

    monkeypatch.setattr(cuda, "THREADS", 8)
    return OnNumpy(kernels, monkeypatch.setattr)
