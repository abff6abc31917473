# Shapes: M tokens, N out_features, K in_features.
"""The corrected target and bias against float64 least squares on the tokens themselves."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duotone.solver import statistics as statistics_module
from duotone.solver.drift import bias_shift, corrected_target
from duotone.solver.statistics import Statistics, StatisticsAccumulator

CPU = torch.device("cpu")
THOROUGH = settings(max_examples=40, deadline=None, derandomize=True)
SIZES = {"n": st.integers(1, 12), "k": st.integers(1, 24), "seed": st.integers(0, 999), "writer": st.booleans()}


@dataclass
class Case:
    """One linear and what it reads: X0, S0 in the original model, X, S behind the quantized prefix. Float32 values."""

    w: Tensor
    x0: Tensor
    x: Tensor
    s0: Tensor
    s: Tensor
    bias: Tensor
    writer: bool

    @property
    def off(self) -> Tensor:
        """R [M, N]: by how much the output, or the stream behind it, is off as long as the weight stays what it was."""
        off = (self.x0 - self.x) @ self.w.T
        return off + self.s0 - self.s if self.writer else off

    @property
    def wanted(self) -> Tensor:
        """What X V^T should be."""
        return self.x @ self.w.T + self.off

    def statistics(self) -> Statistics:
        """As the walk through a block takes them, in float32 and two batches."""
        sums = StatisticsAccumulator(self.x.shape[1], CPU)
        for rows in torch.arange(len(self.x)).tensor_split(2):
            given = (None, self.wanted[rows].float()) if self.writer else (self.x0[rows].float(), None)
            sums.add(self.x[rows].float(), *given)
        return sums.finish("layer")

    def loss(self, v: Tensor) -> float:
        return float((self.wanted - self.x @ v.double().T).square().sum())


def case(n: int, k: int, seed: int, writer: bool, mean: float = 0.3) -> Case:
    """Correlated inputs that are not centered; the drift is a tenth of the signal, partly a linear function of the inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    tokens = 6 * k + 20
    x = normal(tokens, k) @ (torch.eye(k).double() + 0.4 / math.sqrt(k) * normal(k, k)) + mean * normal(k)
    x0 = x + 0.1 * x @ normal(k, k) / math.sqrt(k) + 0.05 * normal(tokens, k) + 0.1 * mean * normal(k)
    s0 = normal(tokens, n)
    s = s0 + 0.1 * x @ normal(k, n) / math.sqrt(k) + 0.05 * normal(tokens, n) + 0.1 * mean
    rounded = [tensor.float().double() for tensor in (normal(n, k) * 0.1, x0, x, s0, s, normal(n))]
    return Case(*rounded, writer)


def undamped(damping: float = 0.0) -> pytest.MonkeyPatch:
    """Replaces the damping until it is undone; a fixture would not do for Hypothesis."""
    patch = pytest.MonkeyPatch()
    patch.setattr(statistics_module, "DRIFT_DAMPING", damping)
    return patch


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def least_squares(x: Tensor, wanted: Tensor) -> Tensor:
    return torch.linalg.lstsq(x, wanted, driver="gelsd").solution.T


@THOROUGH
@given(**SIZES)
def test_undamped_it_is_least_squares(n: int, k: int, seed: int, writer: bool) -> None:
    """W* minimizes |S0 + X0 W^T - S - X V^T|^2 over all V (without the streams for a linear that does not write to one)."""
    given_ = case(n, k, seed, writer)
    patch = undamped()
    try:
        found = corrected_target(given_.w.float(), given_.statistics()).double()
    finally:
        patch.undo()
    expected = least_squares(given_.x, given_.wanted)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert (found - expected).norm() <= 2e-3 * (expected - given_.w).norm()


