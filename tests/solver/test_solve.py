# Shapes: N out_features, K in_features, B columns of a group.
"""The column loop against OBQ by its definition, in float64, where equal means equal."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from duotone.errors import DuotoneError
from duotone.scheme import Scheme
from duotone.solver.reorder import ORDERS
from duotone.solver.solve import Factor, factorize, output_loss, solve
from duotone.solver.statistics import Statistics
from duotone.solver.sweep import Grid, Rule
from tests.oracles.obq import correlated_layer, damped, obq

DAMPING = 0.01
ORDER = pytest.mark.parametrize("order", ORDERS.keys())
#: (K, g): 20 and 60 leave a short last group
SHAPES = pytest.mark.parametrize(("columns", "group_size"), [(16, 8), (20, 8), (60, 16), (64, 16)])


def factor_of(hessian: Tensor, order: str, group_size: int, damping_frac: float = DAMPING) -> Factor:
    order_K = ORDERS[order](hessian, group_size, damping_frac)
    return factorize(Statistics(hessian, 1), order_K, damping_frac, "layer")


def steps(w_NK: Tensor, group_size: int) -> Tensor:
    """One symmetric INT4 step a row and group, [N, G]; over 7, so that no weight starts on a tie (-7.5 steps would be one)."""
    return torch.stack([group.abs().amax(-1) / 7 for group in w_NK.split(group_size, dim=1)], dim=1)


def grid(step_NG: Tensor, group_size: int) -> Grid:
    """The INT4 grid of these steps, without FP8."""
    outer = torch.ones(1, dtype=step_NG.dtype)
    return Grid(step_NG.T.contiguous(), None, outer, Rule.INT4_ONLY, Scheme(group_size=group_size))


def nearest(w_NK: Tensor, step_NG: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes and values [N, K] of every weight on its own."""
    step_NK = step_NG.repeat_interleave(group_size, 1)[:, : w_NK.shape[1]]
    level_NK = torch.round(w_NK / step_NK).clamp(-8, 7)
    return (level_NK + 8).to(torch.uint8), level_NK * step_NK


