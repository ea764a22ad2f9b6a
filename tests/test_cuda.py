"""The CUDA kernels, proven without a GPU: what NVRTC makes of them runs on numpy (ptx.py) and equals the reference."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import types
import warnings

import numpy as np
import on_numpy
import ptx
import pytest
import torch
from conftest import ROOT
from on_numpy import OnNumpy
from torch._subclasses.fake_tensor import FakeTensorMode

from models import forget_mult, rnn
from models.forget_mult import choose, cuda, nvrtc, operator, pooling, recurrence

if sys.platform != "linux":
    pytest.skip("CuPy and NVRTC are for Linux", allow_module_level=True)
import cupy

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
SHAPES = [(1, 1, 1), (7, 3, 5), (6, 2, 8)]
SOURCE = nvrtc.SOURCE.read_text(encoding="utf-8")
UNTOUCHED = cuda.submit


def relative(got, want):
    """Largest difference over the largest number."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def compare(call, inputs, dtype, tolerance):
    """A call's results and gradients in dtype by kernels, and in float64 by the reference: {name: relative error}."""
    found = []
    for backend, kind in ((None, dtype), ("reference", torch.float64)):
        leaves = {name: tensor.to(kind).double().to(kind).requires_grad_() for name, tensor in inputs.items()}
        outputs = call(backend, **leaves)
        torch.manual_seed(5)
        sum((out.double() * torch.randn(out.shape, dtype=torch.float64)).sum() for out in outputs).backward()
        made = {f"output {number}": out.detach() for number, out in enumerate(outputs)}
        found.append(made | {f"gradient by {name}": leaf.grad for name, leaf in leaves.items()})
    for name, want in found[1].items():
        assert torch.isfinite(found[0][name]).all() and relative(found[0][name], want) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mix", (True, False), ids=("mix", "sum"))
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
def test_recurrence(gpu, dtype, mix, reverse, monkeypatch):
    """Values and all gradients, one number and several a thread, aligned or not, from a state or from none."""
    torch.manual_seed(1)
    call = forget_mult if mix else recurrence
    for shape, enough in itertools.product(SHAPES, (1, 1 << 16)):
        monkeypatch.setattr(cuda, "ENOUGH", enough)
        inputs = {
            "gate": torch.rand(shape).to(dtype),
            "x": torch.randn(shape).to(dtype),
            "initial": torch.randn(shape[1:]).to(dtype),
        }
        compare(
            lambda backend, gate, x, initial: [call(gate, x, initial, reverse, backend or "cuda")],
            inputs, dtype, TOLERANCES[dtype],
        )  # fmt: skip
    widths = {int(name.rsplit("_", 1)[1]) for name, _, _ in gpu.launched}
    assert widths == {1, cuda.WIDTHS[dtype]}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("mode", "kinds"), pooling.MODES.items())
@pytest.mark.parametrize("candidate", pooling.CANDIDATES)
def test_pooling(gpu, dtype, mode, kinds, candidate):
    """Output, last state and all gradients, with zoneout's mask or a part of each update, in both directions."""
    torch.manual_seed(2)
    for reverse, part in ((False, "mask"), (True, "keep"), (False, "all")):
        steps, batch, features = 6, 3, 5
        inputs = {
            "gates": torch.randn(steps, batch, kinds * features).to(dtype),
            "initial": torch.randn(batch, features),
        }
        update = torch.rand(steps, batch, features) < 0.7 if part == "mask" else None
        settings = (update, 0.8 if part == "keep" else 1.0, reverse)

        def call(backend, gates, initial, settings=settings):
            return pooling.pool(gates, initial.to(torch.promote_types(gates.dtype, torch.float32)), mode, candidate,
                                *settings, backend)  # fmt: skip

        compare(call, inputs, dtype, TOLERANCES[dtype])
    assert len(gpu.launched) == 6 and {name.rsplit("_", 1)[1] for name, _, _ in gpu.launched} == {str(kinds)}


