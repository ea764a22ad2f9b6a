"""Devices, allocator, precision, random numbers and clocks, with stand-ins for the GPU."""

import copy
import ctypes
import io
import platform
import resource
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from models import RMC, build, compiled
from utils import UserError, runtime, trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PRODUCTS = "oneDNN" if runtime.use_onednn(True) else "default"
runtime.use_onednn(False)


def flags(**changes):
    """What cli.add_runtime's flags give."""
    defaults = {"cuda": False, "threads": None, "amp": "off"}
    defaults |= {"tf32": False, "tune_allocator": True, "flush_denormal": True, "onednn": True, "numba": True}
    return Namespace(**defaults | changes)


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


def denormals_are_kept():
    return bool((torch.tensor([1e-40]) * 1).item())


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as torch.cuda's questions go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Imaginary {device.type} X1")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_cuda_without_a_gpu_is_refused(no_gpu):
    """One line that says what to do."""
    with pytest.raises(UserError, match=r"^--cuda[^\n]*sees no GPU[^\n]*without --cuda[^\n]*$"):
        runtime.setup(flags(cuda=True))


def test_cuda_with_a_gpu_is_used(gpu, settings):
    """Device and name, and no hint to use it."""
    device, line = runtime.setup(flags(cuda=True))
    assert device == CUDA
    assert "Imaginary cuda X1" in line and "products float32" in line
    assert "--cuda" not in line


def test_an_idle_gpu_is_mentioned(gpu, settings):
    """The CPU is used, and the line says that it need not be."""
    device, line = runtime.setup(flags())
    assert device == CPU
    assert "run with --cuda" in line and "Imaginary" not in line


def test_setup_says_what_holds(no_gpu, settings, monkeypatch):
    """Threads, allocator, denormals, products, precision: each is set and named; no GPU, no hint."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False, "avx512_bf16": True})
    device, line = runtime.setup(flags(threads=2, amp="bf16"))
    assert device == CPU
    assert torch.get_num_threads() == 2
    assert not denormals_are_kept()
    parts = line.split(" | ")
    assert parts[0].startswith("device cpu (")
    assert parts[1:] == [
        "threads 2", "allocator tuned", "denormals flushed", f"products {PRODUCTS}", "kernels numba", "amp bf16",
    ]  # fmt: skip
    assert compiled.wanted
    assert "\n" not in line and "--cuda" not in line


@pytest.mark.parametrize(("amp", "hints"), (("bf16", 1), ("off", 0)))
def test_bfloat16_without_units_for_it_gets_a_hint(no_gpu, settings, monkeypatch, amp, hints):
    """Where it is asked for."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False, "avx512_bf16": False})
    assert runtime.setup(flags(amp=amp))[1].count("no units for bfloat16") == hints


def test_settings_can_be_left_alone(no_gpu, settings, monkeypatch):
    """Without --threads torch's choice stays; --no-tune-allocator, --no-flush-denormal."""
    monkeypatch.setattr(runtime, "keep_memory", lambda: pytest.fail("the allocator was tuned"))
    torch.set_num_threads(2)
    _, line = runtime.setup(flags(tune_allocator=False, flush_denormal=False, onednn=False, numba=False))
    assert denormals_are_kept()
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert not compiled.wanted
    assert line.split(" | ")[1:] == [
        "threads 2", "allocator default", "denormals kept", "products default", "kernels torch", "amp off",
    ]  # fmt: skip


