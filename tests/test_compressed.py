"""What benchmark.py says of compressed checkpoints and of products is what they are."""

import json

import numpy as np
import pytest
from conftest import InProcess

import benchmark
import compress
from data.corpus import encode_file
from utils import UserError, checkpoint, compressed, measurements, tables
from utils.evaluation import evaluate
from utils.workers import Worker


@pytest.fixture
def checkpoints(tiny_checkpoint, tmp_path):
    """{name: path}: a dense model and what compress.py makes of it."""
    paths = {name: str(tmp_path / f"{name}.pt") for name in ("pruned", "sparse", "simulated", "native")}
    for name, source, *flags in (
        ("pruned", str(tiny_checkpoint), "prune", "--sparsity", "0.8"),
        ("sparse", paths["pruned"], "sparse"),
        ("simulated", str(tiny_checkpoint), "quantize", "--fp16", "decoder"),
        ("native", str(tiny_checkpoint), "quantize", "--backend", "native"),
    ):
        compress.main([*flags, "--checkpoint", source, "--output", paths[name]])
    return {"dense": str(tiny_checkpoint), **paths}


def test_compression(checkpoints, tmp_path, monkeypatch, capsys):
    """A row a checkpoint and one of the first in bf16: files, weights, zeros and perplexities are the real ones."""
    for module in (measurements, compressed):
        monkeypatch.setattr(module, "Worker", InProcess)
    flags = ["--tokens", "61", "--rounds", "2", "--warmup", "1", "--record", "c", "--results", str(tmp_path)]
    benchmark.main(["compression", *(f"{name}={path}" for name, path in checkpoints.items()), *flags])
    record = json.loads((tmp_path / "compression" / "c.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == [*checkpoints, "dense, bf16"]
    for name, path in checkpoints.items():
        model, vocabulary, saved = checkpoint.load_model(path, "cpu")
        row, ids = rows[name], encode_file(f"{saved['args']['data']}/test.txt", vocabulary)[0]
        assert row["test"] == evaluate(model, ids[:61], 10).perplexity
        assert row["parameters"] == model.num_params() and len(row["batch_ms"]) == len(row["word_ms"]) == 2
        with open(path, "rb") as file:
            assert row["file_mib"] == len(file.read()) / 2**20
    assert rows["pruned"]["zeros"] / rows["pruned"]["parameters"] > 0.7 and rows["sparse"]["zeros"] == 0
    sizes = [rows[name]["weights_mib"] for name in ("native", "sparse", "dense")]
    assert sizes == sorted(sizes) and sizes[0] < 0.4 * sizes[2]
    assert rows["native"]["types"].startswith("4 operations in integers | 10 in float32: layer0.eltwiseadd_gate")
    assert " | 1 in float16: decoder" in rows["simulated"]["types"]
    assert rows["dense"]["types"].startswith("0 operations in integers") and 0 < rows["dense, bf16"]["valid"] < 1000
    text = tables.compression_text(record)
    assert text in (tmp_path / "compression.md").read_text() and f"- native: {rows['native']['types']}\n" in text
    ratio = np.median([a / b for a, b in zip(rows["dense"]["word_ms"], rows["native"]["word_ms"], strict=True)])
    assert f"| {ratio:.2f} (" in next(line for line in text.splitlines() if line.startswith("| native"))


def test_what_is_no_checkpoint_is_one_line(tiny_checkpoint, fails, tmp_path):
    """Here, and from the process that measures."""
    assert "no checkpoint" in fails(benchmark.main, "compression", f"dense={tmp_path / 'none.pt'}")
    assert "no checkpoint runs/lr=1/best.pt" in fails(benchmark.main, "compression", "dense=runs/lr=1/best.pt")
    assert "two have one name" in fails(benchmark.main, "compression", "a=one.pt", "a=two.pt")
    args = benchmark.build_parser().parse_args(["compression", "x"])
    worker = Worker(str(tmp_path / "none.pt"), "off", args, kind=compressed.Measured)
    with pytest.raises(UserError, match="no checkpoint"):
        worker("memory")
    worker.end()


def test_products(monkeypatch, tmp_path, capsys):
    """Every way computes the product, as exactly as its numbers allow; the table is of all of them."""
    for module in (measurements, compressed):
        monkeypatch.setattr(module, "Worker", InProcess)
    monkeypatch.setattr(compressed, "PRODUCTS", [(1, 67, 41), (5, 67, 41)])
    monkeypatch.setattr(compressed.importlib.util, "find_spec", lambda name: None)
    flags = ["--rounds", "1", "--warmup", "1", "--record", "p", "--results", str(tmp_path)]
    benchmark.main(["products", *flags])
    assert "torchao is not installed" in capsys.readouterr().out
    record = json.loads((tmp_path / "compression" / "p.json").read_text())
    assert {row["name"] for row in record["rows"]} == set(compressed.WAYS) - {"int8, torchao"}
    for row in record["rows"]:
        low, high = (1e-3, 2e-2) if row["name"].startswith(("int8", "bf16")) else (0, 1e-6)
        assert low <= row["difference"] < high, row["name"]
    text = tables.products_text(record)
    assert text in (tmp_path / "compression.md").read_text() and "5 x 67 by 67 x 41" in text
    taken = {row["name"]: row["ms"][0] for row in record["rows"] if row["sizes"] == [1, 67, 41]}
    ratio = f"; {taken['fp32'] / taken['int8, ours']:.2f} ("
    assert ratio in next(line for line in text.splitlines() if line.startswith("| int8, ours"))
    record["rows"] = [row for row in record["rows"] if (row["name"], row["sizes"][0]) != ("bf16", 5)]  # too far off
    (line,) = (line for line in tables.products_text(record).splitlines() if line.startswith("| bf16"))
    assert line.endswith(" | - |") and line.count(" | - |") == 1


def test_quantization(tiny_checkpoint, tmp_path, monkeypatch, fails):
    """The rows of distiller's table: float32 itself, and what compress.py quantize makes of the same statistics."""
    for module in (measurements, compressed):
        monkeypatch.setattr(module, "Worker", InProcess)
    flags = ["--tokens", "61", "--statistics-tokens", "200", "--record", "q", "--results", str(tmp_path)]
    benchmark.main(["quantization", str(tiny_checkpoint), *flags])
    record = json.loads((tmp_path / "compression" / "q.json").read_text())
    model, vocabulary, saved = checkpoint.load_model(tiny_checkpoint, "cpu")
    ids = encode_file(f"{saved['args']['data']}/test.txt", vocabulary)[0][:61]
    scores = [row["ours"]["test"] for row in record["rows"]]
    assert scores[0] == evaluate(model, ids, 10).perplexity and len(set(scores)) == len(scores) == 7
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    output = str(tmp_path / "avg.pt")
    places = ["--checkpoint", str(tiny_checkpoint), "--output", output]
    chosen = ["--mode", "asymmetric", "--per-channel", "--clip", "avg", "--tokens", "200"]
    compress.main(["quantize", *places, *chosen])
    assert scores[4] == evaluate(checkpoint.load_model(output, "cpu")[0], ids, 10).perplexity
    text = tables.quantization_text(record)
    assert f"| {scores[4]:.2f} | - | - | 88.85 |" in text and text in (tmp_path / "compression.md").read_text()
    monkeypatch.undo()
    missing = str(tmp_path / "none")
    assert "checkout of IntelLabs/distiller" in fails(
        benchmark.main, "quantization", tiny_checkpoint, "--distiller", missing
    )
