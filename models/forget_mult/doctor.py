"""python -m models.forget_mult.doctor: what the CUDA kernels need, whether it is there, whether they compute right."""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from . import cuda, nvrtc, reference

SHAPE = (37, 5, 67)
"""Of the self-test."""


def version(name):
    """Of a package, or why it can't be imported."""
    try:
        return getattr(__import__(name), "__version__", "is there")
    except Exception as error:  # of the import and of the libraries that it loads
        return f"{type(error).__name__}: {error}"


def driver():
    """What CUDA the driver is for, by CuPy."""
    try:
        from cupy.cuda import runtime

        number = runtime.driverGetVersion()
    except Exception as error:  # of the import
        return f"unknown ({type(error).__name__})"
    return f"for CUDA {number // 1000}.{number % 1000 // 10}" if number else "none"


def compiles():
    """Compile for every architecture that NVRTC knows; a line each, the compiler's log if it fails."""
    try:
        path = nvrtc.library()
        print(f"NVRTC {'.'.join(map(str, nvrtc.version(path)))}, {path}")
    except Exception as error:  # of the search
        print(f"NVRTC: {type(error).__name__}: {error}; pip install {cuda.packages(torch.version.cuda)}")
        return
    source = nvrtc.SOURCE.read_text(encoding="utf-8")

    def compiled(architecture):
        try:
            return f"sm_{architecture}: {len(nvrtc.compiled(source, f'sm_{architecture}', path)):,} bytes"
        except Exception as error:  # pynvrtc's, whose text is the log
            return f"sm_{architecture}: {error}"

    with ThreadPoolExecutor() as pool:  # one takes some five seconds
        for line in pool.map(compiled, nvrtc.architectures(path)):
            print(line)


def self_test(device):
    """The largest relative difference from the loop in float64, of h and of gradients, for each type on a device."""
    torch.manual_seed(0)
    gate, x, slope = torch.rand(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    initial = torch.randn(SHAPE[1:])
    for dtype in cuda.NAMES:
        largest = 0.0
        for mix in (True, False):
            found = []
            for backend, kind, place in ((cuda, dtype, device), (reference, torch.float64, "cpu")):
                g, v, s = (part.to(dtype).to(place, kind) for part in (gate, x, slope))
                first = initial.to(place, torch.promote_types(kind, torch.float32))
                h = backend.forward(g, v, first, mix, False)
                found.append([h, *backend.backward(s, g, v, h, first, mix, False)])
            for got, want in zip(*found, strict=True):
                largest = max(largest, ((got.cpu().double() - want).abs().max() / want.abs().max()).item())
        print(f"{device} {dtype}: {largest:.1e} off the reference")


def main():
    """Print all of it."""
    print(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}")
    for name in ("cupy", "pynvrtc"):
        print(f"{name} {version(name)}")
    print(f"driver {driver()}")
    compiles()
    print(f"kernels are kept in {nvrtc.folder()}")
    if not torch.cuda.is_available():
        print("no GPU: no driver is there, or torch was built without CUDA; nothing was launched")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        print(f"{device}: {name}, sm_{major}{minor}; kernels {'usable' if cuda.usable(device) else 'not usable'}")
        if cuda.usable(device):
            self_test(device)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("doctor: interrupted", file=sys.stderr)
        sys.exit(130)
