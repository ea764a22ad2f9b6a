"""Each kind of dropout does what the paper says it does, and nothing in evaluation."""

import pytest
import torch
from torch import nn

from models import compiled
from models.dropout import dropout, embedding_dropout, locked_dropout, unit_drop, weight_drop

STEPS, BATCH, WORDS, EMSIZE = 7, 5, 31, 11


def test_locked_mask_is_constant_over_time_and_differs_across_the_batch():
    """0 or 1 / (1 - p); the same for every step, another for each column and feature, another for each pass."""
    torch.manual_seed(1)
    masks = [locked_dropout(torch.ones(STEPS, BATCH, 97), 0.25, True) for _ in range(2)]
    for mask in masks:
        assert set(mask.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
        assert torch.equal(mask, mask[:1].expand_as(mask))
        assert len({tuple(column.tolist()) for column in mask[0]}) == BATCH
        assert abs(mask.mean().item() - 1) < 0.1
    assert not torch.equal(*masks)


def test_locked_dropout_gradient_is_the_mask():
    """The gradient of the sum is the mask itself, in float64."""
    torch.manual_seed(2)
    x = torch.randn(STEPS, BATCH, EMSIZE, dtype=torch.float64, requires_grad=True)
    y = locked_dropout(x, 0.4, True)
    y.sum().backward()
    torch.testing.assert_close(y, x * x.grad)
    assert torch.equal(x.grad, x.grad[:1].expand_as(x)) and 0 < (x.grad == 0).float().mean() < 1


def test_a_dropped_word_is_gone_everywhere_in_the_batch():
    """Every occurrence of a word shares its fate, all features of it; the others are scaled; so are the gradients."""
    torch.manual_seed(3)
    embedding = nn.Embedding(WORDS, EMSIZE)
    tokens = torch.randint(WORDS, (STEPS, BATCH * 17))
    embedded = embedding_dropout(embedding(tokens), tokens, WORDS, 0.3, True)
    embedded.sum().backward()
    dropped = 0
    for word in tokens.unique():
        own = embedded[tokens == word]
        gone = not own.any()
        dropped += gone
        want = torch.zeros(EMSIZE) if gone else embedding.weight[word] / 0.7
        torch.testing.assert_close(own, want.expand_as(own))
        count = (tokens == word).sum()
        torch.testing.assert_close(
            embedding.weight.grad[word], torch.full((EMSIZE,), 0.0 if gone else count.item() / 0.7)
        )
    assert 0 < dropped < WORDS / 2


def test_embedding_dropout_is_as_if_rows_of_the_matrix_were_zero():
    """The authors mask the matrix; the mask drawn here, applied to it, gives the same."""
    torch.manual_seed(4)
    embedding, tokens = nn.Embedding(WORDS, EMSIZE), torch.arange(WORDS)[:, None]
    embedded = embedding_dropout(embedding(tokens), tokens, WORDS, 0.5, True)
    mask = (embedded[:, 0] / embedding.weight)[:, :1].round(decimals=4)
    assert set(mask.flatten().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(nn.functional.embedding(tokens, mask * embedding.weight), embedded)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("p", (0.1, 0.5))
def test_weight_drop_is_dropconnect_and_its_gradient_reaches_the_weight(p, dtype):
    """Elements are 0 with probability p, else times 1 / (1 - p); the weight stays; its gradient has the same mask."""
    torch.manual_seed(5)
    weight = torch.randn(211, 103, dtype=dtype, requires_grad=True)
    before = weight.detach().clone()
    first, second = (weight_drop(weight, p, True) for _ in range(2))
    slope = torch.randn_like(weight)
    first.backward(slope)
    kept = first != 0
    assert abs((~kept).double().mean().item() - p) < 5 * (p * (1 - p) / weight.numel()) ** 0.5
    torch.testing.assert_close(first, torch.where(kept, weight / (1 - p), 0))
    torch.testing.assert_close(weight.grad, torch.where(kept, slope / (1 - p), 0))
    assert torch.equal(weight, before)
    both = (kept & (second != 0)).double().mean().item()
    assert abs(both - (1 - p) ** 2) < 0.02
    rows, columns = kept.double().mean(1), kept.double().mean(0)
    assert rows.std() < 2 * (p * (1 - p) / 103) ** 0.5 and columns.std() < 2 * (p * (1 - p) / 211) ** 0.5


@pytest.mark.parametrize(("p", "kept"), ((0.1, 93), (0.5, 52), (0.999, 1)))
def test_unit_drop_keeps_some_columns_and_their_gradient(p, kept):
    """As many of 103 as p leaves, at least one, in order, scaled so that the mean stays; others for each pass."""
    torch.manual_seed(9)
    weight = torch.randn(31, 103, dtype=torch.float64, requires_grad=True)
    passes = [unit_drop(weight, p, True) for _ in range(300)]
    for few, units in passes[:3]:
        assert few.shape == (31, kept) and units.unique().tolist() == units.tolist()
        torch.testing.assert_close(few, weight[:, units] * 103 / kept)
    often = torch.stack([units for _, units in passes]).flatten().bincount(minlength=103).double() / 300
    part = kept / 103
    assert (often - part).abs().max() < 5 * (part * (1 - part) / 300) ** 0.5
    few, units = passes[0]
    slope = torch.randn_like(few)
    few.backward(slope)
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight).index_copy(1, units, slope * 103 / kept))
    with torch.autocast("cpu", torch.bfloat16):
        assert unit_drop(weight.float(), p, True)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("order", ((0, 1, 2), (1, 0, 2)))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("p", (0.1, 0.65))