def test_onednn_is_used_only_where_it_computes_in_float32(settings, monkeypatch):
    """The products of this machine are float32 whatever the setting; one that rounds to bfloat16 is found out."""
    left, right = torch.randn(257, 263), torch.randn(263, 269)
    for wanted in (False, True):
        used = runtime.use_onednn(wanted)
        assert used <= wanted
        assert relative_error(left @ right, left.double() @ right.double()) < 1e-6
    product = torch.Tensor.__matmul__

    def rounding(left, right):
        if torch.backends.mkldnn.matmul.fp32_precision == "ieee" or left.dtype == torch.float64:
            return product(left, right)
        return product(left.bfloat16().double(), right.bfloat16().double()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert runtime.use_onednn(True) is False
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert runtime.use_onednn(True) is False


@pytest.mark.parametrize(
    ("name", "chosen"),
    (("AMD EPYC", True), ("Intel(R) Xeon(R) Processor @ 2.80GHz", False), ("aarch64", True)),
)
def test_onednn_is_not_for_intel_unless_asked_for(settings, monkeypatch, name, chosen):
    """MKL is faster there; --onednn beats the name."""
    monkeypatch.setattr(runtime, "processor", lambda: name)
    can = runtime.use_onednn(True)
    assert runtime.use_onednn(None) is (can and chosen)
    assert runtime.use_onednn(False) is False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept():
    """Five blocks that come and go cost the pages of less than two; blocks that live side by side are apart."""
    size = 64 << 20
    assert runtime.keep_memory() is True
    assert runtime.keep_memory() is True
    torch.ones(size, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for value in range(5):
        block = torch.full((size,), value, dtype=torch.uint8)
        del block
    pages = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()
    assert pages < 2 * size
    blocks = [torch.full((size // 8,), value, dtype=torch.uint8) for value in range(5)]
    assert all((block == value).all() for value, block in enumerate(blocks))


def test_other_c_libraries_are_left_alone(monkeypatch):
    """False, and nothing is called."""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("a C library was opened"))
    assert runtime.keep_memory() is False


def test_a_refused_setting_is_not_called_tuned(monkeypatch):
    """glibc answers 1 for what it accepts."""
    answers = iter((1, 0, 1))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Namespace(mallopt=lambda option, value: next(answers)))
    assert runtime.keep_memory() is False
    assert not list(answers)


@pytest.mark.parametrize(("amp", "dtype"), (("off", torch.float32), ("bf16", torch.bfloat16)))
def test_autocast(amp, dtype):
    """The type of products; the softmax stays in float32, and nothing is left behind."""
    x, w = torch.randn(3, 5), torch.randn(7, 5)
    with runtime.autocast(CPU, amp):
        product = torch.nn.functional.linear(x, w)
        assert product.dtype == dtype
        assert torch.nn.functional.cross_entropy(product, torch.tensor([0, 1, 2])).dtype == torch.float32
    assert torch.nn.functional.linear(x, w).dtype == torch.float32


def test_rng_state_round_trip(monkeypatch):
    """The same draws again, also after a trip through a file; what a GPU of another machine saved is passed over."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    state = runtime.rng_state()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    first = torch.rand(17)
    assert not torch.equal(torch.rand(17), first)
    for back in (state, torch.load(file, weights_only=True), {**state, "cuda": [torch.zeros(3)]}):
        runtime.set_rng_state(back)
        assert torch.equal(torch.rand(17), first)


def test_rng_states_of_gpus(gpu, monkeypatch):
    """All are kept, each goes back to its own GPU, those without a GPU are passed over."""
    put = []
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["a", "b", "c"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: put.append((index, state)))
    state = runtime.rng_state()
    assert state["cuda"] == ["a", "b", "c"]
    runtime.set_rng_state(state)
    assert put == [(0, "a"), (1, "b")]


def test_clock_on_the_cpu(monkeypatch):
    """Milliseconds between two readings of the monotonic counter."""
    readings = iter((10.0, 10.25, 17.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    clock = runtime.Clock(CPU)
    first, second, third = clock.mark(), clock.mark(), clock.mark()
    assert clock.milliseconds(first, second) == 250
    assert clock.milliseconds(first, third) == 7000


def test_clock_on_a_gpu_waits_for_nothing_but_the_end(monkeypatch):
    """A mark records an event that can be timed; only asking for a time waits, and only for the later event."""
    calls = []

    class Event:
        def __init__(self, enable_timing=False):
            self.number = sum(call[0] == "new" for call in calls)
            calls.append(("new", self.number, enable_timing))

        def record(self):
            calls.append(("record", self.number))

        def synchronize(self):
            calls.append(("synchronize", self.number))

        def elapsed_time(self, end):
            calls.append(("elapsed", self.number, end.number))
            return 12.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: pytest.fail("waited for the whole device"))
    clock = runtime.Clock(CUDA)
    start, forward, end = clock.mark(), clock.mark(), clock.mark()
    assert calls == [call for number in range(3) for call in (("new", number, True), ("record", number))]
    calls.clear()
    assert clock.milliseconds(start, forward) == 12.5
    assert calls == [("synchronize", 1), ("elapsed", 0, 1)]
    calls.clear()
    assert clock.milliseconds(start, end) == 12.5
    assert calls == [("synchronize", 2), ("elapsed", 0, 2)]


def test_describe(gpu, monkeypatch):
    """The GPU's name; the processor's by /proc/cpuinfo, by the platform elsewhere."""
    assert runtime.describe(CUDA) == "Imaginary cuda X1"
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    if names:
        assert runtime.describe(CPU) == f"cpu ({names[0].split(': ')[1]})"
    monkeypatch.setattr(runtime.os.path, "exists", lambda path: False)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "z80")
    assert runtime.describe(CPU) == "cpu (z80)"


def test_peak_memory(monkeypatch):
    """In MiB: what the GPU's allocator says; of a process what the system does, in KiB or on macOS in bytes."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 << 20)
    assert runtime.peak_memory(CUDA) == 7
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        assert runtime.peak_memory(CPU) > 0.99 * int(lines["VmHWM"].split()[0]) / 1024
    monkeypatch.setattr(resource, "getrusage", lambda who: Namespace(ru_maxrss=11 << 20))
    for system, mebibytes in (("linux", 11 << 10), ("darwin", 11)):
        monkeypatch.setattr(sys, "platform", system)
        assert runtime.peak_memory(CPU) == mebibytes


IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
for package in map(importlib.import_module, ("data", "models", "utils")):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
for script in pathlib.Path().glob("*.py"):
    importlib.import_module(script.stem)
print(*sorted(sys.modules), sep="\\n")
"""


def test_importing_everything_imports_no_cuda_package_and_no_plots():
    """They are imported where they are needed: a machine without a GPU never loads them, and --help is quick."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=root, capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert {"train_rnn", "generate", "evaluate", "benchmark", "models.rnn", "utils.report", "data.prepare"} <= modules
    assert not modules & {"cupy", "cupy_backends", "pynvrtc", "matplotlib"}


class InTurn(torch.nn.Module):
    """What DataParallel(dim=1) does, without GPUs: every tensor split along dim 1, one call a part, results joined."""

    def __init__(self, module, parts):
        super().__init__()
        self.module, self.parts = module, parts

    def forward(self, tokens, targets, state):
        split = zip(*(tensor.chunk(self.parts, 1) for tensor in (tokens, targets, *state)), strict=True)
        results = [self.module(part[0], part[1], part[2:]) for part in split]
        loss, regularizer, count, states = zip(*results, strict=True)
        joined = tuple(torch.cat(parts, 1) for parts in zip(*states, strict=True))
        return torch.cat(loss, 1), torch.cat(regularizer, 1), torch.cat(count, 1), joined


DEVICES = {
    "LSTM": ("rnn", {"model": "LSTM", "emsize": 5, "nhid": 7, "nlayers": 2}),
    "RMC": ("rmc", {"emsize": 5, "headsize": 3}),
    "RMC adaptive": ("rmc", {"emsize": 5, "headsize": 3}),
    "QRNN": ("qrnn", {"emsize": 5, "nhid": 7, "nlayers": 2, "window": 3, "mode": "ifo"}),
    "AWD-LSTM split": ("awd", {"model": "LSTM", "emsize": 5, "nhid": 7, "nlayers": 3, "tied": True}),
    "AWD-QRNN": ("awd", {"model": "QRNN", "emsize": 5, "nhid": 7, "nlayers": 3, "tied": True}),
}


@pytest.mark.parametrize("config", DEVICES)
def test_a_step_on_several_devices_equals_one_on_one(config):
    """Loss, count, gradient norm, state and updated weights; a target paired with another column's word would show."""
    torch.manual_seed(0)
    family = dict(zip(("family", "core"), DEVICES[config], strict=True))
    others = {"cutoffs": [3, 7] if config in ("RMC adaptive", "AWD-LSTM split") else None}
    if config.startswith("AWD"):
        others |= {"splitcross": True, "alpha": 2.0, "beta": 1.0, "ar_norm": "l2"}
    whole = build({**family, "vocab_size": 13, "tied": config.startswith("AWD"), **others}).double()
    parts = copy.deepcopy(whole)
    tokens, targets = torch.randint(13, (2, 3, 12))
    args = Namespace(amp="off", clip=0.1, average="targets", bptt=5, variable_bptt=False)
    results = []
    for model, stepped in ((whole, whole), (parts, InTurn(parts, 3))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        clock = runtime.Clock(torch.device("cpu"))
        state = model.initial_state(12)
        results.append(trainer.training_step(stepped, optimizer, tokens, targets, state, args, clock)[:4])
    (loss, count, norm, state), (loss_2, count_2, norm_2, state_2) = results
    assert count == count_2 == 36
    torch.testing.assert_close((loss, norm, *state), (loss_2, norm_2, *state_2), rtol=1e-10, atol=0)
    for (name, ours), theirs in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-10 * ours.norm(), name


def test_several_gpus_get_replicas_along_dim_1(monkeypatch):
    """DataParallel where there is more than one GPU, the model itself elsewhere."""
    model = torch.nn.Linear(2, 2)
    assert runtime.data_parallel(model, torch.device("cpu")) == (model, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert runtime.data_parallel(model, torch.device("cuda")) == (model, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    made = []
    monkeypatch.setattr(torch.nn, "DataParallel", lambda *args, **kwargs: made.append((args, kwargs)) or "replicas")
    assert runtime.data_parallel(model, torch.device("cuda")) == ("replicas", 3)
    assert made == [((model,), {"dim": 1})]


def passed(core, x, memory):
    """Output, memory after, and every gradient of a pass through an RMC."""
    core.zero_grad()
    output, (after,) = core(x, (memory,))
    (output.sum() + after.sum()).backward()
    gradient, x.grad = x.grad, None
    return [output, after, gradient, *(parameter.grad.clone() for parameter in core.parameters())]


@pytest.mark.parametrize("amp", (False, True))
def test_graphs_are_replayed_where_they_fit(monkeypatch, amp):
    """One is recorded for each shape of a window, some shapes at most; results, gradients and states are the core's.

    Autocast, if it is on, is so inside the core's pass alone, and what it converts is not kept."""
    torch.manual_seed(0)
    core, recorded, replayed = RMC(5, headsize=3, numheads=2), [], []

    def record(module, sample):
        recorded.append(tuple(part.shape for part in sample))
        assert not torch.is_autocast_enabled("cpu")
        eager = module.eager

        def watched(x, state):
            assert torch.is_autocast_enabled("cpu") == amp and not torch.is_autocast_cache_enabled()
            return eager(x, state)

        module.eager = watched
        assert all(part.data_ptr() != other.data_ptr() for part, other in zip(sample, given, strict=True))
        return lambda *parts: replayed.append(1) or module(*parts)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(runtime, "SHAPES", 2)
    plain = copy.deepcopy(core)
    runtime.graph(core)
    for steps in (7, 7, 3, 5, 7, 3):
        given = torch.randn(steps, 2, 5, requires_grad=True), torch.randn(1, 2, 6)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            for one, two in zip(*(passed(each, *given) for each in (core, plain)), strict=True):
                assert torch.equal(one, two)
    assert recorded == [((7, 2, 5), (1, 2, 6)), ((3, 2, 5), (1, 2, 6))] and len(replayed) == 5
    with torch.no_grad():
        core(given[0], given[1:])
    core.eval()
    core(given[0], given[1:])
    assert len(replayed) == 5


def test_compiled_passes(monkeypatch):
    """What torch.compile makes of an RMC's training passes gives the same output, memory and gradients as the loop."""
    torch.manual_seed(0)
    core, compiled_shapes = RMC(5, headsize=3, numheads=2), []
    plain, compile_really = copy.deepcopy(core), torch.compile

    def compile_seen(forward, **settings):
        made = compile_really(forward, **settings)
        return lambda x, state: compiled_shapes.append(x.shape) or made(x, state)

    monkeypatch.setattr(torch, "compile", compile_seen)
    runtime.compile_passes(core)
    given = torch.randn(2, 3, 5, requires_grad=True), torch.randn(1, 3, 6)
    for one, two in zip(*(passed(each, *given) for each in (core, plain)), strict=True):
        torch.testing.assert_close(one, two)
    core.eval()
    core(given[0], given[1:])
    assert compiled_shapes == [(2, 3, 5)]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler is not there"):
        runtime.compile_passes(core)


def test_tf32_is_asked_for(gpu, settings):
    """On a GPU products are float32 or TF32, as the flag says, and the line says so."""
    for wanted, precision, said in ((True, "tf32", "products TF32"), (False, "ieee", "products float32")):
        _, line = runtime.setup(flags(cuda=True, tf32=wanted))
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.rnn.fp32_precision == precision
        assert said in line
