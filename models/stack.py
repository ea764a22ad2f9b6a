"""Layers one upon the other, each with a state of its own."""

from torch import nn


class Stack(nn.Module):
    """A core out of layers: core(x, state) -> output, state; state is that of the first layer, of the second, ...

    layers: modules with states, the number of tensors of their state; initial_state(B); and
    carry(x, state) -> output, state, all tensors with B at dim 1.
    """

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def initial_state(self, batch_size):
        """Zeros: what each layer starts from, layer after layer."""
        return tuple(part for layer in self.layers for part in layer.initial_state(batch_size))

    def forward(self, x, state):
        """x (T, B, E), state -> output (T, B, H), state after the last step in its dtype."""
        parts, after = iter(state), []
        for number, layer in enumerate(self.layers):
            before = [next(parts) for _ in range(layer.states)]
            x, own = self.carry(layer, x, before)
            after += (new.to(old.dtype) for new, old in zip(own, before, strict=True))
            if number + 1 < len(self.layers):
                x = self.between(x)
        return x, tuple(after)

    def carry(self, layer, x, state):
        """One layer."""
        return layer.carry(x, state)

    def between(self, x):
        """What happens to x (T, B, H) between two layers."""
        raise NotImplementedError
