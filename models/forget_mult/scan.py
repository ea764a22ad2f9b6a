"""The recurrence without a loop, by cumulative sums in log space, as LGirrbach/PyTorch-QRNN has it, made stable.

With L_t the sum of log a up to t, h_t = exp(L_t) sum over s <= t of b_s exp(-L_s). exp(-L_s) overflows after some
dozens of steps, so that the sum is a logcumsumexp of log b_s - L_s. b may have either sign here: its positive and its
negative part are summed each by itself and subtracted. The first state joins b_0 as a_0 h_0.

Deviations from the seed, which handles positive b from an initial 0 only and sums over all later steps. Gates must not
be negative; those below 1e-37 count as 1e-37. L grows with T, and what is subtracted from it loses digits: in float32
it has 3e-6 to 4e-6 relative where the others have 1e-7, and it is the slowest; see results/qrnn.md.
"""

import functools

import torch

from . import steps

TINY = 1e-37


def solve(a, b, initial, reverse):
    """h_t = a_t h_{t-1} + b_t, a and b (T, B, H) in float32 or wider, initial (B, H)."""
    if reverse:
        return solve(a.flip(0), b.flip(0), initial, False).flip(0)
    first = torch.addcmul(b[0], a[0], initial.to(b.dtype))
    b = torch.cat([first[None], b[1:]])
    logs = a.clamp(min=TINY).log().cumsum(0)
    positive, negative = (torch.logcumsumexp(part.clamp(min=0).log() - logs, 0) for part in (b, -b))
    return (positive + logs).exp() - (negative + logs).exp()


forward = functools.partial(steps.forward, solve=solve)
backward = functools.partial(steps.backward, solve=solve)
