"""train_rnn.py as users call it: the peers' command lines, recipes, wrong input, signals."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

import evaluate
import generate
import train_awd
import train_qrnn
import train_rmc
import train_rnn
from models import build
from utils import checkpoint, parsing

PORT = {
    "emsize": 300, "nhid": 300, "nlayers": 1, "lr": 0.001, "clip": 0.1, "epochs": 100, "batch_size": 64, "bptt": 100,
    "dropout": 0.5, "tied": True, "model": "LSTM", "optimizer": "adam", "seed": 1111, "cuda": False, "loop": False,
    "data": "./data/wikitext-2", "plateau_factor": 0.5, "plateau_patience": 5, "log_interval": 100,
}  # fmt: skip
EXAMPLE = {
    "emsize": 200, "nhid": 200, "nlayers": 2, "lr": 20, "clip": 0.25, "epochs": 40, "batch_size": 20, "bptt": 35,
    "dropout": 0.2, "tied": False, "model": "LSTM", "optimizer": "sgd", "seed": 1111, "cuda": False, "loop": False,
    "data": "./data/wikitext-2", "plateau_factor": 0.25, "plateau_patience": 0, "log_interval": 200,
}  # fmt: skip
LARGE = {"emsize": 1500, "nhid": 1500, "dropout": 0.65, "epochs": 40}
MEDIUM = {"emsize": 650, "nhid": 650, "dropout": 0.5, "epochs": 40}
CUDA = {"cuda": True}
# What the READMEs print for main.py and train_rnn.py, with what it must mean. The example's and Distiller's lines are
# for the example's own defaults.
README_LINES = [
    ("port", "--cuda", CUDA),
    ("example", "--accel --epochs 6", CUDA | {"epochs": 6}),
    ("example", "--accel --epochs 6 --tied", CUDA | {"epochs": 6, "tied": True}),
    ("example", "--accel --tied", CUDA | {"tied": True}),
    ("example", "--accel --emsize 650 --nhid 650 --dropout 0.5 --epochs 40", CUDA | MEDIUM),
    ("example", "--accel --emsize 650 --nhid 650 --dropout 0.5 --epochs 40 --tied", CUDA | MEDIUM | {"tied": True}),
    ("example", "--accel --emsize 1500 --nhid 1500 --dropout 0.65 --epochs 40", CUDA | LARGE),
    ("example", "--accel --emsize 1500 --nhid 1500 --dropout 0.65 --epochs 40 --tied", CUDA | LARGE | {"tied": True}),
    ("example", "--cuda --epochs 6", CUDA | {"epochs": 6}),
    ("example", "--cuda --epochs 6 --tied", CUDA | {"epochs": 6, "tied": True}),
    ("example", "--cuda --tied", CUDA | {"tied": True}),
    ("example", "--cuda --emsize 650 --nhid 650 --dropout 0.5 --epochs 40", CUDA | MEDIUM),
    ("example", "--cuda --emsize 650 --nhid 650 --dropout 0.5 --epochs 40 --tied", CUDA | MEDIUM | {"tied": True}),
    ("example", "--cuda --emsize 1500 --nhid 1500 --dropout 0.65 --epochs 40", CUDA | LARGE),
    ("example", "--cuda --emsize 1500 --nhid 1500 --dropout 0.65 --epochs 40 --tied", CUDA | LARGE | {"tied": True}),
    # Distiller's table of pruning: its own parameters line, a size that its main.py would refuse too.
    ("example", "--emsize 650 --nhid 1500 --dropout 0.65 --tied --wd 1e-6",
     {"emsize": 650, "nhid": 1500, "dropout": 0.65, "tied": True, "wdecay": 1e-6}),
    # Spellings: abbreviations, underscores, the values that their --help lists.
    ("example", "--epoch 3 --batch_size 7 --log_interval=5", {"epochs": 3, "batch_size": 7, "log_interval": 5}),
    ("example", "--batch-size 7 --model GRU --seed 3", {"batch_size": 7, "model": "GRU", "seed": 3}),
    ("example", "--momentum 0.9", {"momentum": 0.9}),
    ("example", "--weight-decay 1e-5 --decay 0.95", {"wdecay": 1e-5, "decay": 0.95, "schedule": "step"}),
    ("port", "--cudnn --no-tied", {"tied": False}),
    ("port", "--loop", {"loop": True}),
]  # fmt: skip


def parse(*argv):
    """The flags of a train_rnn.py command line."""
    return parsing.parse_training(train_rnn.build_parser(), train_rnn.RECIPES, list(argv), families=("rnn",))[0]


@pytest.mark.parametrize(("recipe", "line", "meaning"), README_LINES, ids=[line for _, line, _ in README_LINES])
def test_published_command_lines_mean_the_published_settings(recipe, line, meaning):
    """What a user copies from a peer's README, with only the script's name (and --recipe example) changed."""
    words = line.split() if recipe == "port" else [*line.split(), "--recipe", "example"]
    flags = vars(parse(*words))
    expected = (PORT if recipe == "port" else EXAMPLE) | meaning
    assert {name: flags[name] for name in expected} == expected
    assert flags["schedule"] == expected.get("schedule", "plateau")


@pytest.mark.parametrize(
    "line", ["", "--cuda", "--accel", "--checkpoint ./model.pt --words 7 --data ./data/wikitext-2"]
)
def test_published_command_lines_of_generate(line):
    """generate.py parses what the peers' READMEs print."""
    flags = generate.build_parser().parse_args(line.split())
    assert (flags.checkpoint, flags.outf, flags.seed, flags.temperature) == ("./model.pt", "generated.txt", 1111, 1.0)
    assert flags.cuda == (line in ("--cuda", "--accel"))


