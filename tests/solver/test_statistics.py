# Shapes: M tokens, K in_features.
"""Second moments of a layer's inputs."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.errors import DuotoneError
from duotone.kernels import native
from duotone.solver.statistics import Statistics, StatisticsAccumulator
from tests.solver.test_sweep import COMPILED

CPU = torch.device("cpu")
#: BF16 inputs on a CPU are multiplied by an op of our own.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def accumulated(
    x_MK: torch.Tensor, cuts: list[int], original_MK: torch.Tensor | None = None, off_MD: torch.Tensor | None = None
) -> Statistics:
    """Statistics of the tokens, cut into batches before the given rows."""
    edges = [0, *sorted(cuts), len(x_MK)]
    accumulator = StatisticsAccumulator(x_MK.shape[1], CPU)
    for start, stop in pairwise(edges):
        given = (None if tokens is None else tokens[start:stop] for tokens in (original_MK, off_MD))
        accumulator.add(x_MK[start:stop], *given)
    return accumulator.finish("layer")


@DTYPES
@settings(max_examples=40, deadline=None, derandomize=True)
@given(m=st.integers(1, 200), k=st.integers(1, 40), data=st.data())
def test_batches_do_not_matter_exactly(dtype: torch.dtype, m: int, k: int, data: st.DataObject) -> None:
    """Small integers have exact sums: any cut (empty batches too) gives X^T X / M to the last bit."""
    cuts = data.draw(st.lists(st.integers(0, m), max_size=5))
    rng = np.random.default_rng(m * 100 + k)
    x_MK = rng.integers(-9, 10, (m, k))
    found = accumulated(torch.from_numpy(x_MK).to(dtype), cuts)
    expected = (x_MK.T @ x_MK).astype(np.float32) / np.float32(m)
    assert found.tokens == m
    assert found.hessian.dtype == torch.float32
    assert np.array_equal(found.hessian.numpy(), expected)
    assert found.mean is not None and np.array_equal(found.mean.numpy(), x_MK.sum(0).astype(np.float32) / np.float32(m))
    assert all(
        other is None for other in (found.input_drift, found.stream_target, found.input_drift_mean, found.stream_target_mean)
    )


@DTYPES
@settings(max_examples=40, deadline=None, derandomize=True)
@given(m=st.integers(1, 100), k=st.integers(1, 30), d=st.integers(1, 30), data=st.data())
def test_drift_by_its_definition_in_any_batches(dtype: torch.dtype, m: int, k: int, d: int, data: st.DataObject) -> None:
    """(X0 - X)^T X / M, R^T X / M and their means, to the last bit on small integers; each alone or both."""
    cuts = data.draw(st.lists(st.integers(0, m), max_size=5))
    rng = np.random.default_rng(m * 100 + k)
    x, x0, off = (rng.integers(-9, 10, (m, width)) for width in (k, k, d))
    with_input, with_stream = data.draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    tensors = [torch.from_numpy(values).to(dtype) for values in (x, x0, off)]
    found = accumulated(tensors[0], cuts, tensors[1] if with_input else None, tensors[2] if with_stream else None)
    for present, left, moment, mean in (
        (with_input, x0 - x, found.input_drift, found.input_drift_mean),
        (with_stream, off, found.stream_target, found.stream_target_mean),
    ):
        assert present == (moment is not None) == (mean is not None)
        if moment is not None and mean is not None:
            assert np.array_equal(moment.numpy(), (left.T @ x).astype(np.float32) / np.float32(m))
            assert np.array_equal(mean.numpy(), left.sum(0).astype(np.float32) / np.float32(m))


@DTYPES
@pytest.mark.parametrize("k", [63, 64, 65, 255, 256, 257, 600, 1025, 1300])
def test_every_entry_of_a_wide_matrix(k: int, dtype: torch.dtype) -> None:
    """Only one triangle is computed, panel by panel: the other one is its mirror image, wherever the panels end."""
    rng = np.random.default_rng(k)
    x_MK = rng.integers(-9, 10, (12, k))
    found = accumulated(torch.from_numpy(x_MK).to(dtype), [5])
    assert np.array_equal(found.hessian.numpy(), (x_MK.T @ x_MK).astype(np.float32) / np.float32(12))


def test_drift_of_real_inputs_against_float64() -> None:
    """A drift of a thousandth of the signal keeps three digits or more: differences are taken before they are summed."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 500, 20, generator=generator)
    original, off = (x + 1e-3 * noise).bfloat16().float(), 1e-3 * noise[:, :7]
    found = accumulated(x, [100, 101], original.view(50, 10, 20).view(500, 20), off)
    assert found.input_drift is not None and found.stream_target is not None
    for moment, left in ((found.input_drift, original.double() - x.double()), (found.stream_target, off.double())):
        exact = left.T @ x.double() / 500
        assert (moment.double() - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("cuts", [[], [1], [500, 501, 777], list(range(0, 1000, 10))], ids=["one", "two", "four", "hundred"])
def test_real_inputs_against_float64(cuts: list[int]) -> None:
    """Each entry within 1e-6 of sqrt(h_ii h_jj), the scale on which an entry can be wrong: a few float32 roundings."""
    rng = np.random.default_rng(3)
    x_MK = rng.standard_normal((1000, 48)) @ rng.standard_normal((48, 48)) * np.exp(2 * rng.standard_normal(48))
    x_MK = x_MK.astype(np.float32)
    exact = x_MK.astype(np.float64).T @ x_MK.astype(np.float64) / 1000
    scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    found = accumulated(torch.from_numpy(x_MK), cuts).hessian.numpy()
    assert (np.abs(found - exact) / scale).max() < 1e-6


def test_leading_shapes_and_bfloat16() -> None:
    """[batch, tokens, K] counts batch * tokens tokens; BF16 inputs are squared in float32."""
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    accumulator = StatisticsAccumulator(16, CPU)
    accumulator.add(x)
    found = accumulator.finish("layer")
    flat = x.double().reshape(15, 16)
    assert found.tokens == 15
    assert torch.allclose(found.hessian.double(), flat.T @ flat / 15, rtol=0, atol=1e-6)


@pytest.mark.parametrize("extension", [pytest.param(True, marks=COMPILED), False], ids=["compiled", "torch"])
@pytest.mark.parametrize(("m", "k", "d"), [(513, 130, 70), (7, 64, 1)])
def test_bfloat16_inputs_are_those_of_float32(m: int, k: int, d: int, extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All six moments of numbers that BF16 holds, drifts of a part in a hundred: within float32 rounding of the wide path's.

    The inputs are not contiguous, as a slice of a batch may not be.
    """
    generator = torch.Generator().manual_seed(m)
    x = (torch.randn(m, 2 * k, generator=generator) * torch.exp(torch.randn(2 * k, generator=generator))).bfloat16()[:, ::2]
    original = x + (0.01 * torch.randn(m, k, generator=generator)).bfloat16()
    off = (0.01 * torch.randn(m, d, generator=generator)).bfloat16()
    expected = accumulated(x.float(), [m // 2], x.float() + (original - x).float(), off.float())
    monkeypatch.setattr(native, "available", lambda: extension)
    found = accumulated(x, [m // 2], original, off)
    assert found.tokens == m
    for name in ("hessian", "input_drift", "stream_target", "mean", "input_drift_mean", "stream_target_mean"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 2e-6 * other.norm(), name
    assert torch.equal(found.hessian[64:, :64], found.hessian[:64, 64:].T)


def test_a_stream_in_float32_beside_inputs_in_bfloat16() -> None:
    """Its drift is rounded to BF16 for the products, and counts as it is for the mean."""
    generator = torch.Generator().manual_seed(1)
    x, off = torch.randn(50, 20, generator=generator).bfloat16(), torch.randn(50, 8, generator=generator)
    found = accumulated(x, [20], None, off)
    assert found.stream_target is not None and found.stream_target_mean is not None
    torch.testing.assert_close(found.stream_target, off.bfloat16().float().T @ x.float() / 50)
    torch.testing.assert_close(found.stream_target_mean, off.mean(0))


def test_no_token_is_an_error() -> None:
    """An expert that was never routed to, say: the message names the layer."""
    accumulator = StatisticsAccumulator(8, CPU)
    accumulator.add(torch.zeros(0, 8))
    with pytest.raises(DuotoneError, match=r"layers\.3\.experts\.7: found no calibration token"):
        accumulator.finish("layers.3.experts.7")


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e25], ids=["nan", "inf", "minus-inf", "overflow"])
def test_non_finite_inputs_are_an_error(bad: float, dtype: torch.dtype) -> None:
    """One bad value among many, also one whose square leaves float32: the message names the layer and what it was."""
    x_MK = torch.ones(64, 8, dtype=dtype)
    x_MK[40, 5] = bad
    accumulator = StatisticsAccumulator(8, CPU)
    accumulator.add(x_MK)
    accumulator.add(torch.ones(8, 8, dtype=dtype))
    with pytest.raises(DuotoneError, match=r"layers\.0\.q_proj: gradients are not finite"):
        accumulator.finish("layers.0.q_proj", "gradients")


def test_a_covariance_that_is_rounding_has_a_factor() -> None:
    """Inputs that hardly vary around a large mean: the centered moments are not positive, and the target stays finite."""
    x = 100 + 1e-4 * torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    sums = StatisticsAccumulator(24, x.device)
    sums.add(x, None, torch.randn(200, 8, generator=torch.Generator().manual_seed(1)))
    statistics = sums.finish("layer").centered()
    assert float(torch.linalg.eigvalsh(statistics.hessian).amin()) < 0, "the moments are positive: nothing was tested"
    w = torch.randn(8, 24, generator=torch.Generator().manual_seed(2))
    assert torch.isfinite(statistics.stream_weight(w)).all()
