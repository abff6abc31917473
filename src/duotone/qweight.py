# Shapes: N out_features, K in_features, G = ceil(K / group_size) groups.
"""The quantized value that flows between all rooms: frozen, its invariants checked once, at birth."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.contract import fp8_product
from duotone.scheme import Scheme


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as 4-bit codes and two levels of scales: real = FP8((level[code] - zero) * group_scale) * outer_scale.

    Shapes: codes uint8 [N, K] in original column order; group_scale float32 [N, G]; outer_scale float32 [N] or [1];
    zero_point float32 [N, G] (integers on the level axis) exactly when the scheme is asymmetric; input_scale float32
    scalar exactly when the target's activations are static and have been calibrated.
    Raises ValueError with the name of the field, what was found and what was expected.
    """

    codes: Tensor
    group_scale: Tensor
    outer_scale: Tensor
    scheme: Scheme
    zero_point: Tensor | None = None
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        target = self.scheme.target
        expected_outer = rows if target.channel_outer_scale else 1
        _expect("codes", self.codes, (rows, columns), torch.uint8)
        _expect("group_scale", self.group_scale, (rows, self.scheme.groups(columns)), torch.float32)
        _expect("outer_scale", self.outer_scale, (expected_outer,), torch.float32)
        if (self.zero_point is None) != self.scheme.symmetric:
            raise ValueError("zero_point: must be given exactly when the scheme is asymmetric")
        if self.zero_point is not None:
            _expect("zero_point", self.zero_point, tuple(self.group_scale.shape), torch.float32)
            low, high = self.scheme.levels[0], self.scheme.levels[-1]
            if bool(((self.zero_point < low) | (self.zero_point > high) | (self.zero_point % 1 != 0)).any()):
                raise ValueError(f"zero_point: expected integers in [{low:g}, {high:g}]")
        if self.input_scale is not None and (target.dynamic_activations or self.input_scale.numel() != 1):
            raise ValueError("input_scale: expected one value, and only for a target with static activations")
        if self.codes.numel() and int(self.codes.max()) > 15:
            raise ValueError(f"codes: found {int(self.codes.max())}, expected 0..15")
        for name, scale in (("group_scale", self.group_scale), ("outer_scale", self.outer_scale)):
            if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise ValueError(f"{name}: expected finite positive values")
        if target.channel_outer_scale:
            self._check_canonical()

    def _check_canonical(self) -> None:
        """A channel-scaled target has one legal split: row maximum at the peak, or the clamped outer scale."""
        peak = self.scheme.peak_group_scale
        if not torch.equal(self.scheme.target.fp8.round(self.group_scale), self.group_scale):
            raise ValueError(f"group_scale: expected {self.scheme.target.fp8.name} values")
        clamped = torch.tensor(self.scheme.smallest_outer_scale, dtype=torch.float32)
        row_max_N = self.group_scale.amax(-1)
        clamped_N = self.outer_scale == clamped.to(self.outer_scale.device)
        if bool(((row_max_N != peak) & ~clamped_N).any()) or bool((row_max_N > peak).any()):
            raise ValueError(f"group_scale: expected each row's largest to be exactly {peak:g} (canonical form)")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def storage_bits(self) -> int:
        """Bits on disk: codes padded to whole groups, one BF16 scale a group, four bits a zero point."""
        padded = self.group_scale.numel() * self.scheme.group_size
        per_group = 16 if self.zero_point is None else 20
        return padded * self.scheme.bits + self.group_scale.numel() * per_group


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name}: found {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")


def expand_groups(group_NG: Tensor, group_size: int, in_features: int) -> Tensor:
    """One value a column from one value a group: [N, G] -> [N, K]; the last group may be short."""
    return group_NG.repeat_interleave(group_size, dim=-1)[..., :in_features]


def fp8_values(weight: QuantizedWeight) -> Tensor:
    """The FP8 operand of the matrix product, float32 [N, K]: what every kernel multiplies."""
    scheme, (_, columns) = weight.scheme, weight.shape
    level_NK = torch.tensor(scheme.levels, device=weight.codes.device)[weight.codes.long()]
    zero_NK = None if weight.zero_point is None else expand_groups(weight.zero_point, scheme.group_size, columns)
    scale_NK = expand_groups(weight.group_scale, scheme.group_size, columns)
    return fp8_product(level_NK, zero_NK, scale_NK, scheme.target.fp8)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Real weights float32 [N, K]: the FP8 operand times the outer scale."""
    return fp8_values(weight) * weight.outer_scale[:, None]