CHANGES = {
    "model": ("GRU", lambda config: config["core"]["model"]),
    "emsize": (13, lambda config: config["core"]["emsize"]),
    "nhid": (17, lambda config: config["core"]["nhid"]),
    "nlayers": (3, lambda config: config["core"]["nlayers"]),
    "dropout": (0.25, lambda config: (config["core"]["dropout"] + config["dropout"] + config["dropouti"]) / 3),
    "tied": (False, lambda config: config["tied"]),
    "loop": (True, lambda config: config["core"]["loop"]),
}


def test_every_model_flag_reaches_the_model():
    """A flag that is parsed and never passed changes no figure and no error; each one here changes the model."""
    groups = [g for g in train_rnn.build_parser()._action_groups if g.title in ("model", "softmax")]
    assert {action.dest for g in groups for action in g._group_actions} == {
        *CHANGES,
        "adaptivesoftmax",
        "splitcross",
        "cutoffs",
        "nhead",
        "context",
    }
    for name, (value, read) in CHANGES.items():
        flag = {True: f"--{name}", False: f"--no-{name}"}.get(value, f"--{name}={value}")
        config = train_rnn.model_config(parse("--no-tied", flag), 31)
        assert read(config) == value, name
        model = build(config)
        if name in ("model", "emsize", "nhid", "nlayers"):
            core = model.core
            built = {"model": core.model, "emsize": core.input_size, "nhid": core.output_size}
            assert {**built, "nlayers": core.rnn.num_layers}[name] == value, name


def test_a_transformers_flags_reach_it():
    """Sizes, heads and context, 2 and --bptt if not given, and --nhid, which is its own."""
    arguments = ("--model", "Transformer", "--emsize", "12", "--nhid", "17", "--nlayers", "3", "--bptt", "7")
    for flags, heads, context in (([], 2, 7), (["--nhead", "3", "--context", "5"], 3, 5)):
        config = train_rnn.model_config(parse(*arguments, *flags), 31)
        model = build(config)
        assert config["family"] == "transformer" and config["core"]["dropout"] == config["dropout"] == 0.5
        assert [part.shape[0] for part in model.initial_state(1)] == [context - 1] * 4
        assert {layer.self_attn.num_heads for layer in model.core.layers} == {heads}
        assert {layer.linear1.weight.shape for layer in model.core.layers} == {(17, 12)}


def test_a_transformer_is_trained_resumed_evaluated_and_writes(train, tmp_path, capsys):
    """As every other model is; a window's length decides nothing."""
    record = train("--model", "Transformer", "--emsize", "12", "--nhead", "3", "--epochs", "1", "--name", "first")
    more = train_rnn.main(["--runs-dir", str(tmp_path / "runs"), "--resume", "first", "--epochs", "2"])
    assert math.isfinite(record["results"]["test"]["perplexity"]) and len(more["history"]) == 2
    generate.main(["--checkpoint", str(tmp_path / "model.pt"), "--words", "7", "--outf", "-"])
    assert len(capsys.readouterr().out.splitlines()[-1].split()) == 7