def rounding_oracle(step_NG: np.ndarray, group_size: int) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """The same grid for the oracle: column index instead of group."""

    def round_column(w_N: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        level_N = np.clip(np.round(w_N / step_NG[:, k // group_size]), -8, 7)
        return level_N + 8, level_N * step_NG[:, k // group_size]

    return round_column


@ORDER
@SHAPES
@pytest.mark.parametrize("block_size", [5, 128])
def test_codes_equal_obq(order: str, columns: int, group_size: int, block_size: int) -> None:
    """Every code, every order, blocks shorter and longer than a group. Float64 on both sides, so no tie is at stake."""
    w_NK, hessian = correlated_layer(24, columns, seed=columns)
    step_NG, factor = steps(w_NK, group_size), factor_of(hessian, order, group_size)
    found = solve(w_NK, factor, grid(step_NG, group_size), None, block_size).codes_NK
    oracle = rounding_oracle(step_NG.numpy(), group_size)
    expected, _ = obq(w_NK.numpy(), damped(hessian.numpy(), DAMPING), factor.order_K.tolist(), oracle)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), expected)
    assert (found != nearest(w_NK, step_NG, group_size)[0]).double().mean() > 0.1, (
        "compensation moved few codes, so this test would not see a wrong one"
    )


@pytest.mark.parametrize("order", ["gar", "none"])
@SHAPES
def test_refreshed_groups_see_the_weights_that_obq_updated(order: str, columns: int, group_size: int) -> None:
    """At a group's first column the solver offers OBQ's updated weights of the group, in visiting order, once a group."""
    w_NK, hessian = correlated_layer(12, columns, seed=columns + 1)
    step_NG, factor = steps(w_NK, group_size), factor_of(hessian, order, group_size)
    order_K = factor.order_K.tolist()
    seen: list[tuple[int, np.ndarray]] = []
    expected: list[tuple[int, np.ndarray]] = []

    def refresh(group: int, updated_BN: Tensor) -> None:
        seen.append((group, updated_BN.numpy().copy()))

    def before_column(k: int, updated_NK: np.ndarray) -> None:
        group = k // group_size
        if not any(group == other for other, _ in expected):
            expected.append((group, updated_NK[:, [i for i in order_K if i // group_size == group]].T))

    codes = solve(w_NK, factor, grid(step_NG, group_size), refresh, 128).codes_NK
    oracle = rounding_oracle(step_NG.numpy(), group_size)
    expected_codes, _ = obq(w_NK.numpy(), damped(hessian.numpy(), DAMPING), order_K, oracle, before_column)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert [group for group, _ in seen] == [group for group, _ in expected]
    assert len(seen) == -(-columns // group_size)
    for (_, found), (_, updated) in zip(seen, expected, strict=True):
        assert np.allclose(found, updated, rtol=0, atol=1e-10)
    assert np.abs(seen[-1][1] - w_NK.numpy()[:, order_K[-len(seen[-1][1]) :]].T).max() > 1e-3, "nothing was updated"


@ORDER
def test_block_size_does_not_matter(order: str) -> None:
    """Same codes in float64 for blocks that divide nothing and for one block; K beyond the inner block of 32."""
    w_NK, hessian = correlated_layer(16, 100, seed=4)
    step_NG, factor = steps(w_NK, 16), factor_of(hessian, order, 16)
    reference = solve(w_NK, factor, grid(step_NG, 16), None, 1)
    for block_size in (7, 32, 33, 48, 64, 100, 1000):
        found = solve(w_NK, factor, grid(step_NG, 16), None, block_size)
        assert torch.equal(found.codes_NK, reference.codes_NK)
        torch.testing.assert_close(found.value_KN, reference.value_KN, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.left_KN, reference.left_KN, rtol=0, atol=1e-12)


@ORDER
def test_float32_is_as_good_as_float64(order: str) -> None:
    """The production type: codes equal but for a tiny share, loss equal to 1e-3, for every block size.

    Float32 may round a near-tie the other way (1 column in 10^5). That costs nothing there but sends the rest of its row
    down another path: 60 codes of 8192, and a tenth of one row's loss, which is 1e-3 of the loss of 128 rows.
    """
    w_NK, hessian = correlated_layer(128, 64, seed=9)
    step_NG = steps(w_NK, 16).float()
    exact = solve(w_NK, factor_of(hessian, order, 16), grid(step_NG.double(), 16)).codes_NK
    exact_loss = output_loss(w_NK, (exact.double() - 8) * step_NG.repeat_interleave(16, 1), Statistics(hessian, 1))
    for block_size in (16, 40, 128):
        found = solve(w_NK.float(), factor_of(hessian.float(), order, 16), grid(step_NG, 16), None, block_size).codes_NK
        found_loss = output_loss(w_NK, (found.double() - 8) * step_NG.repeat_interleave(16, 1), Statistics(hessian, 1))
        assert (found != exact).double().mean() <= 0.01
        assert found_loss == pytest.approx(exact_loss, rel=1e-3)


@ORDER
def test_diagonal_hessian_is_round_to_nearest(order: str) -> None:
    """Uncorrelated inputs: nothing to compensate, so no order changes a code, float32 included."""
    w_NK, hessian = correlated_layer(16, 60, seed=5, dtype=torch.float32)
    step_NG, factor = steps(w_NK, 16), factor_of(hessian.diagonal().diag(), order, 16)
    assert torch.equal(solve(w_NK, factor, grid(step_NG, 16)).codes_NK, nearest(w_NK, step_NG, 16)[0])


@ORDER
def test_compensation_lowers_the_loss(order: str) -> None:
    """On correlated inputs the solver's loss is well below round-to-nearest's."""
    w_NK, hessian = correlated_layer(32, 64, seed=6)
    step_NG, factor = steps(w_NK, 16), factor_of(hessian, order, 16)
    step_NK = step_NG.repeat_interleave(16, 1)
    solved = (solve(w_NK, factor, grid(step_NG, 16)).codes_NK.double() - 8) * step_NK
    _, plain = nearest(w_NK, step_NG, 16)
    assert output_loss(w_NK, solved, Statistics(hessian, 1)) < 0.7 * output_loss(w_NK, plain, Statistics(hessian, 1))


def test_weights_are_not_touched() -> None:
    """Neither weights nor Hessian change: they are shared by other linears."""
    w_NK, hessian = correlated_layer(8, 32, seed=7)
    w_before, h_before = w_NK.clone(), hessian.clone()
    solve(w_NK, factor_of(hessian, "gar", 8), grid(steps(w_NK, 8), 8))
    assert torch.equal(w_NK, w_before)
    assert torch.equal(hessian, h_before)


# ---- what the loop leaves


@ORDER
@SHAPES
def test_values_are_those_of_the_codes(order: str, columns: int, group_size: int) -> None:
    """In visiting order, for a block within a group and for one beyond it."""
    w_NK, hessian = correlated_layer(9, columns, seed=20)
    step_NG, factor = steps(w_NK, group_size), factor_of(hessian, order, group_size)
    for block_size in (5, 128):
        rounded = solve(w_NK, factor, grid(step_NG, group_size), None, block_size)
        expected_NK = (rounded.codes_NK.double() - 8) * step_NG.repeat_interleave(group_size, 1)[:, :columns]
        torch.testing.assert_close(rounded.value_KN, expected_NK.T[factor.order_K], rtol=0, atol=1e-15)


def naive_wishes(w_NK: Tensor, value_NK: Tensor, factor: Factor) -> Tensor:
    """[N, K] in original order: w_j + sum_{k<j} x_k R_kj / R_jj, term by term."""
    wish_NK, order_K = w_NK.clone(), factor.order_K.tolist()
    for j, column in enumerate(order_K):
        for k, earlier in enumerate(order_K[:j]):
            wish_NK[:, column] += (w_NK - value_NK)[:, earlier] * float(factor.unit_KK[k, j])
    return wish_NK


@ORDER
@SHAPES
def test_what_each_column_wished_to_be(order: str, columns: int, group_size: int) -> None:
    """By a loop over all earlier columns; each code is the nearest level of its wish."""
    w_NK, hessian = correlated_layer(9, columns, seed=21)
    step_NG, factor = steps(w_NK, group_size), factor_of(hessian, order, group_size)
    rounded = solve(w_NK, factor, grid(step_NG, group_size), None, 7)
    wish_NK = rounded.wish(factor)
    value_NK = (rounded.codes_NK.double() - 8) * step_NG.repeat_interleave(group_size, 1)[:, :columns]
    torch.testing.assert_close(wish_NK, naive_wishes(w_NK, value_NK, factor), rtol=0, atol=1e-12)
    assert torch.equal(nearest(wish_NK, step_NG, group_size)[0], rounded.codes_NK)
    assert (wish_NK - w_NK).abs().max() > 0.1 * step_NG.min(), "nothing was pushed on"


@ORDER
@pytest.mark.parametrize("dead", [[], [0, 13, 39]], ids=["alive", "dead"])
@pytest.mark.parametrize("damping_frac", [0.01, 0.3])
def test_row_losses_and_gradient_are_those_of_the_damped_hessian(
    order: str, dead: list[int], damping_frac: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From codes alone, dense: row by row e H' e, e H', with H' the Hessian and all that was added to its diagonal."""
    w_NK, hessian = correlated_layer(9, 40, seed=22)
    hessian[dead] = 0
    hessian[:, dead] = 0
    step_NG, factor = steps(w_NK, 8), factor_of(hessian, order, 8, damping_frac)
    damped_KK = hessian + factor.damping_K.diag()
    live = [k for k in range(40) if k not in dead]
    mean = hessian.diagonal()[live].mean()
    torch.testing.assert_close(factor.damping_K[live], (damping_frac * mean).expand(len(live)))
    torch.testing.assert_close(factor.damping_K[dead], ((1 + damping_frac) * mean).expand(len(dead)))
    rounded = solve(w_NK, factor, grid(step_NG, 8), None, 16)
    error_NK = w_NK - (rounded.codes_NK.double() - 8) * step_NG.repeat_interleave(8, 1)
    expected_NK = error_NK @ damped_KK
    torch.testing.assert_close(rounded.row_loss(factor), (expected_NK * error_NK).sum(1), rtol=1e-10, atol=0)
    for panel in (1, 7, 40, 512):
        monkeypatch.setattr("duotone.solver.solve._PANEL", panel)
        found_NK = rounded.gradient(factor)
        assert found_NK.is_contiguous()
        torch.testing.assert_close(found_NK, expected_NK, rtol=0, atol=1e-12)


def test_the_losses_of_float32() -> None:
    """What rows are compared by and a local search starts from, to float32 rounding; K beyond a panel of the product."""
    w_NK, hessian = correlated_layer(6, 600, seed=23, dtype=torch.float32)
    step_NG, factor = steps(w_NK, 16), factor_of(hessian, "act", 16)
    rounded = solve(w_NK, factor, grid(step_NG, 16))
    error_NK = w_NK.double() - (rounded.codes_NK.double() - 8) * step_NG.double().repeat_interleave(16, 1)[:, :600]
    expected_NK = error_NK @ (hessian.double() + factor.damping_K.double().diag())
    torch.testing.assert_close(rounded.row_loss(factor).double(), (expected_NK * error_NK).sum(1), rtol=1e-4, atol=0)
    assert (rounded.gradient(factor) - expected_NK).norm() < 1e-4 * expected_NK.norm()


@ORDER
def test_pivots_are_what_a_column_costs_at_last(order: str) -> None:
    """1 / (H^-1)_jj of the columns from j on, by inversion, in original order."""
    _, hessian = correlated_layer(1, 24, seed=24)
    factor = factor_of(hessian, order, 8)
    damped_KK, order_K = damped(hessian.numpy(), DAMPING), factor.order_K.tolist()
    expected = np.empty(24)
    for j, column in enumerate(order_K):
        expected[column] = 1 / np.linalg.inv(damped_KK[np.ix_(order_K[j:], order_K[j:])])[0, 0]
    assert np.allclose(factor.pivots().numpy(), expected, rtol=1e-9, atol=0)


@ORDER
@pytest.mark.parametrize("columns", [1, 24, 100])
def test_condition_number(order: str, columns: int) -> None:
    """Not above the largest by the smallest eigenvalue of the damped Hessian, and more than half of it."""
    _, hessian = correlated_layer(1, columns, seed=26)
    eigenvalues = np.linalg.eigvalsh(damped(hessian.numpy(), DAMPING))
    found = factor_of(hessian, order, 8).condition_number
    assert 0.5 * eigenvalues[-1] / eigenvalues[0] < found <= eigenvalues[-1] / eigenvalues[0] * (1 + 1e-9)


@pytest.mark.parametrize("picked", [[False] * 6, [True] * 6, [True, False, False, True, True, False]])
def test_rows_of_one_or_the_other(picked: list[bool]) -> None:
    """Each row in all three tensors, and so its loss."""
    w_NK, hessian = correlated_layer(6, 20, seed=25)
    step_NG, factor = steps(w_NK, 8), factor_of(hessian, "act", 8)
    both = [solve(w_NK, factor, grid(step_NG * share, 8)) for share in (1, 0.8)]
    mixed = both[0].where(torch.tensor(picked), both[1])
    losses = [one.row_loss(factor) for one in (*both, mixed)]
    assert bool((losses[0] != losses[1]).all())
    for n, take in enumerate(picked):
        source = both[take]
        assert torch.equal(mixed.codes_NK[n], source.codes_NK[n])
        assert torch.equal(mixed.value_KN[:, n], source.value_KN[:, n])
        assert torch.equal(mixed.left_KN[:, n], source.left_KN[:, n])
        assert losses[2][n] == losses[take][n]


# ---- the factor


@ORDER
def test_factor_multiplies_back(order: str) -> None:
    """R R^T is the reordered damped Hessian; R is upper triangular with the unit diagonal taken out."""
    _, hessian = correlated_layer(1, 40, seed=8)
    factor = factor_of(hessian, order, 8)
    r_KK = (factor.unit_KK * factor.diagonal_K).numpy()
    expected = damped(hessian.numpy(), DAMPING)[np.ix_(factor.order_K.tolist(), factor.order_K.tolist())]
    assert np.allclose(r_KK @ r_KK.T, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    assert np.array_equal(np.triu(r_KK), r_KK)
    assert np.array_equal(factor.unit_KK.diagonal(), np.ones(40))
    assert (factor.damping_frac, factor.dead_columns) == (DAMPING, 0)


def test_damping_is_raised_and_recorded_on_a_singular_hessian() -> None:
    """Rank one in float32 and hardly any damping: 1e-3 of the mean diagonal is what the factor took, once, and says so."""
    x_K = torch.linspace(1, 2, 48)
    hessian = torch.outer(x_K, x_K)
    assert int(torch.linalg.cholesky_ex(hessian + 1e-9 * hessian.diagonal().mean() * torch.eye(48))[1]) > 0
    factor = factor_of(hessian, "none", 16, damping_frac=1e-9)
    assert factor.damping_frac == pytest.approx(1e-3)
    r_KK = (factor.unit_KK * factor.diagonal_K).double().numpy()
    expected = damped(hessian.double().numpy(), factor.damping_frac)
    assert np.abs(r_KK @ r_KK.T - expected).max() < 1e-5


def test_raised_damping_replaces_the_first() -> None:
    """A slightly indefinite matrix takes 0.1 of the mean diagonal when 0.01 fails, not 0.11; the Hessian itself is kept."""
    basis, _ = np.linalg.qr(np.random.default_rng(19).standard_normal((24, 24)))
    hessian = torch.from_numpy(basis @ np.diag(np.linspace(-0.05, 2, 24)) @ basis.T)
    before = hessian.clone()
    factor = factor_of(hessian, "none", 8)
    r_KK = (factor.unit_KK * factor.diagonal_K).numpy()
    assert factor.damping_frac == pytest.approx(0.1)
    assert np.allclose(r_KK @ r_KK.T, damped(before.numpy(), 0.1), rtol=0, atol=1e-12)
    assert torch.equal(hessian, before)


def test_hopeless_hessian_is_an_error() -> None:
    """Far from positive definite: no silent fallback, the message names the layer and the last damping tried."""
    hessian = torch.eye(8) - 100 * torch.ones(8, 8).triu(1) - 100 * torch.ones(8, 8).tril(-1)
    with pytest.raises(DuotoneError, match=r"layers\.2\.down_proj: .* damping 10\b"):
        factorize(Statistics(hessian, 1), torch.arange(8), DAMPING, "layers.2.down_proj")


@ORDER
def test_dead_columns_are_counted_and_rounded_to_nearest(order: str) -> None:
    """Channels that calibration never excited: neither set to zero nor compensated; the live ones are solved all the same."""
    w_NK, hessian = correlated_layer(16, 40, seed=10)
    dead = torch.tensor([0, 13, 14, 39])
    hessian[dead] = 0
    hessian[:, dead] = 0
    step_NG, factor = steps(w_NK, 8), factor_of(hessian, order, 8)
    found = solve(w_NK, factor, grid(step_NG, 8)).codes_NK
    assert factor.dead_columns == 4
    assert torch.equal(found[:, dead], nearest(w_NK, step_NG, 8)[0][:, dead])
    assert torch.equal(hessian.diagonal()[dead], torch.zeros(4, dtype=torch.float64))
    filled = hessian.clone()
    filled[dead, dead] = hessian.diagonal().sum() / 36
    oracle = rounding_oracle(step_NG.numpy(), 8)
    expected, _ = obq(w_NK.numpy(), damped(filled.numpy(), DAMPING), factor.order_K.tolist(), oracle)
    assert np.array_equal(found.numpy(), expected)


def test_all_columns_dead() -> None:
    """A Hessian of zeros: every column counted, round to nearest."""
    w_NK, _ = correlated_layer(4, 16, seed=11)
    step_NG, factor = steps(w_NK, 8), factor_of(torch.zeros(16, 16, dtype=torch.float64), "gar", 8)
    assert factor.dead_columns == 16
    assert torch.equal(solve(w_NK, factor, grid(step_NG, 8)).codes_NK, nearest(w_NK, step_NG, 8)[0])


@pytest.mark.parametrize("panel", [5, 24, 512])
def test_output_loss_is_the_relative_error_of_outputs(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """|X (W - V)^T|^2 / |X W^T|^2 from the inputs themselves, in whatever panels; zero weights do not divide by zero."""
    monkeypatch.setattr("duotone.solver.solve._PANEL", panel)
    rng = np.random.default_rng(12)
    x_TK, w_NK, v_NK = rng.standard_normal((100, 24)), rng.standard_normal((6, 24)), rng.standard_normal((6, 24))
    statistics = Statistics(torch.from_numpy(x_TK.T @ x_TK / 100), 100)
    expected = np.square(x_TK @ (w_NK - v_NK).T).sum() / np.square(x_TK @ w_NK.T).sum()
    assert output_loss(torch.from_numpy(w_NK), torch.from_numpy(v_NK), statistics) == pytest.approx(expected, rel=1e-12)
    assert output_loss(torch.zeros(6, 24).double(), torch.zeros(6, 24).double(), statistics) == 0


def test_products_in_bfloat16_cost_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide layer on a machine with units for it: a loss is measured to a thousandth, and codes are as good."""
    w_NK, hessian = correlated_layer(24, 1100, seed=40, dtype=torch.float32)
    step_NG, found = steps(w_NK, 40), {}
    for units in (False, True):
        monkeypatch.setattr("duotone.device.has_bf16_units", lambda units=units: units)
        factor = factor_of(hessian, "act", 40)
        rounded = solve(w_NK, factor, grid(step_NG, 40))
        v_NK = (rounded.codes_NK.float() - 8) * step_NG.repeat_interleave(40, 1)[:, :1100]
        found[units] = (rounded, factor, rounded.gradient(factor), v_NK)
        assert factor.narrow.dtype == (torch.bfloat16 if units else torch.float32)
    (wide, factor, _, v_NK), (narrow, _, narrow_NK, narrow_v_NK) = found[False], found[True]
    assert not torch.equal(wide.codes_NK, narrow.codes_NK), "no code differs: nothing was tested"
    losses = torch.stack([wide.row_loss(factor).sum(), narrow.row_loss(factor).sum()])
    assert abs(losses[1] / losses[0] - 1) < 5e-3  # few rows: other codes are now better, now worse
    exact_NK = (w_NK - narrow_v_NK) @ (hessian + factor.damping_K.diag())
    assert (narrow_NK - exact_NK).norm() < 0.01 * exact_NK.norm()
    measured = []
    for units in (False, True):
        monkeypatch.setattr("duotone.device.has_bf16_units", lambda units=units: units)
        measured.append(output_loss(w_NK, v_NK, Statistics(hessian, 1)))
    assert measured[1] == pytest.approx(measured[0], rel=1e-3) and measured[0] != measured[1]
    assert narrow_NK.dtype == torch.float32
