"""Quantized operations: each to the bit what numpy's integers give; grids, ranges, statistics by their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_apart import MODELS, config_of, log_probs, pair

from models import build
from models.quantized import ACIQ, Grid, Integers, Number, activation_range, grid_of
from utils import UserError, quantization

reals = st.integers(-5000, 5000).map(lambda number: number / 100)


@given(ends=st.tuples(reals, reals), bits=st.integers(2, 8), mode=st.sampled_from(["symmetric", "asymmetric"]))
def test_grids(ends, bits, mode):
    """0 is on the grid; the ends are, to half a step; symmetric grids have no zero point."""
    low, high = min(*ends, 0.0), max(*ends, 0.0)
    grid, numbers = grid_of(*sorted(ends), mode, bits), torch.tensor([low, high, 0.0])
    least, greatest = grid.ends
    assert greatest - least == 2**bits - 1 and least <= grid.zero <= greatest
    q = grid.integers(numbers)
    assert (q >= least).all() and (q <= greatest).all() and grid.reals(q)[2] == 0
    room = 0.5001 if mode == "asymmetric" else 1.0001  # the greatest is half a step beyond the symmetric integers
    assert (grid.reals(q) - numbers).abs().max() <= room * grid.scale + 1e-6
    if mode == "symmetric":
        assert grid.zero == 0
        assert low == high == 0 or grid.scale == pytest.approx(max(-low, high) / ((2**bits - 1) / 2))


def test_grids_by_channel():
    """One for each row."""
    weight = torch.randn(7, 5) * torch.logspace(-3, 2, 7)[:, None]
    for mode in ("symmetric", "asymmetric"):
        grid = grid_of(weight.amin(1, True), weight.amax(1, True), mode, 8)
        for row, line in enumerate(weight):
            own = grid_of(line.min(), line.max(), mode, 8)
            assert grid.scale[row].item() == own.scale and grid.zero[row].item() == own.zero
            assert torch.equal(grid.integers(weight)[row], own.integers(line))


def test_ranges():
    """What was seen; means of rows; ACIQ's multiples of the deviation within what was seen; bounds of what it feeds."""
    own = {"min": -9.0, "max": 20.0, "avg_min": -4.0, "avg_max": 5.0, "mean": 1.0, "std": 2.0, "mean_abs_dev": 0.5}
    assert activation_range(own, "none", 8) == (-9.0, 20.0)
    assert activation_range(own, "avg", 8) == (-4.0, 5.0)
    assert activation_range(own, "gauss", 4) == (1 - 2 * ACIQ["gauss"][4], 1 + 2 * ACIQ["gauss"][4])
    assert activation_range(own, "laplace", 8) == (1 - 0.5 * 9.89, 1 + 0.5 * 9.89)
    assert activation_range({**own, "std": 9.0}, "gauss", 8) == (-9.0, 20.0)
    assert activation_range({**own, "feeds": "sigmoid"}, "none", 8) == (-6.0, 6.0)
    assert activation_range({**own, "feeds": "tanh"}, "avg", 8) == (-4.0, 4.0)
    assert activation_range({**own, "feeds": "relu"}, "none", 8) == (-9.0, 20.0)


@pytest.mark.parametrize(("name", "density"), [("gauss", lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)),
                                               ("laplace", lambda x: math.exp(-abs(x)) / 2)])  # fmt: skip
@pytest.mark.parametrize("bits", range(2, 9))
def test_aciq(name, density, bits):
    """The table's clip has the least expected square error of those around it: rounding and clipping."""

    def cost(clip):
        x = np.linspace(clip, clip + 30, 60_001)
        beyond = 2 * np.trapezoid((x - clip) ** 2 * np.vectorize(density)(x), x)
        return beyond + (2 * clip / 2**bits) ** 2 / 12

    own = ACIQ[name][bits]
    assert min(cost(own - 0.06), cost(own + 0.06)) > cost(own)


def settings_of(mode="asymmetric", per_channel=False, weight_bits=8, activation_bits=8, **ranges):
    """Settings of Integers with ranges {operation: (low, high)}."""
    statistics = {name: {"kind": "", "min": low, "max": high} for name, (low, high) in ranges.items()}
    rest = {"weight_bits": weight_bits, "activation_bits": activation_bits, "clip": "none", "fp16": []}
    return {"mode": mode, "per_channel": per_channel, "statistics": statistics, **rest}


def numbers_of(ops, name, shape, seed):
    """Random integers on the grid of an operation."""
    low, high = ops.grids[name].ends
    values = np.random.default_rng(seed).integers(low, high + 1, shape)
    return Number(torch.from_numpy(values).int(), name, ops.grids[name])


def q_of(real, grid):
    """Integers nearest to reals, in numpy."""
    return np.clip(np.rint(np.asarray(real, np.float64) / grid.scale + grid.zero), *grid.ends).astype(np.int64)


def whole(number):
    """The integers of a Number less their zero, int64."""
    return number.values.numpy().astype(np.int64) - number.grid.zero


