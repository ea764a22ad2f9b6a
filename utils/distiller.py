"""IntelLabs/distiller quantizes the LSTM of a checkpoint, by its own code from a checkout, for benchmark.py.

Its packages for pictures and tables have stand-ins. Two of its parts that today's torch has no functions for as well:
its tracer finds here, by hand, what it finds in an LSTM (gates split into sigmoids and a tanh, whose ranges it then
narrows), and no batch norm is folded.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import tempfile
import types
import warnings
from copy import deepcopy
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import nn
from torch.nn import functional

from models.softmax import IGNORE

from . import UserError, checkpoint, runtime
from .evaluation import evaluate
from .quantization import steps

REPOSITORY = "IntelLabs/distiller"
NEVER_CALLED = {
    "torchvision", "torchnet", "scipy", "tabulate", "pandas", "xlsxwriter", "pydot", "tensorboardX", "git", "sklearn",
    "pretrainedmodels", "gym", "lsb_release",
}  # fmt: skip


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes stand-ins for packages of NEVER_CALLED and their modules."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in NEVER_CALLED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__, module.__file__ = [], spec, spec.name, spec.name
        return module

    def exec_module(self, module):
        pass


def installed_packages():
    """A stand-in for setuptools' pkg_resources, which is gone: no package is installed, versions are numbers."""
    module = types.ModuleType("pkg_resources")

    class DistributionNotFound(Exception):
        pass

    def require(name):
        raise DistributionNotFound(name)

    module.require, module.DistributionNotFound = require, DistributionNotFound
    module.parse_version = lambda text: tuple(int(part) for part in text.split("+")[0].split(".")[:2])
    return module


class Traced:
    """Stands for distiller's SummaryGraph of an LSTM."""

    def __init__(self, model, example):
        self.model = model

    def adjacency_map(self, dedicated_modules_only):
        """{name: what follows}, of the sums of gates alone."""
        from distiller.summary_graph import AdjacentsEntry, OpSimpleMetadata

        entries = {}
        for name, _ in self.model.named_modules():
            cell, _, own = name.rpartition(".")
            if own == "eltwiseadd_gate":
                split = OpSimpleMetadata(f"{cell}.split", "Split")
                gates = [OpSimpleMetadata(f"{cell}.act_{gate}", "Sigmoid") for gate in "ifo"]
                for operation, after in (
                    (OpSimpleMetadata(name, "Add"), [split]),
                    (split, [*gates, OpSimpleMetadata(f"{cell}.act_g", "Tanh")]),
                ):
                    entries[operation.name] = AdjacentsEntry(operation)
                    entries[operation.name].successors = after
        return entries


def imported(checkout):
    """The package of a checkout. Raises UserError when it is not there."""
    if not (Path(checkout) / "distiller" / "quantization").is_dir():
        raise UserError(f"{checkout} is not there: name a checkout of {REPOSITORY}")
    sys.meta_path.insert(0, Finder())
    sys.modules["pkg_resources"] = installed_packages()
    sys.path.insert(0, str(checkout))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import distiller
        import distiller.quantization.range_linear as quantizing
    distiller.SummaryGraph = Traced
    quantizing.mt.fold_batch_norms = lambda model, **settings: None
    return distiller


class WordModel(nn.Module):
    """Its examples' model with its LSTM, and the weights of ours."""

    def __init__(self, ours, lstm):
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(*ours.embedding.weight.shape), lstm
        self.decoder = nn.Linear(ours.core.output_size, ours.vocab_size)
        for theirs, own in ((self.encoder.weight, ours.embedding.weight), (self.decoder.weight, ours.head.weight)):
            theirs.data.copy_(own.data)
        self.decoder.bias.data.copy_(ours.head.bias.data)

    def forward(self, tokens, state):
        """tokens (T, B), state (h, c) -> logits (T, B, V), state."""
        output, state = self.rnn(self.encoder(tokens), state)
        return self.decoder(output.flatten(0, 1)).unflatten(0, tokens.shape), state


