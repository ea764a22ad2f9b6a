"""The Transformer against torch's own encoder layers, which see a whole text and a mask."""

import math

import pytest
import torch
from torch import nn

from models import ModelError, build
from models.transformer import Transformer

EMSIZE, NHEAD, NHID, LAYERS = 6, 3, 11, 2


def make(context=5, **sizes):
    """A core in float64 with norms that are not the identity, in evaluation mode."""
    torch.manual_seed(1)
    core = Transformer(EMSIZE, NHEAD, NHID, LAYERS, context, **sizes).double().eval()
    for name, parameter in core.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    return core


def mask_by_hand(steps, batch, context):
    """What is added to the score of position t for position s, for each column and head, (B * heads, T, T)."""
    mask = torch.full((NHEAD, steps, steps), -math.inf, dtype=torch.float64)
    for head in range(NHEAD):
        for t in range(steps):
            for s in range(max(0, t - context + 1), t + 1):
                mask[head, t, s] = -(t - s) / 2 ** (8 * (head + 1) / NHEAD)
    return mask.repeat(batch, 1, 1)


def by_torch(core, x, context):
    """The whole text x (T, B, E) at once through nn.TransformerEncoderLayer's own forward."""
    x = x * EMSIZE**0.5
    for layer in core.layers:
        x = layer(x, src_mask=mask_by_hand(len(x), x.shape[1], context))
    return x


def in_windows(core, x, lengths):
    """Output of x (T, B, E) read in windows, and the state after it."""
    state, outputs = core.initial_state(x.shape[1]), []
    for part in x.split(lengths):
        output, state = core(part, state)
        outputs.append(output)
    return torch.cat(outputs), state


@pytest.mark.parametrize("context", (1, 2, 5, 13, 29))
@pytest.mark.parametrize("lengths", ((13,), (1,) * 13, (5, 1, 7)), ids=("one window", "words", "windows"))
@pytest.mark.parametrize("batch", (1, 7))
def test_any_windows_equal_torchs_layers_on_the_whole_text(context, lengths, batch):
    """Outputs; the state is made of the inputs of the layers, as long as the context, and of ones where there are."""
    core = make(context)
    x = torch.randn(13, batch, EMSIZE, dtype=torch.float64)
    output, state = in_windows(core, x, lengths)
    torch.testing.assert_close(output, by_torch(core, x, context), rtol=1e-10, atol=1e-10)
    past = context - 1
    assert [tuple(part.shape) for part in state] == [(past, batch, 1)] + [(past, batch, EMSIZE)] * LAYERS
    assert state[0][:, 0, 0].tolist() == [0.0] * (past - 13) + [1.0] * min(past, 13)
    first = torch.cat([x.new_zeros(past, batch, EMSIZE), EMSIZE**0.5 * x])[13:]
    torch.testing.assert_close(state[1], first)


def test_gradients_of_one_window():
    """Of the inputs and of every parameter."""
    core = make()
    x = torch.randn(13, 3, EMSIZE, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, **dict(core.named_parameters())}
    mix = torch.randn(13, 3, EMSIZE, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((mix * output).sum(), list(leaves.values()))
        for output in (core(x, core.initial_state(3))[0], by_torch(core, x, 5))
    )
    errors = {name: ((a - b).norm() / b.norm()).item() for name, a, b in zip(leaves, ours, theirs, strict=True)}
    assert not {name: error for name, error in errors.items() if not error < 1e-9}


def test_how_far_back_an_output_sees():
    """LAYERS * (context - 1) words, and no further."""
    core = make(context=3)
    x = torch.randn(11, 1, EMSIZE, dtype=torch.float64)
    output, _ = core(x, core.initial_state(1))
    x[6 - LAYERS * 2] += 1
    moved = (core(x, core.initial_state(1))[0] - output).abs().amax((1, 2)) > 1e-12
    assert moved.tolist() == [False] * 2 + [True] * 5 + [False] * 4


def test_columns_with_and_without_a_past():
    """As evaluate puts them together: a fresh one beside one that has read something."""
    core = make()
    x = torch.randn(9, 2, EMSIZE, dtype=torch.float64)
    _, state = core(x[:5, 1:], core.initial_state(1))
    state = tuple(torch.cat(parts, 1) for parts in zip(core.initial_state(1), state, strict=True))
    output, _ = core(x[5:], state)
    torch.testing.assert_close(output[:, :1], by_torch(core, x[5:, :1], 5))
    torch.testing.assert_close(output[:, 1:], by_torch(core, x[:, 1:], 5)[5:])


def test_dropout_in_training_only():
    """Two passes differ in training, and only there."""
    core = make(dropout=0.5)
    x = torch.randn(5, 2, EMSIZE, dtype=torch.float64)
    outputs = [core(x, core.initial_state(2))[0] for _ in range(2)]
    core.train()
    outputs += [core(x, core.initial_state(2))[0] for _ in range(2)]
    assert torch.equal(*outputs[:2]) and not torch.equal(*outputs[2:]) and not torch.equal(*outputs[1:3])


def test_every_place_of_dropout():
    """Where all is dropped, of a layer only its norms are left, and nothing enters the second of its inner ones."""
    core = make(dropout=1.0).train()
    inner = []
    for layer in core.layers:
        layer.linear2.register_forward_pre_hook(lambda module, inputs: inner.append(inputs[0]))
    x = torch.randn(5, 2, EMSIZE, dtype=torch.float64)
    expected = x * EMSIZE**0.5
    for layer in core.layers:
        expected = layer.norm2(layer.norm1(expected))
    assert torch.equal(core(x, core.initial_state(2))[0], expected)
    assert len(inner) == LAYERS and not any(part.any() for part in inner)


@pytest.mark.parametrize("amp", (False, True))
def test_a_language_model_learns_in_either_type(amp):
    """A text of period 4 with carried state: sure of every word after 86 steps, and the state is float32."""
    core = {"emsize": 16, "nhead": 2, "nhid": 32, "nlayers": 2, "context": 6, "dropout": 0.0}
    torch.manual_seed(1)
    model = build({"family": "transformer", "core": core, "vocab_size": 5, "tied": False})
    optimizer, state = torch.optim.Adam(model.parameters(), 1e-2), model.initial_state(2)
    text = torch.tensor([0, 1, 2, 1]).repeat(160)[:, None].expand(-1, 2)
    for begin in range(0, 600, 7):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss, _, count, state = model(text[begin : begin + 7], text[begin + 1 : begin + 8], state)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        state = tuple(part.detach() for part in state)
    assert (loss / count).item() < 0.1 and {part.dtype for part in state} == {torch.float32}


def test_heads_that_do_not_fit_are_refused():
    """Named by their flags."""
    with pytest.raises(ModelError, match="--emsize 7 can't be shared by --nhead 2 heads"):
        Transformer(7, 2, 11, 1, 5)