@THOROUGH
@given(**SIZES)
def test_it_lowers_the_error_and_damping_shrinks_it(n: int, k: int, seed: int, writer: bool) -> None:
    """However damped, it is nearer to the original's outputs than the weight is; more damping brings it to the weight."""
    given_ = case(n, k, seed, writer)
    w, before = given_.w.float(), given_.loss(given_.w)
    assert given_.loss(corrected_target(w, given_.statistics())) < before
    moved, losses = [], []
    for damping in (0.01, 0.1, 1.0, 1e3, 1e8):
        patch = undamped(damping)
        try:
            target = corrected_target(w, given_.statistics())
        finally:
            patch.undo()
        moved.append(float((target - w).norm()))
        losses.append(given_.loss(target))
    assert moved == sorted(moved, reverse=True) and moved[-1] < 1e-6 * w.norm()
    assert all(early <= late * (1 + 1e-6) for early, late in zip(losses, [*losses[1:], before], strict=True))


@pytest.mark.parametrize("writer", [True, False])
def test_the_damping_is_a_share_of_the_mean_diagonal(writer: bool) -> None:
    """W + R^T X (H + 0.05 mean(diag H) I)^-1, by an explicit inverse."""
    given_ = case(7, 12, 1, writer)
    h = given_.x.T @ given_.x / len(given_.x)
    damped = h + 0.05 * h.diagonal().mean() * torch.eye(12)
    expected = given_.w + given_.off.T @ given_.x / len(given_.x) @ torch.linalg.inv(damped)
    torch.testing.assert_close(corrected_target(given_.w.float(), given_.statistics()).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_correction_is_that_of_every_weight_that_reads_the_inputs() -> None:
    """(X0 - X)^T X (H + damping)^-1 in float64, once for all weights; centered statistics have another."""
    given_ = case(7, 12, 5, writer=False, mean=1.0)
    statistics, moved = given_.statistics(), given_.x0 - given_.x
    centered = given_.x - given_.x.mean(0), moved - moved.mean(0)
    for its, (x, off) in ((statistics, (given_.x, moved)), (statistics.centered(), centered)):
        h = x.T @ x / len(x)
        correction = off.T @ x / len(x) @ torch.linalg.inv(h + 0.05 * h.diagonal().mean() * torch.eye(12))
        torch.testing.assert_close(its.input_correction.double(), correction, rtol=1e-4, atol=1e-5)
        assert its.input_correction is its.input_correction
        for w in (given_.w.float(), given_.w.float()[:3] * 2):
            close(corrected_target(w, its), w.double() @ (torch.eye(12) + correction))


@pytest.mark.parametrize("zero", [None, 0.0])
def test_without_drift_it_is_the_weight(zero: float | None) -> None:
    """Bit for bit, where no original was run, and where it runs beside an equal one (the first linears of a model)."""
    given_ = case(5, 9, 2, writer=False)
    w, hessian = given_.w.float(), given_.statistics().hessian
    none = None if zero is None else torch.zeros(9, 9)
    assert torch.equal(corrected_target(w, Statistics(hessian, 10, none)), w)
    assert torch.equal(corrected_target(w, Statistics(0 * hessian, 10, none)), w)


def test_where_the_stream_is_not_off_it_is_the_weight() -> None:
    """To float32 rounding: what the linear has to write is what it writes."""
    given_ = case(5, 9, 2, writer=True)
    w, hessian = given_.w.float(), given_.statistics().hessian
    close(corrected_target(w, Statistics(hessian, 10, stream_target=w @ hessian)), given_.w)
    assert torch.equal(corrected_target(w, Statistics(0 * hessian, 10, stream_target=0 * w)), w)


@pytest.mark.parametrize("writer", [True, False])
@pytest.mark.parametrize("dead", [[0], [2, 5, 6], list(range(9))])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_dead_channels_keep_their_weights(writer: bool, dead: list[int], scale: float) -> None:
    """A channel that is never excited behind the quantized prefix has no say; the others are solved as if it were not there."""
    given_ = case(4, 9, 3, writer)
    given_.x[:, dead] = 0
    for values in (given_.x, given_.x0, given_.s, given_.s0):
        values *= scale
    w, statistics = given_.w.float(), given_.statistics()
    found = corrected_target(w, statistics)
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found[:, dead], w[:, dead])
    alive = [k for k in range(9) if k not in dead]
    if alive:
        assert not torch.equal(found[:, alive], w[:, alive])
        h = statistics.hessian.double()
        pull = (given_.off.T @ given_.x / len(given_.x))[:, alive]
        damped = h[alive][:, alive] + 0.05 * h.diagonal().mean() * torch.eye(len(alive))
        expected = given_.w[:, alive] + pull @ torch.linalg.inv(damped)
        torch.testing.assert_close(found[:, alive].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", ["one channel a million times the others", "twins", "fewer tokens than channels"])
def test_hard_hessians_stay_finite(shape: str) -> None:
    """Damping bounds the condition number: a singular or a lopsided H factorizes, and the error still falls."""
    given_ = case(6, 40, 4, writer=False)
    if shape == "one channel a million times the others":
        given_.x[:, 3] *= 1e6
        given_.x0[:, 3] *= 1e6
    elif shape == "twins":
        given_.x[:, 20:], given_.x0[:, 20:] = given_.x[:, :20], given_.x0[:, :20]
    else:
        given_ = Case(given_.w, given_.x0[:10], given_.x[:10], given_.s0[:10], given_.s[:10], given_.bias, False)
    found = corrected_target(given_.w.float(), given_.statistics())
    assert bool(torch.isfinite(found).all())
    assert given_.loss(found) < given_.loss(given_.w)


# ---- with a bias to move


@THOROUGH
@given(**SIZES)
def test_with_a_free_bias_it_is_least_squares_with_an_intercept(n: int, k: int, seed: int, writer: bool) -> None:
    """Undamped target on centered statistics and the shifted bias: the weight and the bias of a regression on [X, 1]."""
    given_ = case(n, k, seed, writer, mean=1.0)
    statistics = given_.statistics()
    patch = undamped()
    try:
        target = corrected_target(given_.w.float(), statistics.centered())
    finally:
        patch.undo()
    bias = given_.bias + bias_shift(given_.w.float(), target, statistics).double()
    with_one = torch.cat([given_.x, torch.ones(len(given_.x), 1)], dim=1)
    expected = least_squares(with_one, given_.wanted + given_.bias)
    assert (target.double() - expected[:, :-1]).norm() <= 1e-3 * expected[:, :-1].norm()
    assert (bias - expected[:, -1]).norm() <= 1e-3 * expected.norm()


@THOROUGH
@given(**SIZES)
def test_the_shifted_bias_keeps_the_mean(n: int, k: int, seed: int, writer: bool) -> None:
    """Whatever V is: the mean output, or the mean of the stream behind a linear that writes to it, is the original's."""
    given_ = case(n, k, seed, writer, mean=1.0)
    v = (given_.w.float() * 8).round() / 8
    bias = given_.bias + bias_shift(given_.w.float(), v, given_.statistics()).double()
    found, expected = given_.x @ v.double().T + bias, given_.x0 @ given_.w.T + given_.bias
    if writer:
        found, expected = found + given_.s, expected + given_.s0
    torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=1e-4, atol=1e-5)


@THOROUGH
@given(**SIZES)
def test_centered_statistics_are_those_of_centered_tokens(n: int, k: int, seed: int, writer: bool) -> None:
    """Covariances equal the second moments of tokens less their means, and leave the given statistics as they are."""
    given_ = case(n, k, seed, writer, mean=1.0)
    statistics = given_.statistics()
    before = statistics.hessian.clone()
    found = statistics.centered()
    x, x0, wanted = (tensor - tensor.mean(0) for tensor in (given_.x, given_.x0, given_.wanted))
    close(found.hessian, x.T @ x / len(x))
    if writer:
        assert found.stream_target is not None and found.input_drift is None
        close(found.stream_target, wanted.T @ x / len(x))
    else:
        assert found.input_drift is not None and found.stream_target is None
        close(found.input_drift, (x0 - x).T @ x / len(x))
    assert torch.equal(statistics.hessian, before) and found.tokens == statistics.tokens


def test_without_means_there_is_nothing_to_center_and_no_bias() -> None:
    """Statistics that somebody made by hand."""
    statistics = Statistics(torch.eye(4), 10)
    assert statistics.centered() is statistics
    with pytest.raises(ValueError, match="means"):
        bias_shift(torch.ones(2, 4), torch.ones(2, 4), statistics)