@pytest.mark.parametrize(
    ("flags", "says"),
    (
        (["--model", "Transformer", "--loop"], "--loop"),
        (["--nhead", "2"], "--nhead and --context go with --model Transformer, got --model LSTM"),
        (["--model", "Transformer", "--emsize", "11", "--nhid", "11"], "--emsize 11 can't be shared by --nhead 2"),
    ),
)
def test_flags_of_another_kind_of_model(fails, tiny_corpus, flags, says):
    """One line."""
    assert says in fails(train_rnn.main, "--data", tiny_corpus, *flags)


WIDE = {
    train_rnn: (
        *("--recipe example", "--no-tied", "--model GRU", "--adaptivesoftmax"),
        *("--model Transformer", "--model Transformer --nhead 3"),
    ),
    train_rmc: ("", "--variant port --memslots 2"),
    train_qrnn: ("--emsize 320",),
    train_awd: ("", "--model QRNN"),
}


@pytest.mark.parametrize(("module", "flags"), [(module, flags) for module, every in WIDE.items() for flags in every])
@pytest.mark.parametrize("wanted", (60_000, 1_234_567))
def test_num_params_finds_the_width(module, flags, wanted):
    """No other width is nearer; sizes keep their proportions, to a unit (a unit for each head)."""
    args, _ = parsing.parse_training(
        module.build_parser(), module.RECIPES, [*flags.split(), "--num-params", f"{wanted:g}"]
    )
    parsing.settle_cutoffs(args, 211)
    before = {name: getattr(args, name) for name in module.WIDTHS}
    parsing.settle_width(args, module.WIDTHS, lambda: module.model_config(args, 211))
    first = module.WIDTHS[0]
    heads = getattr(args, "nhead", None) or 1
    width, found = getattr(args, first), {}
    for other in (width - heads, width, width + heads):
        for name, size in before.items():
            setattr(args, name, heads * max(1, round(other // heads * size / before[first])))
        found[other] = abs(build(module.model_config(args, 211)).num_params() - wanted)
    assert min(found, key=found.get) == width


def test_a_run_has_as_many_parameters_as_asked_for(train, fails, tiny_corpus):
    """The record has the sizes; too few to be had end with one line."""
    record = train("--num-params", "3e3", "--epochs", "1")
    core, count = record["model"]["core"], record["model"]["parameters"]
    assert abs(count - 3000) < 200 and core["nhid"] == core["emsize"] != 11
    assert "--num-params 10: the narrowest model has" in fails(
        train_rnn.main, "--data", tiny_corpus, "--num-params", "10"
    )


def test_every_training_flag_is_read():
    """No flag of the train scripts is parsed and then forgotten: each name is used in the code that trains."""
    source = "".join(
        (ROOT / "utils" / f"{name}.py").read_text()
        for name in ("experiment", "text", "trainer", "optim", "runtime", "parsing", "pruning")
    )
    source += (ROOT / "train_rnn.py").read_text()
    for action in train_rnn.build_parser()._actions:
        if action.dest not in ("help", *CHANGES):
            assert re.search(rf"\bargs\.{action.dest}\b", source), action.dest


def test_a_part_of_the_training_text(train, tiny_corpus):
    """--train-tokens: as many updates as its columns have windows, the record says how much, the vocabulary stays."""
    record = train("--train-tokens", "1000", "--epochs", "1")
    assert record["history"]["epochs"][0]["batches"] == -(-(1000 // 7 - 1) // 13)
    assert record["corpus"]["tokens"]["train"] == 1000 and record["corpus"]["types"] == 29
    assert record["corpus"]["tokens"]["valid"] > 500


def test_parameters_of_the_recipes_on_wikitext2(corpus_folder):
    """The port's model has 10,739,078 parameters on the real vocabulary."""
    args = parse("--data", str(corpus_folder("wikitext-2")))
    corpus = parsing.load_corpus(args)
    assert build(train_rnn.model_config(args, len(corpus.vocabulary))).num_params() == 10_739_078


def numeric_flags(parser):
    """(flag, whether it takes whole numbers) of every flag with a checked number."""
    for action in parser._actions:
        if action.type is not None and action.option_strings:
            is_int = "whole" in _message(action.type)
            yield action.option_strings[0], is_int


def _message(parse_number):
    with pytest.raises(Exception) as error:
        parse_number("x")
    return str(error.value)


@pytest.mark.parametrize("module", [train_rnn, generate, evaluate], ids=lambda module: module.__name__)
def test_impossible_numbers_end_with_one_line(module, fails):
    """nan, inf, words and negative numbers are refused by every numeric flag, fractions and 0.5 by the whole ones."""
    tried = 0
    for flag, is_int in numeric_flags(module.build_parser()):
        for value in ("nan", "inf", "-1", "two", "", *(("1.5", "1e3") if is_int else ())):
            assert f"argument {flag}" in fails(module.main, f"{flag}={value}"), (flag, value)
            tried += 1
    assert tried > 20 if module is train_rnn else tried


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--emsize", "12"], ["tied", "12", "11", "--no-tied"]),
        (["--cuda"], ["--cuda", "no GPU"]),
        (["--data", "nowhere"], ["nowhere", "python -m data.prepare wikitext-2", "--data pydocs"]),
        (["--batch-size", "5000"], ["5000", "--batch-size"]),
        (["--eval-batch", "5000"], ["5000", "--eval-batch"]),
        (["--model", "TRANSFORMER"], ["--model", "LSTM", "GRU"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--recipe", "best"], ["--recipe", "port", "example"]),
        (["--wrong"], ["--wrong"]),
        (["--decay", "0.9", "--schedule", "plateau"], ["--decay", "step"]),
        (["--vocab-size", "2"], ["--vocab-size"]),
        (["--resume", "nothing"], ["nothing", "last.pt"]),
        (["--save", "/no/such/folder/model.pt"], ["/no/such/folder/model.pt"]),
        (["--save", "."], ["--save .", "a folder"]),
        (["--onnx-export", "/no/such/folder/model.onnx"], ["--onnx-export /no/such/folder/model.onnx"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one of the cases needs a machine without a GPU")
def test_wrong_flags_end_with_one_line(flags, words, fails, tiny_corpus, tmp_path):
    """One line on standard error, exit code 2, and what it says helps."""
    places = ["--data", tiny_corpus, "--runs-dir", tmp_path, "--save", tmp_path / "model.pt"]
    error = fails(train_rnn.main, *places, *TINY, *flags)
    for word in words:
        assert word in error
    assert not list(tmp_path.iterdir()), "found before anything was made"


@pytest.mark.parametrize(
    ("split", "content", "words"),
    [
        ("valid", None, ["valid.txt"]),
        ("test", b"", ["test.txt", "empty"]),
        ("train", b"good words\nbad \xff\xfe words\n", ["train.txt", "UTF-8"]),
    ],
)
def test_unusable_corpora_end_with_one_line(split, content, words, fails, tmp_path):
    """Missing, empty and badly encoded files are named."""
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_bytes(b"some words\n" * 50)
    path = tmp_path / f"{split}.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    error = fails(train_rnn.main, "--data", tmp_path, "--runs-dir", tmp_path / "runs", *TINY)
    for word in words:
        assert word in error


def test_a_taken_name_is_an_error(train, fails, tmp_path, tiny_corpus):
    """Two runs never share a folder."""
    train("--name", "one", "--dry-run")
    train("--name", "one", "--epochs", "1")
    error = fails(train_rnn.main, "--data", tiny_corpus, "--runs-dir", tmp_path / "runs", "--name", "one", *TINY)
    assert "taken" in error and "--resume one" in error


def test_a_dry_run_keeps_nothing(train, tmp_path, capsys):
    """One batch and a short evaluation, no files but the corpus cache."""
    record = train("--dry-run", "--epochs", "50")
    assert record["status"] == "dry-run" and record["history"]["epochs"][0]["batches"] == 1
    assert list(tmp_path.iterdir()) == []
    assert "test ppl" in capsys.readouterr().out


def test_a_non_finite_loss_is_no_success(train, fails, tiny_corpus, tmp_path):
    """Step, rate and gradient norm are named, the exit code is 1, the last good checkpoint stays."""
    train("--name", "good", "--epochs", "1")
    before = (tmp_path / "model.pt").read_bytes()
    places = ["--data", tiny_corpus, "--runs-dir", tmp_path / "runs", "--save", tmp_path / "model.pt"]
    wild = ["--lr", "1e38", "--optimizer", "sgd", "--clip", "0", "--name", "wild"]
    error = fails(train_rnn.main, *places, *TINY, *wild, code=1)
    assert re.search(r"not finite at batch \d+ of epoch 1: lr 1e\+38, gradient norm (nan|inf|[\d.e+]+)", error)
    assert (tmp_path / "model.pt").read_bytes() == before
    assert not (tmp_path / "runs" / "wild" / "last.pt").exists()


def background(tmp_path, *flags, **options):
    """train_rnn.py in a process of its own, its output a pipe."""
    argv = [sys.executable, "-u", str(ROOT / "train_rnn.py"), *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        argv, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def wait_for(process, pattern):
    """Read the process's output up to the line that matches."""
    for line in process.stdout:
        if re.search(pattern, line):
            return line
    raise AssertionError(f"{pattern} never came")


LONG = [*TINY, "--epochs", "400", "--nhid", "53", "--emsize", "53"]


def test_ctrl_c_evaluates_the_best_model_and_the_run_can_go_on(tmp_path, tiny_corpus):
    """Exit code 0, test perplexity printed, curves and record there, and where --resume goes on from."""
    process = background(tmp_path, "--data", tiny_corpus, *LONG, "--name", "long")
    wait_for(process, r"epoch   3 \|    40/")
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(60) == 0, rest
    assert "Exiting from training early" in rest and re.search(
        r"End of training \| test loss +[\d.]+ \| test ppl", rest
    )
    record = json.loads((tmp_path / "runs" / "long" / "run.json").read_text())
    assert record["status"] == "interrupted" and record["results"]["test"]["targets"] == 784
    assert (tmp_path / "runs" / "long" / "curves.png").stat().st_size > 5000
    saved = checkpoint.load(tmp_path / "runs" / "long" / "last.pt")
    assert saved["position"]["epoch"] >= 3
    assert checkpoint.load(tmp_path / "model.pt")["best"] == saved["best"]


def test_ctrl_c_twice_stops_at_once(tmp_path, tiny_corpus):
    """The second one does not wait for the evaluation, here of half a million words; no traceback."""
    shutil.copytree(tiny_corpus, tmp_path / "slow")
    test = tmp_path / "slow" / "test.txt"
    test.write_text(600 * test.read_text())
    process = background(tmp_path, "--data", tmp_path / "slow", *LONG, "--name", "long")
    wait_for(process, r"epoch   2 ")
    process.send_signal(signal.SIGINT)
    wait_for(process, "Exiting from training early")
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(60) == 130 and "Traceback" not in rest
    assert "error: interrupted" in rest and "End of training" not in rest
    assert checkpoint.load(tmp_path / "runs" / "long" / "last.pt")["position"]["epoch"] >= 2


def test_a_full_disk_loses_nothing(tmp_path, tiny_corpus):
    """When a checkpoint can't be written, one line says so, exit code 2, and the previous model.pt is still whole."""
    done = background(tmp_path, "--data", tiny_corpus, *TINY, "--epochs", "1").communicate()[0]
    assert "End of training" in done
    before = (tmp_path / "model.pt").read_bytes()
    limit = len(before) // 2
    flags = [*TINY, "--epochs", "1", "--name", "full"]
    process = background(
        tmp_path,
        "--data",
        tiny_corpus,
        *flags,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    output = process.communicate()[0]
    assert process.returncode == 2 and "Traceback" not in output
    assert re.search(r"error: cannot save .*best\.pt: File too large", output)
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []


def test_what_the_start_prints(train, capsys):
    """Vocabulary, parameters, recipe, device; nothing else is needed to know what was run."""
    train("--dry-run", "--recipe", "example", "--no-tied")
    out = capsys.readouterr().out
    for words in (
        "vocabulary 29",
        "parameters ",
        "recipe example",
        "lr=20.0",
        "emsize=11",
        "device cpu",
        "tokens 8,265",
    ):
        assert words in out


LOG_LINE = (
    r"\| epoch   2 \|    20/   91 batches \| lr 0.001 \| ms/batch +[\d.]+ \| forward ms/batch +[\d.]+ \| "
    r"loss +[\d.]+ \| ppl +[\d.]+ \| eta \d:\d\d:\d\d\n"
)
EPOCH_LINE = r"\| end of epoch   2 \| time: +[\d.]+s \| valid loss +[\d.]+ \| valid ppl +[\d.]+ \| eval batch 3\n"


def test_log_lines(train, tmp_path, capsys):
    """word_language_model's lines, into train_log.txt, test_log.txt and onto the screen."""
    train("--name", "logged", "--lr", "0.001")
    folder = tmp_path / "runs" / "logged"
    for text in (capsys.readouterr().out, (folder / "train_log.txt").read_text()):
        assert re.search(LOG_LINE, text) and re.search(EPOCH_LINE, text)
    test_log = (folder / "test_log.txt").read_text()
    assert len(re.findall(r"end of epoch", test_log)) == 2
    assert re.search(r"\| End of training \| test loss +[\d.]+ \| test ppl +[\d.]+\n", test_log)
