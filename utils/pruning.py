"""Pruning: which weights become zero and stay so, while a model trains or at once."""

import fnmatch
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from . import UserError

ALIASES = {"encoder.": "embedding.", "decoder.": "head."}
"""Names of word_language_model's modules, so that schedules written for it work here."""


def level(weight, sparsity):
    """A mask that is False for the fraction `sparsity` of a weight's elements, rounded down: those of least magnitude.

    Of equal ones those that are first in memory.
    """
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    order = weight.detach().abs().flatten().argsort(stable=True)
    mask[order[: int(sparsity * weight.numel())]] = False
    return mask.view_as(weight)


def threshold(weight, bound):
    """A mask that is False where a weight's magnitude is at most `bound`."""
    return weight.detach().abs() > bound


@dataclass(frozen=True)
class Window:
    """Of epochs: a pruner acts before an epoch when start, start + frequency, ... below end are done.

    Raises ValueError unless 0 <= start < end and frequency >= 1.
    """

    start: int
    end: int
    frequency: int

    def __post_init__(self):
        if not 0 <= self.start < self.end or self.frequency < 1:
            raise ValueError(f"from epoch {self.start} to {self.end}, every {self.frequency}")

    def due(self, done):
        """Whether the pruner acts when so many epochs are done."""
        return self.start <= done < self.end and (done - self.start) % self.frequency == 0

    @property
    def span(self):
        """Epochs from the first to the last time that the pruner acts."""
        return (self.end - self.start - 1) // self.frequency * self.frequency


@dataclass(frozen=True)
class AutomatedGradualPruner:
    """Zhu & Gupta 2017 (arXiv 1710.01878, equation 1): the sparsity of each weight rises by a cubic.

    s = final + (initial - final) (1 - (done - start) / span)^3, over the epochs from the first to the last action.
    """

    initial_sparsity: float
    final_sparsity: float
    weights: list

    def mask(self, pattern, weight, window, done):
        """What is kept of a weight when `done` epochs are done."""
        left = 1 - (done - window.start) / window.span if window.span else 0.0
        return level(weight, self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * left**3)


@dataclass(frozen=True)
class BaiduRNNPruner:
    """Narang et al. 2017 (arXiv 1704.05119, algorithm 1), by epochs: a threshold that rises, faster after the ramp.

        slope = 2 q frequency / (2 (ramp - start) + 3 (end - ramp)),  ramp = start + ramp_epoch_offset
        before the ramp:  threshold = slope (done - start + 1) / frequency
        after it:         (slope (ramp - start + 1) + ramp_slope_mult slope (done - ramp + 1)) / frequency

    q: the 90th percentile of the magnitudes of the weight in a trained model (--summary percentile).
    """

    q: float
    ramp_epoch_offset: int
    ramp_slope_mult: float
    weights: list

    def mask(self, pattern, weight, window, done):
        """What is kept of a weight when `done` epochs are done."""
        ramp = window.start + self.ramp_epoch_offset
        slope = 2 * self.q * window.frequency / (2 * (ramp - window.start) + 3 * (window.end - ramp))
        rise = slope * (min(done, ramp) - window.start + 1)
        if done >= ramp:
            rise += self.ramp_slope_mult * slope * (done - ramp + 1)
        return threshold(weight, rise / window.frequency)


@dataclass(frozen=True)
class _ByTensor:
    """A pruner with a number for each pattern; that of "*" for weights which no other names."""

    @property
    def weights(self):
        """The patterns."""
        return list(self.numbers)


@dataclass(frozen=True)
class SparsityLevelParameterPruner(_ByTensor):
    """levels: the fraction of each weight's elements that is pruned."""

    levels: dict
    numbers = property(lambda self: self.levels)

    def mask(self, pattern, weight, window, done):
        """What is kept of a weight."""
        return level(weight, self.numbers[pattern])


