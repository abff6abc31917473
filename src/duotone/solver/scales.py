# Shapes: N out_features, K in_features, G groups along K, g = group_size.
"""From weights to scales: the min-max rule in each target's two levels, and in the single level that other tools use."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.contract import divided, fp8_product, split_scale, tensor_outer_scale
from duotone.qweight import expand_groups
from duotone.scheme import Scheme


@dataclass(frozen=True, eq=False)
class ColumnScales:
    """Scales of one group for all rows, [N] each (outer [N] or [1]): what a solver needs while it is in that group."""

    step: Tensor
    group_scale: Tensor
    zero_point: Tensor | None
    outer_scale: Tensor

    def value(self, code_N: Tensor, scheme: Scheme) -> Tensor:
        """The real value that the hardware's FP8 product stands for."""
        level_N = code_N + scheme.levels[0]
        return fp8_product(level_N, self.zero_point, self.group_scale, scheme.target.fp8) * self.outer_scale


@dataclass(frozen=True, eq=False)
class Scales:
    """Group scales [N, G], zero points [N, G] or None, and the outer scale [N] or [1] of one weight."""

    group_scale: Tensor
    zero_point: Tensor | None
    outer_scale: Tensor

    @property
    def step(self) -> Tensor:
        """Width of one level in real units, [N, G]."""
        return self.group_scale * self.outer_scale[:, None]

    def where(self, rows_N: Tensor, other: "Scales") -> "Scales":
        """These scales, with those of `other` in the rows that are True; a tensor's one outer scale is the same in both."""
        zero = None
        if self.zero_point is not None and other.zero_point is not None:
            zero = torch.where(rows_N[:, None], other.zero_point, self.zero_point)
        outer = (
            torch.where(rows_N, other.outer_scale, self.outer_scale)
            if len(self.outer_scale) == len(rows_N)
            else self.outer_scale
        )
        return Scales(torch.where(rows_N[:, None], other.group_scale, self.group_scale), zero, outer)


def fit_scales(w_NK: Tensor, scheme: Scheme) -> Scales:
    """Min-max scales in the target's own form, fitted on the weights as they are and then frozen.

    A channel-scaled target gets E4M3 group scales in canonical form, a tensor-scaled one BF16 group scales. They have their
    final precision before any code is chosen: a scale rounded later would move the FP8 products (DPQ.md section 1).
    """
    if not scheme.target.channel_outer_scale:
        step_NG, zero_NG = fit_single_level(w_NK, scheme)
        outer = tensor_outer_scale(w_NK.abs().amax(), scheme.target)
        return Scales(step_NG / outer, zero_NG, outer)
    scale_NG, low_NG = _minmax(grouped(w_NK, scheme.group_size), scheme)
    # Only the row maximum goes to BF16 first (it is what the file keeps); the others reach the E4M3 grid in one step, and
    # none may pass it where it rounds down.
    largest_N1 = scale_NG.amax(-1, keepdim=True)
    kept_N1 = bf16(largest_N1)
    group_NG, outer_N = split_scale(torch.where(scale_NG == largest_N1, kept_N1, scale_NG.minimum(kept_N1)), scheme)
    return Scales(group_NG, _zero_point(low_NG, group_NG * outer_N[:, None], scheme), outer_N)


def fit_paper_scales(w_NK: Tensor, scheme: Scheme) -> Scales:
    """As the published DPQ code fits them: on the weights already rounded to FP8 under the outer scale (DPQ.md section 2).

    That code knows one outer scale a tensor; on a channel-scaled target there is no FP8 tensor to fit on, and the
    target's own min-max scales stand in.
    """
    if scheme.target.channel_outer_scale:
        return fit_scales(w_NK, scheme)
    outer = tensor_outer_scale(w_NK.abs().amax(), scheme.target)
    w8_NK = scheme.target.fp8.round(w_NK / outer)
    return Scales(*single_level(grouped(w8_NK, scheme.group_size), scheme), outer)


