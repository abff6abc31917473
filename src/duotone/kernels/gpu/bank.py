# Shapes: E experts, P linears of one input, N rows of a linear, R those padded to whole blocks, S slots, K columns.
"""The weights of all experts of a bank as one, in the layout that each of them has for itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.kernels.gpu import fp8, layout
from duotone.kernels.gpu.backend import Packed


@dataclass(frozen=True, eq=False)
class Bank:
    """P linears of each of E experts: an expert's gate and up, or its down.

    codes, index, table, to_a_word, is_signed: as in `layout.Layout`, with the E * P * R rows of all, an expert's one after the
    other. table_rows: of each linear's own part of the table; 0: they have one in common. outer_scale: float32 [E * P * R],
    zero where nothing is. input_scale: static activation scales [E], or None. rows: N.
    """

    codes: Tensor
    index: Tensor
    table: Tensor
    to_a_word: int
    is_signed: bool
    table_rows: int
    outer_scale: Tensor
    input_scale: Tensor | None
    experts: int
    parts: int
    rows: int
    in_features: int
    group_size: int
    fp8_max: float
    smallest_scale: float

    @property
    def part_rows(self) -> int:
        """R."""
        return len(self.outer_scale) // (self.experts * self.parts)


def why_not(weights: Sequence[Sequence[Packed]]) -> str | None:
    """Why the linears of experts [E][P] cannot be one, or None."""
    return differing(weights, ("in_features", "group_size", "fp8_max", "smallest_scale", "to_a_word"))


def differing(weights: Sequence[Sequence[Packed | fp8.Packed]], facts: Sequence[str]) -> str | None:
    """Which of these facts, or of what all weights have, keeps the linears of experts [E][P] from being one; None: nothing."""
    flat = [weight for expert in weights for weight in expert]
    for fact in facts:
        if len(found := {getattr(weight, fact) for weight in flat}) > 1:
            return f"{fact}: found {' and '.join(map(str, sorted(found)))}, expected one for all experts"
    if len(found := {len(weight.outer_scale) for weight in flat}) > 1:
        return f"rows: found {' and '.join(map(str, sorted(found)))}, expected as many in all experts"
    if any({_static(weight) for weight in expert} != {_static(expert[0])} for expert in weights):
        return "input_scale: found several for the linears of one input, expected one"
    return None


def _static(weight: Packed | fp8.Packed) -> float | None:
    return None if weight.input_scale is None else float(weight.input_scale)


def static_scales(weights: Sequence[Sequence[Packed | fp8.Packed]]) -> Tensor | None:
    """The static activation scales [E], or None where they are dynamic."""
    scales = [expert[0].input_scale for expert in weights]
    return None if scales[0] is None else torch.stack(scales)  # pyright: ignore[reportArgumentType]


def stack(weights: Sequence[Sequence[Packed]]) -> Bank:
    """The linears of experts [E][P] as one (see `why_not`): copies."""
    first, flat = weights[0][0], [weight for expert in weights for weight in expert]
    held = [layout.Layout(one.codes, one.index, one.table, one.to_a_word, one.is_signed) for one in flat]
    if len({one.is_signed for one in held}) > 1:
        held = [layout.unsigned(one) if one.is_signed else one for one in held]
    table, table_rows = held[0].table, 0
    if any(not torch.equal(one.table, table) for one in held):
        table_rows = max(len(one.table) for one in held)
        table = torch.cat([torch.nn.functional.pad(one.table, (0, 0, 0, table_rows - len(one.table))) for one in held])
    outer = [torch.nn.functional.pad(one.outer_scale, (0, -len(one.outer_scale) % layout.BLOCK_ROWS)) for one in flat]
    return Bank(
        torch.cat([one.codes for one in held]),
        torch.cat([one.entries for one in held], 1),
        table,
        first.to_a_word,
        held[0].is_signed,
        table_rows,
        torch.cat(outer),
        static_scales(weights),
        len(weights),
        len(weights[0]),
        len(first.outer_scale),
        first.in_features,
        first.group_size,
        first.fp8_max,
        first.smallest_scale,
    )


def split(bank: Bank) -> list[list[Packed]]:
    """The weights [E][P] that a bank is made of: copies of the index, views of all else."""
    high = bank.part_rows

    def one(expert: int, part: int) -> Packed:
        number = expert * bank.parts + part
        start = number * high
        table = bank.table[number * bank.table_rows : (number + 1) * bank.table_rows] if bank.table_rows else bank.table
        return Packed(
            bank.codes[start // layout.PIECE_ROWS : (start + high) // layout.PIECE_ROWS],
            bank.index[:, start : start + high].contiguous(),
            table,
            bank.to_a_word,
            bank.is_signed,
            bank.outer_scale[start : start + bank.rows],
            None if bank.input_scale is None else bank.input_scale[expert],
            bank.in_features,
            bank.group_size,
            bank.fp8_max,
            bank.smallest_scale,
        )

    return [[one(expert, part) for part in range(bank.parts)] for expert in range(bank.experts)]
