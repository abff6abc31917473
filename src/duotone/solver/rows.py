# Shapes: N out_features (of all linears that are rounded together), K in_features, B columns of a block, P paths of a beam.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Two inner loops in which rows answer for one another: compiled where the extension is there, in torch otherwise.

With a curvature O [N, N] of the model's loss in the outputs, the loss of an error E is tr(O E H E^T): an error of row m may be
made up for by row n. Both loops take rows and columns in the order in which they are visited. The torch versions are the
specification; being two Python loops deep, they are for small models.
"""

import torch
from torch import Tensor

from duotone.kernels import native
from duotone.solver.sweep import Grid, Rule


def beam_rows(
    target_NK: Tensor,
    coupling_NN: Tensor,
    unit_KK: Tensor,
    diagonal_K: Tensor,
    grid: Grid,
    group_K: Tensor,
    width: int,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes uint8 and values [N, K], row after row; each row's columns are decided by a beam search over `width` paths.

    Row n aims at target_n + sum_m coupling[m, n] * (target_m - value_m), over the rows before it, or, with the codes and values
    of a `start`, over all others; it then leaves its start only for something cheaper. Its loss is that of the column loop,
    sum_j (diagonal_j (x_j + sum_{k<j} x_k unit[k, j]))^2; a path goes on with the nearest value and the one next to it.
    width 1 without a start is the column loop itself.
    """
    if not native.compiled(grid.scheme.target.fp8, target_NK):
        return beam_rows_torch(target_NK, coupling_NN, unit_KK, diagonal_K, grid, group_K, width, start)
    codes, values = (None, None) if start is None else start
    return torch.ops.duotone.beam_rows(
        target_NK.contiguous(),
        coupling_NN.contiguous(),
        unit_KK.contiguous(),
        diagonal_K.contiguous(),
        grid.group_scale_GN,
        grid.zero_point_GN,
        grid.outer_scale,
        group_K,
        codes,
        values,
        grid.scheme.levels[0],
        grid.scheme.target.fp8.max,
        width,
    )


