"""A plugin for pytest: Triton programs are compiled for a GPU that need not be there, and their PTX is run on the CPU.

    TRITON_ARCH=89 pytest -p tests.kernels.on_ptx tests/kernels/test_gpu.py

What is tested so is the program that a GPU would be given, with the launches and specializations that it would be given it
with; tensors lie on the CPU and everything else is torch's there. test_gpu_executed.py runs some of the tests so by default.
"""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is read

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels import ptx

TARGET = GPUTarget("cuda", int(os.environ.get("TRITON_ARCH", "90")), 32)
#: Registers that copies and Hopper's products write are read behind waits; a text without any is run once.
_LATE = ("cp.async", "wgmma")
#: Bytes of a program, on Ada and on Hopper.
MOST_SHARED = {89: 99 * 1024, 90: 227 * 1024}
_compiled: dict[tuple[str, str], tuple[Any, list[str]]] = {}


class _Absent:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """All from a tensor's first element to its last, written through."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    whole = tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,))
    return whole.view(torch.uint8).numpy() if whole.dtype != torch.uint8 else whole.numpy()


def _run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In the place of JITFunction.run: the same binding and specialization, but for a launch."""
    assert not warmup
    kwargs["debug"] = kwargs.get("debug", self.debug)
    *_, target, backend, binder = self.device_caches[0]
    bound, specialization, options = binder(*args, **kwargs)
    key = self.cache_key, repr((specialization, sorted(options.items())))
    if key not in _compiled:
        chosen, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        source = self.ASTSource(self, signature, constants, attributes)
        built = triton.compile(source, target=target, options=chosen.__dict__)
        _compiled[key] = built, [name for name, kind in signature.items() if kind != "constexpr"]
    built, names = _compiled[key]
    given = [_bytes_of(bound[name]) if isinstance(bound[name], Tensor) else bound[name] for name in names]
    buffers = [each for each in given if isinstance(each, np.ndarray)]
    size = tuple(grid(bound) if callable(grid) else grid)
    size, text = size + (1,) * (3 - len(size)), built.asm["ptx"]
    assert built.metadata.shared <= MOST_SHARED[TARGET.arch] and size[1] < 2**16 and size[2] < 2**16, "no GPU launches this"
    if any(name in text for name in _LATE):
        before = [buffer.copy() for buffer in buffers]
        ptx.run(text, built.metadata.shared, size, given, late=False)
        early = [buffer.copy() for buffer in buffers]
        for buffer, old in zip(buffers, before, strict=True):
            buffer[:] = old
        ptx.run(text, built.metadata.shared, size, given, late=True)
        assert all(map(np.array_equal, buffers, early)), f"{self.fn.__name__}: something is not waited for"
    else:
        ptx.run(text, built.metadata.shared, size, given, late=True)


driver.set_active(_Absent())
JITFunction.run = _run
