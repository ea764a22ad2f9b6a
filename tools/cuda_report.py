"""What can be counted of the CUDA kernels without a GPU, for results/cuda.md: nothing in it was timed.

Registers and spills by ptxas, bytes loaded and stored by running the PTX on numpy (ptx.py), tensor operations of a
training step with and without the kernels.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import on_numpy
from on_numpy import OnNumpy

import benchmark
from models import compiled, forget_mult
from models.forget_mult import nvrtc, pooling
from utils import cli, measurements, program, timing
from utils.workers import Candidate

ARCHITECTURES = (75, 80, 90, 100, 120)
FAMILIES = ("LSTM, port", "RMC, paper's form", "QRNN, paper", "AWD-LSTM", "AWD-QRNN")
BANDWIDTH = 3.35e12
"""Bytes a second of an H100 SXM, by its data sheet."""
SIZES = {"QRNN, paper": (105, 20, 640), "AWD-QRNN": (70, 20, 1550)}


def registers(ptxas):
    """Rows: a kernel, then registers on each architecture; and the largest spill or stack in bytes."""
    found, largest = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            place = Path(folder) / "kernels.ptx"
            source = nvrtc.SOURCE.read_text(encoding="utf-8")
            place.write_text(nvrtc.compiled(source, f"compute_{architecture}", nvrtc.library()), encoding="utf-8")
            command = [ptxas, "-v", f"-arch=sm_{architecture}", place, "-o", Path(folder) / "kernels"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            for name, bytes_used, used in re.findall(r"entry function '(\w+)'(.*?)Used (\d+) registers", said, re.S):
                found.setdefault(name, []).append(used)
                largest = max(largest, *map(int, re.findall(r"(\d+) bytes (?:stack|spill)", bytes_used)))
    return [[name, *used] for name, used in sorted(found.items())], largest


def traffic():
    """Rows: a kernel of float32, bytes that it loads and stores for each number of h, and the fewest possible."""
    gpu, steps, columns = OnNumpy(on_numpy.kernels()), 64, (2, 32)
    leaves, rows = [torch.rand(steps, *columns, requires_grad=True) for _ in range(2)], []

    def add():
        memory, numbers, (name, *_) = gpu.memory, steps * int(np.prod(columns)), gpu.launched[-1]
        counted = memory.loaded.total() / numbers, memory.stored.total() / numbers
        rows.append([name, *(f"{part:.2f}" for part in counted), *(4 * part for part in fewest(name))])

    h = forget_mult(*leaves, backend="cuda")
    add()
    h.square().sum().backward()
    add()
    for mode, kinds in pooling.MODES.items():
        gates = torch.rand(steps, columns[0], kinds * columns[1], requires_grad=True)
        output, _ = pooling.pool(gates, torch.zeros(columns), mode, "tanh")
        add()
        output.square().sum().backward()
        add()
    return rows


def fewest(name):
    """Numbers that a kernel has to load and to store for each of h: every input once, every result once."""
    kinds = int(name[-1])
    if name.startswith("pool_back"):
        return kinds + 2, kinds
    if name.startswith("pool"):
        return kinds, 2 if kinds > 2 else 1
    return (2, 1) if name.startswith("forward") else (4, 2)


def launches(args):
    """Rows: a family, the tensor operations of a training step by torch alone, with the kernels, and what they save."""
    rows = []
    for name in FAMILIES:
        candidate = Candidate(*measurements.CANDIDATES[name], None, None, args)
        candidate.step()  # the first one makes the optimizer's state as well
        with compiled.torch_only():
            pooling.fused = lambda *tensors: None
            alone, calls = timing.count(candidate.step).launches, []
            kernels = pooling._pool, pooling._pool_back
            pooling.fused = lambda *tensors, kernels=kernels, calls=calls: tuple(
                lambda *given, kernel=kernel: calls.append(1) or kernel(*given) for kernel in kernels
            )
            fused = timing.count(candidate.step).launches + len(calls)
        rows.append([name, f"{alone:,}", f"{fused:,}", f"{len(calls)}"])
    return rows


def floors():
    """Rows: sizes, bytes that a layer's pooling has to move forward and backward, and microseconds at BANDWIDTH."""
    rows = []
    for (name, sizes), (dtype, narrow) in itertools.product(SIZES.items(), (("float32", 4), ("bfloat16", 2))):
        numbers, kinds = int(np.prod(sizes)), pooling.MODES["fo"]
        moved = numbers * (kinds * narrow + 2 * 4), numbers * (2 * kinds * narrow + 2 * 4)
        rows.append([f"{name}, {' x '.join(map(str, sizes))}, {dtype}"])
        rows[-1] += [f"{part / 2**20:.1f} MiB, {part / BANDWIDTH * 1e6:.0f} us" for part in moved]
    return rows


def main(argv=None):
    """Count, print, and with --record keep."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--ptxas", default="ptxas", metavar="PATH", help="NVIDIA's assembler, of NVRTC's version")
    parser.add_argument("--vocab-size", type=cli.number(int, 3), default=10000, help="words; Penn Treebank has 10000")
    benchmark.add_record(parser)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    counted = launches(args)
    kernels, spilled = registers(args.ptxas)
    figures = {"kind": "cuda", "nvrtc": ".".join(map(str, nvrtc.version(nvrtc.library()))), "spilled": spilled}
    figures |= {"registers": kernels, "architectures": list(ARCHITECTURES), "launches": counted}
    figures |= {"traffic": traffic(), "floors": floors(), "bandwidth": BANDWIDTH}
    measurements.finish(args, "counted, not timed", figures, "cuda")


if __name__ == "__main__":
    program.run(main)
