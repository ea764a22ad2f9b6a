"""Matrices in compressed rows: every family computes what it did, from fewer numbers."""

import pytest
import torch
from test_apart import MODELS, config_of, log_probs, pair

from models import build
from models.apart import matrices
from models.sparse import SPARSE, columns_dtype, compressed_rows, thinned


def zeros_in(weight, part, seed=3):
    """Set this part of a matrix to zero at random places, and its second row."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight[torch.rand(weight.shape, generator=generator) < part] = 0
        weight[1] = 0


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("shape", [(7, 11), (1, 5), (3, 40_001)])
def test_rows_are_torchs(shape):
    """Values, columns and starts as torch's own conversion has them; columns as narrow as they can be."""
    weight = torch.randn(shape)
    weight[torch.rand(shape) < 0.7] = 0
    values, columns, starts = compressed_rows(weight)
    want = weight.to_sparse_csr()
    for got, theirs in ((values, want.values()), (columns, want.col_indices()), (starts, want.crow_indices())):
        assert got.tolist() == theirs.tolist()
    assert columns.dtype == (torch.int16 if shape[1] <= 32768 else torch.int32)
    assert columns_dtype(32768) == torch.int16 and columns_dtype(32769) == torch.int32


@pytest.mark.parametrize(("family", "core"), MODELS)
def test_equals_the_model(family, core):
    """In float64, over windows of every kind; a shared matrix is kept once; one that is dense enough stays dense."""
    config = config_of(family, core)
    whole, _ = pair(config)
    places = list(matrices(whole))
    for number, (_, module, name) in enumerate(places[1:-1]):
        zeros_in(getattr(module, name), 0.5 if number == 0 else 0.9)
    zeros_in(whole.embedding.weight, 0.9)
    weights, counts = thinned(whole)
    small = build({**config, "sparse": counts}).double().eval()
    small.load_state_dict(weights)

    dense = {place for place, module, name in places if (getattr(module, name) == 0).double().mean() <= SPARSE}
    assert counts.keys() == {place for place, _, _ in places} - dense and len(dense) <= 1
    assert small.embedding.weight is small.head.weight and small.embedding.weight.dim() == 1
    zeros = sum(int((p == 0).sum()) for name, p in whole.named_parameters() if name in counts)
    assert small.num_params() == whole.num_params() - zeros
    for columns in (3, 1):
        tokens = torch.arange(13 * columns).view(13, columns) % 23
        with torch.no_grad():
            want = log_probs(whole, tokens, 13)
            torch.testing.assert_close(log_probs(small, tokens, 5, 1, 7), want, rtol=1e-9, atol=1e-9)


def test_new_weights_are_used():
    """What is loaded later counts, in another type too; indices that lie outside are refused."""
    config = config_of("rnn", {"model": "LSTM", "emsize": 11, "nhid": 11, "nlayers": 1})
    whole, _ = pair(config)
    zeros_in(whole.embedding.weight, 0.9)
    weights, counts = thinned(whole)
    small = build({**config, "sparse": counts}).double().eval()
    small.load_state_dict(weights)
    tokens = torch.arange(23)[:, None]
    with torch.no_grad():
        first = log_probs(small, tokens, 23)
        small.load_state_dict(weights | {name: weights[name] * 2 for name in ("embedding.weight", "head.weight")})
        assert not torch.allclose(log_probs(small, tokens, 23), first)
    for part, wrong in (("columns", 11), ("columns", -1), ("starts", 10_000)):
        names = [f"{module}.weight_{part}" for module in ("embedding", "head")]
        with pytest.raises(RuntimeError):
            small.load_state_dict(weights | {name: torch.full_like(weights[name], wrong) for name in names})
