"""Stands for a GPU: launches of models/forget_mult/cuda.py run on numpy, as ptx.py understands their PTX."""

import ptx

from models import compiled
from models.forget_mult import cuda, nvrtc, pooling


def kernels(source=None):
    """{name: ptx.Kernel} of a CUDA source, ours if None, as NVRTC compiles it."""
    source = nvrtc.SOURCE.read_text(encoding="utf-8") if source is None else source
    return ptx.parse(nvrtc.compiled(source, "compute_80", nvrtc.library()))


class OnNumpy:
    """launched: (name, blocks, arguments) of each launch; memory: of the last.

    replace: as setattr, for what is put into the modules in the place of a GPU's.
    """

    def __init__(self, kernels, replace=setattr):
        self.kernels, self.launched, launch = kernels, [], cuda.launch

        def watched(name, threads, tensors, *scalars):
            self.memory = ptx.Memory()
            for tensor in tensors:
                if tensor is not None and tensor.device.type == "cpu":
                    self.memory.allow(tensor.data_ptr(), compiled.array(tensor))
            launch(name, threads, tensors, *scalars)

        replace(cuda, "launch", watched)
        replace(cuda, "submit", self.submit)
        replace(pooling, "fused", lambda *tensors: (cuda.pool, cuda.pool_back))

    def submit(self, device, name, blocks, arguments):
        """What cuda.submit would start."""
        self.launched.append((name, blocks, arguments))
        ptx.Machine(self.kernels[name], blocks, cuda.THREADS, arguments, self.memory).run()
