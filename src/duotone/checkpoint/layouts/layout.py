# Shapes: N out_features, K in_features, G groups along K.
"""The shape of a layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.contract import power_of_two_at_least
from duotone.formats import FloatFormat
from duotone.qweight import QuantizedWeight, expand_groups
from duotone.scheme import Scheme


@dataclass(frozen=True)
class Shared:
    """What the linears of one input have in common, for runtimes that fuse them into one matrix.

    outer_scale: the largest that any of them needs, see `Layout.outer`; None: the weight's own. input_scale: the static scale
    of their activations; None: there is none, or the weight's own.
    """

    outer_scale: float | None = None
    input_scale: float | None = None


ALONE = Shared()


@dataclass(frozen=True)
class Layout:
    """How a file stores a linear [N, K].

    specs: names, dtypes and shapes, without arithmetic. to_tensors: the tensors of a weight. values: what the layout's
    runtimes multiply, float32 [N, K], from those tensors. config: the quantization_config, given linears left alone; None:
    none. file: a further JSON file, and what is in it given the quantization_config. refuses: why a linear of a shape and
    scheme cannot be stored; None: all can. outer: the outer scale that a weight needs, where those of one input have to share
    it. static: the linears whose activations it scales by one number each, by name. container: of the file. keeps_kv_scales:
    whether its runtimes read the scales of an FP8 cache.
    """

    name: str
    specs: Callable[[str, tuple[int, int], Scheme], dict[str, TensorSpec]]
    to_tensors: Callable[[str, QuantizedWeight, Shared], dict[str, Tensor]]
    values: Callable[[str, dict[str, Tensor], Scheme], Tensor]
    config: Callable[[Scheme, Sequence[str]], dict[str, Any]] | None = None
    refuses: Callable[[str, tuple[int, int], Scheme], str | None] | None = None
    file: tuple[str, Callable[[dict[str, Any]], dict[str, Any]]] | None = None
    outer: Callable[[QuantizedWeight], float] | None = None
    static: Callable[[str], bool] | None = None
    container: str = "safetensors"
    keeps_kv_scales: bool = False


def column_specs(layer: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
    """What AutoGPTQ's layout and those made after it store: qweight [K / 8, N], scales [G, N], qzeros [G, N / 8]."""
    rows, columns = shape
    groups = scheme.groups(columns)
    return {
        f"{layer}.qweight": TensorSpec("I32", (columns // 8, rows)),
        f"{layer}.scales": TensorSpec("F16", (groups, rows)),
        f"{layer}.qzeros": TensorSpec("I32", (groups, rows // 8)),
    }


def product_scale(weight: QuantizedWeight) -> Tensor:
    """Both scales as the one BF16 number of the file [N, G]; exact for every weight that `quantize` makes."""
    return (weight.group_scale * weight.outer_scale[:, None]).to(torch.bfloat16)


def products(level_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, group_size: int) -> Tensor:
    """(level - zero) * scale, float32 [N, K]: a weight that is not rounded to FP8."""
    columns = level_NK.shape[1]
    centered_NK = level_NK if zero_NG is None else level_NK - expand_groups(zero_NG, group_size, columns)
    return centered_NK * expand_groups(scale_NG.float(), group_size, columns)


def tensor_outer(weight: QuantizedWeight, fp8: FloatFormat) -> float:
    """One outer scale for a whole tensor: its own (`gaudi`), else the power of two under which no product leaves FP8."""
    if not weight.scheme.target.channel_outer_scale:
        return float(weight.outer_scale)
    levels = weight.scheme.levels
    span = max(abs(level) for level in levels) if weight.scheme.symmetric else levels[-1] - levels[0]
    return float(power_of_two_at_least(product_scale(weight).float().max() * span / fp8.max))


def input_scale_of(layer: str, weight: QuantizedWeight, shared: Shared) -> float:
    """The static scale of a linear's activations. Raises ValueError where there is none: `Layout.static` was not heeded."""
    scale = shared.input_scale if shared.input_scale is not None else weight.input_scale
    if scale is None:
        raise ValueError(f"{layer}: this layout has a static activation scale, found none")
    return float(scale)
