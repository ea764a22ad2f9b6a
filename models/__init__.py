"""Tensors in, tensors out: the cores, the heads and the language model around them. No flags, no files, no printing.

Axes in every docstring: T time, B batch, E embedding, H hidden, V vocabulary. Time first, batch second, states too.
"""

import os

# before numba is imported: its threads wait at full speed, and where it had more of them than torch, one of two
# processes under torchrun took seven times as long
if "OMP_NUM_THREADS" in os.environ:
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"].split(",")[0])

from .awd import AWD
from .forget_mult import BackwardForgetMult, ForgetMult, forget_mult, recurrence
from .language_model import LanguageModel, ModelError
from .native import Native
from .qrnn import QRNN, QRNNCore, QRNNLayer
from .quantized import Quantized
from .rmc import RMC, RelationalMemory
from .rnn import RNN
from .sparse import Sparse
from .transformer import Transformer

CORES = {"rmc": RMC, "rnn": RNN, "qrnn": QRNNCore, "awd": AWD, "transformer": Transformer}

__all__ = [
    "AWD", "CORES", "QRNN", "RMC", "RNN", "BackwardForgetMult", "ForgetMult", "LanguageModel", "ModelError", "QRNNCore",
    "QRNNLayer", "RelationalMemory", "build", "forget_mult", "recurrence",
]  # fmt: skip


def build(config):
    """The LanguageModel that a plain dictionary describes; checkpoints keep this dictionary.

    config: {"family": a key of CORES, "core": the arguments of that core, and those of LanguageModel
        ("vocab_size", "tied", "dropouti", ...)}. With "quantization", settings of quantized.Integers, the model is
        Quantized; with "native": True it is Native, whose weights are int8; with "sparse", counts of weights, Sparse.

    Raises ModelError for an unknown family or sizes that do not fit each other.
    """
    arguments = dict(config)
    family, core = arguments.pop("family"), arguments.pop("core")
    if family not in CORES:
        raise ModelError(f"unknown model family {family!r}: this version knows {', '.join(CORES)}")
    native = arguments.pop("native", False)
    kinds = ((native, Native), ("quantization" in arguments, Quantized), ("sparse" in arguments, Sparse))
    kind = next((kind for asked, kind in kinds if asked), LanguageModel)
    return kind(core=CORES[family](**core), **arguments)
