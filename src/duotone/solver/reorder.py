# Shapes: K in_features; perm[new] = old throughout.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""In which order a solver visits columns. The order is undone inside the method: no file or kernel ever sees it."""

from collections.abc import Callable

import torch
from torch import Tensor


def natural_order(diagonal_K: Tensor, group_size: int) -> Tensor:
    """Columns as they stand."""
    del group_size
    return torch.arange(diagonal_K.numel(), device=diagonal_K.device)


def act_order(diagonal_K: Tensor, group_size: int) -> Tensor:
    """All columns by falling Hessian diagonal, each keeping its group and scale (`actorder: static` elsewhere)."""
    del group_size
    return torch.argsort(diagonal_K, descending=True, stable=True)


def group_aware_order(diagonal_K: Tensor, group_size: int) -> Tensor:
    """GAR: groups by their largest Hessian diagonal, columns inside a group by their own, both falling (DPQ.md section 3).

    No column leaves its group, so groups are visited one after the other and nothing of the order has to be stored.
    Stable sorts: equal inputs give equal bytes. A short last group takes part like any other.
    """
    groups = diagonal_K.split(group_size)
    largest_G = torch.stack([group.max() for group in groups])
    inside = [torch.argsort(group, descending=True, stable=True) for group in groups]
    visited = torch.argsort(largest_G, descending=True, stable=True).tolist()
    return torch.cat([inside[group] + group * group_size for group in visited])


Order = Callable[[Tensor, int], Tensor]
ORDERS: dict[str, Order] = {"gar": group_aware_order, "act": act_order, "none": natural_order}
