# Shapes: N out_features, K in_features, B columns of a block. Symbols of GPTQ (arXiv 2210.17323) and of its reading as
# Babai's nearest plane (arXiv 2507.18553): H = R R^T with R upper triangular, x = w - q.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The column loop that GPTQ and DPQ share: one Cholesky factor, no inverse, errors pushed to later columns.

The loss of a row is |x R|^2 = sum_j (x_j R_jj + sum_{k<j} x_k R_kj)^2. Visiting columns in order, column j is free to
cancel what earlier ones left: it rounds w_j + sum_{k<j} x_k R_kj / R_jj. That is GPTQ's update (U = R^-1 is the Cholesky
factor of H^-1), read from the left: each block gathers all earlier errors in one matrix product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from duotone.device import product, product_dtype
from duotone.errors import DuotoneError
from duotone.solver.statistics import Statistics
from duotone.solver.sweep import Grid, sweep

#: (group, error-updated weights [columns of the group, N]): fit that group's scale before its first column is rounded
RefreshGroup = Callable[[int, Tensor], None]

#: Damping is raised by this factor, at most this often, when the Hessian does not factorize.
_DAMPING_STEP, _DAMPING_TRIES = 10.0, 4
#: Power iterations for a condition number.
_CONDITION_STEPS = 4
#: Products with a triangle skip its zeros in panels of so many columns; what they leave stays in the cache.
_PANEL = 512


@dataclass(frozen=True, eq=False)
class Factor:
    """Column-normalized R of the damped, reordered Hessian (unit diagonal), its diagonal, and the damping it took.

    damping_K: what was added to the Hessian's diagonal, in original order.
    """

    unit_KK: Tensor
    diagonal_K: Tensor
    order_K: Tensor
    damping_frac: float
    damping_K: Tensor
    dead_columns: int

    @cached_property
    def narrow(self) -> Tensor:
        """R as whole matrices are multiplied with it: in BF16, if this machine is so much faster at that."""
        return self.unit_KK.to(product_dtype(self.unit_KK))

    @cached_property
    def _place(self) -> Tensor:
        return torch.argsort(self.order_K)

    def visited(self, w_NK: Tensor) -> Tensor:
        """[N, K] in original order as [K, N] in visiting order. Rows are moved: columns take four times as long."""
        return w_NK.T.contiguous()[self.order_K]

    def original(self, x_KN: Tensor) -> Tensor:
        """[K, N] in visiting order as [N, K] in original order."""
        return x_KN[self._place].T.contiguous()

    @cached_property
    def condition_number(self) -> float:
        """Largest by smallest eigenvalue of the damped Hessian, by a few power iterations with it and its inverse: at least so
        large, and rarely twice that.
        """
        root_KK = self.unit_KK * self.diagonal_K
        high_K = low_K = torch.full_like(self.diagonal_K, len(self.diagonal_K) ** -0.5)
        for _ in range(_CONDITION_STEPS):
            high_K = root_KK @ (root_KK.T @ (high_K / high_K.norm()))
            inner_K1 = torch.linalg.solve_triangular(root_KK, (low_K / low_K.norm())[:, None], upper=True)
            low_K = torch.linalg.solve_triangular(root_KK.T, inner_K1, upper=False)[:, 0]
        return float(high_K.norm() * low_K.norm())

    def pivots(self) -> Tensor:
        """What a squared error of a column costs once later columns have made up for it, [K] in original order."""
        pivot_K = torch.empty_like(self.diagonal_K)
        pivot_K[self.order_K] = self.diagonal_K.square()
        return pivot_K


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes uint8 [N, K] in original column order; in visiting order values, and what each column wished to be less that."""

    codes_NK: Tensor
    value_KN: Tensor
    left_KN: Tensor

    def row_loss(self, factor: Factor) -> Tensor:
        """Loss of each row [N] under the damped Hessian: |x R|^2, column by column."""
        return (self.left_KN * factor.diagonal_K[:, None]).square_().sum(0)

    def wish(self, factor: Factor) -> Tensor:
        """What the columns wished to be [N, K] in original order: the weights with all that earlier columns pushed on."""
        return factor.original(self.value_KN + self.left_KN)

    def where(self, rows_N: Tensor, other: "Rounded") -> "Rounded":
        """This, with the other's rows where True."""
        codes_NK = torch.where(rows_N[:, None], other.codes_NK, self.codes_NK)
        value_KN, left_KN = (
            torch.where(rows_N, *both) for both in ((other.value_KN, self.value_KN), (other.left_KN, self.left_KN))
        )
        return Rounded(codes_NK, value_KN, left_KN)

    def gradient(self, factor: Factor) -> Tensor:
        """(W - V) H of the damped Hessian, [N, K] in original order: R (R^T x), of which the loop has left R^T x."""
        pivoted_KN = (self.left_KN * factor.diagonal_K.square()[:, None]).to(factor.narrow.dtype)
        gradient_KN = torch.empty_like(self.left_KN)
        for start in range(0, len(pivoted_KN), _PANEL):  # R is upper triangular
            rows = slice(start, start + _PANEL)
            gradient_KN[rows] = product(factor.narrow[rows, start:], pivoted_KN[start:])
        return factor.original(gradient_KN)