def fit_single_level(w_NK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """BF16 group scale and zero point [N, G] as a tool that knows only INT4 chooses them: what peers optimise against."""
    return single_level(grouped(w_NK, scheme.group_size), scheme)


def single_level(w_NGg: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """BF16 step and zero point (None if symmetric) of the values along the last axis: [..., g] -> [...]."""
    scale, low = _minmax(w_NGg, scheme)
    step = bf16(scale)
    return step, _zero_point(low, step, scheme)


def split_single_level(step_NG: Tensor, zero_NG: Tensor | None, scheme: Scheme) -> Scales:
    """What the runtime makes of a single-level BF16 scale when it loads the file: the second rounding of other tools."""
    if scheme.target.channel_outer_scale:
        group_NG, outer_N = split_scale(step_NG, scheme)
        return Scales(group_NG, zero_NG, outer_N)
    # Error-updated weights may have outgrown the original ones: the outer scale covers the farthest level of any group.
    # 15/16 of it is the largest weight of a symmetric min-max group, which the protective range is about.
    lowest, highest = scheme.levels[0], scheme.levels[-1]
    widest_NG = torch.full_like(step_NG, -lowest) if zero_NG is None else torch.maximum(zero_NG - lowest, highest - zero_NG)
    outer = tensor_outer_scale((step_NG * widest_NG).amax() * 15 / 16, scheme.target)
    return Scales(step_NG / outer, zero_NG, outer)


def nearest_code(w: Tensor, step: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Code 0..15 (float tensor) of the nearest INT4 level of w / step + zero. Broadcasts."""
    level = torch.round(w / step) if zero_point is None else torch.round(w / step) + zero_point
    return level.clamp(scheme.levels[0], scheme.levels[-1]) - scheme.levels[0]


def nearest_entry(w_N: Tensor, column: ColumnScales, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Code and real value of the nearest of the 16 FP8 values: not always the FP8 value of the nearest INT4 level.

    The table rises with the code, so only the level on the far side of the weight can be nearer.
    """
    code_N = nearest_code(w_N, column.step, column.zero_point, scheme)
    value_N = column.value(code_N, scheme)
    other_N = (code_N + torch.sign(w_N - value_N)).clamp(0, 15)
    other_value_N = column.value(other_N, scheme)
    nearer_N = (w_N - other_value_N).abs() < (w_N - value_N).abs()
    return torch.where(nearer_N, other_N, code_N), torch.where(nearer_N, other_value_N, value_N)


def round_to_nearest(w_NK: Tensor, scales: Scales, scheme: Scheme) -> Tensor:
    """Codes uint8 [N, K] of every weight on its own, no compensation."""
    columns = w_NK.shape[1]
    step_NK = expand_groups(scales.step, scheme.group_size, columns)
    zero_NK = None if scales.zero_point is None else expand_groups(scales.zero_point, scheme.group_size, columns)
    return nearest_code(w_NK, step_NK, zero_NK, scheme).to(torch.uint8)


def grouped(w_NK: Tensor, group_size: int) -> Tensor:
    """[N, K] -> [N, G, g], the last group filled with zeros."""
    padding = -w_NK.shape[1] % group_size
    return torch.nn.functional.pad(w_NK, (0, padding)).view(w_NK.shape[0], -1, group_size)


def _minmax(w_NGg: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Width of a level and the smallest value (at most 0) along the last axis.

    The 16 levels of a symmetric group span 2 * amax: scale 2 * amax / 15, as GPTQ, compressed-tensors and the paper have it.
    """
    low, high = w_NGg.amin(-1).clamp(max=0), w_NGg.amax(-1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    return divided(span, 15), low


def _zero_point(low_NG: Tensor, step_NG: Tensor, scheme: Scheme) -> Tensor | None:
    """The level at which real 0 lies, so that `low` falls on the lowest level; None for a symmetric scheme."""
    if scheme.symmetric:
        return None
    lowest, highest = scheme.levels[0], scheme.levels[-1]
    return torch.round(lowest - low_NG / step_NG).clamp(lowest, highest)


def bf16(x: Tensor) -> Tensor:
    """BF16-exact float32; a group of zeros gets a step so small that E4M3 rounds it to its smallest value."""
    return x.to(torch.bfloat16).float().clamp(min=2.0**-24)
