"""Where the solver's loops are compiled: the extension for a CPU, Triton programs for an NVIDIA GPU; or why they are not.

Both have `sweep`, `scale_error` and `local_search` under the same names, for the same arguments. Without either, plain torch
computes the same, much slower: it is the specification.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from duotone.formats import E4M3, E4M3FN, FloatFormat
from duotone.kernels import native
from duotone.kernels.gpu.backend import missing_triton


def compiled(fp8: FloatFormat, tensor: Tensor) -> Any:
    """What has the loops for such a tensor, or None."""
    if native.compiled(fp8, tensor):
        return torch.ops.duotone
    if tensor.device.type != "cuda" or tensor.dtype != torch.float32 or fp8 not in (E4M3FN, E4M3):
        return None
    if refusal(tensor.device) is not None:
        return None
    from duotone.kernels.gpu import solver

    return solver


def refusal(device: torch.device) -> str | None:
    """Why a GPU does not run the Triton programs, as a sentence; None: it does, or the device is none. Tries them once."""
    if device.type != "cuda":
        return None
    is_any = device.index is None  # pyright: ignore[reportUnnecessaryComparison] - torch's types leave None out
    return _tried(torch.cuda.current_device() if is_any else device.index)


@cache
def _tried(index: int) -> str | None:
    if reason := missing_triton():
        return reason
    from duotone.solver import trial

    return trial.fault(torch.device("cuda", index))
