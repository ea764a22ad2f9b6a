"""The RMC against its equations written out, against the port itself, and what its gates and rows must not do."""

import contextlib
import copy
import itertools
import math

import pytest
import torch

from models import RNN, LanguageModel, RelationalMemory, build, compiled, rmc, rmc_walk
from models.rmc import GATE_STYLES, RMC, VARIANTS

SIZES = {"input_size": 7, "headsize": 5, "numheads": 3, "attmlplayers": 2, "keysize": 2}


def layer(variant, seed=0, **changes):
    """A RelationalMemory of odd sizes in float64, every parameter random, norms and gate biases too."""
    torch.manual_seed(seed)
    module = RelationalMemory(**(SIZES | changes), variant=variant).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def norm(rows, gain, bias, joint):
    """Layer norm of a list of vectors: each by itself, or all numbers of all rows together."""
    groups = [rows] if joint else [[row] for row in rows]
    result = []
    for group in groups:
        numbers = torch.cat(group)
        mean = numbers.sum() / len(numbers)
        deviation = (((numbers - mean) ** 2).sum() / len(numbers) + 1e-5).sqrt()
        result += [(row - mean) / deviation for row in group]
    if joint:
        return [row * g + b for row, g, b in zip(result, gain, bias, strict=True)]
    return [row * gain + bias for row in result]


def reference_step(m, x, memory, gatestyle):
    """One step of one example by the equations of the class: x (input,), memory a list of rows (F,)."""
    port = m.port

    def affine(linear, vector):
        return linear.weight @ vector + linear.bias

    row = affine(m.input_projector, x)
    rows = [*memory, row]
    for block in range(m.numblocks):
        own = 0 if port else block
        qkv = [affine(m.qkv_projector[own], r) for r in rows]
        qkv = norm(qkv, m.qkv_norm[own].weight, m.qkv_norm[own].bias, port)
        size = 2 * m.keysize + m.headsize
        attended = []
        for query_row in qkv:
            heads = []
            for head in range(m.numheads):
                own_part = slice(head * size, (head + 1) * size)
                q = query_row[own_part][: m.keysize]
                k = [r[own_part][m.keysize : 2 * m.keysize] for r in qkv]
                v = [r[own_part][2 * m.keysize :] for r in qkv]
                weights = [(q @ key / math.sqrt(m.keysize)).exp() for key in k]
                heads.append(sum(w * value for w, value in zip(weights, v, strict=True)) / sum(weights))
            attended.append(torch.cat(heads))
        rows = [r + a for r, a in zip(rows, attended, strict=True)]
        rows = norm(rows, m.attention_norm[own].weight, m.attention_norm[own].bias, port)
        outputs = []
        for r in rows:
            for number in range(m.attmlplayers):
                r = affine(m.mlp[0 if port else number], r)
                if port or number + 1 < m.attmlplayers:
                    r = r.clamp(min=0)
            outputs.append(r)
        rows = [r + o for r, o in zip(rows, outputs, strict=True)]
        rows = norm(rows, m.mlp_norm[own].weight, m.mlp_norm[own].bias, port)
    new = []
    for after, before in zip(rows[:-1], memory, strict=True):
        if gatestyle == "none":
            new.append(after)
            continue
        gates = affine(m.input_gates, row) + affine(m.memory_gates, before.tanh())
        half = len(gates) // 2
        i = 1 / (1 + (-(gates[:half] + m.gate_bias[0])).exp())
        f = 1 / (1 + (-(gates[half:] + m.gate_bias[1])).exp())
        new.append(i * after.tanh() + f * before)
    return new


def reference(m, x, memory, gatestyle):
    """x (T, B, input), memory (S, B, F) -> output (T, B, S * F), memory (S, B, F), example by example."""
    outputs, finals = [], []
    for b in range(x.shape[1]):
        rows = list(memory[:, b].unbind(0))
        steps = []
        for t in range(len(x)):
            rows = reference_step(m, x[t, b], rows, gatestyle)
            steps.append(torch.cat(rows))
        outputs.append(torch.stack(steps))
        finals.append(torch.stack(rows))
    return torch.stack(outputs, 1), torch.stack(finals, 1)


