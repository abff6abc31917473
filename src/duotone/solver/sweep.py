# Shapes: N out_features, K in_features, B columns of a block, G groups along K, g = group_size, C candidates.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The solver's two inner loops, compiled where `loops` has them and in torch otherwise: same rounding, same order.

`sweep` rounds the columns of a block one after the other, each adding what the earlier ones left. `scale_error` measures
group scales. The torch versions are the specification and run anywhere; the compiled ones take float32.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from duotone.contract import fp8_product
from duotone.scheme import Scheme
from duotone.solver import loops
from duotone.solver.scales import ColumnScales, Scales, grouped, nearest_code, nearest_entry

#: In torch, rank-1 updates inside a block touch this many columns; beyond, one small matrix product does.
_INNER_COLUMNS = 32
#: In torch, candidates are tried on so many rows at a time: temporaries stay in a CPU's cache; a GPU wants more at once.
_ROWS, _ROWS_ELSEWHERE = 64, 2048


class Rule(IntEnum):
    """What a column is rounded to."""

    #: the nearest of its 16 FP8 values
    NEAREST_VALUE = 0
    #: the FP8 value of the nearest INT4 level
    NEAREST_LEVEL = 1
    #: the nearest INT4 level, (level - zero) * step, without FP8
    INT4_ONLY = 2
    #: the nearest FP8 value in the outer scale; there are no codes
    FP8_VALUE = 3


@dataclass(frozen=True, eq=False)
class Grid:
    """What columns are rounded to: group scales [G, N], zero points [G, N] or None, outer scale [N] or [1], and the rule.

    The tensors may be overwritten between sweeps, group by group.
    """

    group_scale_GN: Tensor
    zero_point_GN: Tensor | None
    outer_scale: Tensor
    rule: Rule
    scheme: Scheme

    @classmethod
    def of(cls, scales: Scales, rule: Rule, scheme: Scheme) -> "Grid":
        """The grid of a weight's scales: a copy, even where a transposed view would already be contiguous."""
        copy = torch.contiguous_format
        zero_GN = None if scales.zero_point is None else scales.zero_point.T.clone(memory_format=copy)
        group_GN = scales.group_scale.T.clone(memory_format=copy)
        return cls(group_GN, zero_GN, scales.outer_scale.contiguous(), rule, scheme)

    def column(self, group: int) -> ColumnScales:
        """One group's scales for all rows."""
        scale_N = self.group_scale_GN[group]
        zero_N = None if self.zero_point_GN is None else self.zero_point_GN[group]
        return ColumnScales(scale_N * self.outer_scale, scale_N, zero_N, self.outer_scale)

    def round(self, w_N: Tensor, column: ColumnScales) -> tuple[Tensor, Tensor]:
        """Codes (as float) and values [N] that the rule gives."""
        if self.rule is Rule.NEAREST_VALUE:
            return nearest_entry(w_N, column, self.scheme)
        if self.rule is Rule.FP8_VALUE:
            return torch.zeros_like(w_N), self.scheme.target.fp8.round(w_N / self.outer_scale) * self.outer_scale
        code_N = nearest_code(w_N, column.step, column.zero_point, self.scheme)
        if self.rule is Rule.NEAREST_LEVEL:
            return code_N, column.value(code_N, self.scheme)
        level_N = code_N + self.scheme.levels[0]
        return code_N, (level_N if column.zero_point is None else level_N - column.zero_point) * column.step


