# Shapes: N out_features, K in_features, G groups along K.
"""The methods: what they solve, against OBQ on the contract's own grid; what they promise to each other."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from duotone.errors import DuotoneError
from duotone.formats import E4M3, FloatFormat
from duotone.qweight import QuantizedWeight, dequantize
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.solver import methods
from duotone.solver.drift import corrected_target
from duotone.solver.methods import (
    METHODS,
    LayerReport,
    Problem,
    SolverOptions,
    dpq,
    dpq_paper,
    gptq,
    rtn,
    shared_factor,
)
from duotone.solver.reorder import GROUPED_ORDERS, ORDERS
from duotone.solver.scales import Scales, fit_paper_scales, fit_scales, fit_single_level, round_to_nearest, split_single_level
from duotone.solver.search import refresh_scale, search_scales
from duotone.solver.statistics import Statistics
from duotone.solver.sweep import Grid, Rule
from tests.oracles.obq import correlated_layer, damped, loss, obq

ORDER = pytest.mark.parametrize("order", ORDERS.keys())
CASES = pytest.mark.parametrize(
    ("target", "symmetric"),
    [(HOPPER, True), (HOPPER, False), (GAUDI, True), (GAUDI, False)],
    ids=["hopper-symmetric", "hopper-asymmetric", "gaudi-symmetric", "gaudi-asymmetric"],
)
#: (K, g): 20 leaves a short last group
SHAPES = pytest.mark.parametrize(("columns", "group_size"), [(16, 8), (20, 8), (64, 16)])
FP8_OF = {"hopper": (ml_dtypes.float8_e4m3fn, 448), "gaudi": (ml_dtypes.float8_e4m3, 240)}


def problem(w_NK: Tensor, hessian: Tensor | None, scheme: Scheme, **options: Any) -> Problem:
    """A layer with its factor, as the pipeline would put it together."""
    settings = SolverOptions(**options)
    if hessian is None:
        return Problem("layer", w_NK, None, None, scheme, settings)
    statistics = Statistics(hessian, 8 * len(hessian))
    return Problem("layer", w_NK, statistics, shared_factor(statistics, scheme, settings, "layer"), scheme, settings)


def to_fp8(product: np.ndarray, target: Target) -> np.ndarray:
    """Saturating FP8 cast by ml_dtypes."""
    kind, largest = FP8_OF[target.name]
    return np.clip(product, -largest, largest).astype(np.float32).astype(kind).astype(np.float64)


class Rows:
    """The oracle's rounding for a layer of N rows, noting how close each row ever came to a tie.

    Production is float32 and OBQ float64: they may disagree where a value is within float32 error (a few 1e-5 steps) of
    a tie, and then for the rest of that row. Rows that stayed 1e-3 away from every tie must agree to the last code.
    """

    def __init__(self, rows: int) -> None:
        self.margin_N = np.full(rows, np.inf)

    def _note(self, x_N: np.ndarray) -> None:
        self.margin_N = np.minimum(self.margin_N, np.abs(x_N - np.floor(x_N) - 0.5))

    def level(self, w_N: np.ndarray, step_N: np.ndarray, zero_N: np.ndarray) -> np.ndarray:
        """Nearest INT4 level of w / step + zero."""
        self._note(w_N / step_N)
        return np.clip(np.round(w_N / step_N) + zero_N, -8, 7)

    def entry(self, w_N: np.ndarray, table_16N: np.ndarray, step_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest of 16 values; the margin is the distance to the midpoint with the nearest other value."""
        distance = np.abs(w_N - table_16N)
        code_N = distance.argmin(0)
        value_N = np.take_along_axis(table_16N, code_N[None], 0)[0]
        others = np.where(table_16N == value_N, np.inf, distance)
        self.margin_N = np.minimum(self.margin_N, (others.min(0) - distance.min(0)) / (2 * step_N))
        return code_N, value_N

    def minmax(self, w_Ng: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
        """BF16 step and zero point of one group's weights."""
        low, high = np.minimum(w_Ng.min(1), 0), np.maximum(w_Ng.max(1), 0)
        step_N = (2 * np.maximum(-low, high) if symmetric else high - low) / 15
        self._note(np.frexp(step_N)[0] * 256)
        step_N = step_N.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
        if symmetric:
            return step_N, np.zeros(len(step_N))
        self._note(low / step_N)
        return step_N, np.clip(np.round(-8 - low / step_N), -8, 7)

    @property
    def safe(self) -> np.ndarray:
        """Rows on which float32 and float64 have to agree; most of them, or the comparison says little."""
        safe_N = self.margin_N > 1e-3
        assert safe_N.mean() > 0.6
        return safe_N


def zeros_of(zero_NG: Tensor | None, like_NG: Tensor) -> np.ndarray:
    return np.zeros(like_NG.shape) if zero_NG is None else zero_NG.numpy()


def order_of(hessian: Tensor, order: str, group_size: int) -> list[int]:
    return ORDERS[order](hessian, group_size, 0.01).tolist()


def plain_dpq(patch: pytest.MonkeyPatch, refits: int = 0) -> None:
    """Leave of dpq the column loop on searched scales: no local search, and scales searched again so often only."""
    patch.setattr(methods, "local_search", lambda *args: args[-1])
    patch.setattr(methods, "REFITS", refits)


def scales_of(weight: QuantizedWeight) -> Scales:
    return Scales(weight.group_scale, weight.zero_point, weight.outer_scale)


# ---- equality with OBQ


def table_of(scales: Scales, j: int, target: Target) -> np.ndarray:
    """The 16 real values [16, N] that the hardware can multiply in group j: INT4, then FP8, then the outer scale."""
    zero_NG = zeros_of(scales.zero_point, scales.group_scale)
    level = np.arange(-8, 8)[:, None]
    return to_fp8((level - zero_NG[:, j]) * scales.group_scale.numpy()[:, j], target) * scales.outer_scale.numpy()


def assert_frozen(weight: QuantizedWeight, scales: Scales) -> None:
    """The weight has these scales, fitted before any column was rounded."""
    assert torch.equal(weight.group_scale, scales.group_scale)
    assert torch.equal(weight.outer_scale, scales.outer_scale)
    assert np.array_equal(zeros_of(weight.zero_point, scales.group_scale), zeros_of(scales.zero_point, scales.group_scale))


@ORDER
@CASES
@SHAPES
def test_published_dpq_equals_obq(order: str, target: Target, symmetric: bool, columns: int, group_size: int) -> None:
    """Round to INT4, then to FP8; push on the error against that value; scales fitted once as published, then frozen."""
    w_NK, hessian = correlated_layer(16, columns, seed=columns, dtype=torch.float32)
    scheme = Scheme(target, group_size=group_size, symmetric=symmetric)
    weight, _ = dpq_paper(problem(w_NK, hessian, scheme, order=order))
    scales, rows = fit_paper_scales(w_NK, scheme), Rows(16)
    step_NG, zero_NG = scales.step.numpy(), zeros_of(scales.zero_point, scales.step)

    def round_column(w_N: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        j = k // group_size
        code_N = (rows.level(w_N, step_NG[:, j], zero_NG[:, j]) + 8).astype(int)
        return code_N, np.take_along_axis(table_of(scales, j, target), code_N[None], 0)[0]

    expected, value = obq(w_NK.numpy(), damped(hessian.numpy(), 0.01), order_of(hessian, order, group_size), round_column)
    safe_N = rows.safe
    assert np.array_equal(weight.codes.numpy()[safe_N], expected[safe_N])
    assert np.allclose(dequantize(weight).numpy()[safe_N], value[safe_N], rtol=1e-6, atol=0)
    assert_frozen(weight, scales)


@ORDER
@CASES
@SHAPES
def test_dpq_equals_obq(
    order: str, target: Target, symmetric: bool, columns: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before all else: OBQ that rounds to the nearest of 16 values, on the searched scales. Values, as codes may share one."""
    plain_dpq(monkeypatch)
    w_NK, hessian = correlated_layer(16, columns, seed=columns, dtype=torch.float32)
    scheme = Scheme(target, group_size=group_size, symmetric=symmetric)
    weight, _ = dpq(problem(w_NK, hessian, scheme, order=order))
    scales, rows = search_scales(w_NK, scheme), Rows(16)

    def round_column(w_N: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return rows.entry(w_N, table_of(scales, k // group_size, target), scales.step.numpy()[:, k // group_size])

    _, value = obq(w_NK.numpy(), damped(hessian.numpy(), 0.01), order_of(hessian, order, group_size), round_column)
    safe_N = rows.safe
    assert np.allclose(dequantize(weight).numpy()[safe_N], value[safe_N], rtol=1e-6, atol=0)
    assert_frozen(weight, scales)


@pytest.mark.parametrize("order", sorted(GROUPED_ORDERS))
@CASES
@SHAPES
def test_dpq_with_refreshed_scales_equals_obq(
    order: str, target: Target, symmetric: bool, columns: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before all else: at each group's first column the oracle searches that group's scale on its own updated weights."""
    plain_dpq(monkeypatch)
    w_NK, hessian = correlated_layer(24, columns, seed=columns, dtype=torch.float32)
    scheme = Scheme(target, group_size=group_size, symmetric=symmetric)
    weight, _ = dpq(problem(w_NK, hessian, scheme, order=order, refresh_scales=True))
    searched, rows, order_K = search_scales(w_NK, scheme), Rows(24), order_of(hessian, order, group_size)
    grid, reached = Grid.of(searched, Rule.NEAREST_VALUE, scheme), set[int]()

    def scales() -> Scales:
        zero_GN = grid.zero_point_GN
        return Scales(grid.group_scale_GN.T.contiguous(), None if zero_GN is None else zero_GN.T, grid.outer_scale)

    def before_column(k: int, updated_NK: np.ndarray) -> None:
        j = k // group_size
        if j not in reached:
            reached.add(j)
            refresh_scale(grid, j, torch.from_numpy(updated_NK[:, [i for i in order_K if i // group_size == j]].T).float())

    def round_column(w_N: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return rows.entry(w_N, table_of(scales(), k // group_size, target), scales().step.numpy()[:, k // group_size])

    _, value = obq(w_NK.numpy(), damped(hessian.numpy(), 0.01), order_K, round_column, before_column)
    # Two scales of nearly the same error may change places where a row's float32 weights differ in their last bits.
    same_N = (weight.group_scale == scales().group_scale).all(1).numpy()
    assert same_N.mean() > 0.8
    safe_N = rows.safe & same_N
    assert np.allclose(dequantize(weight).numpy()[safe_N], value[safe_N], rtol=1e-6, atol=0)
    assert torch.equal(weight.outer_scale, searched.outer_scale)
    assert (weight.group_scale != searched.group_scale).double().mean() > 0.1, "scales hardly moved: nothing was tested"


@CASES
def test_refreshed_scales_with_refit_and_search(target: Target, symmetric: bool) -> None:
    """All of dpq: a legal weight, whose loss on correlated layers is within a tenth of that of scales searched once."""
    scheme = Scheme(target, group_size=16, symmetric=symmetric)
    errors = []
    for seed in range(4):
        w_NK, hessian = correlated_layer(64, 64, seed=200 + seed, dtype=torch.float32)
        reports = [dpq(problem(w_NK, hessian, scheme, order="gar", refresh_scales=asked))[1] for asked in (False, True)]
        errors.append([np.log(report.output_error) for report in reports])
    frozen, refreshed = np.mean(errors, axis=0)
    assert abs(refreshed - frozen) < np.log(1.1) and refreshed != frozen


@CASES
@SHAPES
@pytest.mark.parametrize("refits", [1, 2])
def test_dpq_keeps_the_scales_of_least_loss(
    target: Target, symmetric: bool, columns: int, group_size: int, refits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the local search: OBQ on the searched scales, and on those searched for what OBQ's columns wished to be.

    In that search a column counts by what its error costs when later ones have made up for it, by inversion; gaudi's outer
    scale stays. Each row has the result of less damped loss.
    """
    plain_dpq(monkeypatch, refits)
    w_NK, hessian = correlated_layer(24, columns, seed=columns, dtype=torch.float32)
    scheme = Scheme(target, group_size=group_size, symmetric=symmetric)
    weight, _ = dpq(problem(w_NK, hessian, scheme, order="act"))
    rows, h_KK, order_K = Rows(24), damped(hessian.numpy(), 0.01), order_of(hessian, "act", group_size)
    pivot_K = np.empty(columns)
    for j, k in enumerate(order_K):
        pivot_K[k] = 1 / np.linalg.inv(h_KK[np.ix_(order_K[j:], order_K[j:])].astype(np.float64))[0, 0]

    def rounded(scales: Scales) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values and wishes [N, K], losses [N]."""
        wish_NK = np.empty((24, columns))

        def round_column(w_N: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            wish_NK[:, k] = w_N
            return rows.entry(w_N, table_of(scales, k // group_size, target), scales.step.numpy()[:, k // group_size])

        value_NK = obq(w_NK.numpy(), h_KK, order_K, round_column)[1]
        return value_NK, wish_NK, np.array([loss(w_NK[n].numpy(), value_NK[n], h_KK) for n in range(24)])

    scales = search_scales(w_NK, scheme)
    value_NK, wish_NK, loss_N = rounded(scales)
    first_N, better_N, closeness_N = loss_N, np.zeros(24, dtype=bool), np.full(24, np.inf)
    for _ in range(refits):
        outer = None if target is HOPPER else scales.outer_scale
        refitted = search_scales(torch.from_numpy(wish_NK).float(), scheme, torch.from_numpy(pivot_K).float(), outer)
        other_NK, other_wish_NK, other_loss_N = rounded(refitted)
        better_N = other_loss_N < loss_N
        closeness_N = np.minimum(closeness_N, np.where(other_loss_N == loss_N, np.inf, np.abs(other_loss_N / loss_N - 1)))
        scales = scales.where(torch.from_numpy(better_N), refitted)
        value_NK, wish_NK = (np.where(better_N[:, None], *both) for both in ((other_NK, value_NK), (other_wish_NK, wish_NK)))
        loss_N = np.where(better_N, other_loss_N, loss_N)
    # Two scales of nearly the same error may change places where a row's float32 wishes differ in their last bits.
    same_N = (weight.group_scale == scales.group_scale).all(1).numpy()
    assert same_N.mean() > 0.8
    safe_N = (rows.margin_N > 1e-3) & (closeness_N > 1e-4) & same_N
    lowered_N = loss_N < first_N
    assert safe_N.sum() >= 6 and len(set(lowered_N[safe_N])) == 2, "too few rows, or one choice for all, to see anything"
    assert np.allclose(dequantize(weight).numpy()[safe_N], value_NK[safe_N], rtol=1e-6, atol=0)
    assert torch.equal(weight.outer_scale[:1], scales.outer_scale[:1]) or target is HOPPER


@pytest.mark.parametrize("order", ["act", "min-pivot"])
@CASES
@SHAPES
def test_gptq_in_scattering_orders_equals_obq_on_static_scales(
    order: str, target: Target, symmetric: bool, columns: int, group_size: int
) -> None:
    """Single-level INT4 scales of the original weights, OBQ without FP8, then the runtime's split of the same scales."""
    w_NK, hessian = correlated_layer(16, columns, seed=columns, dtype=torch.float32)
    scheme = Scheme(target, group_size=group_size, symmetric=symmetric)
    weight, _ = gptq(problem(w_NK, hessian, scheme, order=order))
    step_NG, zero_NG = fit_single_level(w_NK, scheme)
    step, zero, rows = step_NG.numpy(), zeros_of(zero_NG, step_NG), Rows(16)

    def round_column(w_N: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        j = k // group_size
        level_N = rows.level(w_N, step[:, j], zero[:, j])
        return level_N + 8, (level_N - zero[:, j]) * step[:, j]

    expected, _ = obq(w_NK.numpy(), damped(hessian.numpy(), 0.01), order_of(hessian, order, group_size), round_column)
    split, safe_N = split_single_level(step_NG, zero_NG, scheme), rows.safe
    assert np.array_equal(weight.codes.numpy()[safe_N], expected[safe_N])
    assert torch.equal(weight.group_scale, split.group_scale)
    assert torch.equal(weight.outer_scale, split.outer_scale)
    assert np.array_equal(zeros_of(weight.zero_point, step_NG), zero)


@pytest.mark.parametrize("order", ["none", "gar"])
@CASES
@SHAPES
def test_gptq_equals_obq_with_refreshed_scales(
    order: str, target: Target, symmetric: bool, columns: int, group_size: int
) -> None:
    """none, gar: each group's min-max scale is that of OBQ's float64 weights when the group is reached."""
    w_NK, hessian = correlated_layer(16, columns, seed=columns, dtype=torch.float32)
    scheme = Scheme(target, group_size=group_size, symmetric=symmetric)
    weight, _ = gptq(problem(w_NK, hessian, scheme, order=order))
    step, zero, rows = np.full((16, scheme.groups(columns)), np.nan), np.zeros((16, scheme.groups(columns))), Rows(16)

    def before_column(k: int, updated_NK: np.ndarray) -> None:
        j = k // group_size
        if np.isnan(step[0, j]):
            step[:, j], zero[:, j] = rows.minmax(updated_NK[:, j * group_size : (j + 1) * group_size], symmetric)

    def round_column(w_N: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        j = k // group_size
        level_N = rows.level(w_N, step[:, j], zero[:, j])
        return level_N + 8, (level_N - zero[:, j]) * step[:, j]

    order_K = order_of(hessian, order, group_size)
    expected, _ = obq(w_NK.numpy(), damped(hessian.numpy(), 0.01), order_K, round_column, before_column)
    safe_N = rows.safe
    found_step = (weight.group_scale * weight.outer_scale[:, None]).numpy()
    original, _ = fit_single_level(w_NK, scheme)
    assert np.array_equal(weight.codes.numpy()[safe_N], expected[safe_N])
    assert np.array_equal(zeros_of(weight.zero_point, weight.group_scale)[safe_N], zero[safe_N])
    assert (original.numpy() != step).mean() > 0.2, "scales hardly moved, so this test would not see a missing refresh"
    if target.channel_outer_scale:
        split = split_single_level(torch.from_numpy(step).float(), None, scheme)
        assert np.array_equal(weight.group_scale.numpy()[safe_N], split.group_scale.numpy()[safe_N])
        assert np.array_equal(weight.outer_scale.numpy()[safe_N], split.outer_scale.numpy()[safe_N])
    else:
        assert np.array_equal(found_step[safe_N], step[safe_N])


# ---- what does not matter, and what is the same


@ORDER
@pytest.mark.parametrize("method", [dpq, dpq_paper, gptq])
def test_block_size_does_not_matter(method: Any, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 for blocks that divide nothing: codes equal but for a tiny share, relative output error within 1e-5.

    All of dpq differs in a row now and then: its local search may take one of two moves that cost nearly the same.
    """
    w_NK, hessian = correlated_layer(64, 100, seed=3, dtype=torch.float32)
    scheme = Scheme(group_size=16)

    def check(share: float) -> None:
        reference, expected = method(problem(w_NK, hessian, scheme, order=order, block_size=64))
        for block_size in (1, 24, 1000):
            weight, report = method(problem(w_NK, hessian, scheme, order=order, block_size=block_size))
            assert (weight.codes != reference.codes).double().mean() < share
            assert abs(report.output_error - expected.output_error) < 1e-5

    check(0.01 if method is dpq else 1e-3)
    plain_dpq(monkeypatch, refits=1)
    check(1e-3)


@ORDER
@CASES
def test_published_dpq_on_a_diagonal_hessian_is_round_to_nearest(order: str, target: Target, symmetric: bool) -> None:
    """Uncorrelated inputs leave nothing to compensate, in any order; where rtn has the same scales, it is rtn."""
    w_NK, hessian = correlated_layer(16, 60, seed=5, dtype=torch.float32)
    scheme = Scheme(target, group_size=16, symmetric=symmetric)
    solved, _ = dpq_paper(problem(w_NK, hessian.diagonal().diag(), scheme, order=order))
    scales = fit_paper_scales(w_NK, scheme)
    assert torch.equal(solved.codes, round_to_nearest(w_NK, scales, scheme))
    assert_frozen(solved, scales)
    if target is HOPPER:
        assert torch.equal(dequantize(solved), dequantize(rtn(problem(w_NK, None, scheme))[0]))


@ORDER
@CASES
def test_dpq_on_a_diagonal_hessian_takes_the_nearest_value(
    order: str, target: Target, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any order, local search or not: each weight gets the nearest of its 16 values; in all they are nearer than rtn's.

    Without a refit, those of the searched scales; with one, those of the scales that it has then, which are no worse under the
    Hessian in any row, as they are searched with the columns' weights in it.
    """
    w_NK, hessian = correlated_layer(16, 60, seed=5, dtype=torch.float32)
    scheme = Scheme(target, group_size=16, symmetric=symmetric)
    given = problem(w_NK, hessian.diagonal().diag(), scheme, order=order)
    refitted, _ = dpq(given)
    monkeypatch.setattr(methods, "REFITS", 0)
    solved, _ = dpq(given)
    nearest, _ = rtn(problem(w_NK, None, scheme))
    scales = search_scales(w_NK, scheme)
    error_NK, refitted_error_NK = ((w_NK - dequantize(weight)).abs() for weight in (solved, refitted))
    table_16NK, refitted_table_16NK = (
        np.stack([table_of(its, k // 16, target) for k in range(60)], axis=2) for its in (scales, scales_of(refitted))
    )
    assert np.array_equal(refitted_error_NK.numpy(), np.abs(w_NK.numpy() - refitted_table_16NK.astype(np.float32)).min(0))
    weight_K = hessian.diagonal() + 0.01 * hessian.diagonal().mean()
    loss_N, refitted_loss_N = ((its.double().square() * weight_K).sum(-1) for its in (error_NK, refitted_error_NK))
    assert bool((refitted_loss_N <= loss_N * (1 + 1e-6)).all()) and refitted_loss_N.sum() < loss_N.sum()
    assert np.array_equal(error_NK.numpy(), np.abs(w_NK.numpy() - table_16NK.astype(np.float32)).min(0))
    assert error_NK.square().sum() < 0.95 * (w_NK - dequantize(nearest)).square().sum()
    assert not torch.equal(solved.codes, nearest.codes), "the nearest level always gave the nearest value: nothing was tested"
    assert_frozen(solved, scales)
    assert_frozen(nearest, fit_scales(w_NK, scheme))


@CASES
def test_gptq_on_a_diagonal_hessian_ignores_the_order(target: Target, symmetric: bool) -> None:
    """Updated weights are the original ones: refreshed or static scales and any order give one result."""
    w_NK, hessian = correlated_layer(16, 60, seed=5, dtype=torch.float32)
    scheme = Scheme(target, group_size=16, symmetric=symmetric)
    found = [gptq(problem(w_NK, hessian.diagonal().diag(), scheme, order=order))[0] for order in ORDERS]
    for other in found[1:]:
        assert torch.equal(found[0].codes, other.codes)
        assert torch.equal(dequantize(found[0]), dequantize(other))


@dataclasses.dataclass(frozen=True)
class _Unrounded(FloatFormat):
    """A format in which every number is exact."""

    def round(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("method", [dpq, dpq_paper])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_dpq_without_fp8_rounding_is_gptq_with_static_scales(
    method: Any, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 replaced by the identity, nothing searched: either DPQ is plain GPTQ on static scales (DPQ.md section 8)."""
    plain_dpq(monkeypatch)
    monkeypatch.setattr(methods, "search_scales", lambda w, scheme, **_: fit_scales(w, scheme))
    wide = _Unrounded("exact", E4M3.exponent_bits, E4M3.mantissa_bits, E4M3.has_infinity)
    scheme = Scheme(Target("wide", wide, dynamic_activations=False, channel_outer_scale=False), 16, symmetric)
    w_NK, hessian = correlated_layer(16, 64, seed=13, dtype=torch.float32)
    w_NK = w_NK * (200 / w_NK.abs().max())
    exact, _ = method(problem(w_NK, hessian, scheme, order="act"))
    plain, _ = gptq(problem(w_NK, hessian, scheme, order="act"))
    rounded, _ = method(problem(w_NK, hessian, Scheme(GAUDI, 16, symmetric), order="act"))
    assert torch.equal(exact.codes, plain.codes)
    assert torch.equal(exact.group_scale * exact.outer_scale, plain.group_scale * plain.outer_scale)
    assert not torch.equal(exact.codes, rounded.codes), "FP8 rounding changes no code here, so this test would not see it"
    if symmetric:
        assert exact.outer_scale.tolist() == [1.0]


# ---- quality


@CASES
@pytest.mark.parametrize("order", ["none", "gar"])
def test_dpq_beats_gptq_beats_rtn_on_average(target: Target, symmetric: bool, order: str) -> None:
    """Output error under the contract's arithmetic, geometric mean over correlated layers (not promised for each)."""
    scheme = Scheme(target, group_size=16, symmetric=symmetric)
    logs = []
    for seed in range(6):
        w_NK, hessian = correlated_layer(64, 64, seed=100 + seed, dtype=torch.float32)
        given = problem(w_NK, hessian, scheme, order=order)
        logs.append([np.log(method(given)[1].output_error) for method in (dpq, dpq_paper, gptq, rtn)])
    of_dpq, of_paper, of_gptq, of_rtn = np.mean(logs, axis=0)
    assert of_dpq < of_gptq - np.log(1.03)
    assert of_dpq < of_paper < of_gptq
    assert of_gptq < of_rtn - np.log(1.3)


@CASES
@pytest.mark.parametrize("refresh", [False, True], ids=["frozen", "refreshed"])
def test_no_step_of_dpq_raises_a_rows_loss(
    target: Target, symmetric: bool, refresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row under the damped Hessian: the refit, then the local search, which takes a tenth off the sum."""
    scheme = Scheme(target, group_size=16, symmetric=symmetric)
    w_NK, hessian = correlated_layer(64, 64, seed=21, dtype=torch.float32)
    hessian[5], hessian[:, 5] = 0, 0  # a dead column has a loss too: that of its damping
    given = problem(w_NK, hessian, scheme, order="gar" if refresh else "act", refresh_scales=refresh)
    assert given.factor is not None
    h_KK = (hessian + given.factor.damping_K.diag()).double()

    def row_loss() -> Tensor:
        error_NK = (w_NK - dequantize(dpq(given)[0])).double()
        return ((error_NK @ h_KK) * error_NK).sum(-1)

    searched_N = row_loss()
    plain_dpq(monkeypatch, refits=1)
    refitted_N = row_loss()
    plain_dpq(monkeypatch)
    plain_N = row_loss()
    assert bool((refitted_N <= plain_N * (1 + 1e-5)).all())
    # Where each group's scale is taken when it is reached, only hopper's outer scales are left to be searched again.
    if not refresh or target is HOPPER:
        assert bool((refitted_N < plain_N * 0.99).any()) and refitted_N.sum() < 0.98 * plain_N.sum()
    assert bool((searched_N <= refitted_N * (1 + 1e-5)).all())
    assert searched_N.sum() < 0.92 * refitted_N.sum()


@CASES
def test_the_refit_pays_after_the_search_too(target: Target, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output error of all of dpq, on average over layers, is a twentieth less than without a refit."""
    scheme, logs = Scheme(target, group_size=16, symmetric=symmetric), []
    for seed in range(4):
        w_NK, hessian = correlated_layer(64, 64, seed=30 + seed, dtype=torch.float32)
        given = problem(w_NK, hessian, scheme, order="act")
        for refits in (1, 0):
            monkeypatch.setattr(methods, "REFITS", refits)
            logs.append(np.log(dpq(given)[1].output_error))
    assert np.mean(logs[::2]) < np.mean(logs[1::2]) + np.log(0.95)


@pytest.mark.parametrize("writer", [True, False])
def test_dpq_aims_at_the_corrected_target(writer: bool) -> None:
    """With drift, dpq's codes are those it finds for the corrected target; its report is about the weight itself."""
    w_NK, hessian = correlated_layer(24, 40, seed=22, dtype=torch.float32)
    drift = 0.1 * torch.randn(24 if writer else 40, 40, generator=torch.Generator().manual_seed(0)) * hessian.diagonal().sqrt()
    drifted = Statistics(hessian, 320, **({"stream_target": w_NK @ hessian + drift} if writer else {"input_drift": drift}))
    given, scheme = problem(w_NK, hessian, Scheme(group_size=8), order="act"), Scheme(group_size=8)
    found, report = dpq(dataclasses.replace(given, statistics=drifted))
    target_NK = corrected_target(w_NK, drifted)
    expected, _ = dpq(problem(target_NK, hessian, scheme, order="act"))
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.group_scale, expected.group_scale)
    assert not torch.equal(found.codes, dpq(given)[0].codes), "drift moved no code: nothing was tested"
    error_NK = (w_NK - dequantize(found)).double()
    assert report.weight_error == pytest.approx(float(error_NK.square().sum() / w_NK.double().square().sum()), rel=1e-4)
    for method in (gptq, dpq_paper):  # which know nothing of drift
        assert torch.equal(method(dataclasses.replace(given, statistics=drifted))[0].codes, method(given)[0].codes)


# ---- reports and refusals


@pytest.mark.parametrize("name", METHODS.keys())
@CASES
def test_report(name: str, target: Target, symmetric: bool) -> None:
    """Under its own name: errors are those of the weights that will run; the rest is what the factor took and saw."""
    w_NK, hessian = correlated_layer(8, 40, seed=14, dtype=torch.float32)
    hessian[3] = hessian[:, 3] = 0
    given = problem(w_NK, hessian, Scheme(target, group_size=8, symmetric=symmetric), damping_frac=0.02)
    weight, report = METHODS[name].solve(given)
    w, v, h = w_NK.numpy(), dequantize(weight).numpy(), hessian.numpy()
    assert given.factor is not None
    condition = given.factor.condition_number
    assert report == LayerReport("layer", name, report.weight_error, report.output_error, 320, 0.02, 1, condition)
    assert report.weight_error == pytest.approx(loss(w, v, np.eye(40)) / loss(w, 0 * w, np.eye(40)), rel=1e-5)
    assert report.output_error == pytest.approx(loss(w, v, h) / loss(w, 0 * w, h), rel=1e-4)
    assert report.weight_error < 0.1


def test_raised_damping_reaches_the_report() -> None:
    """A singular Hessian with next to no damping: the report tells what it took."""
    x_K = torch.linspace(1, 2, 48)
    w_NK, _ = correlated_layer(4, 48, seed=15, dtype=torch.float32)
    _, report = dpq(problem(w_NK, torch.outer(x_K, x_K), Scheme(group_size=16), damping_frac=1e-9))
    assert report.damping_frac == pytest.approx(1e-3)


def test_rtn_needs_no_calibration_and_the_others_say_so() -> None:
    """Without statistics rtn reports no output error; the others name the layer."""
    w_NK, _ = correlated_layer(4, 24, seed=16, dtype=torch.float32)
    given = problem(w_NK, None, Scheme(group_size=8))
    _, report = rtn(given)
    assert (report.output_error, report.tokens, report.damping_frac, report.dead_columns) == (None, 0, None, 0)
    for method in (gptq, dpq_paper, dpq):
        with pytest.raises(ValueError, match=r"^layer: .*statistics"):
            method(given)


@pytest.mark.parametrize("method", [method.solve for method in METHODS.values()], ids=METHODS.keys())
@CASES
def test_zero_and_tiny_weights(method: Any, target: Target, symmetric: bool) -> None:
    """All zeros stay zeros; a row a million times smaller than its neighbors stays finite and within 1e-6."""
    w_NK, hessian = correlated_layer(4, 24, seed=17, dtype=torch.float32)
    scheme = Scheme(target, group_size=8, symmetric=symmetric)
    zeros, report = method(problem(torch.zeros_like(w_NK), hessian, scheme))
    assert torch.equal(dequantize(zeros), torch.zeros_like(w_NK))
    assert (report.weight_error, report.output_error) == (0, 0)
    w_NK[1] *= 1e-6
    w_NK[2, :8] = 0
    values = dequantize(method(problem(w_NK, hessian, scheme))[0])
    assert torch.isfinite(values).all()
    assert (w_NK - values)[1].abs().max() < 1e-6
    assert (w_NK - values)[0].square().sum() < 0.1 * w_NK[0].square().sum()


@pytest.mark.parametrize("method", [method.solve for method in METHODS.values()], ids=METHODS.keys())
@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=["hopper", "gaudi"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_weights_are_an_error(method: Any, target: Target, bad: float) -> None:
    """Whoever calls a method without the pipeline's check gets an error, never codes."""
    w_NK, hessian = correlated_layer(4, 24, seed=18, dtype=torch.float32)
    w_NK[2, 5] = bad
    with pytest.raises((DuotoneError, ValueError), match=r"^\w+: "):
        method(problem(w_NK, hessian, Scheme(target, group_size=8)))


@pytest.mark.parametrize("order", ["", "GAR", "random"])
def test_unknown_order(order: str) -> None:
    """The message shows what was found and what exists."""
    with pytest.raises(DuotoneError, match=rf"--order: found '{order}', expected one of gar, act, min-pivot, none"):
        SolverOptions(order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_refreshed_scales_want_an_order_that_keeps_groups_together(order: str) -> None:
    """The message names the order found and those that would do."""
    if order in GROUPED_ORDERS:
        assert SolverOptions(order=order, refresh_scales=True).refresh_scales
        return
    with pytest.raises(DuotoneError, match=rf"^--refresh-scales: found --order {order}, expected gar or none"):
        SolverOptions(order=order, refresh_scales=True)


@pytest.mark.parametrize("damping_frac", [0.0, 1.0, -0.01, torch.nan])
def test_bad_damping(damping_frac: float) -> None:
    """A share strictly between 0 and 1."""
    with pytest.raises(DuotoneError, match=r"--damping: found "):
        SolverOptions(damping_frac=damping_frac)


def test_tables_agree() -> None:
    """Every method's default order exists; whoever aims at the original's outputs has statistics, taken group by group."""
    assert {method.order for method in METHODS.values()} <= ORDERS.keys()
    assert all(method.needs_statistics and method.sequential for method in METHODS.values() if method.drift)
    assert [name for name, method in METHODS.items() if not method.needs_statistics] == ["rtn"]
