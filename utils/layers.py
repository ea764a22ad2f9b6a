"""Recurrences and layers by themselves, ours and other repositories', as benchmark.py measures them."""

import copy

import torch
from torch import nn

from models import QRNNLayer, forget_mult
from models.forget_mult import BACKENDS

from . import runtime, timing
from .peers import log_seed, qrnn_seed, sru

WAYS = (*BACKENDS, "cuda")
"""Of ours to compute the recurrence."""


def settle(args, ours):
    """Apply the settings of ours, or what a peer's users have, denormals apart. Returns the device."""
    if ours:
        return runtime.setup(args)[0]
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    return torch.device("cuda" if args.cuda else "cpu")


class Recurrence:
    """h_t = f_t x_t + (1 - f_t) h_{t-1} in one way, forward and backward by f, x (T, B, H) and the first state.

    way: a backend of ours, "pytorch-qrnn", or "log-space QRNN": its layer without its products, which takes
    sigmoids of its gates and starts from 0.
    """

    def __init__(self, way, sizes, checkout, args):
        self.device = settle(args, way in WAYS)
        torch.manual_seed(0)
        steps, batch, features = sizes
        self.raw = [torch.randn(steps, batch, features).to(self.device) for _ in range(2)]
        self.slope = torch.randn(steps, batch, features).to(self.device)
        self.state = torch.zeros(batch, features, device=self.device)
        if way in WAYS:
            self.solve = lambda f, x, state: forget_mult(f, x, state, backend=way)
        elif way == "pytorch-qrnn":
            module, _ = qrnn_seed(checkout)
            self.solve = lambda f, x, state: module.ForgetMult()(f, x, state, use_cuda=False)
        else:
            self.layer = log_seed(checkout).QRNNLayer(1, features, 1, "f")
            del self.layer.f_conv, self.layer.z_conv
            self.layer.f_conv = lambda inputs: -inputs[:, :features]
            self.layer.z_conv = lambda inputs: inputs[:, features:]
            self.solve = None

    def leaves(self, dtype=torch.float32):
        """f, x and the state, fresh, with gradients."""
        f, x = (part.to(dtype) for part in self.raw)
        if self.solve:
            f, x = f.sigmoid(), x.sigmoid()
        return [part.requires_grad_() for part in (f.clone(), x.clone(), self.state.to(dtype, copy=True))]

    def call(self, f, x, state):
        """h of the way."""
        if self.solve:
            return self.solve(f, x, state)
        return self.layer(torch.cat([f, x], 2).transpose(0, 1)).transpose(0, 1)

    def difference(self):
        """Relative differences of h from the plain loop in float64, and of the gradient in f: the larger."""
        leaves, exact_leaves = self.leaves(), self.leaves(torch.float64)
        exact = exact_leaves if self.solve else [part.sigmoid() for part in exact_leaves[:2]] + exact_leaves[2:]
        h, want = self.call(*leaves), forget_mult(*exact, backend="reference")
        h.backward(self.slope)
        want.backward(self.slope.double())
        pairs = (h.detach(), want.detach()), (leaves[0].grad, exact_leaves[0].grad)
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs)

    def step(self):
        """Milliseconds of h, forward and backward."""
        leaves = self.leaves()
        return timing.once(lambda: self.call(*leaves).backward(self.slope), self.device)


class Layer:
    """One layer, (T, B, input) to (T, B, hidden), forward and backward by input and weights.

    way: "QRNN" and "QRNN bf16", ours; "nn.LSTM"; "SRU", asappresearch/sru's; "pytorch-qrnn" and "log-space QRNN", the
    seeds', with the weights of ours. sizes: T, B, input, hidden, window. log-space QRNN: its candidate is a sigmoid,
    window 1.
    """

    def __init__(self, way, sizes, checkout, args):
        self.device = settle(args, way.startswith("QRNN"))
        self.way, self.amp = way, "bf16" if way.endswith("bf16") else "off"
        steps, batch, inputs, features, window = sizes
        torch.manual_seed(0)
        self.ours = QRNNLayer(inputs, features, window=window)
        self.x = torch.randn(steps, batch, inputs).to(self.device).requires_grad_()
        self.slope = torch.randn(steps, batch, features).to(self.device)
        self.layer = self.ours
        if way == "nn.LSTM":
            self.layer = nn.LSTM(inputs, features)
        elif way == "pytorch-qrnn":
            self.layer = qrnn_seed(checkout)[1].QRNNLayer(inputs, features, window=window, use_cuda=False)
            self.layer.load_state_dict(self.ours.state_dict())
        elif way == "SRU":
            self.layer = sru(checkout).SRU(inputs, features, num_layers=1)
        elif way == "log-space QRNN":  # f keeps the past there; its candidate is a sigmoid
            self.ours = QRNNLayer(inputs, features, candidate="sigmoid")
            self.layer = log_seed(checkout).QRNNLayer(inputs, features, 1, "fo")
            own = [part.detach().chunk(3) for part in (self.ours.linear.weight, self.ours.linear.bias)]
            convs = ((self.layer.z_conv, 1), (self.layer.f_conv, -1), (self.layer.o_conv, 1))
            with torch.no_grad():
                for (conv, sign), weight, bias in zip(convs, *own, strict=True):
                    conv.weight.copy_(sign * weight[..., None])
                    conv.bias.copy_(sign * bias)
        self.layer.to(self.device)
        self.ours.to(self.device)

    def call(self, x):
        """The layer's output (T, B, hidden)."""
        if self.way == "log-space QRNN":
            return self.layer(x.transpose(0, 1)).transpose(0, 1)
        with runtime.autocast(x.device, self.amp):
            return self.layer(x)[0]

    def difference(self):
        """Relative difference of the output from our layer with the same weights in float64; 0 of another kind."""
        if self.way in ("nn.LSTM", "SRU"):
            return 0.0
        with torch.no_grad():
            want = copy.deepcopy(self.ours).double()(self.x.double())[0]
            return ((self.call(self.x) - want).norm() / want.norm()).item()

    def step(self):
        """Milliseconds, forward and backward."""
        self.x.grad = None
        self.layer.zero_grad()
        return timing.once(lambda: self.call(self.x).backward(self.slope), self.device)

    def inference(self):
        """Milliseconds without gradients."""
        with torch.no_grad():
            return timing.once(lambda: self.call(self.x), self.device)

    def products(self):
        """Milliseconds of its matrix products alone."""
        return timing.products_alone(timing.count(self.step).products, self.device)[0]


class Resized:
    """Layers of one way, one after the other, in one process: to start one takes longer than to time a GPU's layer."""

    def __init__(self, way, args):
        self.way, self.args, self.sizes, self.layer = way, args, None, None

    def inference(self, sizes):
        """Milliseconds without gradients of the Layer of these sizes, which is kept until others are asked for."""
        if sizes != self.sizes:
            self.layer = None  # its memory first
            self.sizes, self.layer = sizes, Layer(self.way, sizes, None, self.args)
        return self.layer.inference()