def gradients(m, outputs, inputs):
    """Gradients of a fixed mix of the outputs by name: of every parameter, and of x and the initial memory."""
    torch.manual_seed(5)
    mixes = [torch.randn(output.shape, dtype=torch.double).to(output.dtype) for output in outputs]
    loss = sum((mix * output).sum() for mix, output in zip(mixes, outputs, strict=True))
    named = {**dict(m.named_parameters()), **inputs}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, grads, strict=True))


def assert_close(ours, theirs, name, tolerance=1e-10):
    """Relative error by the norm; `name` is in the message."""
    error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-12)
    assert error < tolerance, (name, error.item())


CASES = list(itertools.product(VARIANTS, GATE_STYLES, (1, 3), (1, 2)))


@pytest.mark.parametrize(("variant", "gatestyle", "memslots", "numblocks"), CASES, ids=lambda value: str(value))
def test_equations(variant, gatestyle, memslots, numblocks):
    """Outputs, final memory, every gradient, in float64."""
    m = layer(variant, gatestyle=gatestyle, memslots=memslots, numblocks=numblocks)
    x = torch.randn(4, 2, 7, dtype=torch.double, requires_grad=True)
    memory = torch.randn(memslots, 2, 15, dtype=torch.double, requires_grad=True)
    inputs = {"x": x, "initial memory": memory}
    ours, theirs = m(x, memory), reference(m, x, memory, gatestyle)
    for name, a, b in zip(("output", "memory"), ours, theirs, strict=True):
        assert a.shape == b.shape
        assert_close(a, b, name)
    ours, theirs = gradients(m, ours, inputs), gradients(m, theirs, inputs)
    for name, gradient in ours.items():
        assert gradient is not None and gradient.norm() > 0, name
        assert_close(gradient, theirs[name], name)


