"""A small Transformer, to compare recurrent models with what is usual today."""

import math
from functools import partial

import torch
from torch import nn

from .dropout import dropout
from .language_model import ModelError


class Transformer(nn.Module):
    """nn.TransformerEncoderLayers that look back: core(x, state) -> output, state.

    Vaswani et al. 2017 (arXiv 1706.03762), layer norms after the sums, ReLU, inputs times sqrt(emsize), as in
    pytorch/examples' word_language_model: emsize features, nhead heads, nhid units of the inner layer, nlayers; dropout
    in the layers.

    Each position attends to itself and to the context - 1 positions before it, in every layer, so that an output
    depends on the last nlayers * (context - 1) words and on no boundary of a window; gradients end at it (Dai et al.
    2019, arXiv 1901.02860, whose memory of the layers' inputs this is). A position's distance d counts as -d / 2^(8 n /
    nhead) in the scores of head n = 1 ... nhead (Press et al. 2022, arXiv 2108.12409).

    Deviations from word_language_model: there, a window knows nothing of the one before and positions are sines added
    to the embedding. State: which of the past positions there are, (context - 1, B, 1), 1 or 0, and the inputs of each
    layer at them, (context - 1, B, E). Raises ModelError when heads can't share the features evenly.
    """

    def __init__(self, emsize, nhead, nhid, nlayers, context, dropout=0.0):
        super().__init__()
        if emsize % nhead:
            raise ModelError(f"--emsize {emsize} can't be shared by --nhead {nhead} heads: give a multiple of {nhead}")
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(emsize, nhead, nhid, dropout) for _ in range(nlayers))
        self.input_size = self.output_size = emsize
        self.nhead, self.past, self.dropout = nhead, context - 1, dropout
        self.loop = True

    def initial_state(self, batch_size):
        """Zeros: nothing is past."""
        zeros = self.layers[0].linear1.weight.new_zeros
        inputs = [zeros(self.past, batch_size, self.input_size) for _ in self.layers]
        return (zeros(self.past, batch_size, 1), *inputs)

    def forward(self, x, state):
        """x (T, B, E), state as initial_state gives it -> output (T, B, E), state after the last step in its dtype."""
        there, *before = state
        x = x * math.sqrt(self.input_size)
        drop = partial(dropout, p=self.dropout, training=self.training)
        there = torch.cat([there, there.new_ones(len(x), x.shape[1], 1)])
        scores, after = self.scores(there[..., 0], len(x)), [self.last(there)]
        for layer, past in zip(self.layers, before, strict=True):
            rows = torch.cat([past.to(x.dtype), x])
            after.append(self.last(rows).to(past.dtype))
            seen = layer.self_attn(x, rows, rows, attn_mask=scores.to(x.dtype), need_weights=False)[0]
            x = layer.norm1(x + drop(seen))
            inner = drop(torch.relu(layer.linear1(x)))
            x = layer.norm2(x + drop(layer.linear2(inner)))
        return x, tuple(after)

    def last(self, rows):
        """Of rows (past + T, B, features) those that the next window looks back at."""
        return rows[len(rows) - self.past :].clone()

    def scores(self, there, steps):
        """there (past + T, B) -> what is added to the scores of attention, (B * nhead, T, past + T)."""
        place = torch.arange(len(there), device=there.device)
        distance = place[self.past :, None] - place
        heads = torch.arange(1, self.nhead + 1, device=there.device, dtype=torch.float64)
        slopes = 2 ** (-8 * heads / self.nhead)
        hidden = (distance < 0) | (distance > self.past) | (there.t()[:, None, None] == 0)
        added = (-slopes[:, None, None] * distance).expand(there.shape[1], -1, -1, -1)
        return added.masked_fill(hidden, -torch.inf).flatten(0, 1)
