"""Language models whose matrices keep only the weights that are not 0, in compressed rows (CSR)."""

import warnings

import torch
from torch import nn

from .apart import Apart, Floats, matrices

SPARSE = 2 / 3
"""Zeros, as a part of a matrix, above which it is kept so: then the file is smaller, and products of ten rows win."""


def columns_dtype(width):
    """The narrowest integers that number so many columns."""
    return torch.int16 if width <= 1 << 15 else torch.int32


def compressed_rows(weight):
    """weight (N, K) -> its values that are not 0 (n,), their columns (n,), where rows start and end (N + 1,).

    Columns are int16 if K allows it, starts int32.
    """
    rows, columns = weight.nonzero(as_tuple=True)
    starts = torch.zeros(len(weight) + 1, dtype=torch.int32)
    starts[1:] = rows.bincount(minlength=len(weight)).cumsum(0)
    return weight[rows, columns], columns.to(columns_dtype(weight.shape[1])), starts


class Rows(Floats):
    """Products of matrices in compressed rows, by torch's own; a dense matrix stays one.

    places: {id of the values: (module, name, K)}; the columns and starts are the module's buffers beside them.
    """

    def __init__(self, places):
        self.places, self.made = places, {}

    def matrix(self, values):
        """The sparse tensor (N, K) of a matrix, made once on each device. Raises RuntimeError for what is none."""
        if id(values) not in self.made or self.made[id(values)].device != values.device:
            module, name, width = self.places[id(values)]
            columns, starts = (getattr(module, f"{name}_{part}") for part in ("columns", "starts"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # sparse rows are called beta
                self.made[id(values)] = torch.sparse_csr_tensor(
                    starts, columns.int(), values.detach(), (len(starts) - 1, width), check_invariants=True
                )
        return self.made[id(values)]

    def make(self):
        """Every matrix anew, after its parts have changed."""
        self.made.clear()
        for module, name, _ in self.places.values():
            self.matrix(getattr(module, name))

    def embedding(self, name, tokens, weight):
        if id(weight) not in self.places:
            return super().embedding(name, tokens, weight)
        matrix, chosen = self.matrix(weight), tokens.flatten()
        begin = matrix.crow_indices()[chosen].long()
        counts = matrix.crow_indices()[chosen + 1].long() - begin
        rows = torch.arange(len(chosen), device=tokens.device).repeat_interleave(counts)
        places = torch.arange(len(rows), device=tokens.device) + (begin - counts.cumsum(0) + counts)[rows]
        dense = weight.new_zeros(len(chosen), matrix.shape[1])
        dense[rows, matrix.col_indices()[places].long()] = weight.detach()[places]
        return dense.view(*tokens.shape, -1)

    def linear(self, name, x, weight, bias, feeds=None):
        if id(weight) not in self.places:
            return super().linear(name, x, weight, bias)
        matrix, rows = self.matrix(weight), x.flatten(0, -2)
        y = matrix.mv(rows[0])[None] if len(rows) == 1 else (matrix @ rows.t()).t()
        y = y.reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias


class Sparse(Apart):
    """An Apart some of whose matrices are in compressed rows: NAME the values, NAME_columns, NAME_starts beside it.

    sparse: {name in state_dict: how many weights of it are not 0}. Other arguments: LanguageModel's. The weights are
    those of `thinned`.
    """

    def __init__(self, sparse, **arguments):
        super().__init__(**arguments)
        made, places = {}, {}
        for place, module, name in list(matrices(self)):
            if place not in sparse:
                continue
            weight, count = getattr(module, name), sparse[place]
            if id(weight) not in made:
                made[id(weight)] = (
                    nn.Parameter(weight.new_empty(count), requires_grad=False),
                    torch.empty(count, dtype=columns_dtype(weight.shape[1])),
                    torch.empty(len(weight) + 1, dtype=torch.int32),
                )
            module._parameters[name], columns, starts = made[id(weight)]
            module.register_buffer(f"{name}_columns", columns)
            module.register_buffer(f"{name}_starts", starts)
            places[id(module._parameters[name])] = module, name, weight.shape[1]
        self.operations = Rows(places)
        self.register_load_state_dict_post_hook(lambda *_: self.operations.make())


def thinned(model):
    """The state_dict of a Sparse with the weights of a LanguageModel, and its `sparse`."""
    weights, made, sparse = dict(model.state_dict()), {}, {}
    for place, module, name in matrices(model):
        weight = getattr(module, name)
        if (weight == 0).float().mean() > SPARSE:
            if id(weight) not in made:
                made[id(weight)] = compressed_rows(weight.detach())
            weights[place], weights[f"{place}_columns"], weights[f"{place}_starts"] = made[id(weight)]
            sparse[place] = len(weights[place])
    return weights, sparse