def test_gradcheck(gpu):
    """By torch's own differences, in float64."""
    torch.manual_seed(3)
    leaves = [torch.rand(3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    initial = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for reverse in (False, True):
        assert torch.autograd.gradcheck(lambda *parts, r=reverse: forget_mult(*parts, r, "cuda"), (*leaves, initial))
    gates = torch.randn(3, 2, 4 * 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda gates, c: pooling.pool(gates, c, "ifo", "tanh"), (gates, initial))


def test_gradients_of_any_strides(gpu):
    """A sum's gradient has one number for all; inputs may be transposed."""
    gate, x = torch.rand(5, 3, 7).transpose(0, 1), torch.randn(3, 5, 7)
    found = []
    for backend in ("cuda", "reference"):
        leaves = gate.clone().requires_grad_(), x.clone().requires_grad_()
        forget_mult(*leaves, backend=backend).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_half_goes_through_a_cast(gpu):
    """float16 in, float16 out."""
    gate, x = torch.rand(4, 2, 3), torch.randn(4, 2, 3)
    h = forget_mult(gate.half(), x.half(), backend="cuda")
    assert h.dtype == torch.float16 and relative(h, forget_mult(gate, x, backend="reference")) < 2e-3
    assert gpu.launched[0][0] == "forward_mix_float32_1"


RECURRENCE_BUGS = {
    "no bounds check": ("if (column >= columns) return;", "", "out-of-bounds"),
    "a step too many": ("step < steps; ++step", "step <= steps; ++step", "out-of-bounds"),
    "one column for all": ("blockIdx.x * blockDim.x + threadIdx.x", "blockIdx.x", "two threads write|another has"),
    "a block of 256": ("(Index)blockIdx.x * blockDim.x", "(Index)blockIdx.x * 256", None),
    "h of this step": ("load<T, W>(h + at + stride)", "load<T, W>(h + at)", None),
    "the wrong carry": ("total - total * g : total * g", "total * g : total * g", None),
    "rows for columns": ("(steps - 1) * columns + column : column", "column * steps : column * steps", "out-of-bounds"),
    "32 bits": ("typedef long long Index;", "typedef int Index;", "argument"),
    "no rounding": ("(bits + 0x7fffu + (bits >> 16 & 1)) >> 16", "bits >> 15", None),
}
POOLING_BUGS = {
    "c of this step": ("c[at + (u + 1) * stride]", "c[at + u * stride]", None),
    "rows beyond the last": ("if (done + u < steps) rows[u].read", "rows[u].read", "out-of-bounds"),
    "gates of another row": (
        "column / features * features * KINDS",
        "column / features * features",
        "two threads write",
    ),
    "no mask": ("!update || update[at]", "true", None),
    "the place of i": ("slopes[3 * features]", "slopes[2 * features]", None),
}


def without(*starts):
    """The source without the lines that start so: it compiles faster."""
    return "".join(line for line in SOURCE.splitlines(True) if not line.startswith(starts))


def caught(source, call, inputs, dtypes, monkeypatch):
    """What comparing a call by a broken source's kernels ends with: faults and wrong numbers, [(kind, text)]."""
    source = source.replace("ALL_OF(float64, double, 2)", "")
    monkeypatch.setattr(cuda, "THREADS", 8)
    OnNumpy(on_numpy.kernels(source), monkeypatch.setattr)
    found = []
    for dtype, reverse in itertools.product(dtypes, (False, True)):
        try:
            compare(lambda backend, r=reverse, **leaves: call(backend, r, **leaves), inputs, dtype, TOLERANCES[dtype])
        except (ptx.Fault, AssertionError) as error:
            found.append((type(error), str(error)))
    return found


def check_caught(found, message):
    """A message: every end is a Fault with it. None: wrong numbers."""
    assert found and all(kind is (ptx.Fault if message else AssertionError) for kind, _ in found), found
    assert not message or all(any(part in text for part in message.split("|")) for _, text in found), found


@pytest.mark.parametrize("bug", RECURRENCE_BUGS)
def test_bugs_planted_in_the_recurrence_are_caught(bug, monkeypatch):
    """Each makes numbers wrong or ends in a Fault that names it."""
    right, wrong, message = RECURRENCE_BUGS[bug]
    assert right in SOURCE
    source = without("    POOLING(NAME##")
    torch.manual_seed(4)
    inputs = {name: torch.rand(5, 3, 7) for name in ("gate", "x")}

    def call(backend, reverse, gate, x):
        return [forget_mult(gate, x, None, reverse, backend or "cuda")]

    dtypes = (torch.float32, torch.bfloat16)
    check_caught(caught(source.replace(right, wrong), call, inputs, dtypes, monkeypatch), message)


@pytest.mark.parametrize("bug", POOLING_BUGS)
def test_bugs_planted_in_the_pooling_are_caught(bug, monkeypatch):
    """Likewise."""
    right, wrong, message = POOLING_BUGS[bug]
    assert right in SOURCE
    torch.manual_seed(4)
    inputs = {"gates": torch.randn(5, 3, 4 * 7), "initial": torch.randn(3, 7)}
    update = torch.rand(5, 3, 7) < 0.5

    def call(backend, reverse, gates, initial):
        initial = initial.to(torch.promote_types(gates.dtype, torch.float32))
        return pooling.pool(gates, initial, "ifo", "tanh", update, 1.0, reverse, backend)

    source = without("    RECURRENCE(", "    POOLING(NAME##_2", "    POOLING(NAME##_3", "ALL_OF(bfloat16")
    check_caught(caught(source.replace(right, wrong), call, inputs, (torch.float32,), monkeypatch), message)


def test_a_width_that_does_not_fit_is_caught(gpu, monkeypatch):
    """Four columns a thread where the rows have 15, or where an address is odd."""
    monkeypatch.setattr(cuda, "width", lambda *arguments: 4)
    with pytest.raises(ptx.Fault, match=r"out-of-bounds|unaligned|two threads"):
        forget_mult(torch.rand(5, 3, 5), torch.rand(5, 3, 5), backend="cuda")
    odd = torch.rand(5 * 4 * 4 + 1)[1:].view(5, 4, 4)
    with pytest.raises(ptx.Fault, match="unaligned"):
        forget_mult(odd, odd, backend="cuda")


def test_loads_and_stores(gpu):
    """Each number is read once and written once: bytes per element, forward and backward."""
    gate, x = (torch.rand(16, 3, 7, requires_grad=True) for _ in range(2))
    h = forget_mult(gate, x, backend="cuda")
    assert sum(gpu.memory.loaded.values()) == (2 * 16 + 1) * 21 * 4 and gpu.memory.stored.total() == 16 * 21 * 4
    h.sum().backward()
    assert gpu.memory.loaded.total() == (4 * 16 - 1 + 1) * 21 * 4 and gpu.memory.stored.total() == (2 * 16 + 1) * 21 * 4
    gates = torch.rand(16, 3, 3 * 7, requires_grad=True)
    output, _ = pooling.pool(gates, torch.zeros(3, 7), "fo", "tanh")
    assert gpu.memory.loaded.total() == (3 * 16 + 1) * 21 * 4 and gpu.memory.stored.total() == 2 * 16 * 21 * 4
    output.sum().backward()
    assert gpu.memory.loaded.total() == (5 * 16 + 2) * 21 * 4 and gpu.memory.stored.total() == (3 * 16 + 1) * 21 * 4


def test_every_architecture(tmp_path):
    """NVRTC makes machine code for each that it knows, from sm_75 on; ptxas, if it is here, tells of no spills."""
    path = nvrtc.library()
    every = nvrtc.architectures(path)
    assert min(every) == 75 and len(every) >= 10
    for architecture in (every[0], every[-1]):
        assert nvrtc.compiled(SOURCE, f"sm_{architecture}", path).startswith(b"\x7fELF")
    ptxas = shutil.which("ptxas", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    for architecture in every:
        text = nvrtc.compiled(SOURCE, f"compute_{architecture}", path)
        assert re.search(rf"\.target sm_{architecture}\b", text) and text.count(".entry ") == 42
        if ptxas and architecture in (80, 90):
            (tmp_path / "k.ptx").write_text(text)
            command = [ptxas, "-v", f"-arch=sm_{architecture}", str(tmp_path / "k.ptx"), "-o", str(tmp_path / "k")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            assert said.count("Used ") == 42
            assert set(re.findall(r"(\d+) bytes (?:stack frame|spill \w+)", said)) == {"0"}


class Driver:
    """Records what cuda.submit does on a device that is not there."""

    def __init__(self, monkeypatch):
        self.devices, self.calls, self.current = [], [], "first"
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (self.current, device.index))
        stream = types.SimpleNamespace(from_external=lambda stream: ("cupy's of", *stream))
        monkeypatch.setattr(cupy.cuda, "Stream", stream)
        monkeypatch.setattr(cuda, "_module", lambda index: types.SimpleNamespace(get_function=self.function))

    @contextlib.contextmanager
    def device(self, device):
        self.devices.append(device)
        yield
        self.devices.pop()

    def function(self, name):
        return lambda *arguments, stream: self.calls.append((name, *arguments, stream, list(self.devices)))


def test_a_launch(monkeypatch, kernels):
    """On the tensor's device and the stream that is current then, taken anew; types as the kernel's parameters."""
    driver, device = Driver(monkeypatch), torch.device("cuda", 3)
    arguments = 0, 16, np.int64(5), np.int64(300), np.int32(1)
    cuda.submit(device, "forward_mix_float32_1", 7, arguments)
    driver.current = "second"
    cuda.submit(device, "forward_mix_float32_1", 7, arguments)
    for call, stream in zip(driver.calls, ("first", "second"), strict=True):
        assert call == (
            "forward_mix_float32_1", (7, 1, 1), (cuda.THREADS, 1, 1), arguments, ("cupy's of", stream, 3), [device]
        )  # fmt: skip
    launched = []
    monkeypatch.setattr(cuda, "submit", lambda *call: launched.append(call))
    gate, x = torch.rand(2, 129, 3), torch.rand(2, 129, 3)
    cuda.forward(gate, x, torch.zeros(129, 3), True, False)
    ((_, name, blocks, given),) = launched
    assert blocks == 4 and blocks * cuda.THREADS >= 129 * 3 > (blocks - 1) * cuda.THREADS
    assert given[:2] == (gate.data_ptr(), x.data_ptr()) and given[4:] == (2, 129 * 3, 0)
    assert len(given) == len(kernels[name].parameters)


def test_tensors_that_no_kernel_could_read(gpu):
    """Strided ones, and ones of two devices."""
    with pytest.raises(ValueError, match="contiguous tensors of one device"):
        cuda.launch("forward_mix_float32_1", 1, [torch.rand(3, 2).t()])
    with pytest.raises(ValueError, match="contiguous tensors of one device"):
        cuda.launch("forward_mix_float32_1", 1, [torch.rand(3), None, torch.empty(3, device="meta")])
    with pytest.raises(ValueError, match="takes tensors on a GPU, got cpu"):
        UNTOUCHED(torch.device("cpu"), "forward_mix_float32_1", 1, ())
    empty = torch.empty(4, 0, 3)
    assert forget_mult(empty, empty, backend="cuda").shape == (4, 0, 3) and not gpu.launched


@pytest.mark.skipif(torch.cuda.is_available(), reason="a launch of a kernel that is not there; tests/test_gpu.py")
def test_cupy_takes_the_arguments(monkeypatch):
    """The real one converts them, and only then misses the driver; a tensor it would refuse."""
    launched = []
    monkeypatch.setattr(cuda, "submit", lambda *call: launched.append(call))
    gates, c = torch.rand(2, 3, 8), torch.zeros(2, 3, 4)
    cuda.forward(c, c, c[0], True, False)
    cuda.pool(gates, c[0], torch.empty(0, 3, 4, dtype=torch.bool), 1.0, 2, 0, False, c, c)
    function = cupy.cuda.function.Function.__new__(cupy.cuda.function.Function)
    stream = types.SimpleNamespace(ptr=0)
    for _, _, blocks, arguments in launched:
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorInsufficientDriver"):
            function((blocks, 1, 1), (cuda.THREADS, 1, 1), arguments, stream=stream)
    with pytest.raises(TypeError):
        function((1, 1, 1), (1, 1, 1), (c,), stream=stream)
    assert len(launched) == 2


def test_shapes_and_devices_of_tensors_that_are_not_there(monkeypatch):
    """torch's fake tensors on a GPU: what comes out lies there too, gradients as well."""
    monkeypatch.setattr(cuda, "usable", lambda device: True)
    with FakeTensorMode(), torch.no_grad():  # a torch without CUDA differentiates nothing there
        gate, x, initial = (torch.rand(shape, device="cuda") for shape in ((5, 2, 3), (5, 2, 3), (2, 3)))
        assert choose(x) == "cuda"
        h = forget_mult(gate, x, initial)
        made = operator.solve_backward(h, gate, x, h, initial, True, False, "cuda")
        assert [tuple(part.shape) for part in (h, *made)] == [(5, 2, 3)] * 3 + [(2, 3)]
        assert {part.device.type for part in (h, *made)} == {"cuda"}


@pytest.mark.parametrize("model", ("LSTM", "GRU"))
def test_recurrences_are_not_computed_in_float16(monkeypatch, model):
    """Under a GPU's autocast, for bfloat16, the library's kernels get float32 and autocast is off, however called."""
    seen, states = [], 2 if model == "LSTM" else 1

    def kernel(x, state, *given):
        tensors = [x, *(given[0] if given else ())]
        seen.append((torch.is_autocast_enabled("cuda"), *{part.dtype for part in tensors}))
        return x, *(torch.zeros(1, 3, 7, device="cuda") for _ in range(states))

    monkeypatch.setitem(rnn.LIBRARY, model, kernel)
    monkeypatch.setattr(torch.nn.RNNBase, "reset_parameters", lambda self: None)  # no random numbers there
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        core, x = rnn.RNN(model, 7, 7, 1), torch.empty(5, 3, 7)
        state = core.initial_state(3)
        torch.set_autocast_enabled("cuda", True)
        try:
            w_ih, w_hh, *biases = rnn.layer_weights(core.rnn)
            rnn.run_layer(model, x.bfloat16(), (w_ih, w_hh.bfloat16(), *biases), state)
            monkeypatch.setattr(core.rnn, "forward", lambda x, *state: (kernel(x, state)[0], state[0]))
            core(x, state)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert seen == [(False, torch.float32)] * 2


def test_without_a_gpu_torch_does_it(monkeypatch):
    """One warning says what is missing and what to install; then torch's operations."""
    for missing, said in (("cupy.cuda.function", "cupy"), (None, "Error")):
        with monkeypatch.context() as context, warnings.catch_warnings(record=True) as caught_warnings:
            warnings.simplefilter("always")
            for cached in (cuda._obstacle, cuda._warn, cuda._module):
                cached.cache_clear()
            if missing:
                context.setitem(sys.modules, missing, None)
            device = types.SimpleNamespace(index=0)
            if torch.cuda.is_available() and not missing:
                continue
            assert not cuda.usable(device) and not cuda.usable(device)
            (warning,) = caught_warnings
            assert said in str(warning.message) and "pip install cupy-cuda1" in str(warning.message)
    for cached in (cuda._obstacle, cuda._warn, cuda._module):
        cached.cache_clear()
    assert cuda.packages("13.0") == "cupy-cuda13x pynvrtc==9.2 nvidia-cuda-nvrtc"
    assert cuda.packages("12.8") == "cupy-cuda12x pynvrtc==9.2 nvidia-cuda-nvrtc-cu12"


def test_nothing_is_imported_before_a_gpu_asks():
    """models, and a recurrence on the CPU, leave CuPy and pynvrtc alone."""
    code = (
        "import sys, torch, models; models.forget_mult(torch.rand(2, 1, 3), torch.rand(2, 1, 3)); "
        "sys.exit('cupy' in sys.modules or 'pynvrtc' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_kernels_are_kept(tmp_path, monkeypatch):
    """Compiled once for a source, an architecture and an NVRTC; where nothing can be written, each time."""
    count = []
    monkeypatch.setenv("RECURRENT_LM_KERNELS", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "compiled", lambda source, target, path: count.append(target) or target.encode())
    assert nvrtc.kernels(80) == nvrtc.kernels(80) == b"sm_80" and nvrtc.kernels(90) == b"sm_90"
    assert count == ["sm_80", "sm_90"] and len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(nvrtc, "OPTIONS", ("--std=c++20",))
    nvrtc.kernels(80)
    monkeypatch.setattr(nvrtc, "version", lambda path: (99, 9))
    nvrtc.kernels(80)
    assert count[2:] == ["sm_80", "sm_80"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECURRENT_LM_KERNELS", str(tmp_path / "file" / "below"))
    assert nvrtc.kernels(80) == nvrtc.kernels(80) and len(count) == 6


def test_the_compilers_log_is_the_error():
    """Line and reason."""
    with pytest.raises(Exception, match=r"(?s)forget_mult\.cu.*error.*nothing"):
        nvrtc.compiled("__global__ void k() { nothing; }", "compute_80", nvrtc.library())