@dataclass(frozen=True)
class MagnitudeParameterPruner(_ByTensor):
    """thresholds: the largest magnitude that is pruned, for each weight."""

    thresholds: dict
    numbers = property(lambda self: self.thresholds)

    def mask(self, pattern, weight, window, done):
        """What is kept of a weight."""
        return threshold(weight, self.numbers[pattern])


@dataclass(frozen=True)
class SensitivityPruner(_ByTensor):
    """sensitivities: the threshold in standard deviations of each weight (Han et al. 2015, arXiv 1506.02626).

    The deviation is that of the weight when the pruner acts, zeros included, as in IntelLabs/distiller.
    """

    sensitivities: dict
    numbers = property(lambda self: self.sensitivities)

    def mask(self, pattern, weight, window, done):
        """What is kept of a weight."""
        return threshold(weight, self.numbers[pattern] * weight.detach().std().item())


PRUNERS = {
    pruner.__name__: pruner
    for pruner in (
        AutomatedGradualPruner,
        BaiduRNNPruner,
        SparsityLevelParameterPruner,
        MagnitudeParameterPruner,
        SensitivityPruner,
    )
}
BY_TENSOR = ("levels", "thresholds", "sensitivities")
FRACTIONS = ("initial_sparsity", "final_sparsity", "levels")
"""Of their arguments, those that are a number for each pattern, and those that are parts of a whole."""


