"""One run in several processes, as torchrun starts them: each trains a part of the columns, the first does the rest."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from . import runtime

PATIENCE = timedelta(minutes=30)
"""How long the others wait for the first process, which evaluates and writes."""


class Processes:
    """The processes of this run. Without torchrun there is one, and every method gives back what it was given.

    rank: 0 for the one that evaluates, prints and writes. size: how many there are. All methods but the own_columns
    are calls that every process has to make, in the same order.
    """

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
            # Numbers that the CPU needs at once go their own way, so that no GPU is waited for.
            self.control = dist.new_group(backend="gloo", timeout=PATIENCE)

    def replicate(self, model):
        """The model to take steps with: gradients are averaged over the processes in its backward pass."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        # gradients lie in the buffers that are sent: neither copied nor twice in memory
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def own_columns(self, tensor):
        """This process's part of a tensor (..., B, ...) with B at dim 1."""
        return tensor.chunk(self.size, 1)[self.rank].contiguous()

    def draw_apart(self, seed):
        """From now on every process draws random numbers of its own, so that its columns have their own dropout masks.

        The first goes on with those that it would have alone, each other starts anew from `seed` and its rank.
        """
        if self.rank > 0:
            torch.manual_seed(seed + self.rank)

    def rng_states(self):
        """Where the random numbers of each process stand (runtime.rng_state), in the order of their ranks."""
        states = [runtime.rng_state()] * self.size
        if self.size > 1:
            dist.all_gather_object(states, states[self.rank], group=self.control)
        return states

    def set_rng_states(self, states):
        """Put back this process's part of what rng_states returned; a process that was not there yet keeps its own."""
        if self.rank < len(states):
            runtime.set_rng_state(states[self.rank])

    def all_columns(self, state):
        """Put a state, a tuple of tensors with B at dim 1, together from the parts of all processes."""
        if self.size == 1:
            return state
        joined = []
        for part in state:
            parts = [torch.empty_like(part) for _ in range(self.size)]
            dist.all_gather(parts, part.contiguous())
            joined.append(torch.cat(parts, 1))
        return tuple(joined)

    def total(self, tensor):
        """The sum of a tensor over all processes, a new tensor."""
        tensor = tensor.clone()
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def first_of(self, value):
        """What the first process has for a float or int, as a float."""
        return self._control(value, dist.broadcast, src=0)

    def any_of(self, number):
        """The largest of all processes' numbers, as a float: whether one of them wants to stop, for example."""
        return self._control(number, dist.all_reduce, op=dist.ReduceOp.MAX)

    def _control(self, value, call, **arguments):
        if self.size == 1:
            return value
        tensor = torch.tensor(float(value), dtype=torch.float64)
        call(tensor, group=self.control, **arguments)
        return tensor.item()

    def leave(self):
        """The end of the run for this process."""
        if self.size > 1:
            dist.barrier(group=self.control)
            dist.destroy_process_group()
