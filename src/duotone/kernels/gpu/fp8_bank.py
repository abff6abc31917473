# Shapes: E experts, P linears of one input, N rows of a linear, R those padded to whole blocks, K columns, C chunks of 128.
"""The FP8 weights of all experts of a bank as one: what `bank` is for 4-bit codes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.kernels.gpu import bank, fp8, layout


@dataclass(frozen=True, eq=False)
class Bank:
    """P linears of each of E experts.

    values: E4M3FN bytes uint8 [E * P * R, 128 C], an expert's linears one after the other, zeros where nothing is. All else as
    in `bank.Bank`.
    """

    values: Tensor
    outer_scale: Tensor
    input_scale: Tensor | None
    experts: int
    parts: int
    rows: int
    in_features: int
    fp8_max: float
    smallest_scale: float

    @property
    def part_rows(self) -> int:
        """R."""
        return len(self.outer_scale) // (self.experts * self.parts)


def why_not(weights: Sequence[Sequence[fp8.Packed]]) -> str | None:
    """Why the linears of experts [E][P] cannot be one, or None."""
    return bank.differing(weights, ("in_features", "fp8_max", "smallest_scale"))


def stack(weights: Sequence[Sequence[fp8.Packed]]) -> Bank:
    """The linears of experts [E][P] as one (see `why_not`): copies."""
    first, flat = weights[0][0], [weight for expert in weights for weight in expert]
    return Bank(
        torch.cat([_whole_blocks(one.values) for one in flat]),
        torch.cat([torch.nn.functional.pad(one.outer_scale, (0, -len(one.outer_scale) % layout.BLOCK_ROWS)) for one in flat]),
        bank.static_scales(weights),
        len(weights),
        len(weights[0]),
        len(first.outer_scale),
        first.in_features,
        first.fp8_max,
        first.smallest_scale,
    )


def _whole_blocks(values: Tensor) -> Tensor:
    more = -len(values) % layout.BLOCK_ROWS
    return torch.nn.functional.pad(values, (0, 0, 0, more)) if more else values  # which would be a copy, too


def split(held: Bank) -> list[list[fp8.Packed]]:
    """The weights [E][P] that a bank is made of: views of it."""
    height, high = held.part_rows, held.rows + -held.rows % fp8.ROWS

    def one(expert: int, part: int) -> fp8.Packed:
        start = (expert * held.parts + part) * height
        return fp8.Packed(
            held.values[start : start + high],
            held.outer_scale[start : start + held.rows],
            None if held.input_scale is None else held.input_scale[expert],
            held.in_features,
            held.fp8_max,
            held.smallest_scale,
        )

    return [[one(expert, part) for part in range(held.parts)] for expert in range(held.experts)]