def matches(name, pattern):
    """Whether a shell pattern describes a parameter's name, or what of it follows a dot."""
    for theirs, ours in ALIASES.items():
        if pattern.startswith(theirs):
            pattern = ours + pattern.removeprefix(theirs)
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def read_schedule(path):
    """The text of a schedule. Raises UserError when there is none to read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--compress {path}: expected a YAML file with pruners and policies ({error})") from None


def parse_schedule(text, source):
    """[(pruner, Window)] of YAML text in the form of IntelLabs/distiller's schedules.

    pruners: by name, each with a class of PRUNERS and its arguments; policies: which of them acts when, in epochs done.
    source: what an error calls it. Raises UserError for what is no such text.
    """
    try:
        schedule = yaml.safe_load(text)
        made = {name: _pruner(arguments) for name, arguments in schedule["pruners"].items()}
        policies = []
        for policy in schedule["policies"]:
            window = Window(policy["starting_epoch"], policy["ending_epoch"], policy["frequency"])
            pruner = made[policy["pruner"]["instance_name"]]
            if getattr(pruner, "ramp_epoch_offset", 0) > window.end - window.start:
                raise ValueError(f"ramp_epoch_offset: {pruner.ramp_epoch_offset}, expected a ramp within the epochs")
            policies.append((pruner, window))
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{source}: not understood ({reason}); examples are in schedules/") from None
    return policies


def _pruner(arguments):
    arguments = dict(arguments)
    kind = arguments.pop("class")
    if kind not in PRUNERS:
        raise ValueError(f"class {kind}, expected one of {', '.join(PRUNERS)}")
    for name, value in arguments.items():
        numbers = value.values() if isinstance(value, dict) else [value]
        if name == "weights":
            if not isinstance(value, list):
                raise ValueError(f"weights: {value}, expected a list of patterns")
        elif (name in BY_TENSOR) != (isinstance(value, dict) and all(isinstance(pattern, str) for pattern in value)):
            raise ValueError(f"{name}: {value}, expected {'numbers by pattern' if name in BY_TENSOR else 'a number'}")
        elif not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{name}: {value}, expected numbers (a decimal point in those with an exponent)")
        elif name in FRACTIONS and not all(0 <= number <= 1 for number in numbers):
            raise ValueError(f"{name}: {value}, expected 0 to 1")
    return PRUNERS[kind](**arguments)


def gradual(sparsity, window):
    """The text of the schedule that --sparsity and --prune-epochs describe: every matrix gradually, from 5%."""
    pruner = {"class": "AutomatedGradualPruner", "initial_sparsity": min(0.05, sparsity), "final_sparsity": sparsity}
    return _schedule({**pruner, "weights": ["*"]}, window)


AT_ONCE = {
    "sparsity": ("SparsityLevelParameterPruner", "levels"),
    "threshold": ("MagnitudeParameterPruner", "thresholds"),
    "sensitivity": ("SensitivityPruner", "sensitivities"),
}


def at_once(criterion, number, patterns):
    """The text of a schedule that prunes once, before the first epoch, by a criterion of AT_ONCE."""
    kind, numbers = AT_ONCE[criterion]
    return _schedule({"class": kind, numbers: dict.fromkeys(patterns, number)}, Window(0, 1, 1))


def _schedule(pruner, window):
    policy = {"starting_epoch": window.start, "ending_epoch": window.end, "frequency": window.frequency}
    policy["pruner"] = {"instance_name": "the pruner"}
    return yaml.safe_dump({"pruners": {"the pruner": pruner}, "policies": [policy]})


def chosen_schedule(args):
    """The text of the schedule that the flags choose, "" for none; args: compress, sparsity, prune_epochs."""
    if args.compress:
        return read_schedule(args.compress)
    return gradual(args.sparsity, Window(*args.prune_epochs)) if args.sparsity else ""


@dataclass
class Pruning:
    """The masks of a model's weights, and the policies by which more and more is pruned; none comes back.

    schedule: text for parse_schedule, "" for none; source: what an error calls it. masks: {name of a parameter: bool
    tensor of its shape, False where it is held at zero}, to begin with. A pattern names parameters of any kind, "*" the
    matrices alone; a matrix that embedding and softmax share may be called by either name.
    Raises UserError for a pattern that matches nothing.
    """

    model: torch.nn.Module
    schedule: str
    source: str = "--compress"
    masks: dict = field(default_factory=dict)

    def __post_init__(self):
        self.policies = parse_schedule(self.schedule, self.source) if self.schedule else []
        own = {id(parameter): name for name, parameter in self.model.named_parameters()}
        every = self.model.named_parameters(remove_duplicate=False)
        self.names = {name: own[id(parameter)] for name, parameter in every}
        self.parameters = dict(self.model.named_parameters())
        norms = [name for name, module in self.model.named_modules() if isinstance(module, torch.nn.LayerNorm)]
        self.norms = {f"{name}.{part}" for name in norms for part in ("weight", "bias")}
        self.masks = {name: mask.to(self.parameters[name].device) for name, mask in self.masks.items()}
        self.chosen = [self._find(pruner) for pruner, _ in self.policies]

    def _find(self, pruner):
        """{name of a parameter: the pattern that it is chosen by}; "*" is for those that no other chooses."""
        found = {}
        for pattern in sorted(pruner.weights, key="*".__eq__):
            if pattern == "*":
                names = [n for n, parameter in self.parameters.items() if parameter.dim() > 1 and n not in self.norms]
            else:
                names = [own for name, own in self.names.items() if matches(name, pattern)]
            if not names:
                raise UserError(
                    f"pruning: no parameter is called {pattern}; there are {', '.join(sorted(self.parameters))}"
                )
            for name in names:
                found.setdefault(name, pattern)
        return found

    def start_epoch(self, done):
        """Let the pruners act that are due when so many epochs are done; returns the names of what they pruned."""
        acted = []
        for (pruner, window), chosen in zip(self.policies, self.chosen, strict=True):
            if window.due(done):
                for name, pattern in chosen.items():
                    mask = pruner.mask(pattern, self.parameters[name], window, done)
                    self.masks[name] = mask & self.masks.get(name, mask)
                acted += chosen
        self.apply()
        return acted

    @torch.no_grad()
    def apply(self):
        """Set the pruned weights to zero: after each update, and after an average took their place."""
        for name, mask in self.masks.items():
            self.parameters[name].mul_(mask)

    def count(self):
        """Elements that masks hold at zero, tied ones counted once."""
        return sum(mask.numel() - int(mask.sum()) for mask in self.masks.values())

    def state_dict(self):
        """What a checkpoint keeps: schedule and masks."""
        return {"schedule": self.schedule, "masks": {name: mask.cpu() for name, mask in self.masks.items()}}
