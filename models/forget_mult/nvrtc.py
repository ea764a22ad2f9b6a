"""forget_mult.cu compiled for a GPU's architecture, by NVRTC through pynvrtc, and kept on disk."""

import contextlib
import ctypes
import hashlib
import os
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("forget_mult.cu")
OPTIONS = ("--std=c++17",)


def library():
    """The path of NVRTC, loaded with what it needs: torch's, a wheel's or the system's. Raises what the search does."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return load_nvidia_dynamic_lib("nvrtc").abs_path


def version(path):
    """(major, minor) of an NVRTC."""
    from pynvrtc.interface import NVRTCInterface

    return NVRTCInterface(path).nvrtcVersion()


def architectures(path):
    """Numbers XY of the architectures sm_XY that an NVRTC compiles for."""
    nvrtc, count = ctypes.CDLL(path), ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(numbers)
    return list(numbers)


def compiled(source, target, path):
    """A source compiled for a target: sm_XY, which gives machine code (bytes), or compute_XY, which gives PTX (str).

    Machine code, because a driver may be older than the PTX of this NVRTC. Raises pynvrtc's ProgramException, whose
    text is the compiler's log.
    """
    from pynvrtc.compiler import Program

    program = Program(source, SOURCE.name, lib_name=path)
    ptx = program.compile([f"--gpu-architecture={target}", *OPTIONS])
    if target.startswith("compute"):
        return ptx
    nvrtc, size = program._interface._lib, ctypes.c_size_t()  # pynvrtc knows PTX only
    nvrtc.nvrtcGetCUBINSize(program._program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program._program, code)
    return code.raw


def kernels(architecture):
    """The machine code of forget_mult.cu for sm_XY, from the folder of kernels if it was compiled before."""
    path, source = library(), SOURCE.read_text(encoding="utf-8")
    key = hashlib.sha256(repr((source, OPTIONS, architecture, version(path))).encode()).hexdigest()[:24]
    kept = folder() / f"forget_mult-sm_{architecture}-{key}.cubin"
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    code = compiled(source, f"sm_{architecture}", path)
    with contextlib.suppress(OSError):  # no place to keep it: compiled again the next time
        keep(kept, code)
    return code


def folder():
    """Where kernels are kept: RECURRENT_LM_KERNELS, or recurrent-lm in the user's folder of caches."""
    given, cache = os.environ.get("RECURRENT_LM_KERNELS"), os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else Path(cache or Path.home() / ".cache") / "recurrent-lm"


def keep(path, code):
    """Write a file whole or not at all, whoever else writes it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
