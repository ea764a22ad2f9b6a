"""Language models with weights of 8 bits, whose products the processor computes in integers."""

import torch
from torch import nn
from torch.nn import functional

from .apart import Apart, Floats, matrices


def narrow(weight):
    """weight (N, K) -> int8 (N, K) and a scale for each row (N,): w is q * scale, q from -127 to 127."""
    scale = weight.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8(Floats):
    """Products of int8 weights and inputs rounded to int8, with a scale for each row of either; the rest in float32.

    places: {id of a weight: (its module, the name of its scales)}.
    """

    def __init__(self, places):
        self.places = places

    def scales(self, weight):
        """The scales (N,) of a weight (N, K)."""
        module, name = self.places[id(weight)]
        return getattr(module, name)

    def embedding(self, name, tokens, weight):
        return functional.embedding(tokens, weight) * functional.embedding(tokens, self.scales(weight)[:, None])

    def linear(self, name, x, weight, bias, feeds=None):
        step = x.abs().amax(-1, True).clamp_(min=1e-30) / 127
        q = (x / step).round_().to(torch.int8)
        total = torch._int_mm(q.flatten(0, -2), weight.t()).view(*x.shape[:-1], len(weight))
        y = total * step * self.scales(weight)
        return y if bias is None else y + bias


class Native(Apart):
    """An Apart whose matrices are int8 parameters, each NAME with a buffer NAME_scale beside it.

    Arguments: LanguageModel's. The weights are those of `narrowed`.
    """

    def __init__(self, **arguments):
        super().__init__(**arguments)
        made, places = {}, {}
        for _, module, name in list(matrices(self)):
            weight = getattr(module, name)
            if id(weight) not in made:
                q, scale = narrow(weight.detach())
                made[id(weight)] = nn.Parameter(q, requires_grad=False), scale
            module._parameters[name], scale = made[id(weight)]
            module.register_buffer(f"{name}_scale", scale)
            places[id(module._parameters[name])] = module, f"{name}_scale"
        self.operations = Int8(places)

    def initial_state(self, batch_size):
        return tuple(part.float() for part in super().initial_state(batch_size))


def narrowed(model):
    """The state_dict of a Native with the weights of a LanguageModel: matrices int8, their scales beside them."""
    weights, made = dict(model.state_dict()), {}
    for place, module, name in matrices(model):
        weight = getattr(module, name)
        if id(weight) not in made:
            made[id(weight)] = narrow(weight.detach())
        weights[place], weights[f"{place}_scale"] = made[id(weight)]
    return weights
