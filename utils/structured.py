"""Structured pruning: whole hidden units leave a model, and a smaller dense one is left."""

from dataclasses import dataclass

from models.forget_mult.pooling import MODES

from . import UserError


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter that runs over units: its index is that of an array (outer, units, inner).

    units: the name of what they are units of, a layer for example; axes of one name lose the same ones.
    """

    units: str
    outer: int = 1
    inner: int = 1

    def split(self, tensor, dim):
        """tensor, its axis `dim` in three."""
        return tensor.unflatten(dim, (self.outer, tensor.shape[dim] // (self.outer * self.inner), self.inner))


def remove_units(config, weights, sparsity):
    """The configuration and the weights of a model without the fraction `sparsity` of each layer's units.

    config: for models.build; weights: its state_dict, or anything with those names and shapes. A unit is a hidden unit
    with all of its gates and all that reads it (Wen et al. 2018, arXiv 1709.05027), of an RMC a head with its features
    of memory. Those leave whose weights have the least sum of squares. Where embedding and softmax share a matrix, its
    features are the last layer's units and leave with them. Of an LSTM, GRU, QRNN or AWD model the smaller one computes
    what the larger one would with those units held at 0; of an RMC it does not, whose norms span all heads.

    Returns (config, weights, keep), keep: (name, tensor of the old shape) -> tensor of the new shape.
    Raises UserError for an adaptive softmax, whose inner sizes are tied to the number of units, and a Transformer.
    """
    if config.get("cutoffs") and not config.get("splitcross"):
        raise UserError("--structured: an adaptive softmax can't lose units, its clusters' sizes are made of them")
    if config["family"] not in AXES:
        raise UserError(f"--structured: a {config['family']} can't lose units; it is for {', '.join(AXES)}")
    axes = AXES[config["family"]](config)
    totals = {}
    for name, described in axes.items():
        for dim, axis in enumerate(described):
            if axis and name in weights and not (config["tied"] and name == "head.weight"):
                parts = axis.split(weights[name].double(), dim)
                rest = [other for other in range(parts.dim()) if other != dim + 1]
                totals[axis.units] = totals.get(axis.units, 0) + parts.square().sum(rest)
    kept = {
        units: total.topk(max(1, len(total) - int(sparsity * len(total)))).indices.sort().values
        for units, total in totals.items()
    }

    def keep(name, tensor):
        for dim, axis in enumerate(axes.get(name, ())):
            if axis:
                parts = axis.split(tensor, dim).index_select(dim + 1, kept[axis.units])
                tensor = parts.flatten(dim, dim + 2)
        return tensor.contiguous()

    smaller = {name: keep(name, tensor) for name, tensor in weights.items()}
    sizes = SIZES[config["family"]](config, {units: len(indices) for units, indices in kept.items()})
    return {**config, "core": {**config["core"], **sizes}}, smaller, keep


def _stack_axes(config, gates, window, name):
    """Axes of a stack: gates blocks of rows and window blocks of columns in each layer's matrices.

    name: (number of a layer) -> names of (input matrix, hidden matrix or None, biases).
    """
    count = config["core"]["nlayers"]
    last = f"layer {count - 1}"
    before = Axis(last) if config["tied"] else None
    axes = {
        "embedding.weight": (None, before),
        "head.weight": (None, Axis(last)),
        "head.tail_vectors": (None, Axis(last)),
    }
    for number in range(count):
        own = f"layer {number}"
        rows = Axis(own, outer=gates)
        w_ih, w_hh, biases = name(number)
        axes[w_ih] = (rows, before and Axis(before.units, outer=window(number)))
        axes |= {w_hh: (rows, Axis(own))} if w_hh else {}
        axes |= dict.fromkeys(biases, (rows,))
        before = Axis(own)
    return axes


GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def _recurrent_axes(config, pattern):
    """Of nn.LSTM's parameters and the like; pattern: their names, of the number of a layer and the kind of weight."""

    def name(number):
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ih, hh, *biases = (pattern.format(number=number, kind=kind) for kind in kinds)
        return ih, hh, biases

    return _stack_axes(config, GATES[config["core"]["model"]], lambda number: 1, name)


def _rnn_axes(config):
    return _recurrent_axes(config, "core.rnn.{kind}_l{number}")


def _qrnn_names(number):
    return f"core.layers.{number}.linear.weight", None, [f"core.layers.{number}.linear.bias"]


def _qrnn_axes(config):
    core = config["core"]
    return _stack_axes(config, MODES[core.get("mode", "fo")], lambda number: core.get("window", 2), _qrnn_names)


def _awd_axes(config):
    if config["core"]["model"] == "QRNN":
        return _stack_axes(config, MODES["fo"], lambda number: 1 if number else 2, _qrnn_names)
    return _recurrent_axes(config, "core.layers.{number}.rnn.{kind}_l0")


def _rmc_axes(config):
    core = config["core"]
    headsize, keysize, slots = core["headsize"], core.get("keysize") or core["headsize"], core.get("memslots", 1)
    features, qkv = Axis("heads", inner=headsize), Axis("heads", inner=2 * keysize + headsize)
    gates = Axis("heads", outer=2, inner=headsize) if core.get("gatestyle", "unit") == "unit" else None
    port = core.get("variant") == "port"
    axes = {"core.projector.weight": (None, Axis("heads", outer=slots, inner=headsize))}
    layers = {"input_projector": (features, None), "input_gates": (gates, features), "memory_gates": (gates, features)}
    for number in range(1 if port else core.get("numblocks", 1)):
        layers[f"qkv_projector.{number}"] = (qkv, features)
        for norm, span in (("qkv_norm", qkv), ("attention_norm", features), ("mlp_norm", features)):
            both = (None, span) if port else (span,)
            axes |= {f"core.memory.{norm}.{number}.{part}": both for part in ("weight", "bias")}
    for number in range(1 if port else core.get("attmlplayers", 2)):
        layers[f"mlp.{number}"] = (features, features)
    for name, (rows, columns) in layers.items():
        axes |= {f"core.memory.{name}.weight": (rows, columns), f"core.memory.{name}.bias": (rows,)}
    return axes


def _stack_sizes(config, kept):
    last = kept[f"layer {config['core']['nlayers'] - 1}"]
    sizes = {"emsize": last} if config["tied"] else {}
    if config["family"] == "awd" and config["tied"]:
        return sizes | ({"nhid": kept["layer 0"]} if config["core"]["nlayers"] > 1 else {})
    return sizes | {"nhid": last}


AXES = {"rnn": _rnn_axes, "qrnn": _qrnn_axes, "awd": _awd_axes, "rmc": _rmc_axes}
SIZES = dict.fromkeys(("rnn", "qrnn", "awd"), _stack_sizes) | {"rmc": lambda config, kept: {"numheads": kept["heads"]}}
