# Shapes: M tokens, N out_features, K in_features.
"""The W4A8 linear in plain torch, on any device: the specification every fast kernel is tested against.

The FP8 operand is kept in BF16, which holds every E4M3 value exactly, or as it is where the file has it so; products are
exact in float32 and summed there. So this runs W8A8 linears too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.contract import quantize_activations
from duotone.qweight import AnyWeight, Fp8Weight, fp8_values, runnable_input_scale
from duotone.scheme import AnyScheme, Target

NAME = "torch"
#: Its weights go anywhere.
DEVICE: str | None = None


@dataclass(frozen=True, eq=False)
class Packed:
    """FP8 weights [N, K] held in BF16 or FP8, outer scale [N] or [1], static activation scale or None."""

    values: Tensor
    outer_scale: Tensor
    input_scale: Tensor | None
    target: Target


def refuses(scheme: AnyScheme, device: torch.device) -> str | None:
    """Why this backend cannot run weights of a scheme on a device, or None. It runs everything."""
    del scheme, device
    return None


def describe(scheme: AnyScheme) -> str:
    """What will run, for people."""
    del scheme
    return "plain torch: exact, not fast"


def path_refusals(scheme: AnyScheme) -> list[str]:
    """Why no faster path will run: there is one only."""
    del scheme
    return []


def prepack(weight: AnyWeight) -> Packed:
    """The form this backend multiplies. Raises ValueError when a static activation scale is missing."""
    input_scale = runnable_input_scale(weight)
    values = weight.values if isinstance(weight, Fp8Weight) else fp8_values(weight).to(torch.bfloat16)
    return Packed(values, weight.outer_scale, input_scale, weight.scheme.target)


def values(packed: Packed) -> Tensor:
    """The FP8 operand, float32 [N, K]."""
    return packed.values.float()


def can_merge(weights: Sequence[Packed]) -> bool:
    """Whether weights may be one: never, a call costs nothing here that several could share."""
    del weights
    return False


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """Y = ((sum_k x8 * w8) * outer_scale * s_x) rounded to x's dtype, then + bias; x [..., K] -> [..., N]."""
    x8, input_scale = quantize_activations(x, packed.target, packed.input_scale)
    total = torch.nn.functional.linear(x8, packed.values.float())
    y = (total * packed.outer_scale * input_scale).to(x.dtype)
    return y if bias is None else y + bias