def factorize(statistics: Statistics, order_K: Tensor, damping_frac: float, layer: str) -> Factor:
    """Factor H = R R^T after reordering and damping by a share of the mean diagonal.

    A channel that calibration never excited gets a unit diagonal: its weights are rounded to nearest, not set to zero.
    Raises DuotoneError naming the layer when the Hessian does not factorize even with damping raised 1000-fold.
    """
    # Last column first: the lower triangle that is found is R turned by half a circle.
    turned_K = order_K.flip(0)
    h_KK = statistics.hessian[turned_K[:, None], turned_K]
    diagonal = h_KK.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1.0
    mean = diagonal.mean().clone()
    added, damping = 0.0, damping_frac
    for _ in range(_DAMPING_TRIES):
        diagonal += (damping - added) * mean
        lower_KK, failed = torch.linalg.cholesky_ex(h_KK)
        if not int(failed):
            r_KK = lower_KK.flip(0, 1)
            r_K = r_KK.diagonal().clone()
            damping_K = torch.empty_like(r_K)
            damping_K[turned_K] = diagonal
            damping_K -= statistics.hessian.diagonal()
            return Factor(r_KK.div_(r_K), r_K, order_K, damping, damping_K, int(dead.sum()))
        added, damping = damping, max(damping, 1e-4) * _DAMPING_STEP
    raise DuotoneError(f"{layer}: the Hessian does not factorize with damping {added:g}, expected a positive definite matrix")


def solve(
    w_NK: Tensor, factor: Factor, grid: Grid, refresh_group: RefreshGroup | None = None, block_size: int = 128
) -> Rounded:
    """Round column after column, each making up for the errors of those before it.

    `refresh_group` may overwrite its group's scales in `grid`; columns of a group must then be contiguous in the order (GAR
    or none), and blocks follow groups. The result does not depend on `block_size` (to float32 rounding).
    """
    w_KN = factor.visited(w_NK)
    group_K = (factor.order_K // grid.scheme.group_size).to(torch.int32)
    groups = group_K.tolist()
    value_KN, left_KN = torch.empty_like(w_KN), torch.empty_like(w_KN)
    x_KN = torch.empty_like(w_KN, dtype=factor.narrow.dtype)
    codes_KN = torch.empty_like(w_KN, dtype=torch.uint8)
    for start, stop in _spans(groups, block_size if refresh_group is None else None):
        unit_BB = factor.unit_KK[start:stop, start:stop]
        pushed_BN = product(factor.narrow[:start, start:stop].T, x_KN[:start]).to(w_KN.dtype)
        if refresh_group is not None:
            # The weights that would cancel all error so far if the group were free: what its scale has to cover.
            free_BN = torch.linalg.solve_triangular(unit_BB.T, pushed_BN, upper=False, unitriangular=True)
            refresh_group(groups[start], w_KN[start:stop] + free_BN)
        w_BN = w_KN[start:stop]
        codes_KN[start:stop], value_KN[start:stop] = sweep(w_BN + pushed_BN, w_BN, unit_BB, grid, group_K[start:stop])
        x_BN = w_BN - value_KN[start:stop]
        x_KN[start:stop] = x_BN
        torch.addmm(pushed_BN, unit_BB.T, x_BN, out=left_KN[start:stop])
    return Rounded(factor.original(codes_KN), value_KN, left_KN)


def _spans(group_of_K: list[int], block_size: int | None) -> list[tuple[int, int]]:
    """Column blocks: of a fixed size, or (None) one for each run of columns of the same group."""
    columns = len(group_of_K)
    if block_size is not None:
        return [(start, min(start + block_size, columns)) for start in range(0, columns, block_size)]
    starts = [k for k in range(columns) if k == 0 or group_of_K[k] != group_of_K[k - 1]]
    return list(zip(starts, [*starts[1:], columns], strict=True))


def output_loss(w_NK: Tensor, v_NK: Tensor, statistics: Statistics) -> float:
    """Relative output error |X (W - V)^T|^2 / |X W^T|^2 under the layer's undamped Hessian."""
    return _energy(w_NK - v_NK, statistics.hessian) / max(_energy(w_NK, statistics.hessian), 1e-30)


def output_energy(w_NK: Tensor, statistics: Statistics) -> float:
    """|X W^T|^2, what `output_loss` is relative to."""
    return _energy(w_NK, statistics.hessian)


def _energy(e_NK: Tensor, hessian_KK: Tensor) -> float:
    """tr(E H E^T), of whose two triangles one is enough. From so many products one number: BF16 rounds off 1e-4 of it."""
    twice_KK = (2 * hessian_KK).tril_()
    twice_KK.diagonal().div_(2)
    twice_KK = twice_KK.to(product_dtype(hessian_KK))
    total = torch.zeros((), dtype=torch.float64, device=e_NK.device)
    for e_RK in e_NK.split(_PANEL):
        narrow_RK = e_RK.to(twice_KK.dtype)
        for start in range(0, len(hessian_KK), _PANEL):
            columns = slice(start, start + _PANEL)
            total += (product(narrow_RK[:, start:], twice_KK[start:, columns]) * e_RK[:, columns]).sum(dtype=torch.float64)
    return float(total)
