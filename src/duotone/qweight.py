# Shapes: N out_features, K in_features, G = ceil(K / group_size) groups.
"""The quantized values that flow between all rooms, in 4 bits or in FP8: frozen, invariants checked once, at birth."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.contract import fp8_product, join_scale, split_scale
from duotone.scheme import Fp8Scheme, Scheme, Target


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as 4-bit codes and two levels of scales: real = FP8((level[code] - zero) * group_scale) * outer_scale.

    Shapes: codes uint8 [N, K] in original column order; group_scale float32 [N, G]; outer_scale float32 [N] or [1];
    zero_point float32 [N, G] (integers on the level axis) exactly when the scheme is asymmetric; input_scale float32
    scalar exactly when the target's activations are static and have been calibrated. cut: these are some columns of a wider
    weight, whose rows may have their largest group scale elsewhere.
    Raises ValueError with the name of the field, what was found and what was expected.
    """

    codes: Tensor
    group_scale: Tensor
    outer_scale: Tensor
    scheme: Scheme
    zero_point: Tensor | None = None
    input_scale: Tensor | None = None
    cut: bool = False

    def __post_init__(self) -> None:
        if self.codes.dim() != 2:
            raise ValueError(f"codes: found shape {tuple(self.codes.shape)}, expected [N, K]")
        rows, columns = self.codes.shape
        target = self.scheme.target
        _expect("codes", self.codes, (rows, columns), torch.uint8)
        _expect("group_scale", self.group_scale, (rows, self.scheme.groups(columns)), torch.float32)
        _expect("outer_scale", self.outer_scale, (rows if target.channel_outer_scale else 1,), torch.float32)
        if self.codes.numel() and int(self.codes.max()) > 15:
            raise ValueError(f"codes: found {int(self.codes.max())}, expected 0..15")
        _expect_scale("group_scale", self.group_scale)
        _expect_scale("outer_scale", self.outer_scale)
        self._check_zero_point()
        _check_input_scale(self.input_scale, target)
        self._check_canonical()

    def _check_zero_point(self) -> None:
        if (self.zero_point is None) != self.scheme.symmetric:
            raise ValueError("zero_point: must be given exactly when the scheme is asymmetric")
        if self.zero_point is None:
            return
        _expect("zero_point", self.zero_point, tuple(self.group_scale.shape), torch.float32)
        low, high = self.scheme.levels[0], self.scheme.levels[-1]
        if not bool(((self.zero_point >= low) & (self.zero_point <= high) & (self.zero_point % 1 == 0)).all()):
            raise ValueError(f"zero_point: expected integers in [{low:g}, {high:g}]")

    def _check_canonical(self) -> None:
        """Each target has one legal pair of scales: the one that a reader of the file gets back bit for bit."""
        if self.scheme.target.channel_outer_scale and self.cut:
            peak, fp8 = self.scheme.peak_group_scale, self.scheme.target.fp8
            if not torch.equal(fp8.round(self.group_scale), self.group_scale) or bool((self.group_scale > peak).any()):
                raise ValueError(f"group_scale: expected {fp8.name} values of at most {peak:g}")
            return
        if self.scheme.target.channel_outer_scale:
            group, outer = split_scale(join_scale(self.group_scale, self.outer_scale), self.scheme)
            if not torch.equal(group, self.group_scale):
                peak = self.scheme.peak_group_scale
                raise ValueError(
                    f"group_scale: expected {self.scheme.target.fp8.name} values, each row's largest exactly {peak:g}"
                )
            if not torch.equal(outer, self.outer_scale):
                raise ValueError("outer_scale: expected a BF16 row maximum over the peak group scale (canonical form)")
            return
        if not torch.equal(self.group_scale.to(torch.bfloat16).float(), self.group_scale):
            raise ValueError("group_scale: expected BF16 values")
        if float(torch.frexp(self.outer_scale).mantissa) != 0.5:
            raise ValueError(f"outer_scale: found {float(self.outer_scale):g}, expected a power of two")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A weight as FP8 values and an outer scale: real = value * outer_scale.

    Shapes: values float8_e4m3fn [N, K], none beyond the target's largest; outer_scale float32 [N], of BF16 values, or [1], a
    power of two; input_scale as in `QuantizedWeight`. Raises ValueError with the name of the field, what was found and what
    was expected.
    """

    values: Tensor
    outer_scale: Tensor
    scheme: Fp8Scheme
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.dim() != 2:
            raise ValueError(f"values: found shape {tuple(self.values.shape)}, expected [N, K]")
        target = self.scheme.target
        _expect("values", self.values, tuple(self.values.shape), torch.float8_e4m3fn)
        _expect("outer_scale", self.outer_scale, (len(self.values) if target.channel_outer_scale else 1,), torch.float32)
        _expect_scale("outer_scale", self.outer_scale)
        if not bool((self.values.float().abs() <= target.fp8.max).all()):
            raise ValueError(f"values: found some beyond {target.fp8.max:g} or NaN, expected {target.fp8.name}")
        if target.channel_outer_scale and not torch.equal(self.outer_scale.to(torch.bfloat16).float(), self.outer_scale):
            raise ValueError("outer_scale: expected BF16 values")
        if not target.channel_outer_scale and float(torch.frexp(self.outer_scale).mantissa) != 0.5:
            raise ValueError(f"outer_scale: found {float(self.outer_scale):g}, expected a power of two")
        _check_input_scale(self.input_scale, target)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]


#: A weight in either precision.
AnyWeight = QuantizedWeight | Fp8Weight


def runnable_input_scale(weight: AnyWeight) -> Tensor | None:
    """The static activation scale that a kernel multiplies with; None where activations are scaled per token.

    Raises ValueError for a static target's weight that has none yet: it would silently be run as a dynamic one.
    """
    if weight.input_scale is None and not weight.scheme.target.dynamic_activations:
        name = weight.scheme.target.name
        raise ValueError(f"input_scale: found none, expected the calibrated one: activations of target {name} are static")
    return weight.input_scale


def _check_input_scale(input_scale: Tensor | None, target: Target) -> None:
    if input_scale is None:
        return
    if target.dynamic_activations:
        raise ValueError("input_scale: must not be given, activations of this target are scaled per token")
    _expect("input_scale", input_scale, (), torch.float32)
    _expect_scale("input_scale", input_scale)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name}: found {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")


def _expect_scale(name: str, scale: Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{name}: expected finite positive values")


def expand_groups(group_NG: Tensor, group_size: int, in_features: int) -> Tensor:
    """One value a column from one value a group: [N, G] -> [N, K]; the last group may be short."""
    return group_NG.repeat_interleave(group_size, dim=-1)[..., :in_features]


def fp8_values(weight: AnyWeight) -> Tensor:
    """The FP8 operand of the matrix product, float32 [N, K]: what every kernel multiplies."""
    if isinstance(weight, Fp8Weight):
        return weight.values.float()
    scheme, (_, columns) = weight.scheme, weight.shape
    level_NK = torch.tensor(scheme.levels, dtype=torch.float32, device=weight.codes.device)[weight.codes.long()]
    zero_NK = None if weight.zero_point is None else expand_groups(weight.zero_point, scheme.group_size, columns)
    scale_NK = expand_groups(weight.group_scale, scheme.group_size, columns)
    return fp8_product(level_NK, zero_NK, scale_NK, scheme.target.fp8)


def dequantize(weight: AnyWeight) -> Tensor:
    """Real weights float32 [N, K]: the FP8 operand times the outer scale."""
    return fp8_values(weight) * weight.outer_scale[:, None]
