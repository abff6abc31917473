# Shapes: N out_features, K in_features, G groups along K.
"""The shape of a layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.qweight import QuantizedWeight, expand_groups
from duotone.scheme import Scheme


@dataclass(frozen=True)
class Layout:
    """How a file stores a linear [N, K].

    specs: names, dtypes and shapes, without arithmetic. to_tensors: the tensors of a weight. values: what the layout's runtimes
    multiply, float32 [N, K], from those tensors. config: the quantization_config, given linears left alone; None: none. file:
    a further JSON file with the same content. refuses: why a scheme and a shape cannot be stored; None: all can.
    """

    name: str
    specs: Callable[[str, tuple[int, int], Scheme], dict[str, TensorSpec]]
    to_tensors: Callable[[str, QuantizedWeight], dict[str, Tensor]]
    values: Callable[[str, dict[str, Tensor], Scheme], Tensor]
    config: Callable[[Scheme, Sequence[str]], dict[str, Any]] | None = None
    refuses: Callable[[Scheme, tuple[int, int]], str | None] | None = None
    file: str | None = None


def product_scale(weight: QuantizedWeight) -> Tensor:
    """Both scales as the one BF16 number of the file [N, G]; exact for every weight that `quantize` makes."""
    return (weight.group_scale * weight.outer_scale[:, None]).to(torch.bfloat16)


def products(level_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, group_size: int) -> Tensor:
    """(level - zero) * scale, float32 [N, K]: a weight that is not rounded to FP8."""
    columns = level_NK.shape[1]
    centered_NK = level_NK if zero_NG is None else level_NK - expand_groups(zero_NG, group_size, columns)
    return centered_NK * expand_groups(scale_NG.float(), group_size, columns)