def test_dropout_draws_each_step_column_and_feature_for_itself(p, dtype, order):
    """As often 0 as p says along every axis, two neighbours both as often as p^2; scaled; gradients alike."""
    torch.manual_seed(6)
    leaf = torch.randn(31, 29, 103, dtype=dtype, requires_grad=True)
    x = leaf.permute(order)
    y = dropout(x, p, True)
    slope = torch.randn(y.shape, dtype=dtype)
    y.backward(slope)
    gone = y == 0
    torch.testing.assert_close(y, torch.where(gone, 0, x / (1 - p)))
    torch.testing.assert_close(leaf.grad.permute(order), torch.where(gone, 0, slope / (1 - p)))
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        count = gone.numel() / gone.shape[axis]
        assert (gone.double().mean(others) - p).abs().max() < 5 * (p * (1 - p) / count) ** 0.5
        both = (gone & gone.roll(1, axis)).double().mean().item()
        assert abs(both - p * p) < 0.01, axis


def test_dropout_without_kernels_is_the_librarys_and_of_everything_leaves_nothing():
    """torch's own mask for torch's own seed; p of 1; empty windows."""
    x = torch.randn(7, 5, 11)
    torch.manual_seed(8)
    want = nn.functional.dropout(x, 0.3)
    torch.manual_seed(8)
    with compiled.torch_only():
        assert torch.equal(dropout(x, 0.3, True), want)
    assert not dropout(x, 1.0, True).any()
    assert dropout(torch.empty(7, 0, 11), 0.3, True).shape == (7, 0, 11)


def test_a_seed_fixes_the_masks():
    """torch's generator is where they come from."""

    def draw():
        torch.manual_seed(7)
        x, weight = torch.ones(3, 5, 7), torch.ones(13, 11)
        words = embedding_dropout(torch.ones(1, 19, 2), torch.arange(19)[None], 19, 0.5, True)
        weights = (*(weight_drop(weight, 0.5, True) for _ in range(2)), *unit_drop(weight, 0.5, True))
        return dropout(x, 0.5, True), locked_dropout(x, 0.5, True), *weights, words

    assert all(torch.equal(a, b) for a, b in zip(draw(), draw(), strict=True))


def test_nothing_is_dropped_in_evaluation_or_with_probability_zero():
    """What comes in goes out, and the generator is left alone."""
    tokens, x = torch.randint(WORDS, (STEPS, BATCH)), torch.randn(STEPS, BATCH, EMSIZE)
    state = torch.get_rng_state()
    for p, training in ((0.5, False), (0.0, True)):
        assert dropout(x, p, training) is x
        assert torch.equal(locked_dropout(x, p, training), x)
        assert torch.equal(weight_drop(x, p, training), x)
        assert unit_drop(x, p, training) == (x, None)
        assert embedding_dropout(x, tokens, WORDS, p, training) is x
    assert torch.equal(torch.get_rng_state(), state)
