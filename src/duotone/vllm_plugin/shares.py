# Shapes: N out_features of a process, K in_features of a process, G groups along all of the linear's columns.
"""The part of a fused linear that one process of vLLM has, from the file's tensors to quantized weights. Knows nothing of vLLM.

A process with some of the columns (o_proj, down_proj) is given the scales of all of them, so the outer scale of a row is the
whole row's and every weight is the contract's, for any number of processes. Where groups lie across a border they are cut into
smaller ones that have the same scale.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duotone.checkpoint.compressed_tensors import SideScales
from duotone.checkpoint.packing import unpack_int4
from duotone.contract import split_scale
from duotone.errors import DuotoneError
from duotone.qweight import AnyWeight, Fp8Weight, QuantizedWeight
from duotone.scheme import AnyScheme, Fp8Scheme, Scheme

_NIBBLES = 8


@dataclass(frozen=True)
class Share:
    """A process's part of a linear of `all_columns`: rows of each linear that is fused in it, and columns from `start` on.

    Raises DuotoneError, naming the linear, for parts that the packed file cannot be cut into.
    """

    name: str
    rows: tuple[int, ...]
    columns: int
    all_columns: int
    start: int
    scheme: AnyScheme

    def __post_init__(self) -> None:
        if isinstance(self.scheme, Fp8Scheme):
            return
        if self.is_cut and self.columns % _NIBBLES:
            raise DuotoneError(
                f"{self.name}: found {self.columns} columns on each process, expected a multiple of {_NIBBLES}; use another "
                "--tensor-parallel-size"
            )
        if not self.scheme.symmetric and any(rows % _NIBBLES for rows in self.rows):
            raise DuotoneError(
                f"{self.name}: found {self.rows} rows on each process, expected multiples of {_NIBBLES} with zero points; use "
                "another --tensor-parallel-size"
            )

    @property
    def is_cut(self) -> bool:
        """Whether other processes have the rest of each row."""
        return self.columns != self.all_columns

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the tensors that have to be loaded: codes or FP8 values of these columns, scales (and zero points) of all."""
        rows = sum(self.rows)
        if isinstance(self.scheme, Fp8Scheme):
            values = {"weight": (rows, self.columns)}
            return values | ({"weight_scale": (rows, 1)} if self.scheme.target.channel_outer_scale else {})
        groups = self.scheme.groups(self.all_columns)
        width = self.columns if self.is_cut else groups * self.scheme.group_size
        found = {"weight_packed": (rows, width // _NIBBLES), "weight_scale": (rows, groups)}
        return found if self.scheme.symmetric else found | {"weight_zero_point": (rows // _NIBBLES, groups)}


def weights_of(share: Share, stored: dict[str, Tensor], sides: Sequence[SideScales | None]) -> list[AnyWeight]:
    """The quantized weights of a share: one, or where the outer scale is a tensor's (`gaudi`) one for each fused linear.

    stored: tensors by the names of `shapes`. sides: the scales in duotone.json of each fused linear.
    Raises DuotoneError naming the linear for scales that are missing or not valid.
    """
    try:
        if isinstance(share.scheme, Fp8Scheme):
            return list(_fp8_weights(share, share.scheme, stored, sides))
        return list(_packed_weights(share, share.scheme, stored, sides))
    except ValueError as error:
        raise DuotoneError(f"{share.name}: the checkpoint's scales are not valid: {error}") from None


def _fp8_weights(
    share: Share, scheme: Fp8Scheme, stored: dict[str, Tensor], sides: Sequence[SideScales | None]
) -> Iterator[AnyWeight]:
    """Of a linear in FP8."""
    values = stored["weight"]
    if scheme.target.channel_outer_scale:
        yield Fp8Weight(values, stored["weight_scale"].float().flatten(), scheme)
        return
    for first, last, outer, input_scale in _by_tensor(share, sides):
        yield Fp8Weight(values[first:last], outer.to(values.device), scheme, input_scale.to(values.device))


def _packed_weights(
    share: Share, scheme: Scheme, stored: dict[str, Tensor], sides: Sequence[SideScales | None]
) -> Iterator[AnyWeight]:
    """Of a linear in 4 bits."""
    packed, scale = stored["weight_packed"], stored["weight_scale"]
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise DuotoneError(f"{share.name}.weight_scale: found negative or non-finite scales, expected positive ones")
    zero = None
    if not scheme.symmetric:
        zero = unpack_int4(stored["weight_zero_point"].T.contiguous(), sum(share.rows)).T.float() + scheme.levels[0]
    if scheme.target.channel_outer_scale:
        group, outer = split_scale(scale, scheme)
        parts = [(0, sum(share.rows), outer, None)]
    else:
        group, parts = scale.float(), list(_by_tensor(share, sides))
    size, place = _regrouped(share, scheme.group_size)
    codes, group = unpack_int4(packed, share.columns), group[:, place]
    zero = None if zero is None else zero[:, place].contiguous()
    scheme = replace(scheme, group_size=size)
    for first, last, outer, input_scale in parts:
        yield QuantizedWeight(
            codes[first:last],
            group[first:last].contiguous(),
            outer.to(codes.device),
            scheme,
            None if zero is None else zero[first:last],
            None if input_scale is None else input_scale.to(codes.device),
            cut=share.is_cut,
        )


def _by_tensor(share: Share, sides: Sequence[SideScales | None]) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """First and last row, outer scale and activation scale of each fused linear."""
    first = 0
    for rows, side in zip(share.rows, sides, strict=True):
        if side is None:
            raise DuotoneError(
                f"{share.name}: duotone.json has no scales for it, expected them for target {share.scheme.target.name}"
            )
        outer, entering = (torch.tensor(scale, dtype=torch.float32) for scale in ([side.outer_scale], side.input_scale))
        yield first, first + rows, outer, entering
        first += rows


def _regrouped(share: Share, group_size: int) -> tuple[int, list[int]]:
    """A group size that divides what this process has, and which of all groups each such group is of."""
    size = math.gcd(group_size, share.columns) if share.is_cut else group_size
    groups = -(-share.columns // size)
    return size, [(share.start + i * size) // group_size for i in range(groups)]


def is_left_to_vllm(scheme: Scheme, capability: tuple[int, int] | None) -> bool:
    """Whether vLLM runs a scheme by itself: CUTLASS W4A8 on compute capability 9.0; sources in loadability/runtimes.py."""
    return capability == (9, 0) and scheme.target.channel_outer_scale and scheme.symmetric and scheme.group_size == 128
