"""Weights of 8 bits: products are those of integers, and every family computes nearly what it did."""

import numpy as np
import pytest
import torch
from test_apart import MODELS, config_of, log_probs, pair

from models import build
from models.native import Int8, narrow, narrowed


def test_narrow():
    """Within half a step of the weight, row by row; zeros stay zeros."""
    weight = torch.randn(7, 11) * torch.logspace(-4, 3, 7)[:, None]
    weight[3], weight[5, 2] = 0, 0
    q, scale = narrow(weight)
    assert q.dtype == torch.int8 and q.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 3
    assert ((q * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert (q[3] == 0).all() and q[5, 2] == 0


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 2, 131), (7, 1, 1501)])
def test_products_are_those_of_integers(shape):
    """Inputs rounded row by row, sums in int64: the same but for the last rounding to float32."""
    x, weight, bias = torch.randn(shape), torch.randn(13, shape[-1]), torch.randn(13)
    q, scale = narrow(weight)
    module = torch.nn.Module()
    module.scales = scale
    ops = Int8({id(q): (module, "scales")})
    got = ops.linear("name", x, q, bias).numpy()
    step = x.abs().amax(-1, True).numpy() / np.float32(127)
    inputs = np.rint(x.numpy() / step).astype(np.int64)
    want = (inputs @ q.numpy().astype(np.int64).T) * step.astype(np.float64) * scale.numpy() + bias.numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)
    zeros = ops.linear("name", torch.zeros(shape), q, None)
    assert zeros.shape == (*shape[:-1], 13) and (zeros == 0).all()


@pytest.mark.parametrize(("family", "core"), MODELS)
def test_models(family, core):
    """Near the model it was made of; matrices are int8, a shared one is one; windows of any length are one."""
    config = config_of(family, core)
    whole = pair(config)[0].float()
    native = build({**config, "native": True}).eval()
    native.load_state_dict(narrowed(whole))
    kinds = {
        name: tensor.dtype for name, tensor in native.state_dict().items() if tensor.dim() == 2 and "norm" not in name
    }
    assert set(kinds.values()) == {torch.int8} and native.num_params() == whole.num_params()
    assert native.embedding.weight is native.head.weight
    tokens = torch.randint(23, (10, 3))

    with torch.no_grad():
        want, got = log_probs(whole, tokens, 10), log_probs(native, tokens, 10)
        spread = (want - want.mean()).square().mean().sqrt()
        assert 0 < (got - want).square().mean().sqrt() < 0.1 * spread
        assert torch.equal(log_probs(native, tokens, 3, 1, 6), got)
