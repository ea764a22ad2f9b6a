"""The recurrence as an operator of torch: autograd, torch.compile and fake tensors know it."""

import torch

BACKENDS = {}
NAMESPACE = __name__.split(".")[0]


def compute(
    gate: torch.Tensor, x: torch.Tensor, initial: torch.Tensor, mix: bool, reverse: bool, backend: str
) -> torch.Tensor:
    """forward of a backend; see the package's docstring. float16 goes through float32."""
    inputs = (part.contiguous() for part in (*_widened(gate, x), initial))
    return BACKENDS[backend].forward(*inputs, mix, reverse).to(x.dtype)


def _widened(*parts):
    """Tensors of float16 in float32, others as they are."""
    return (part.float() if part.dtype == torch.float16 else part for part in parts)


solve = torch.library.custom_op(f"{NAMESPACE}::recurrence", mutates_args=())(compute)


@solve.register_fake
def _(gate, x, initial, mix, reverse, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def compute_backward(
    slope: torch.Tensor,
    gate: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    initial: torch.Tensor,
    mix: bool,
    reverse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """backward of a backend, likewise."""
    inputs = (part.contiguous() for part in (*_widened(slope, gate, x, h), initial))
    d_gate, d_x, d_initial = BACKENDS[backend].backward(*inputs, mix, reverse)
    return d_gate.to(gate.dtype), d_x.to(x.dtype), d_initial


solve_backward = torch.library.custom_op(f"{NAMESPACE}::recurrence_backward", mutates_args=())(compute_backward)


@solve_backward.register_fake
def _(slope, gate, x, h, initial, mix, reverse, backend):
    return tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in (gate, x, initial))


def _keep(ctx, inputs, output):
    gate, x, initial, ctx.mix, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(gate, x, output, initial)


def _gradients(ctx, slope):
    return *solve_backward(slope, *ctx.saved_tensors, ctx.mix, ctx.reverse, ctx.backend), None, None, None


solve.register_autograd(_gradients, setup_context=_keep)
