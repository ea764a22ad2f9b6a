"""compress.py as users call it: pruned checkpoints that evaluate.py and generate.py read; tables; wrong input."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY

import compress
import evaluate
import generate
import train_rnn
from models import ModelError
from utils import UserError, checkpoint, quantization
from utils.summary import KINDS, summary_text


def weights_of(path):
    """{name: array} of a checkpoint's parameters."""
    return {name: tensor.numpy() for name, tensor in checkpoint.load(path)["weights"].items()}


@pytest.mark.parametrize(
    ("flags", "bound"),
    [
        (["--sparsity", "0.5"], lambda w: np.sort(np.abs(w), axis=None)[int(0.5 * w.size) - 1]),
        (["--threshold", "0.05"], lambda w: 0.05),
        (["--sensitivity", "0.5"], lambda w: 0.5 * w.std(ddof=1)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_pruned_at_once(flags, bound, tiny_checkpoint, tmp_path, capsys):
    """Every matrix by the criterion, nothing else changed; the masks lie in the checkpoint; it evaluates, generates."""
    output = tmp_path / "pruned.pt"
    compress.main(["prune", "--checkpoint", str(tiny_checkpoint), "--output", str(output), *flags])
    before, after, masks = weights_of(tiny_checkpoint), weights_of(output), checkpoint.load(output)["pruning"]["masks"]
    for name, weight in before.items():
        if weight.ndim == 1:
            assert np.array_equal(after[name], weight)
            continue
        small = np.abs(weight) <= bound(weight)
        assert 0 < small.mean() < 1 and np.array_equal(after[name], np.where(small, 0, weight))
        assert name == "head.weight" or np.array_equal(masks[name].numpy(), ~small)
    evaluate.main(["--checkpoint", str(output), "--eval-batch", "3"])
    generate.main(["--checkpoint", str(output), "--words", "20", "--outf", str(tmp_path / "text")])
    assert "test" in capsys.readouterr().out and len((tmp_path / "text").read_text().split()) == 20


def test_sparse(tiny_checkpoint, tmp_path, capsys, fails):
    """Without its zeros a pruned model is a smaller file, the same model, and can't learn; a damaged one is refused."""
    pruned, output = str(tmp_path / "pruned.pt"), str(tmp_path / "sparse.pt")
    assert "zeros: prune it first" in fails(compress.main, "sparse", "--checkpoint", tiny_checkpoint)
    compress.main(["prune", "--checkpoint", str(tiny_checkpoint), "--output", pruned, "--sparsity", "0.8"])
    compress.main(["sparse", "--checkpoint", pruned, "--output", output])
    assert "core.rnn.weight_ih_l0" in capsys.readouterr().out
    before, after = checkpoint.load(pruned)["weights"], checkpoint.load(output)["weights"]
    assert sum(tensor.nbytes for tensor in after.values()) < 0.5 * sum(tensor.nbytes for tensor in before.values())
    assert perplexity(output, capsys) == perplexity(pruned, capsys)
    native = str(tmp_path / "native.pt")
    compress.main(["quantize", "--checkpoint", pruned, "--output", native, "--backend", "native"])
    assert [bool(checkpoint.load(path)["pruning"]["masks"]) for path in (pruned, output, native)] == [
        True,
        False,
        False,
    ]
    generate.main(["--checkpoint", output, "--words", "20", "--outf", str(tmp_path / "text")])
    assert len((tmp_path / "text").read_text().split()) == 20
    for wrong in (["--dynamic"], ["--dynamic", "sgd"]):
        assert "can't learn" in fails(evaluate.main, "--checkpoint", output, *wrong)
    assert "compressed already" in fails(compress.main, "quantize", "--checkpoint", output)
    saved = checkpoint.load(output)
    saved["weights"]["head.weight_columns"] += 1000
    checkpoint.save(output, saved)
    assert "does not fit the model" in fails(evaluate.main, "--checkpoint", output)


def test_bf16(tiny_checkpoint, tmp_path, capsys):
    """Weights of two bytes, within half a step of eight bits; what is tied lies in the file once; it can go on."""
    output = tmp_path / "bf16.pt"
    compress.main(["bf16", "--checkpoint", str(tiny_checkpoint), "--output", str(output)])
    before, after = checkpoint.load(tiny_checkpoint)["weights"], checkpoint.load(output)["weights"]
    assert before.keys() == after.keys() and {weight.dtype for weight in after.values()} == {torch.bfloat16}
    for name, weight in before.items():
        torch.testing.assert_close(after[name].float(), weight, rtol=2**-8, atol=0)
    assert after["head.weight"].data_ptr() == after["embedding.weight"].data_ptr()
    assert abs(perplexity(output, capsys) / perplexity(tiny_checkpoint, capsys) - 1) < 1e-3
    generate.main(["--checkpoint", str(output), "--words", "20", "--outf", str(tmp_path / "text")])
    assert len((tmp_path / "text").read_text().split()) == 20


def test_chosen_weights(tiny_checkpoint, tmp_path):
    """--weights prunes what its patterns name."""
    output = tmp_path / "pruned.pt"
    places = ["--checkpoint", str(tiny_checkpoint), "--output", str(output)]
    compress.main(["prune", *places, "--sparsity", "0.5", "--weights", "weight_hh_l0", "decoder.weight"])
    pruned = {name for name, weight in weights_of(output).items() if (weight == 0).mean() > 0.4 and weight.ndim == 2}
    assert pruned == {"core.rnn.weight_hh_l0", "embedding.weight", "head.weight"}


def test_pruned_twice_and_trained_on(train, tmp_path):
    """A second pruning keeps the first one's zeros, and --start-from keeps both while it trains."""
    train("--name=dense")
    once, twice = str(tmp_path / "once.pt"), str(tmp_path / "twice.pt")
    dense = str(tmp_path / "runs" / "dense" / "best.pt")
    compress.main(["prune", "--checkpoint", dense, "--output", once, "--sparsity", "0.7", "--weights", "weight_hh_l0"])
    compress.main(["prune", "--checkpoint", once, "--output", twice, "--sparsity", "0.3", "--weights", "weight_ih_l0"])
    again = str(tmp_path / "again.pt")
    compress.main(["prune", "--checkpoint", twice, "--output", again, "--sparsity", "0.2"])
    assert (weights_of(again)["core.rnn.weight_hh_l0"] == 0).sum() == int(0.7 * 484)
    assert int((~checkpoint.load(again)["pruning"]["masks"]["core.rnn.weight_hh_l0"]).sum()) == int(0.7 * 484)
    record = train("--name=sparse", "--start-from", twice, "--epochs=3")
    for name, part in (("core.rnn.weight_hh_l0", 0.7), ("core.rnn.weight_ih_l0", 0.3)):
        before, after = weights_of(twice)[name], weights_of(tmp_path / "runs" / "sparse" / "best.pt")[name]
        assert np.array_equal(before == 0, after == 0) and (after == 0).sum() == int(part * after.size)
        assert not np.array_equal(before, after)
    assert record["model"]["pruned"] == int(0.7 * 484) + int(0.3 * 484)
    dense_losses = [epoch["valid_loss"] for epoch in train("--resume=dense")["history"]["epochs"]]
    assert record["history"]["epochs"][0]["valid_loss"] < dense_losses[0]


def test_start_from_is_the_run_it_names(train, fails, tmp_path):
    """Its best weights before the first update; a run or a file; --finetune beside it is one too many."""
    train("--name=dense")
    dense = weights_of(tmp_path / "runs" / "dense" / "best.pt")
    for number, start in enumerate(["dense", str(tmp_path / "runs" / "dense"), str(tmp_path / "model.pt")]):
        train(f"--name=next{number}", f"--start-from={start}", "--lr=1e-12", "--epochs=1")
        again = weights_of(tmp_path / "runs" / f"next{number}" / "last.pt")
        assert all(np.allclose(again[name], weight, atol=1e-8) for name, weight in dense.items())
    common = ["--data", tmp_path, "--runs-dir", tmp_path / "runs", *TINY]
    assert "--start-from nobody" in fails(train_rnn.main, *common, "--start-from=nobody")
    assert "exclude each other" in fails(
        train_rnn.main, *common, "--start-from=dense", "--finetune=dense", "--optimizer=ntasgd"
    )


def test_start_from_another_kind_of_model(train, tmp_path):
    """Weights of the same shapes that mean something else: untied and pruned ones for a tied model, another cell's."""
    train("--name=untied", "--no-tied", "--epochs=1", "--sparsity=0.5", "--prune-epochs=0:1:1")
    train("--name=tanh", "--model=RNN_TANH", "--epochs=1")
    for flags, says in (
        (["--start-from=untied"], "does not fit: its --tied is False, here it is True"),
        (["--start-from=tanh", "--model=RNN_RELU"], "its --model is RNN_TANH, here it is RNN_RELU"),
    ):
        with pytest.raises(UserError, match=says):
            train("--name=next", *flags)
    assert not (tmp_path / "runs" / "next").exists()
    train("--name=next", "--start-from=untied", "--no-tied", "--dropout=0.3", "--epochs=1")
    assert train("--resume=next", "--start-from=untied", "--no-tied", "--epochs=2")["epochs"] == 2


def test_structured(tiny_checkpoint, tmp_path, capsys):
    """A smaller dense model, which evaluates, generates and trains on."""
    output = str(tmp_path / "smaller.pt")
    compress.main(
        ["prune", "--checkpoint", str(tiny_checkpoint), "--output", output, "--structured", "--sparsity", "0.3"]
    )
    before, after = checkpoint.load(tiny_checkpoint), checkpoint.load(output)
    assert after["config"]["core"]["nhid"] == after["config"]["core"]["emsize"] == 8
    model, _, _ = checkpoint.load_model(output, "cpu")
    out = capsys.readouterr().out
    assert f"-> {model.num_params():,}" in out and before["config"]["core"]["nhid"] == 11
    evaluate.main(["--checkpoint", output, "--eval-batch", "3"])
    generate.main(["--checkpoint", output, "--words", "20", "--outf", str(tmp_path / "text")])
    assert (tmp_path / "smaller.pt").stat().st_size < tiny_checkpoint.stat().st_size
    data = after["args"]["data"]
    places = ["--data", data, "--runs-dir", str(tmp_path), "--save", str(tmp_path / "m.pt"), "--name=on"]
    train_rnn.main([*places, *TINY, "--emsize=8", "--nhid=8", "--start-from", output])


def test_masks_follow_the_units(tiny_checkpoint, tmp_path):
    """What was pruned in the units that stay is pruned in the smaller model."""
    pruned, output = str(tmp_path / "pruned.pt"), str(tmp_path / "smaller.pt")
    compress.main(["prune", "--checkpoint", str(tiny_checkpoint), "--output", pruned, "--sparsity", "0.5"])
    compress.main(["prune", "--checkpoint", pruned, "--output", output, "--structured", "--sparsity", "0.3"])
    saved = checkpoint.load(output)
    for name, mask in saved["pruning"]["masks"].items():
        assert torch.equal(saved["weights"][name] == 0, ~mask)


def perplexity(path, capsys):
    """On the test split, as evaluate.py prints it."""
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(path), "--eval-batch", "3"])
    return float(re.search(r"\| test +\|.* ppl +([\d.]+)", capsys.readouterr().out)[1])


def test_quantized(tiny_checkpoint, tmp_path, capsys, fails):
    """8 bits cost little, 2 much; statistics are kept and read again, edits counting; it evaluates and generates."""
    output, file = str(tmp_path / "quantized.pt"), tmp_path / "statistics.yaml"
    places = ["quantize", "--checkpoint", str(tiny_checkpoint), "--output", output]
    dense = perplexity(tiny_checkpoint, capsys)
    compress.main([*places, "--mode", "asymmetric", "--per-channel", "--clip", "avg", "--statistics", str(file)])
    assert "| 14 operations in integers\n" in capsys.readouterr().out
    assert dense < perplexity(output, capsys) < 1.2 * dense
    compress.main([*places, "--mode", "asymmetric", "--per-channel", "--statistics", str(file)])
    assert perplexity(output, capsys) == pytest.approx(dense, rel=0.03)
    generate.main(["--checkpoint", output, "--words", "20", "--outf", str(tmp_path / "text")])
    assert len((tmp_path / "text").read_text().split()) == 20
    evaluate.main(["--checkpoint", output, "--record", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())["model"]["quantization"]
    assert record == {**quantization.SETTINGS, "mode": "asymmetric", "per_channel": True}
    assert "compressed" in fails(evaluate.main, "--checkpoint", output, "--dynamic")
    compress.main([*places, "--weight-bits", "2", "--activation-bits", "2"])
    assert perplexity(output, capsys) > 1.05 * dense
    compress.main([*places, "--fp16", "encoder,eltwise,decoder", "--statistics", str(file), "--tokens", "9"])
    assert "| 7 operations in integers | 7 in float16: encoder" in capsys.readouterr().out
    assert checkpoint.load(output)["config"]["quantization"]["statistics"] == yaml.safe_load(file.read_text())
    compress.main([*places, "--fp16", "all"])
    assert perplexity(output, capsys) == pytest.approx(dense, rel=1e-3)


def test_native(tiny_checkpoint, tmp_path, capsys, fails):
    """int8 weights in the file; it evaluates, generates, is no model to learn from or to compress again."""
    output = str(tmp_path / "native.pt")
    dense = perplexity(tiny_checkpoint, capsys)
    compress.main(["quantize", "--checkpoint", str(tiny_checkpoint), "--output", output, "--backend", "native"])
    assert "| 4 operations in integers | 10 in float32: layer0.eltwiseadd_gate" in capsys.readouterr().out
    assert perplexity(output, capsys) == pytest.approx(dense, rel=0.02)
    weights = checkpoint.load(output)["weights"]
    assert all((tensor.dtype == torch.int8) == (tensor.dim() == 2) for tensor in weights.values())
    assert weights["head.weight"].data_ptr() == weights["embedding.weight"].data_ptr()
    generate.main(["--checkpoint", output, "--words", "20", "--outf", str(tmp_path / "text")])
    assert "can't learn" in fails(evaluate.main, "--checkpoint", output, "--dynamic")
    assert "compressed already" in fails(compress.main, "prune", "--checkpoint", output, "--sparsity", "0.5")
    quantized = str(tmp_path / "quantized.pt")
    flags = ["--output", quantized, "--tokens", "200", "--fp16", "encoder,"]
    compress.main(["quantize", "--checkpoint", str(tiny_checkpoint), *flags])
    assert checkpoint.load(quantized)["config"]["quantization"]["fp16"] == ["encoder"]
    for again in (["sparse"], ["quantize", "--backend", "native"]):
        assert "quantized already" in fails(compress.main, *again, "--checkpoint", quantized, "--output", output)
    assert checkpoint.load(output)["config"]["native"]
    with pytest.raises(UserError, match="leave out --cuda"):
        checkpoint.load_model(output, torch.device("cuda"))


def test_what_cannot_be_built_is_not_written(train, tmp_path):
    """A model with another head is refused before its place is taken, also where that is its own."""
    train("--adaptivesoftmax", "--epochs=1")
    model = tmp_path / "model.pt"
    compress.main(["prune", "--checkpoint", str(model), "--output", str(model), "--sparsity", "0.9"])
    before = model.read_bytes()
    with pytest.raises(ModelError):
        compress.main(["sparse", "--checkpoint", str(model), "--output", str(model)])
    assert model.read_bytes() == before


def test_nothing_left_of_a_matrix(tiny_checkpoint, tmp_path, capsys):
    """Tables of a sparse model whose matrices are zeros alone; a pruned one is not adapted."""
    pruned, output = str(tmp_path / "pruned.pt"), str(tmp_path / "sparse.pt")
    compress.main(["prune", "--checkpoint", str(tiny_checkpoint), "--output", pruned, "--threshold", "100"])
    compress.main(["sparse", "--checkpoint", pruned, "--output", output])
    for kind in ("sparsity", "percentile"):
        compress.main(["--checkpoint", output, "--summary", kind])
        assert "bias" in capsys.readouterr().out
    with pytest.raises(UserError, match="is pruned"):
        evaluate.main(["--checkpoint", pruned, "--dynamic"])


def test_sparsity_table(tiny_checkpoint, tmp_path, capsys):
    """Counts against numpy's, by element, row and column; the shared matrix once in the total."""
    output = str(tmp_path / "pruned.pt")
    saved = checkpoint.load(tiny_checkpoint)
    saved["weights"]["core.rnn.weight_hh_l0"][3] = 0
    saved["weights"]["core.rnn.weight_hh_l0"][:, 5] = 0
    checkpoint.save(output, {name: part for name, part in saved.items() if name != "format"})
    compress.main(["--checkpoint", output, "--summary", "sparsity"])
    rows = {line.split("|")[1].strip(): [part.strip() for part in line.split("|")[2:-1]] for line in
            capsys.readouterr().out.splitlines() if line.startswith("|")}  # fmt: skip
    weight = weights_of(output)["core.rnn.weight_hh_l0"]
    nonzero = np.count_nonzero(weight)
    assert rows["core.rnn.weight_hh_l0"] == [
        "44 x 11", "484", str(nonzero), f"{100 - 100 * nonzero / 484:.2f}", f"{100 / 44:.2f}", f"{100 / 11:.2f}",
        f"{weight.mean():.5f}", f"{weight.std(ddof=1):.5f}",
    ]  # fmt: skip
    model, _, _ = checkpoint.load_model(output, "cpu")
    assert rows["total"][1] == f"{model.num_params():,}" and "head.weight" not in rows
    assert int(rows["total"][2].replace(",", "")) == sum(int((p != 0).sum()) for p in model.parameters())


def test_percentiles(tiny_checkpoint):
    """The 90th is the least magnitude that nine tenths do not exceed."""
    model, _, _ = checkpoint.load_model(tiny_checkpoint, "cpu")
    text = summary_text(model, "percentile")
    weight = np.sort(np.abs(weights_of(tiny_checkpoint)["core.rnn.weight_ih_l0"]), axis=None)
    (row,) = (line for line in text.splitlines() if "core.rnn.weight_ih_l0" in line)
    assert f"{weight[int(0.9 * weight.size)]:.4f}" in row


@pytest.mark.parametrize("kind", KINDS)
def test_summary_of_a_train_script(kind, train, tmp_path, capsys):
    """Of the model that the flags describe, or of a run's; prints and ends without a run folder."""
    assert train("--summary", kind) is None
    assert "embedding" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    train("--name=dense", "--sparsity=0.5", "--prune-epochs=0:1:1")
    capsys.readouterr()
    train("--summary", kind, "--resume=dense")
    out = capsys.readouterr().out
    assert kind != "sparsity" or f"{100 * int(0.5 * 484) / 484:.2f}" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["nothing to do", "prune", "--summary"]),
        (["prune"], ["--sparsity", "--threshold"]),
        (["prune", "--sparsity", "0.5", "--threshold", "1"], ["--threshold", "not allowed"]),
        (["prune", "--sparsity", "0.5", "--weights", "gru.*"], ["gru.*", "core.rnn.weight_hh_l0"]),
        (["prune", "--threshold", "1", "--structured"], ["--structured", "--sparsity"]),
        (["prune", "--sparsity", "0.5", "--checkpoint", "gone.pt"], ["gone.pt"]),
        (["prune", "--sparsity", "0.5", "--output", "nowhere/x.pt"], ["nowhere/x.pt"]),
        (["--summary", "everything"], ["--summary", "percentile"]),
        (["quantize", "--fp16", "encoder,nobody"], ["--fp16 nobody", "layer0.fc_gate_x"]),
        (["quantize", "--weight-bits", "9"], ["--weight-bits", "8"]),
        (["quantize", "--data", "nowhere"], ["nowhere"]),
        (["quantize", "--backend", "native", "--clip", "avg"], ["--clip", "--backend simulated"]),
        (["quantize", "--statistics", "nowhere/x.yaml", "--tokens", "9"], ["--statistics nowhere/x.yaml"]),
    ],
)
def test_mistakes_are_one_line(flags, words, fails, tiny_checkpoint):
    """What is missing, what is there twice, what is not there."""
    given = [] if "--checkpoint" in flags else ["--checkpoint", tiny_checkpoint]
    message = fails(compress.main, *flags, *given)
    assert all(word in message for word in words), message


def test_schedules_are_shown_in_the_readme():
    """The folder that the README names is there."""