def beam_rows_torch(
    target_NK: Tensor,
    coupling_NN: Tensor,
    unit_KK: Tensor,
    diagonal_K: Tensor,
    grid: Grid,
    group_K: Tensor,
    width: int,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`beam_rows` in torch, on any device and in float32 or float64."""
    curvature_K = diagonal_K.square()
    if start is None:
        codes_NK, value_NK = torch.empty(target_NK.shape, dtype=torch.uint8, device=target_NK.device), target_NK.clone()
    else:
        codes_NK, value_NK = start[0].clone(), start[1].clone()
    for n in range(len(target_NK)):
        left_NK = target_NK - value_NK  # rows that are still to come have no error yet, or that of the start
        weights_N = coupling_NN[:, n].clone()
        weights_N[n] = 0
        wish_K = target_NK[n] + weights_N @ left_NK
        codes_K, value_K, cost = _beam(wish_K, unit_KK, curvature_K, _row(grid, n), group_K, width)
        if start is not None and float(_cost(wish_K - value_NK[n], unit_KK, curvature_K)) <= cost:
            continue
        codes_NK[n], value_NK[n] = codes_K, value_K
    return codes_NK, value_NK


def _beam(
    wish_K: Tensor, unit_KK: Tensor, curvature_K: Tensor, grid: Grid, group_K: Tensor, width: int
) -> tuple[Tensor, Tensor, float]:
    """Codes and values [K] of the cheapest path, and its cost."""
    scheme, groups = grid.scheme, group_K.tolist()
    left_PK, codes_PK, cost_P = torch.zeros_like(wish_K)[None], torch.zeros_like(wish_K)[None], wish_K.new_zeros(1)
    for j, group in enumerate(groups):
        column = grid.column(group)
        w_P = wish_K[j] + left_PK[:, :j] @ unit_KK[:j, j]
        code_P, value_P = grid.round(w_P, column)
        next_P = code_P + torch.where(w_P > value_P, 1.0, -1.0)
        next_P = torch.where((next_P < 0) | (next_P > 15), 2 * code_P - next_P, next_P)
        next_value_P = column.value(next_P, scheme)
        codes_P2 = torch.stack((code_P, next_P), 1)
        value_P2 = torch.stack((value_P, next_value_P), 1)
        cost_P2 = cost_P[:, None] + (w_P[:, None] - value_P2).square() * curvature_K[j]
        kept = torch.sort(cost_P2.flatten(), stable=True).indices[:width]
        left_PK, codes_PK, cost_P = left_PK[kept // 2].clone(), codes_PK[kept // 2].clone(), cost_P2.flatten()[kept]
        left_PK[:, j], codes_PK[:, j] = wish_K[j] - value_P2.flatten()[kept], codes_P2.flatten()[kept]
    columns = [grid.column(group) for group in groups]
    values = [column.value(code, scheme) for column, code in zip(columns, codes_PK[0].split(1), strict=True)]
    return codes_PK[0].to(torch.uint8), torch.cat(values), float(cost_P[0])


def _cost(left_K: Tensor, unit_KK: Tensor, curvature_K: Tensor) -> Tensor:
    return ((left_K @ unit_KK).square() * curvature_K).sum()


def _row(grid: Grid, n: int) -> Grid:
    """One row's share of a grid."""
    zero_GN, outer = grid.zero_point_GN, grid.outer_scale
    return Grid(
        grid.group_scale_GN[:, n : n + 1],
        None if zero_GN is None else zero_GN[:, n : n + 1],
        outer[n : n + 1] if len(outer) > 1 else outer,
        Rule.NEAREST_VALUE,
        grid.scheme,
    )


def descend_rows(
    pull_BN: Tensor, curvature_NN: Tensor, hessian_BB: Tensor, grid: Grid, group_B: Tensor, codes_BN: Tensor, value_BN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, values and O (new values - old ones) [B, N] after every value of a block of columns was visited once.

    Each value in turn goes to the nearest of its 16 to what all others leave for it. pull: (O E H)^T of the block's columns.
    """
    if not native.compiled(grid.scheme.target.fp8, pull_BN):
        return descend_rows_torch(pull_BN, curvature_NN, hessian_BB, grid, group_B, codes_BN, value_BN)
    return torch.ops.duotone.descend_rows(
        pull_BN.contiguous(),
        curvature_NN.contiguous(),
        hessian_BB.contiguous(),
        grid.group_scale_GN,
        grid.zero_point_GN,
        grid.outer_scale,
        group_B,
        codes_BN.contiguous(),
        value_BN.contiguous(),
        grid.scheme.levels[0],
        grid.scheme.target.fp8.max,
    )


def descend_rows_torch(
    pull_BN: Tensor, curvature_NN: Tensor, hessian_BB: Tensor, grid: Grid, group_B: Tensor, codes_BN: Tensor, value_BN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`descend_rows` in torch, on any device and in float32 or float64."""
    codes_BN, value_BN, change_BN = codes_BN.clone(), value_BN.clone(), torch.zeros_like(pull_BN)
    rows = [_row(grid, n) for n in range(pull_BN.shape[1])]
    for j, group in enumerate(group_B.tolist()):
        own_N = (pull_BN[j] - hessian_BB[:j, j] @ change_BN[:j]) / hessian_BB[j, j]
        for n, row in enumerate(rows):
            wish_1 = value_BN[j, n : n + 1] + (own_N[n] - change_BN[j, n]) / curvature_NN[n, n]
            code_1, value_1 = row.round(wish_1, row.column(group))
            step_1 = value_1 - value_BN[j, n : n + 1]
            if float(step_1):
                codes_BN[j, n], value_BN[j, n] = code_1[0], value_1[0]
                change_BN[j] += curvature_NN[n] * step_1
    return codes_BN, value_BN, change_BN
