# Shapes: K columns.
"""Norms as a part of the linears that read them, on a GPU: one launch norms and quantizes, nothing in BF16 lies between.

Nobody else reads such a norm's output, says an architecture's table (`NormedStream`). The module stays where it is, with its
weight, and hands its input on.
"""

import copy
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from duotone.contract import quantize_activations
from duotone.kernels.gpu import backend, fp8
from duotone.kernels.gpu.layout import CHUNK
from duotone.runtime.linear import QuantizedLinear, take_norm


def install(blocks: nn.ModuleList, norms: Iterable[tuple[str, tuple[str, ...]]], dtype: torch.dtype) -> int:
    """Have linears on the GPU kernels do the norms that they alone read; how many norms they did take.

    norms: of each its path in a block and those of its readers. dtype: the model's. Norms that compute something else than
    Llama's, by a trial on integers, whose sums are exact, stay as they are, and a warning says so.
    """
    taken, faults = 0, list[str]()
    for block in blocks:
        for path, readers in norms:
            norm: Any = block.get_submodule(path)
            linears = [layer for name in readers if isinstance(layer := block.get_submodule(name), QuantizedLinear)]
            if len(linears) < len(readers) or any(layer.backend not in (backend, fp8) for layer in linears):
                continue
            if fault := _fault(norm, linears[0], dtype):
                faults.append(f"{path}: {fault}")
                continue
            take_norm(linears, norm.weight.detach(), norm.variance_epsilon)
            norm.forward = partial(_hand_on, norm)  # which, unlike a method, is pickled with the model
            taken += 1
    if faults:
        warnings.warn(f"{len(faults)} norms stay in plain torch, first {faults[0]}", stacklevel=2)
    return taken


def _hand_on(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """The forward of a norm that its readers do."""
    del self
    return hidden_states


def _fault(norm: nn.Module, reader: QuantizedLinear, dtype: torch.dtype) -> str | None:
    """Why a reader cannot do a norm, as a sentence."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return f"found {type(norm).__name__}, expected an RMS norm with a weight and a variance_epsilon, such as Llama's"
    if weight.dtype != dtype or dtype not in backend.NATIVE:
        return f"found a weight in {weight.dtype}, expected the model's {dtype}, and that BF16, FP16 or float32"
    if len(weight) > backend.MOST_NORMED:
        return f"found {len(weight)} columns, expected {backend.MOST_NORMED} or fewer"
    from duotone.kernels.gpu import trial

    return trial.told(weight.device, lambda: _difference(norm, weight.detach(), epsilon, reader))


def _difference(norm: nn.Module, weight: Tensor, epsilon: float, reader: QuantizedLinear) -> str | None:
    from duotone.kernels.gpu import launch

    x = torch.randint(-8, 9, (3, len(weight)), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    target, packed = reader.scheme.target, reader.packed
    static = None if packed.input_scale is None else packed.input_scale.cpu()
    meant, scale = quantize_activations(copy.deepcopy(norm).cpu()(x), target, static)
    facts = packed.input_scale, packed.fp8_max, packed.smallest_scale
    x8, scales = launch.activations(x.to(weight.device), -(-len(weight) // CHUNK), *facts, (weight, epsilon))
    same = torch.equal(x8[:, : len(weight)].float().cpu(), meant) and torch.equal(scales.cpu()[:, None], scale.expand(3, 1))
    return None if same else "FP8 activations"