CASES = [("symmetric", 8, 8), ("asymmetric", 8, 8), ("asymmetric", 4, 8), ("asymmetric", 8, 3), ("symmetric", 2, 2)]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("mode", "weight_bits", "activation_bits"), CASES)
def test_linear_is_integer_arithmetic(mode, weight_bits, activation_bits, per_channel):
    """Sums of products in int64, the bias on their grid, one rescaling: every bit equal, for long rows too."""
    ops = Integers(settings_of(mode, per_channel, weight_bits, activation_bits, x=(-1.0, 3.0), y=(-90.0, 70.0)))
    x = numbers_of(ops, "x", (3, 5, 1501), 1)
    weight, bias = torch.randn(7, 1501) * torch.arange(1, 8)[:, None] / 9, torch.randn(7)
    got = ops.linear("y", x, weight, bias)
    w, total = weight.numpy(), np.empty((3, 5, 7), np.int64)
    out = ops.grids["y"]
    for n in range(7):
        low, high = (w[n].min(), w[n].max()) if per_channel else (w.min(), w.max())
        grid = grid_of(low, high, mode, weight_bits)
        total[..., n] = (whole(x) * (q_of(w[n], grid) - grid.zero)).sum(-1)
        total[..., n] += np.rint(np.float64(bias[n]) / (x.grid.scale * grid.scale)).astype(np.int64)
        assert abs(total[..., n]).max() < 2**31
        rescaled = np.rint(total[..., n] * (x.grid.scale * grid.scale / out.scale)) + out.zero
        assert np.array_equal(got.values[..., n].numpy(), np.clip(rescaled, *out.ends).astype(np.int64))
    assert got.grid is out and len(np.unique(got.values)) > 2


@pytest.mark.parametrize(("mode", "bits"), [("symmetric", 8), ("asymmetric", 8), ("asymmetric", 3)])
def test_sums_and_products_are_integer_arithmetic(mode, bits):
    """Add and subtract round both to the result's grid first; a product is rescaled once."""
    ops = Integers(settings_of(mode, activation_bits=bits, a=(-1.0, 3.0), b=(-7.0, 2.0), y=(-5.0, 4.0)))
    a, b, out = numbers_of(ops, "a", (5, 61), 1), numbers_of(ops, "b", (5, 61), 2), ops.grids["y"]
    on_y = [np.rint(whole(x) * (x.grid.scale / out.scale)).astype(np.int64) for x in (a, b)]
    for got, want in (
        (ops.add("y", a, b), on_y[0] + on_y[1]),
        (ops.subtract("y", a, b), on_y[0] - on_y[1]),
        (ops.multiply("y", a, b), np.rint(whole(a) * whole(b) * (a.grid.scale * b.grid.scale / out.scale))),
    ):
        assert np.array_equal(got.values.numpy(), np.clip(want + out.zero, *out.ends).astype(np.int64))


def test_activations_embedding_and_scaling():
    """An activation of what the integers stand for, put on its grid; a table of integers; integers on a wider grid."""
    ops = Integers(settings_of(x=(-6.0, 6.0), y=(0.0, 1.0), encoder=(-1.0, 2.0)))
    x = numbers_of(ops, "x", (5, 61), 1)
    sigmoid = 1 / (1 + np.exp(-(whole(x) * x.grid.scale)))
    got = ops.activate("y", "sigmoid", x).values.numpy()
    assert abs(got - q_of(sigmoid, ops.grids["y"])).max() <= 1 and (got == q_of(sigmoid, ops.grids["y"])).mean() > 0.99
    weight, tokens = torch.randn(23, 11), torch.randint(23, (3, 5))
    got = ops.embedding("encoder", tokens, weight)
    assert np.array_equal(got.values.numpy(), q_of(weight.numpy(), ops.grids["encoder"])[tokens.numpy()])
    scaled = ops.scale(x, 0.25)
    assert torch.equal(scaled.values, x.values) and torch.allclose(scaled.reals(), 0.25 * x.reals())


def test_the_embedding_is_weights():
    """Its grid has their bits, unclipped; where it is left in float16, what reads it has the grid of a result."""
    seen = {"kind": "embedding", "min": -0.5, "max": 0.4, "avg_min": -0.1, "avg_max": 0.1}
    weight, tokens = torch.tensor([[0.3, -0.45], [0.05, 0.4]]), torch.tensor([[0], [1]])
    settings = {**settings_of(weight_bits=4), "clip": "avg", "statistics": {"encoder": seen}}
    ops, half = Integers(settings), Integers({**settings, "fp16": ["encoder"]})
    assert (ops.grids["encoder"].bits, half.grids["encoder"].bits) == (4, 8)
    error = ops.embedding("encoder", tokens, weight).reals() - weight[tokens]
    assert error.abs().max() <= 0.5001 * 0.9 / 15
    assert half.grids["encoder"].reals(torch.tensor(127.0)) < 0.11