WALKS = (
    {"memslots": 1},
    {"memslots": 3, "attmlplayers": 4},
    {"memslots": 2, "attmlplayers": 1, "numheads": 1, "headsize": 3},
    {"memslots": 1, "steps": 1, "batch": 1},
    {"memslots": 1, "steps": 2, "batch": 37, "keysize": 17},
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changes", WALKS, ids=str)
def test_the_compiled_walk_follows_the_equations(variant, changes):
    """In float32, against the equations in float64: outputs, final memory, every gradient.

    Batches that do not fill the parts that threads share and ones that fill them unevenly.
    """
    changes = dict(changes)
    steps, batch = changes.pop("steps", 5), changes.pop("batch", 3)
    exact = layer(variant, seed=11, **changes)
    m = copy.deepcopy(exact).float()
    memory = torch.randn(m.memslots, batch, m.mem_size)
    given = {"x": torch.randn(steps, batch, 7), "initial memory": memory}
    inputs = [
        {name: part.to(dtype).requires_grad_() for name, part in given.items()} for dtype in (torch.float, torch.double)
    ]
    ours, theirs = m(*inputs[0].values()), reference(exact, *inputs[1].values(), "unit")
    for name, a, b in zip(("output", "memory"), ours, theirs, strict=True):
        assert_close(a, b, name, 2e-6)
    ours, theirs = gradients(m, ours, inputs[0]), gradients(exact, theirs, inputs[1])
    for name, gradient in ours.items():
        assert gradient.norm() > 0 and gradient.dtype == torch.float32, name
        assert_close(gradient, theirs[name], name, 1e-5)
    with torch.no_grad():
        assert torch.equal(m(*given.values())[0], m(*inputs[0].values())[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_compiled_walk_in_bfloat16(variant):
    """Under autocast it differs from torch's operations by what the rounding of the products makes of it."""
    m = layer(variant, seed=12, memslots=2).float()
    inputs = {"x": torch.randn(3, 5, 7).requires_grad_(), "initial memory": torch.randn(2, 5, 15).requires_grad_()}
    results = []
    for context in (contextlib.nullcontext(), compiled.torch_only()):
        with context, torch.autocast("cpu", torch.bfloat16):
            outputs = m(*inputs.values())
        assert outputs[0].dtype == torch.float32
        outputs = dict(zip(("output", "memory"), outputs, strict=True))
        results.append(outputs | gradients(m, outputs.values(), inputs))
    for name, ours in results[0].items():
        assert_close(ours, results[1][name].float(), name, 3e-2)


def test_who_is_walked_by_compiled_kernels(monkeypatch):
    """Cores of one block with gates of unit style, in float32 on a CPU, unless they are switched off."""
    calls = []
    monkeypatch.setattr(rmc, "walk", lambda *arguments: (calls.append(1), rmc_walk.walk(*arguments))[1])

    def walked(context=None, dtype=torch.float32, **changes):
        m, count = RelationalMemory(**(SIZES | changes)).to(dtype), len(calls)
        with context or contextlib.nullcontext():
            m(torch.randn(2, 3, 7, dtype=dtype), m.initial_state(3))
        return len(calls) > count

    assert walked() and walked(variant="port", memslots=2) and walked(torch.no_grad())
    assert not walked(compiled.torch_only()) and not walked(dtype=torch.float64) and not walked(dtype=torch.bfloat16)
    assert not walked(numblocks=2) and not walked(gatestyle="memory") and not walked(gatestyle="none")


def test_names_that_are_none():
    """ValueError instead of the paper's form."""
    for wrong in ({"variant": "Port"}, {"gatestyle": "units"}):
        with pytest.raises(ValueError, match="expected one of"):
            RelationalMemory(**(SIZES | wrong))
    RelationalMemory(**(SIZES | {"variant": "port", "forgetbias": 1, "inputbias": 0}))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "changes",
    [{"attmlplayers": 1}, {"attmlplayers": 5}, {"keysize": None}, {"numheads": 1, "headsize": 2, "memslots": 5}],
    ids=str,
)
def test_other_sizes(variant, changes):
    """One and five MLP layers, keys as wide as heads, more slots than features."""
    m = layer(variant, **changes)
    x = torch.randn(2, 3, 7, dtype=torch.double)
    memory = m.initial_state(3)
    for name, a, b in zip(("output", "memory"), m(x, memory), reference(m, x, memory, "unit"), strict=True):
        assert_close(a, b, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_equal_the_whole(variant):
    """Memory carried from chunk to chunk, T = 1 and B = 1 included."""
    m = layer(variant, memslots=2)
    x = torch.randn(6, 1, 7, dtype=torch.double)
    whole, final = m(x, m.initial_state(1))
    memory, parts = m.initial_state(1), []
    for chunk in x.split([1, 3, 2]):
        part, memory = m(chunk, memory)
        parts.append(part)
    assert_close(torch.cat(parts), whole, "output")
    assert_close(memory, final, "memory")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_single_steps_without_gradients(variant, slots, batch):
    """In float32, where they are computed another way: to 1e-5 those of the reference in float64."""
    m = layer(variant, memslots=slots)
    x = torch.randn(5, batch, 7, dtype=torch.double)
    want, final = reference(m, x, m.initial_state(batch), "unit")
    memory, steps = m.float().initial_state(batch), []
    for row in x.float():
        step, memory = m(row[None], memory)
        steps.append(step)
    for name, a, b in (("output", torch.cat(steps), want), ("memory", memory, final)):
        assert (a - b).norm() < 1e-5 * b.norm(), name


@pytest.mark.parametrize(("slots", "features"), [(1, 15), (3, 15), (5, 2)])
def test_initial_memory(slots, features):
    """Rows of the identity, padded or cut, the same for every example."""
    m = RelationalMemory(7, features, memslots=slots)
    memory = m.initial_state(4)
    assert memory.shape == (slots, 4, features)
    for s, b, f in itertools.product(range(slots), range(4), range(features)):
        assert memory[s, b, f] == (1.0 if s == f else 0.0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gatestyle", ["unit", "memory"])
def test_open_forget_gate_and_shut_input_gate_keep_the_memory(variant, gatestyle):
    """forgetbias +inf and inputbias -inf: the memory stays, whatever the input."""
    torch.manual_seed(2)
    gates = {"forgetbias": math.inf, "inputbias": -math.inf, "gatestyle": gatestyle}
    m = RelationalMemory(**SIZES, memslots=2, variant=variant, **gates)
    memory = torch.randn(2, 3, 15)
    output, after = m(torch.randn(5, 3, 7), memory)
    assert torch.equal(after, memory)
    assert torch.equal(output[2], memory.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_examples_do_not_see_each_other(variant):
    """The gradient of one column's output with respect to another's input and memory is zero."""
    m = layer(variant, memslots=3, numblocks=2)
    x = torch.randn(3, 4, 7, dtype=torch.double, requires_grad=True)
    memory = torch.randn(3, 4, 15, dtype=torch.double, requires_grad=True)
    output, _ = m(x, memory)
    for gradient in torch.autograd.grad(output[:, 1].sum(), (x, memory)):
        assert gradient[:, 1].abs().sum() > 0
        assert gradient[:, [0, 2, 3]].abs().sum() == 0


@pytest.mark.parametrize(("gatestyle", "width"), [("unit", 15), ("memory", 1)])
def test_gates_have_the_shape_of_their_style(gatestyle, width):
    """Slots, heads, batch and features all differ here, so that no axis passes for another."""
    m = layer("paper", gatestyle=gatestyle, memslots=2)
    assert m.input_gates.weight.shape == (2 * width, 15) == m.memory_gates.weight.shape


def test_the_layers_of_the_paper_are_distinct():
    """MLP layers, and the blocks' own projections and norms; the port shares them, as published."""
    paper, port = (layer(variant, attmlplayers=4, numblocks=3) for variant in VARIANTS)
    assert len(set(map(id, paper.mlp))) == 4 and len({p.data_ptr() for p in paper.mlp.parameters()}) == 8
    assert len(paper.qkv_projector) == len(paper.qkv_norm) == len(paper.mlp_norm) == len(paper.attention_norm) == 3
    assert len(port.mlp) == len(port.qkv_projector) == len(port.qkv_norm) == 1


@pytest.mark.parametrize(("variant", "parameters"), [("port", 10_667_072), ("paper", 11_842_622)])
def test_parameters_at_the_defaults_on_wikitext2(variant, parameters):
    """As published for the port; the paper's form has two MLP layers more and fewer gains."""
    core = {"emsize": 192, "memslots": 1, "headsize": 192, "numheads": 4, "numblocks": 1, "attmlplayers": 3}
    core |= {"keysize": 64, "gatestyle": "unit", "forgetbias": 1.0, "inputbias": 0.0, "variant": variant}
    config = {"family": "rmc", "core": core, "vocab_size": 33_278, "tied": True, "dropouti": 0.5, "dropout": 0.5}
    assert build(config).num_params() == parameters


def test_the_paper_starts_from_a_cut_normal():
    """Deviation 1/sqrt(inputs) before the cut at two deviations, biases at 0; gate biases are no parameters."""
    m = RelationalMemory(300, 128, numheads=4, variant="paper")
    weight = m.input_projector.weight.detach() * math.sqrt(300)
    assert weight.abs().max() <= 2 and weight.std() == pytest.approx(0.88, abs=0.01)
    assert all(module.bias.abs().max() == 0 for module in (m.mlp[0], m.input_gates, m.qkv_projector[0]))
    assert "gate_bias" not in m.state_dict()


def test_as_a_language_model():
    """The core projects to the embedding size, so that the head can be tied; chunks equal the whole, bf16 is close."""
    torch.manual_seed(0)
    core = RMC(7, headsize=5, numheads=3, memslots=2)
    model = LanguageModel(11, core, tied=True).eval()
    tokens = torch.randint(11, (5, 3))
    hidden, state = model.hidden(tokens, model.initial_state(3))
    assert hidden.shape == (5, 3, 7) and [part.shape for part in state] == [(2, 3, 15)]
    first, middle = model.hidden(tokens[:2], model.initial_state(3))
    second, _ = model.hidden(tokens[2:], middle)
    assert_close(torch.cat([first, second]), hidden, "hidden", 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_state = model.hidden(tokens, model.initial_state(3))
    assert low_state[0].dtype == torch.float32
    assert_close(low.float(), hidden, "bf16", 0.05)
    assert isinstance(RNN("LSTM", 7, 5, 1), torch.nn.Module)
