# Shapes: N out_features, K in_features, B columns of a block.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""After the column loop: coordinate descent over the codes, with scales fixed and the whole quadratic form.

The column loop never looks back: a column rounded early cannot answer for what later ones left. Here each column in turn is
put on the value nearest to what all the *others* leave for it, w_k + sum_{j != k} (w_j - v_j) H_jk / H_kk. No pass can
raise the loss tr((W - V) H (W - V)^T) of the H it is given.
"""

import torch
from torch import Tensor

from duotone.scheme import Scheme
from duotone.solver.scales import Scales
from duotone.solver.statistics import Statistics
from duotone.solver.sweep import Grid, Rule, sweep

_BLOCK = 128


def descend(
    w_NK: Tensor,
    codes_NK: Tensor,
    scales: Scales,
    statistics: Statistics,
    scheme: Scheme,
    passes: int,
    damping_frac: float = 0.0,
    order_K: Tensor | None = None,
) -> Tensor:
    """Codes uint8 [N, K] after `passes` sweeps over all columns, under H plus `damping_frac` of its mean diagonal.

    The damping is what the column loop had: without it, sweeps fit the noise of a short calibration. Columns are visited
    in the order given, or as they stand; those never excited keep their codes, as nothing is lost by them.
    """
    damping = damping_frac * float(statistics.hessian.diagonal().mean())
    h_KK, order_K = _visited(statistics.hessian, damping, order_K)
    curvature_K = h_KK.diagonal() + damping
    group_K = (order_K // scheme.group_size).to(torch.int32)
    grid = Grid.of(scales, Rule.NEAREST_VALUE, scheme)
    w_KN, codes_KN = w_NK.T[order_K].contiguous(), codes_NK.T[order_K].contiguous()
    value_KN = _values(codes_NK, grid)[order_K]
    error_KN = w_KN - value_KN
    for _ in range(passes):
        for start in range(0, len(w_KN), _BLOCK):
            block = slice(start, start + _BLOCK)
            curvature_B, value_BN = curvature_K[block], value_KN[block]
            pull_BN = torch.addmm(error_KN[block], h_KK[block], error_KN, beta=damping)
            wanted_BN = pull_BN.div_(curvature_B[:, None]).add_(value_BN)
            # A column that moves by d pulls column j by d H_ij / H_jj.
            coupling_BB = h_KK[block, block] / curvature_B
            codes_KN[block], moved_BN = sweep(wanted_BN, value_BN, coupling_BB, grid, group_K[block])
            torch.sub(w_KN[block], moved_BN, out=error_KN[block])
            value_KN[block] = moved_BN
    refined_NK = codes_NK.clone()
    refined_NK[:, order_K] = codes_KN.T
    return refined_NK


def _visited(h_KK: Tensor, damping: float, order_K: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hessian and original indices of the columns to visit, in order: all that have some curvature."""
    excited_K = h_KK.diagonal() + damping > 0
    if order_K is None and bool(excited_K.all()):
        return h_KK, torch.arange(len(h_KK), device=h_KK.device)
    order_K = torch.arange(len(h_KK), device=h_KK.device) if order_K is None else order_K
    order_K = order_K[excited_K[order_K]]
    return h_KK[order_K][:, order_K], order_K


def _values(codes_NK: Tensor, grid: Grid) -> Tensor:
    """Real values [K, N] of codes, group by group."""
    parts = codes_NK.T.float().split(grid.scheme.group_size)
    return torch.cat([grid.column(group).value(part, grid.scheme) for group, part in enumerate(parts)])
