# Shapes: M tokens, K in_features.
"""Second moments of a layer's inputs."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.errors import DuotoneError
from duotone.solver.statistics import Statistics, StatisticsAccumulator

CPU = torch.device("cpu")


def accumulated(x_MK: torch.Tensor, cuts: list[int]) -> Statistics:
    """Statistics of the tokens, cut into batches before the given rows."""
    edges = [0, *sorted(cuts), len(x_MK)]
    accumulator = StatisticsAccumulator(x_MK.shape[1], CPU)
    for start, stop in pairwise(edges):
        accumulator.add(x_MK[start:stop])
    return accumulator.finish("layer")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(m=st.integers(1, 200), k=st.integers(1, 40), data=st.data())
def test_batches_do_not_matter_exactly(m: int, k: int, data: st.DataObject) -> None:
    """Small integers have exact sums: any cut (empty batches too) gives X^T X / M to the last bit."""
    cuts = data.draw(st.lists(st.integers(0, m), max_size=5))
    rng = np.random.default_rng(m * 100 + k)
    x_MK = rng.integers(-9, 10, (m, k))
    found = accumulated(torch.from_numpy(x_MK).float(), cuts)
    expected = (x_MK.T @ x_MK).astype(np.float32) / np.float32(m)
    assert found.tokens == m
    assert found.hessian.dtype == torch.float32
    assert np.array_equal(found.hessian.numpy(), expected)


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


def test_no_token_is_an_error() -> None:
    """An expert that was never routed to, say: the message names the layer."""
    accumulator = StatisticsAccumulator(8, CPU)
    accumulator.add(torch.zeros(0, 8))
    with pytest.raises(DuotoneError, match=r"layers\.3\.experts\.7: found no calibration token"):
        accumulator.finish("layers.3.experts.7")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e25], ids=["nan", "inf", "minus-inf", "overflow"])
def test_non_finite_inputs_are_an_error(bad: float) -> None:
    """One bad value among many, also one whose square leaves float32: the message names the layer."""
    x_MK = torch.ones(64, 8)
    x_MK[40, 5] = bad
    accumulator = StatisticsAccumulator(8, CPU)
    accumulator.add(x_MK)
    accumulator.add(torch.ones(8, 8))
    with pytest.raises(DuotoneError, match=r"layers\.0\.q_proj: .*not finite"):
        accumulator.finish("layers.0.q_proj")
