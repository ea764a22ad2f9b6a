"""The recurrence h_t = a_t h_{t-1} + b_t over time, element by element, in several ways that give the same.

ForgetMult, h_t = f_t x_t + (1 - f_t) h_{t-1}, is its case with one gate: the pooling of Quasi-Recurrent Neural Networks
(Bradbury et al. 2017, arXiv 1611.01576, section 2.1), and dynamic weighted averaging wherever else.

Each file of BACKENDS has the same two functions, over x and gate (T, B, H) and initial (B, H), contiguous:

    forward(gate, x, initial, mix, reverse) -> h (T, B, H) in x's type
        mix: h_t = gate_t x_t + (1 - gate_t) h_{t-1}; otherwise h_t = gate_t h_{t-1} + x_t
        reverse: from the last step to the first; h_{t-1} is then the h of the step after
    backward(slope, gate, x, h, initial, mix, reverse) -> the gradients in gate, x, initial, in their types

and carries h in float32 or, for float64, in float64.
"""

import torch
from torch import nn

from .. import compiled
from . import cpu, cuda, operator, reference, scan, steps

BACKENDS = {"reference": reference, "cpu": cpu, "scan": scan, "torch": steps}
"""The plain loop; compiled, for a CPU; log-space cumulative sums; torch's operations step by step, for any device."""

operator.BACKENDS.update(BACKENDS, cuda=cuda)


def choose(tensor):
    """The name of the way that is fastest for a tensor's device."""
    if tensor.is_cuda and cuda.usable(tensor.device):
        return "cuda"
    return "cpu" if tensor.device.type == "cpu" and compiled.wanted else "torch"


def recurrence(a, b, initial=None, reverse=False, backend=None):
    """h_t = a_t h_{t-1} + b_t: a, b of a common shape (T, B, H) after broadcasting -> h (T, B, H).

    initial (B, H): h before the first step, or after the last with reverse; 0 if None. reverse: from the end to the
    start. backend: a name of BACKENDS, or "cuda" for a GPU's kernels; by device if None. The wider type is that of h;
    the sums are carried in float32 at least. Gradients by a, b and initial; no second ones.
    Raises ValueError for other shapes and unknown backends.
    """
    return _solve(a, b, initial, False, reverse, backend)


def forget_mult(f, x, initial=None, reverse=False, backend=None):
    """h_t = f_t x_t + (1 - f_t) h_{t-1}: f, x (T, B, H) -> h (T, B, H). Everything else as for recurrence."""
    return _solve(f, x, initial, True, reverse, backend)


def _solve(gate, x, initial, mix, reverse, backend):
    if backend not in (None, *operator.BACKENDS):
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(operator.BACKENDS)}")
    if torch.jit.is_tracing():  # a graph of plain operations
        initial = x.new_zeros(x.shape[1:]) if initial is None else initial
        return reference.forward(gate, x, initial, mix, reverse)
    dtype = torch.promote_types(gate.dtype, x.dtype)
    gate, x = torch.broadcast_tensors(gate.to(dtype), x.to(dtype))
    if x.dim() != 3 or not len(x):
        raise ValueError(f"expected tensors of shape (time, batch, features), at least one step, got {tuple(x.shape)}")
    if initial is None:
        initial = x.new_zeros(x.shape[1:])
    elif initial.shape != x.shape[1:]:
        raise ValueError(f"expected an initial state of {tuple(x.shape[1:])}, got {tuple(initial.shape)}")
    return operator.solve(gate, x, initial, mix, reverse, backend or choose(x))


class ForgetMult(nn.Module):
    """h_t = f_t x_t + (1 - f_t) h_{t-1}, with the call of salesforce/pytorch-qrnn: ForgetMult()(f, x, hidden).

    backend: how; see BACKENDS. Deviations from the seed: hidden may be of another type, f and x of any strides.
    """

    reverse = False

    def __init__(self, backend=None):
        super().__init__()
        self.backend = backend

    def forward(self, f, x, hidden_init=None, use_cuda=True):
        """f, x (T, B, H), hidden_init (B, H) or None -> h (T, B, H).

        use_cuda: False asks for torch's operations where a CUDA tensor would take a kernel of ours.
        """
        backend = self.backend or ("torch" if x.is_cuda and not use_cuda else None)
        return forget_mult(f, x, hidden_init, self.reverse, backend)


class BackwardForgetMult(ForgetMult):
    """The same from the end: h_t = f_t x_t + (1 - f_t) h_{t+1}, hidden_init being h after the last step."""

    reverse = True
