# Shapes: M tokens, N out_features, K in_features, G groups along K.
"""The arithmetic that runs, and the only place where it is written down.

    table = FP8((level - zero) * group_scale)      Y = BF16((sum_k x8 * table) * outer_scale * s_x) + bias

Quantizer, exporter, kernels and evaluator all call these functions. Order of operations is part of the contract.
"""

import torch
from torch import Tensor

from duotone.formats import FloatFormat
from duotone.scheme import Scheme, Target


def fp8_product(level: Tensor, zero_point: Tensor | None, group_scale: Tensor, fp8: FloatFormat) -> Tensor:
    """The FP8 value the hardware multiplies for a level: FP8((level - zero) * group_scale). Broadcasts; float32."""
    centered = level if zero_point is None else level - zero_point
    return fp8.round(centered * group_scale)


def quantize_activations(x_MK: Tensor, target: Target, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """FP8 activations of any leading shape and their scale.

    Returns float32 values on the FP8 grid, and s_x: [..., 1] found per token, or the static `input_scale` as given.
    Raises ValueError when a static target is given no scale (or a dynamic one is given one).
    """
    x = x_MK.float()
    if target.dynamic_activations != (input_scale is None):
        raise ValueError(f"target {target.name}: input_scale must be given exactly when activations are static")
    if input_scale is None:
        absmax = x.abs().amax(-1, keepdim=True)
        input_scale = divided(absmax, target.fp8.max).clamp(min=target.smallest_activation_scale)
    return target.fp8.round(x / input_scale), input_scale


def split_scale(scale_NG: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The two levels a channel-scaled runtime rebuilds from the one BF16 scale of the file: group [N, G], outer [N].

    This is vLLM's load-time split (FORMATS.md 1.4) in the order that divides: row maximum / 56, group = E4M3(scale / outer).
    """
    scale = scale_NG.float()
    outer_N = divided(scale.amax(-1), scheme.peak_group_scale).clamp(min=scheme.smallest_outer_scale)
    group_NG = scheme.target.fp8.round(scale / outer_N[:, None])
    # A group that rounds to zero would make every reader divide by zero; its weights are below half the smallest step.
    return group_NG.clamp(min=scheme.target.fp8.smallest_subnormal, max=scheme.peak_group_scale), outer_N


def join_scale(group_NG: Tensor, outer_N: Tensor) -> Tensor:
    """The one BF16 scale of the file; `split_scale` gives the canonical pair back bit for bit."""
    return (group_NG * outer_N[:, None]).to(torch.bfloat16)


def static_activation_scale(absmax: Tensor, target: Target) -> Tensor:
    """The power of two at or above absmax / 240 (DPQ.md section 1, `maxabs_pow2`), float32 of the same shape."""
    return power_of_two_at_least(divided(absmax.float(), target.fp8.max)).clamp(min=2.0**-30)


def tensor_outer_scale(absmax: Tensor, target: Target) -> Tensor:
    """2^ceil(log2(absmax / protective_range)) with the floor 1/(P * 512) of the published code; float32 [1]."""
    bound = divided(absmax.float().reshape(1), target.protective_range)
    return power_of_two_at_least(bound.clamp(min=1 / (target.protective_range * 512)))


def kv_scale(absmax: Tensor, target: Target) -> Tensor:
    """What the FP8 cache divides keys or values by: absmax / 448 in the BF16 of the file; 1 for what was always zero.

    Float32 of the same shape. Raises ValueError for an absmax that is not finite.
    """
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("absmax: found NaN or infinity")
    scale = divided(absmax.float(), target.fp8.max).to(torch.bfloat16).float()
    return torch.where(scale > 0, scale, 1.0)


def quantize_kv(x_BHTD: Tensor, scale_H: Tensor, target: Target) -> Tensor:
    """Keys or values as the cache keeps them: FP8(x / scale), saturating, one byte each; as vLLM's cache kernels do."""
    scaled = x_BHTD.float() / scale_H[:, None, None]
    return scaled.clamp(-target.fp8.max, target.fp8.max).to(torch.float8_e4m3fn)


def dequantize_kv(x8_BHTD: Tensor, scale_H: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention sees of the cache: x8 * scale, rounded to the model's dtype."""
    return (x8_BHTD.float() * scale_H[:, None, None]).to(dtype)


def power_of_two_at_least(x: Tensor) -> Tensor:
    """Smallest power of two >= x for positive x, float32; 0 gives 0. By its bits, since a GPU's pow may be one bit off."""
    exponent = (x.float().contiguous().view(torch.int32) + 0x7FFFFF) & 0x7F800000  # the next one, where there is a fraction
    return exponent.view(torch.float32) * (x > 0)


def divided(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once on every device: CUDA multiplies by the inverse of a number that is no tensor."""
    return x / torch.full_like(x, number)
