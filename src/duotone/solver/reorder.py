# Shapes: K in_features, L columns still to be placed, B of them in one block; perm[new] = old throughout.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""In which order a solver visits columns. The order is undone inside the method: no file or kernel ever sees it.

An order takes the Hessian, the group size and the damping (as a share of the mean diagonal) that the solver will add.
"""

from collections.abc import Callable

import torch
from torch import Tensor

#: Columns that `min_pivot_order` eliminates before it applies what they leave to the whole rest, in one matrix product.
_PIVOT_BLOCK = 128


def natural_order(h_KK: Tensor, group_size: int, damping_frac: float) -> Tensor:
    """Columns as they stand."""
    del group_size, damping_frac
    return torch.arange(len(h_KK), device=h_KK.device)


def act_order(h_KK: Tensor, group_size: int, damping_frac: float) -> Tensor:
    """All columns by falling Hessian diagonal, each keeping its group and scale (`actorder: static` elsewhere)."""
    del group_size, damping_frac
    return torch.argsort(h_KK.diagonal(), descending=True, stable=True)


def group_aware_order(h_KK: Tensor, group_size: int, damping_frac: float) -> Tensor:
    """GAR: groups by their largest Hessian diagonal, columns inside a group by their own, both falling (DPQ.md section 3).

    No column leaves its group, so groups are visited one after the other and nothing of the order has to be stored.
    Stable sorts: equal inputs give equal bytes. A short last group takes part like any other.
    """
    del damping_frac
    groups = h_KK.diagonal().split(group_size)
    largest_G = torch.stack([group.max() for group in groups])
    inside = [torch.argsort(group, descending=True, stable=True) for group in groups]
    visited = torch.argsort(largest_G, descending=True, stable=True).tolist()
    return torch.cat([inside[group] + group * group_size for group in visited])


def min_pivot_order(h_KK: Tensor, group_size: int, damping_frac: float) -> Tensor:
    """All columns so that the sum of the factor's squared pivots is small, greedily from the last (arXiv 2507.18553, 4.5).

    With H = R R^T, R upper triangular, a row's loss is sum_j R_jj^2 r_j^2, r_j being what the rounding of column j leaves: at
    most half a step, about step^2 / 12 on average. So the loss goes with sum_j R_jj^2, while prod_j R_jj^2 = det H whatever
    the order: pivots should be as equal as can be. R_jj^2 is the variance of column j given all columns *after* it: the
    last one keeps its own, H_kk, and eliminating it (H - h_k h_k^T / H_kk on the others) leaves the same problem. So the
    order is built from its end, each time with the column whose remaining variance is smallest; large variances wait for the
    front, where all that comes later has taken its share of them. `act_order` is this without the elimination.

    Steps are left out: they differ by row, and the order is one for all. Of equal columns the later is visited later. K^3
    operations, most of them in matrix products. A Hessian that is not positive definite gets some permutation.
    """
    del group_size
    left = torch.arange(len(h_KK), device=h_KK.device).flip(0)  # argmin takes the first of equals: the last column
    excited_K = h_KK.diagonal() > 0
    mean = h_KK.diagonal().where(excited_K, 0).sum() / excited_K.sum().clamp(min=1)  # the one that `factorize` damps by
    rest_LL = h_KK.flip(0, 1)
    rest_LL.diagonal().add_(damping_frac * mean)
    smallest = mean * torch.finfo(h_KK.dtype).eps
    last_first: list[Tensor] = []
    while len(left):
        width = min(_PIVOT_BLOCK, len(left))
        variance_L, gone_L = rest_LL.diagonal().clone(), torch.zeros_like(left, dtype=torch.bool)
        root_BL = rest_LL.new_zeros(width, len(left))
        for j in range(width):
            pivot = variance_L.masked_fill(gone_L, torch.inf).argmin()
            last_first.append(left[pivot])
            shared_L = rest_LL[pivot] - root_BL[:j, pivot] @ root_BL[:j]
            root_BL[j] = shared_L / variance_L[pivot].maximum(smallest).sqrt()
            variance_L -= root_BL[j].square()
            gone_L[pivot] = True
        left, root_BL = left[~gone_L], root_BL[:, ~gone_L]
        rest_LL = torch.addmm(rest_LL[~gone_L][:, ~gone_L], root_BL.T, root_BL, alpha=-1)
    return torch.stack(last_first).flip(0)


Order = Callable[[Tensor, int, float], Tensor]
ORDERS: dict[str, Order] = {
    "gar": group_aware_order,
    "act": act_order,
    "min-pivot": min_pivot_order,
    "none": natural_order,
}
#: Those that visit the groups one after the other: a group's scale can wait until its first column is reached.
GROUPED_ORDERS = frozenset({"gar", "none"})
