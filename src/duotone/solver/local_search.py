# Shapes: N out_features, K in_features.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""After the column loop: each row's codes improved one at a time, through worse ones too (a tabu search).

The column loop never looks back. Here each step takes the move of one code by one level that costs a row least, all its
columns considered; a code that has moved rests for some steps, so that a row climbs out of the place where no single move
helps. The best codes met on the way are kept. With g = (w - v) H, a move of column k by d costs d (d H_kk - 2 g_k) and changes
g by d times a row of H: K additions, where a sweep of coordinate descent takes K^2.
"""

import torch
from torch import Tensor

from duotone.device import product_dtype
from duotone.solver import loops
from duotone.solver.scales import ColumnScales
from duotone.solver.sweep import Grid

#: Columns that a row may look at, and no fewer than a share of K times K: every step looks at all. docs/LOG.md has what
#: more of them bring.
LEAST_VISITS, VISITS_SHARE = 2**18, 1 / 8
#: Steps for which a code that has moved stays where it is.
TENURE = 12


def steps_of(columns: int) -> int:
    """How many moves a row of so many columns tries."""
    return max(LEAST_VISITS // columns, int(columns * VISITS_SHARE))


def local_search(gradient_NK: Tensor, hessian_KK: Tensor, damping_K: Tensor, grid: Grid, codes_NK: Tensor) -> Tensor:
    """Codes uint8 [N, K] of no greater loss tr(E (H + diag(damping)) E^T), E = W - V, than those given (to float32 rounding).

    gradient_NK: E (H + diag(damping)) of the codes given. Of a wide H rows are read in BF16 where `product_dtype` says so, its
    diagonal as it is.
    """
    narrow_KK = hessian_KK.to(product_dtype(hessian_KK))
    if narrow_KK is not hessian_KK:
        damping_K = damping_K + (hessian_KK.diagonal() - narrow_KK.diagonal())
        hessian_KK = narrow_KK
    steps = steps_of(codes_NK.shape[1])
    compiled = loops.compiled(grid.scheme.target.fp8, gradient_NK)
    if compiled is None:
        return local_search_torch(gradient_NK, hessian_KK, damping_K, grid, codes_NK, steps)
    return compiled.local_search(
        gradient_NK.contiguous(),
        hessian_KK.contiguous(),
        damping_K.contiguous(),
        grid.group_scale_GN,
        grid.zero_point_GN,
        grid.outer_scale,
        _groups(grid, codes_NK).to(torch.int32),
        codes_NK.contiguous(),
        grid.scheme.levels[0],
        grid.scheme.target.fp8.max,
        steps,
        TENURE,
    )


def local_search_torch(
    gradient_NK: Tensor, hessian_KK: Tensor, damping_K: Tensor, grid: Grid, codes_NK: Tensor, steps: int
) -> Tensor:
    """`local_search` in torch, on any device and in float32 or float64: all rows take a step together."""
    rows, group_K = torch.arange(len(codes_NK), device=codes_NK.device), _groups(grid, codes_NK)
    code_NK, g_NK, curvature_K = codes_NK.to(gradient_NK.dtype), gradient_NK.clone(), hessian_KK.diagonal() + damping_K
    scale_NK = grid.group_scale_GN[group_K].T
    zero_NK = None if grid.zero_point_GN is None else grid.zero_point_GN[group_K].T
    columns = ColumnScales(scale_NK, scale_NK, zero_NK, grid.outer_scale[:, None])  # of all groups at once
    table = [columns.value(torch.full_like(code_NK, code), grid.scheme) for code in range(16)]
    table_16NK = torch.stack(table).to(gradient_NK.dtype)
    total_N = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    least_N, best_NK, moved_NK = total_N.clone(), code_NK.clone(), torch.full_like(codes_NK, -TENURE - 1, dtype=torch.int64)
    for step in range(steps):
        cost_NK, change_NK = _cheapest(table_16NK, code_NK, g_NK, curvature_K, step - moved_NK <= TENURE)
        k_N = cost_NK.argmin(1)
        cost_N, change_N = cost_NK[rows, k_N], change_NK[rows, k_N]
        going_N = cost_N < torch.inf
        rows_R, k_R, change_R = rows[going_N], k_N[going_N], change_N[going_N]
        code_NK[rows_R, k_R] += torch.where(change_R > 0, 1.0, -1.0).to(code_NK.dtype)
        g_NK[rows_R, k_R] -= change_R * damping_K[k_R]
        g_NK[rows_R] -= change_R[:, None] * hessian_KK[k_R]
        moved_NK[rows_R, k_R] = step
        total_N[going_N] += cost_N[going_N].double()
        better_N = total_N < least_N
        least_N, best_NK = torch.where(better_N, total_N, least_N), torch.where(better_N[:, None], code_NK, best_NK)
    return best_NK.to(torch.uint8)


def _cheapest(
    table_16NK: Tensor, code_NK: Tensor, g_NK: Tensor, curvature_K: Tensor, resting_NK: Tensor
) -> tuple[Tensor, Tensor]:
    """For each column the cheaper of a move up and one down: its cost, infinite where neither can be, and the change."""

    def at(code_NK: Tensor) -> Tensor:
        return table_16NK.gather(0, code_NK.clamp(0, 15).long()[None])[0]

    now_NK = at(code_NK)
    costs, changes = [], []
    for side in (1, -1):
        d_NK = at(code_NK + side) - now_NK
        cost_NK = d_NK * (d_NK * curvature_K - (g_NK + g_NK))
        costs.append(cost_NK.masked_fill((d_NK == 0) | resting_NK | (curvature_K == 0), torch.inf))
        changes.append(d_NK)
    up_NK = costs[0] < costs[1]
    return torch.where(up_NK, *costs), torch.where(up_NK, *changes)


def _groups(grid: Grid, codes_NK: Tensor) -> Tensor:
    return torch.arange(codes_NK.shape[1], device=codes_NK.device) // grid.scheme.group_size
