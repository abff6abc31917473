# Shapes: M tokens, N out_features, K in_features.
"""The W8A8 linear on NVIDIA GPUs that multiply FP8: Ada, Hopper, Blackwell. A backend as `dispatch` knows them.

Activations are quantized by the program that the W4A8 linear has too, the product is torch's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duotone.kernels.gpu import backend
from duotone.kernels.gpu.layout import CHUNK
from duotone.qweight import Fp8Weight, runnable_input_scale
from duotone.scheme import AnyScheme, Fp8Scheme

NAME = "scaled_mm"
#: The kind of device that its weights stay on.
DEVICE: str | None = backend.DEVICE
#: Rows that torch's product wants a multiple of. Of columns it wants 16, activations come in chunks of 128.
ROWS = 16


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the op reads it: the only copy there is, and the weight's own tensor where nothing has to be padded.

    values: E4M3FN bytes uint8 [N', K'], zeros after N and K. outer_scale: float32 [N]. input_scale: static activation scale or
    None. parts: the rows of each of several weights in one. norm, epsilon: as the W4A8 backend's.
    """

    values: Tensor
    outer_scale: Tensor
    input_scale: Tensor | None
    in_features: int
    fp8_max: float
    smallest_scale: float
    parts: tuple[int, ...] = ()
    norm: Tensor | None = None
    epsilon: float = 0.0


def refuses(scheme: AnyScheme, device: torch.device) -> str | None:
    """Why this backend cannot run weights of a scheme on a device, or None."""
    if not isinstance(scheme, Fp8Scheme):
        return "multiplies FP8 weights, not 4-bit codes"
    return backend.device_refuses(device) or _trial(device)


def _trial(device: torch.device) -> str | None:
    from duotone.kernels.gpu import trial

    return trial.fp8_fault(device)


def describe(scheme: AnyScheme) -> str:
    """What will run, for people."""
    del scheme
    return "torch's FP8 product, activations quantized by a program that Triton compiles for this GPU"


def path_refusals(scheme: AnyScheme) -> list[str]:
    """Why no faster path will run: there is one only."""
    del scheme
    return []


def prepack(weight: Fp8Weight) -> Packed:
    """The form this backend multiplies, on the weight's device. Raises ValueError when a static activation scale is missing."""
    target, (rows, columns) = weight.scheme.target, weight.shape
    bytes_, more = weight.values.view(torch.uint8).contiguous(), (0, -columns % CHUNK, 0, -rows % ROWS)
    return Packed(
        torch.nn.functional.pad(bytes_, more) if any(more) else bytes_,
        weight.outer_scale.expand(rows).contiguous(),
        runnable_input_scale(weight),
        columns,
        target.fp8.max,
        target.smallest_activation_scale,
    )


def values(packed: Packed) -> Tensor:
    """The FP8 operand, float32 [N, K], out of what is packed."""
    return packed.values[: len(packed.outer_scale), : packed.in_features].view(torch.float8_e4m3fn).float()


def can_merge(weights: Sequence[Packed]) -> bool:
    """Whether weights may be one: same columns and target, the same static scale, and no padded rows but in the last."""
    first = weights[0]
    facts = ("in_features", "fp8_max", "smallest_scale")
    scales = [None if weight.input_scale is None else float(weight.input_scale) for weight in weights]
    return (
        all(getattr(weight, fact) == getattr(first, fact) for weight in weights for fact in facts)
        and all(scale == scales[0] for scale in scales)
        and all(len(weight.outer_scale) % ROWS == 0 for weight in weights[:-1])
    )


def merge(weights: Sequence[Packed]) -> Packed:
    """Weights that read the same input as one, their rows one after the other (see `can_merge`)."""
    return replace(
        weights[0],
        values=torch.cat([weight.values for weight in weights]),
        outer_scale=torch.cat([weight.outer_scale for weight in weights]),
        parts=tuple(len(weight.outer_scale) for weight in weights),
    )


def split(merged: Packed) -> list[Packed]:
    """The weights that a merged one is made of: views, no copies."""
    weights: list[Packed] = []
    row = 0
    for rows in merged.parts:
        held = merged.values[row : row + rows + -rows % ROWS]
        weights.append(replace(merged, values=held, outer_scale=merged.outer_scale[row : row + rows], parts=()))
        row += rows
    return weights


def with_norm(packed: Packed, weight: Tensor, epsilon: float) -> Packed:
    """A weight whose inputs are normed first, as the W4A8 backend's."""
    return replace(packed, norm=weight, epsilon=epsilon)


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """What `reference.linear` computes, but for the order of its sums; x [..., K] -> [..., N]."""
    from duotone.kernels.gpu import launch

    if x.dtype not in backend.NATIVE:
        y = linear(x.float(), packed).to(x.dtype)
    else:
        facts = packed.outer_scale, packed.input_scale, packed.fp8_max, packed.smallest_scale
        y = launch.linear_fp8(x, packed.values, *facts, *backend.norm_of(x, packed.norm, packed.epsilon))
    return y if bias is None else y + bias


def linears(x: Tensor, merged: Packed) -> tuple[Tensor, ...]:
    """The products with each part of a merged weight: x [..., K] -> [..., rows], views of one tensor."""
    return linear(x, merged).split(merged.parts, -1)
