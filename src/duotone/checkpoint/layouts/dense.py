# Shapes: N out_features, K in_features.
"""No quantized layout: each linear's weight as BF16, for runtimes that know nothing of 4 bits, and to compare with."""

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.layouts.layout import ALONE, Layout, Shared
from duotone.qweight import AnyWeight, dequantize
from duotone.scheme import AnyScheme


def specs(layer: str, shape: tuple[int, int], scheme: AnyScheme) -> dict[str, TensorSpec]:
    """One tensor."""
    del scheme
    return {f"{layer}.weight": TensorSpec("BF16", shape)}


def to_tensors(layer: str, weight: AnyWeight, shared: Shared = ALONE) -> dict[str, Tensor]:
    """FP8 value times outer scale, rounded to BF16: exact where the outer scale is a power of two (`gaudi`)."""
    del shared
    return {f"{layer}.weight": dequantize(weight).to(torch.bfloat16)}


def values(layer: str, tensors: dict[str, Tensor], scheme: AnyScheme) -> Tensor:
    """The weight as it is."""
    del scheme
    return tensors[f"{layer}.weight"].float()


DENSE = Layout("dense-bf16", specs, to_tensors, values)
