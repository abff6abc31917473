"""The compiled extension: the ops torch.ops.duotone.*, loaded once, or a sentence that says why they are not there.

It is optional: everything it computes, torch computes too, slower. DUOTONE_NATIVE is the only environment variable that duotone
reads: 0 leaves the extension unloaded (to compare, or to rule it out as a cause); portable, avx2, avx512, avx512vnni or
avx512vbmi has the linears of a quantized model take that path (kernels/cpu.py).
"""

import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from duotone.formats import E4M3, E4M3FN, FloatFormat

#: setup.py puts the file next to the package, under whichever suffix the interpreter gives extensions.
_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def unavailable() -> str | None:
    """Why the compiled ops cannot be used, or None when they can. Loads them at the first call."""
    if asked_path() == "0":
        return "DUOTONE_NATIVE=0"
    built = [path for suffix in EXTENSION_SUFFIXES if (path := _PACKAGE / f"_C{suffix}").exists()]
    if not built:
        return "the compiled extension was not built; pip install --no-build-isolation with a C++ compiler builds it"
    try:
        torch.ops.load_library(str(built[0]))
    except OSError as error:
        return f"the compiled extension does not load ({error})"
    _describe_for_compilers()
    return None


def _describe_for_compilers() -> None:
    """What torch.compile needs to know of the linear: the shape of what it gives. The other ops it never meets."""

    @torch.library.register_fake("duotone::linear")
    def _(
        x: Tensor, codes: Tensor, index: Tensor, table: Tensor, outer_scale: Tensor, input_scale: Tensor | None,
        bias: Tensor | None, parts: Tensor | None, *_: object,
    ) -> Tensor:  # fmt: skip
        del codes, index, table, input_scale, bias
        rows = outer_scale.shape[0]
        return x.new_empty(*x.shape[:-1], rows) if parts is None else x.new_empty(x.numel() // x.shape[-1] * rows)


def asked_path() -> str | None:
    """What DUOTONE_NATIVE asks for, or None."""
    return os.environ.get("DUOTONE_NATIVE") or None


def available() -> bool:
    """Are the ops torch.ops.duotone.* there, for tensors on the CPU?"""
    return unavailable() is None


def compiled(fp8: FloatFormat, tensor: Tensor) -> bool:
    """Do the solver's compiled ops take this tensor? Their FP8 rounding is E4M3's, of either kind."""
    return fp8 in (E4M3FN, E4M3) and tensor.dtype == torch.float32 and tensor.device.type == "cpu" and available()