class Scored(nn.Module):
    """A WordModel, quantized or not, as our evaluate calls it."""

    def __init__(self, model, shape):
        super().__init__()
        self.model, self.shape = model, shape

    def initial_state(self, batch_size):
        """Zeros: (h, c), (layers, B, H) each."""
        kind = next(self.parameters()).dtype
        return tuple(torch.zeros(self.shape[0], batch_size, self.shape[1], dtype=kind) for _ in range(2))

    def hidden(self, tokens, state):
        """Reads tokens (T, B)."""
        return self.model(tokens, state)

    def forward(self, tokens, targets, state):
        """As LanguageModel's."""
        logits, state = self.model(tokens, state)
        flat = logits.flatten(0, 1).float()
        loss = functional.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return loss, None, (targets != IGNORE).sum(), state


class Distiller:
    """A checkpoint's LSTM quantized by distiller, scored by our evaluate."""

    def __init__(self, path, checkout, args):
        runtime.setup(args)
        ours, _, saved = checkpoint.load_model(path, "cpu")
        if saved["config"]["core"].get("model") != "LSTM" or saved["config"]["family"] != "rnn":
            raise UserError(f"{path} is no LSTM of train_rnn.py: distiller quantizes nothing else here")
        self.package, rnn = imported(checkout), ours.core.rnn
        self.model = WordModel(ours, self.package.modules.DistillerLSTM.from_pytorch_impl(rnn)).eval()
        self.shape = rnn.num_layers, rnn.hidden_size
        self.folder = tempfile.TemporaryDirectory()

    def collect(self, ids):
        """Take statistics from a text, read as ours is."""
        from distiller.data_loggers import collect_quant_stats

        self.package.utils.assign_layer_fq_names(self.model)
        with quiet(), torch.inference_mode():
            collect_quant_stats(self.model, lambda model: self.read(steps(ids)), save_dir=self.folder.name)

    def read(self, text):
        """Read a text [(T, B)]."""
        scored = Scored(self.model, self.shape)
        state = scored.initial_state(text[0].shape[1])
        for tokens in text:
            _, state = scored.hidden(tokens, state)

    def score(self, settings, ids, batch_size):
        """Perplexity of ids (N,) under settings, names of quantization.SETTINGS; None: in float32."""
        model = deepcopy(self.model)
        if settings and settings.get("fp16") == ["all"]:
            model = model.half()
        elif settings is not None:
            model = self.quantized(model, settings)
        return evaluate(Scored(model.eval(), self.shape).eval(), ids, batch_size).perplexity

    def quantized(self, model, settings):
        """The model in simulated integers."""
        from distiller.quantization import LinearQuantMode, PostTrainLinearQuantizer

        names = {"encoder": "encoder", "decoder": "decoder", "eltwise": ".*eltwise.*"}
        arguments = {"per_channel_wts": settings.get("per_channel", False)}
        if settings.get("mode") == "asymmetric":
            arguments["mode"] = LinearQuantMode.ASYMMETRIC_SIGNED
        if settings.get("clip") == "avg":
            arguments["clip_acts"] = "AVG"
        if settings.get("fp16"):
            lines = "".join(f"{names[part]}:\n    fp16: true\n" for part in settings["fp16"])
            arguments["overrides"] = self.package.utils.yaml_ordered_load(lines)
        statistics = str(Path(self.folder.name) / "acts_quantization_stats.yaml")
        with quiet(), contextlib.chdir(self.folder.name):  # it writes what it has found where it is
            quantizer = PostTrainLinearQuantizer(model, model_activation_stats=statistics, **arguments)
            state = tuple(torch.zeros(self.shape[0], 1, self.shape[1]) for _ in range(2))
            quantizer.prepare_model((torch.zeros(1, 1, dtype=torch.int64), state))
        return quantizer.model


@contextlib.contextmanager
def quiet():
    """Without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
