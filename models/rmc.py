"""The Relational Memory Core of Santoro et al. 2018 (arXiv 1806.01822), in both forms that results were published for.

Axes as everywhere, and S memory slots, R = S + 1 rows (the slots, then the input), N heads, K key size, D head size,
F = N * D features of a row.
"""

import math

import torch
from torch import nn

from . import compiled
from .products import linear, one_step, product_dtype, step_linear
from .rmc_walk import Sizes, walk

GATE_STYLES = ("unit", "memory", "none")
VARIANTS = ("paper", "port")


class RelationalMemory(nn.Module):
    """A memory whose rows attend to each other and to the input at every step: output, memory = rmc(x, memory).

    With x' = W_in x + b and M the memory before the step (section 3 and appendix of the paper; where it leaves
    something open, its authors' code, Sonnet v1's relational_memory.py):

        for each block:
            q, k, v = LN(W_qkv [M; x'])                    in each head; q and k of keysize, v of headsize
            A = softmax(q k^T / sqrt(keysize)) v           the heads side by side
            [M; x'] <- LN([M; x'] + A)
            [M; x'] <- LN([M; x'] + MLP([M; x']))
        i, f = sigmoid(W_x x' + W_M tanh(M before) + bias)      equations 5 and 6; inputbias in i, forgetbias in f
        M = i * tanh(M after the blocks) + f * M before         equation 7; its rows side by side are the output

    input_size: features of x. memslots, headsize, numheads, numblocks, attmlplayers: sizes. keysize: headsize if None.
    forgetbias, inputbias: of the gates. gatestyle: "unit" gates every feature, "memory" every slot, "none" nothing: M
    is then what the blocks give.
    variant "paper": LN spans the features of one row (in W_qkv's case of all heads, queries, keys and values
    together); each block has its own W_qkv and LN, the MLP's layers are distinct, shared by the blocks, with ReLU
    between them; gate biases are constants; weights start from a normal of deviation 1/sqrt(inputs) cut at two
    deviations, biases at 0.
    variant "port", as L0SG/relational-rnn-pytorch has it: LN spans all rows and features of an example together, with
    a gain for each; all weights are shared by the blocks; the MLP is one layer applied attmlplayers times with a ReLU
    after each; gate biases are trained; weights start as torch starts them.

    Deviations from both: none in the result. What depends on the input alone is computed for all T at once, and in the
    paper's form the input row, which nothing reads after the last block, is left out there.
    """

    def __init__(
        self,
        input_size,
        headsize,
        numheads=1,
        memslots=1,
        numblocks=1,
        attmlplayers=2,
        keysize=None,
        gatestyle="unit",
        forgetbias=1.0,
        inputbias=0.0,
        variant="paper",
    ):
        for value, known in ((variant, VARIANTS), (gatestyle, GATE_STYLES)):
            if value not in known:
                raise ValueError(f"expected one of {', '.join(known)}, got {value!r}")
        super().__init__()
        self.memslots, self.headsize, self.numheads, self.numblocks = memslots, headsize, numheads, numblocks
        self.attmlplayers, self.keysize, self.gatestyle = attmlplayers, keysize or headsize, gatestyle
        self.port = variant == "port"
        self.input_size, self.mem_size = input_size, numheads * headsize
        self.output_size = memslots * self.mem_size
        features, qkv = self.mem_size, numheads * (2 * self.keysize + headsize)

        def norms(size):
            spans = [memslots + 1, size] if self.port else [size]
            return nn.ModuleList(nn.LayerNorm(spans) for _ in range(1 if self.port else numblocks))

        self.input_projector = nn.Linear(input_size, features)
        self.qkv_projector = nn.ModuleList(nn.Linear(features, qkv) for _ in range(1 if self.port else numblocks))
        self.qkv_norm, self.attention_norm, self.mlp_norm = norms(qkv), norms(features), norms(features)
        self.mlp = nn.ModuleList(nn.Linear(features, features) for _ in range(1 if self.port else attmlplayers))
        if gatestyle != "none":
            gates = 2 * (features if gatestyle == "unit" else 1)
            self.input_gates, self.memory_gates = nn.Linear(features, gates), nn.Linear(features, gates)
            bias = torch.tensor([float(inputbias), float(forgetbias)])
            if self.port:
                self.gate_bias = nn.Parameter(bias)
            else:
                self.register_buffer("gate_bias", bias, persistent=False)
        if not self.port:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    deviation = 1 / math.sqrt(module.in_features)
                    nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
                    nn.init.zeros_(module.bias)

    def initial_state(self, batch_size):
        """The first S rows of the identity, cut or padded with zeros to F features, for each example: (S, B, F)."""
        weight = self.input_projector.weight
        memory = torch.eye(self.memslots, self.mem_size, dtype=weight.dtype, device=weight.device)
        return memory[:, None].repeat(1, batch_size, 1)

    def forward(self, x, memory):
        """x (T, B, input_size), memory (S, B, F) -> output (T, B, S * F), memory (S, B, F) after the last step.

        Between the steps the memory is (B, S, F), so that the rows of an example lie together.
        """
        x = linear(x, self.input_projector.weight, self.input_projector.bias)
        compiled_walk = self.gatestyle == "unit" and self.numblocks == 1 and compiled.usable(memory, x)
        compiled_walk &= memory.dtype == self.attention_norm[0].weight.dtype == torch.float32
        # of a single step the memory's projection, too: one product reads the weights once
        rows = torch.cat([x, memory]) if compiled_walk and one_step(x) else x
        memory = memory.transpose(0, 1).contiguous()
        x_qkv = linear(rows, self.qkv_projector[0].weight, self.qkv_projector[0].bias)
        x_qkv, projected = x_qkv[: len(x)], x_qkv[len(x) :]
        if not self.port:
            x_qkv = self.qkv_norm[0](x_qkv)
        x_gates = None
        if self.gatestyle != "none":
            x_gates = linear(x, self.input_gates.weight, self.input_gates.bias)
            x_gates = x_gates.unflatten(-1, (2, -1)) + self.gate_bias[:, None]
            x_gates = x_gates.flatten(-2)
        if compiled_walk:
            memories = self._walk(x, x_qkv, x_gates, memory, projected)
        else:
            memories = self._loop(x, x_qkv, x_gates, memory)
        return memories.flatten(2), memories[-1].transpose(0, 1).clone(memory_format=torch.contiguous_format)

    def _walk(self, x, x_qkv, x_gates, memory, projected):
        """The steps by the compiled kernels of rmc_walk.py; projected (S, B, Q): W_qkv [M] + b of a single step."""
        sizes = (self.memslots, self.numheads, self.keysize, self.headsize, self.attmlplayers, self.port)
        norms = [self.qkv_norm[0], self.attention_norm[0], self.mlp_norm[0]]
        gains = [part.reshape(-1, part.shape[-1]) for norm in norms for part in (norm.weight, norm.bias)]
        products = [self.qkv_projector[0], *self.mlp, self.memory_gates]
        products = [part for module in products for part in (module.weight, module.bias)]
        inputs = (part.float().contiguous() for part in (x, x_qkv, x_gates))
        projected = projected.transpose(0, 1).float().contiguous()
        return walk(*inputs, memory, projected, Sizes(*sizes), gains, products, product_dtype(products[0]))

    def _loop(self, x, x_qkv, x_gates, memory):
        """The steps by torch's operations, on any device and in any form: the memory after each, (T, B, S, F)."""
        products = {
            name: step_linear(module.weight, module.bias)
            for name, module in self.named_modules()
            if name.startswith(("qkv_projector.", "mlp.", "memory_gates"))
        }
        x_gates = [None] * len(x) if x_gates is None else x_gates.unbind(0)
        steps = []
        for row, row_qkv, row_gates in zip(x.unbind(0), x_qkv.unbind(0), x_gates, strict=True):
            memory = self._gate(self._attend_over(memory, row, row_qkv, products), memory, row_gates, products)
            steps.append(memory)
        return torch.stack(steps)

    def _attend_over(self, memory, row, row_qkv, products):
        """The blocks: memory (B, S, F), the input's row (B, F) and its projection (B, N * (2K + D)) -> (B, S, F)."""
        rows = torch.cat([memory, row[:, None]], 1)
        for block in range(self.numblocks):
            own = 0 if self.port else block
            project, qkv_norm = products[f"qkv_projector.{own}"], self.qkv_norm[own]
            if block > 0:
                qkv = qkv_norm(project(rows))
            elif self.port:
                qkv = qkv_norm(torch.cat([project(memory), row_qkv[:, None]], 1))
            else:
                qkv = torch.cat([qkv_norm(project(memory)), row_qkv[:, None]], 1)
            if block + 1 == self.numblocks and not self.port:
                rows = rows[:, : self.memslots]
            rows = self.attention_norm[own](rows + self.attention(qkv, rows.shape[1]))
            rows = self.mlp_norm[own](rows + self._mlp(rows, products))
        return rows[:, : self.memslots]

    def attention(self, qkv, queries):
        """Projections (B, R, N * (2K + D)) -> what the first `queries` rows attend to, (B, queries, F)."""
        sizes = (self.keysize, self.keysize, self.headsize)
        q, k, v = qkv.unflatten(-1, (self.numheads, -1)).split(sizes, dim=-1)
        q = q[:, :queries] / math.sqrt(self.keysize)
        if self.memslots == 1:  # two rows: products element by element are faster than batched ones
            weights = (q[:, :, None] * k[:, None]).sum(-1).softmax(2)
            return (weights[..., None] * v[:, None]).sum(2).flatten(2)
        weights = torch.einsum("bqnk,brnk->bnqr", q, k).softmax(-1)
        return torch.einsum("bnqr,brnd->bqnd", weights, v).flatten(2)

    def _mlp(self, rows, products):
        """(B, R, F) -> (B, R, F)."""
        for layer in range(self.attmlplayers):
            if layer > 0 and not self.port:
                rows = torch.relu(rows)
            rows = products[f"mlp.{0 if self.port else layer}"](rows)
            if self.port:
                rows = torch.relu(rows)
        return rows

    def _gate(self, new, memory, row_gates, products):
        """What of `new` comes in and what of `memory` stays, both (B, S, F); row_gates (B, 2F), (B, 2) or None."""
        if self.gatestyle == "none":
            return new
        gates = row_gates[:, None] + products["memory_gates"](torch.tanh(memory))
        i, f = torch.sigmoid(gates).chunk(2, dim=-1)
        return torch.addcmul(f * memory, i, torch.tanh(new))


class RMC(nn.Module):
    """The core of the RMC language model: RelationalMemory, its output projected to the embedding size.

    emsize: E. The other arguments are RelationalMemory's. State: (memory,), memory (S, B, F). loop: Python walks time.
    """

    def __init__(self, emsize, **memory):
        super().__init__()
        self.memory = RelationalMemory(emsize, **memory)
        self.projector = nn.Linear(self.memory.output_size, emsize)
        self.input_size = self.output_size = emsize
        self.loop = True

    def initial_state(self, batch_size):
        """(memory,): the identity's first rows, (S, B, F)."""
        return (self.memory.initial_state(batch_size),)

    def forward(self, x, state):
        """x (T, B, E), state -> output (T, B, E), state after the last step in its dtype."""
        output, memory = self.memory(x, state[0])
        return linear(output, self.projector.weight, self.projector.bias), (memory.to(state[0].dtype),)