def sweep(base_BN: Tensor, reference_BN: Tensor, coupling_BB: Tensor, grid: Grid, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 and values [B, N] of a block's columns, in order.

    Column j rounds base_j + sum_{i<j} coupling[i, j] * (reference_i - value_i); of `coupling` only i < j is read.
    group_B: int32, the group of each column.
    """
    compiled = loops.compiled(grid.scheme.target.fp8, base_BN)
    if compiled is None:
        return sweep_torch(base_BN, reference_BN, coupling_BB, grid, group_B)
    return compiled.sweep(
        base_BN.contiguous(),
        reference_BN.contiguous(),
        coupling_BB.contiguous(),
        grid.group_scale_GN,
        grid.zero_point_GN,
        grid.outer_scale,
        group_B,
        grid.scheme.levels[0],
        grid.scheme.target.fp8.max,
        int(grid.rule),
    )


def sweep_torch(
    base_BN: Tensor, reference_BN: Tensor, coupling_BB: Tensor, grid: Grid, group_B: Tensor
) -> tuple[Tensor, Tensor]:
    """`sweep` in torch, on any device and in float32 or float64."""
    columns, groups = len(base_BN), group_B.tolist()
    scales = {group: grid.column(group) for group in set(groups)}
    wish_BN, value_BN, left_BN = base_BN.clone(), torch.empty_like(base_BN), torch.empty_like(base_BN)
    codes_BN = torch.empty_like(base_BN)
    for inner in range(0, columns, _INNER_COLUMNS):
        end = min(inner + _INNER_COLUMNS, columns)
        wish_BN[inner:end] += coupling_BB[:inner, inner:end].T @ left_BN[:inner]
        for j in range(inner, end):
            codes_BN[j], value_BN[j] = grid.round(wish_BN[j], scales[groups[j]])
            torch.sub(reference_BN[j], value_BN[j], out=left_BN[j])
            wish_BN[j + 1 : end].addr_(coupling_BB[j, j + 1 : end], left_BN[j])
    return codes_BN.to(torch.uint8), value_BN


def scale_error(
    w_NK: Tensor, candidates_NGC: Tensor, start: Scales, scheme: Scheme, group_size: int, column_weight_K: Tensor | None = None
) -> Tensor:
    """Squared error [N, G, C] of every group, in units of the weights, rounded to INT4 and FP8 under each candidate scale.

    Zero points and outer scale are those of `start`. With `column_weight_K`, each column's squared error counts that often.
    """
    compiled = loops.compiled(scheme.target.fp8, w_NK)
    if compiled is None:
        return scale_error_torch(w_NK, candidates_NGC, start, scheme, group_size, column_weight_K)
    return compiled.scale_error(
        w_NK.contiguous(),
        candidates_NGC.contiguous(),
        None if start.zero_point is None else start.zero_point.contiguous(),
        start.outer_scale.contiguous(),
        None if column_weight_K is None else column_weight_K.contiguous(),
        scheme.levels[0],
        scheme.target.fp8.max,
        group_size,
    )


def scale_error_torch(
    w_NK: Tensor, candidates_NGC: Tensor, start: Scales, scheme: Scheme, group_size: int, column_weight_K: Tensor | None = None
) -> Tensor:
    """`scale_error` in torch, on any device."""
    weight_Gg = None if column_weight_K is None else grouped(column_weight_K[None], group_size)[0]
    outer_N = start.outer_scale.expand(len(w_NK))
    error_NGC = torch.empty_like(candidates_NGC)
    step = _ROWS if w_NK.device.type == "cpu" else _ROWS_ELSEWHERE
    for first in range(0, len(w_NK), step):
        rows = slice(first, first + step)
        zero = None if start.zero_point is None else start.zero_point[rows].unsqueeze(-1)
        scaled_NGg = grouped(w_NK[rows], group_size) / outer_N[rows, None, None]
        for c in range(candidates_NGC.shape[-1]):
            group = candidates_NGC[rows, :, c : c + 1]
            level = nearest_code(scaled_NGg, group, zero, scheme) + scheme.levels[0]
            squared_NGg = fp8_product(level, zero, group, scheme.target.fp8).sub_(scaled_NGg).square_()
            if weight_Gg is not None:
                squared_NGg *= weight_Gg
            error_NGC[rows, :, c] = squared_NGg.sum(-1) * outer_N[rows, None].square()
    return error_NGC
