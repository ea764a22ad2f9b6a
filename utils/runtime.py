"""Device, threads, allocator, mixed precision, clocks: what depends on the machine and not on the model."""

import ctypes
import os
import platform
import resource
import shutil
import sys
import time
import warnings

import torch

from models import compiled

from . import UserError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's <malloc.h>


def setup(args):
    """Apply --cuda, --tf32, --threads, --tune-allocator, --flush-denormal, --onednn, --numba.

    Returns the device and a line that says what holds.

    Call it before the first large tensor. Raises UserError for --cuda without a GPU.
    """
    if args.cuda and not torch.cuda.is_available():
        raise UserError(
            f"--cuda: torch {torch.__version__} sees no GPU; run without --cuda, "
            f"or install a torch built for CUDA and its driver"
        )
    device = torch.device("cuda" if args.cuda else "cpu")
    if args.cuda and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if args.cuda:
        use_tf32(args.tf32, args.tf32 or args.amp == "bf16")
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = args.tune_allocator and keep_memory()
    # Threads that OpenMP starts later inherit the flag from this one.
    flushed = torch.set_flush_denormal(args.flush_denormal) and args.flush_denormal
    products = "oneDNN" if use_onednn(args.onednn) else "default"
    if args.cuda:
        products = "TF32" if args.tf32 else "float32, of recurrences TF32" if args.amp == "bf16" else "float32"
    compiled.use(args.numba)
    compiled.announce = lambda name: print(f"| compiling the kernel {name}, once", file=sys.stderr, flush=True)
    settings = [
        f"device {describe(device)}",
        f"threads {torch.get_num_threads()}",
        f"allocator {'tuned' if kept else 'default'}",
        f"denormals {'flushed' if flushed else 'kept'}",
        f"products {products}",
        f"kernels {'numba' if args.numba else 'torch'}",
        f"amp {args.amp}",
    ]
    if args.amp == "bf16" and not args.cuda and not has_bf16():
        settings.append("this processor has no units for bfloat16: --amp off trains faster")
    if torch.cuda.is_available() and not args.cuda:
        settings.append("a GPU is there: run with --cuda to use it")
    return device, " | ".join(settings)


def keep_memory():
    """Keep freed memory in the process: glibc returns large blocks after each batch and pays page faults for the next.

    Returns whether it was done (False where the C library is not glibc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20))
    done = [mallopt(option, value) == 1 for option, value in settings]
    return all(done)


def use_tf32(wanted, recurrent):
    """Compute a GPU's float32 products in TF32 (8 bits of exponent, 10 behind the point), or plainly.

    recurrent: those inside cuDNN's recurrences, which --amp bf16 leaves in float32, see models/rnn.py.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32" if wanted else "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if recurrent else "ieee"
    # weight drop hands cuDNN weights that do not lie together: it copies them, once a step, and says so once
    warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")


SHAPES = 8
"""Shapes of windows that graph and compile_passes prepare; others are computed as they come."""


class Passes(torch.nn.Module):
    """A core's pass over a window as torch.cuda.make_graphed_callables wants it: tensors in, tensors out.

    Autocast is as it was when this was made, without its cache: a weight that was converted before would not be
    converted again when a graph is replayed.
    """

    def __init__(self, core, forward, kind):
        super().__init__()
        self.core, self.eager = core, forward
        self.amp = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def forward(self, x, *state):
        """x (T, B, E), the state's tensors -> the output, the tensors of the state after."""
        with torch.autocast(*self.amp, cache_enabled=False):
            output, after = self.eager(x, state)
        return output, *after


def graph(core):
    """Record a core's training passes as CUDA graphs, one for each shape of a window, and replay them from then on.

    A loop over time in Python starts thousands of kernels a window, cuDNN's recurrence of an LSTM a dozen a step; a
    replayed graph is one launch. On one GPU.
    """
    eager = core.forward

    def record(x, state):
        sample = x.detach().clone().requires_grad_(x.requires_grad), *(part.detach().clone() for part in state)
        passes = Passes(core, eager, x.device.type)
        with torch.autocast(x.device.type, enabled=False):  # the backward pass is outside of it, too
            replay = torch.cuda.make_graphed_callables(passes, sample)

        def forward(x, state):
            output, *after = replay(x, *state)
            return output, tuple(after)

        return forward

    _prepare(core, record)


def compile_passes(core):
    """Compile a core's training passes by torch.compile, for each shape of a window when it first comes.

    A loop over time is unrolled. On a CPU the kernels of models/compiled.py stay out of what is compiled.
    Raises UserError where there is no compiler for C++.
    """
    compiler, eager = os.environ.get("CXX", "g++"), core.forward
    if not shutil.which(compiler):
        raise UserError(f"--compile needs a C++ compiler, and {compiler} is not there: install it, or name one in CXX")
    _prepare(core, lambda x, state: torch.compile(eager, dynamic=False))


def _prepare(core, make):
    """From now on a core's training passes are what make(x, state) gives when a shape of x (T, B, E) first comes."""
    eager, made = core.forward, {}

    def forward(x, state):
        known = x.shape in made
        if not (core.training and torch.is_grad_enabled()) or not (known or len(made) < SHAPES):
            return eager(x, state)
        if not known:
            made[x.shape] = make(x, state)
        return made[x.shape](x, state)

    core.forward = forward


def use_onednn(wanted):
    """Let oneDNN compute float32 products on the CPU: on AMD processors it is twice as fast as MKL, torch's default.

    On Intel's MKL is the faster one, for what a gradient needs up to twice: there, wanted must be True; None is for
    others than Intel's. torch sends products to oneDNN when they may be computed in bfloat16. Processors without units
    for that compute them in float32 all the same; where a trial shows less than float32, the default stays.
    Returns whether oneDNN is used.
    """
    settings = torch.backends.mkldnn.matmul
    settings.fp32_precision = "ieee"
    if wanted is None:
        wanted = "Intel" not in processor()
    if not wanted or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((64, 768), (768, 512)))
    exact = left.double() @ right.double()
    settings.fp32_precision = "bf16"
    if (left @ right - exact).norm() > 1e-5 * exact.norm():
        settings.fp32_precision = "ieee"
    return settings.fp32_precision == "bf16"


def has_bf16():
    """Whether the processor multiplies bfloat16 itself; where it does not, its products take longer than float32's."""
    return any(there for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def processor():
    """The processor's name."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def describe(device):
    """The processor's or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({processor()})"


def data_parallel(model, device):
    """The model to take training steps with: on several GPUs its replicas, each with a part of the columns.

    Everything is split and put together along dim 1, where every tensor has its batch; losses and counts come back as
    (1, number of GPUs). The second value is the number of parts.
    """
    parts = torch.cuda.device_count() if device.type == "cuda" else 1
    return (torch.nn.DataParallel(model, dim=1) if parts > 1 else model), parts


def autocast(device, amp):
    """Mixed precision for a `with`: amp "bf16" computes products in bfloat16, "off" changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def peak_memory(device):
    """Most memory used so far in MiB: of the GPU's allocator, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def rng_state():
    """The state of torch's random number generators, plain tensors."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    """Put back what rng_state returned; GPUs that are not there any more are passed over."""
    torch.set_rng_state(state["cpu"])
    for index, gpu_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(gpu_state, index)


class Clock:
    """Marks in time that cost no synchronization on a GPU: CUDA events there, seconds elsewhere."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def mark(self):
        """Now, or when the GPU comes to this point of its stream."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end):
        """Between two marks; on a GPU it waits for `end`."""
        if not self.cuda:
            return (end - start) * 1000
        end.synchronize()
        return start.elapsed_time(end)