def test_float16():
    """Inputs and result rounded to float16; a result of floats goes on its own grid when integers are read from it."""
    ops = Integers({**settings_of(x=(-6.0, 6.0), half=(-9.0, 9.0), y=(-9.0, 9.0)), "fp16": ["hal"]})
    x = numbers_of(ops, "x", (5, 61), 1)
    got = ops.add("half", x, x)
    assert got.grid is None and torch.equal(got.values, (2 * x.reals().half().float()).half().float())
    again = ops.add("y", got, got)
    q = q_of(got.values.numpy(), ops.grids["half"]) - ops.grids["half"].zero
    want = 2 * np.rint(q * (ops.grids["half"].scale / ops.grids["y"].scale)) + ops.grids["y"].zero
    assert np.array_equal(again.values.numpy(), np.clip(want, *ops.grids["y"].ends))


def checkpoint_of(family, core):
    """What quantization.collect needs of a checkpoint, with weights that make results differ."""
    config = config_of(family, core)
    return {"config": config, "weights": pair(config)[0].float().state_dict()}


def quantized(saved, statistics, **settings):
    """The model of a checkpoint in integers."""
    settings = {**quantization.SETTINGS, **settings, "statistics": statistics}
    model = build({**saved["config"], "quantization": settings}).eval()
    model.load_state_dict(saved["weights"])
    return model


@pytest.mark.parametrize(("family", "core"), MODELS)
def test_models(family, core):
    """8 bits by channel are near the model, 3 bits are not; float16 nearly is it; windows of any length are one."""
    saved = checkpoint_of(family, core)
    ids = np.random.default_rng(1).integers(0, 23, 400)
    statistics = quantization.collect(saved, ids)
    whole = build(saved["config"]).eval()
    whole.load_state_dict(saved["weights"])
    tokens = torch.from_numpy(ids[:30]).view(10, 3)

    with torch.no_grad():
        want = log_probs(whole, tokens, 10)
        near = {"mode": "asymmetric", "per_channel": True}
        models = [quantized(saved, statistics, **settings) for settings in (near, near | {"activation_bits": 3})]
        errors = [(log_probs(model, tokens, 10) - want).square().mean().sqrt() for model in models]
        spread = (want - want.mean()).square().mean().sqrt()
        assert errors[0] < 0.25 * spread and errors[1] > 3 * errors[0], (errors, spread)
        half = quantized(saved, statistics, fp16=["all"])
        assert (log_probs(half, tokens, 10) - want).square().mean().sqrt() < 0.01 * spread
        assert torch.equal(log_probs(models[0], tokens, 3, 1, 6), log_probs(models[0], tokens, 10))


def test_statistics():
    """Against numpy, over columns and windows; equal for any length of windows."""
    saved = checkpoint_of(*MODELS[0])
    ids = np.random.default_rng(1).integers(0, 23, 101)
    got = quantization.collect(saved, ids)
    model, seen = quantization.apart(saved), []

    class Look(type(model.operations).__mro__[1]):
        def add(self, name, a, b, feeds=None):
            if name == "layer1.eltwiseadd_gate":
                seen.append((a + b).detach().double().numpy())
            return a + b

    model.operations = Look()
    stream = torch.from_numpy(ids[:100].reshape(10, 10).T.copy())
    model.hidden(stream[:-1], model.initial_state(10))
    x = np.stack(seen)
    own = got["layer1.eltwiseadd_gate"]
    want = {"min": x.min(), "max": x.max(), "avg_min": x.min(-1).mean(), "avg_max": x.max(-1).mean(), "mean": x.mean(),
            "std": x.std(), "mean_abs_dev": abs(x - x.mean()).mean()}  # fmt: skip
    assert own["kind"] == "add" and own["feeds"] == "sigmoid"
    for name, value in want.items():
        assert own[name] == pytest.approx(value, rel=1e-5), name
    rows = model.embedding.weight.detach().double()[stream[:-1]].flatten(1)  # a step of all columns
    for name, values in (("avg_min", rows.amin(1)), ("avg_max", rows.amax(1))):
        assert got["encoder"][name] == pytest.approx(values.mean().item(), rel=1e-5), name


def test_statistics_file(tmp_path):
    """Written, read, edited; what is none is refused in one line."""
    saved, path = checkpoint_of(*MODELS[0]), tmp_path / "statistics.yaml"
    statistics = quantization.collect(saved, np.arange(50) % 23)
    quantization.write_statistics(path, statistics)
    assert quantization.read_statistics(path) == statistics
    path.write_text(path.read_text().replace("max:", "most:", 1))
    for text in (path.read_text(), "", "a: [", "a: {min: 1}", "- 1"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"^--statistics [^\n]*$"):
            quantization.read_statistics(path)
    del statistics["layer1.act_h"]
    with pytest.raises(UserError, match=r"of layer1\.act_h"):
        quantization.check({"statistics": statistics, "fp16": []}, saved)


def test_a_grid_of_nothing():
    """Results that are always 0 have one."""
    for mode in ("symmetric", "asymmetric"):
        grid = grid_of(0.0, 0.0, mode, 8)
        assert isinstance(grid, Grid) and grid.reals(grid.integers(torch.zeros(3))).tolist() == [0, 0, 0]
