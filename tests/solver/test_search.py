"""Searched scales and coordinate descent: legal, and never worse than what they start from."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.qweight import QuantizedWeight, dequantize
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.solver.refine import descend
from duotone.solver.scales import Scales, fit_scales, nearest_entry, round_to_nearest
from duotone.solver.search import search_scales
from duotone.solver.statistics import Statistics


def weight_of(w: torch.Tensor, scales: Scales, scheme: Scheme, codes: torch.Tensor | None = None) -> QuantizedWeight:
    codes = round_to_nearest(w, scales, scheme) if codes is None else codes
    return QuantizedWeight(codes, scales.group_scale, scales.outer_scale, scheme, scales.zero_point)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 100),
    magnitude=st.sampled_from([1e-7, 1e-3, 1.0, 300.0]),
    target=st.sampled_from([HOPPER, GAUDI]),
    symmetric=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_legal_and_no_worse_than_minmax(
    rows: int, columns: int, magnitude: float, target: Target, symmetric: bool, seed: int
) -> None:
    """Any weights: the pair is canonical (QuantizedWeight checks it), and the error after both roundings does not grow."""
    scheme = Scheme(target, 32, symmetric)
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * magnitude
    w[0] = 0
    errors = [
        (dequantize(weight_of(w, scales, scheme)) - w).double().square().sum().item()
        for scales in (search_scales(w, scheme), fit_scales(w, scheme))
    ]
    assert errors[0] <= errors[1] * (1 + 1e-5)


@pytest.mark.parametrize("target", [HOPPER, GAUDI])
def test_search_pays_on_gaussian_weights(target: Target) -> None:
    """DPQ.md section 6: a search that knows of the FP8 rounding takes at least an eighth off min-max's error."""
    scheme = Scheme(target, 128)
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    searched, minmax = (
        (dequantize(weight_of(w, scales, scheme)) - w).square().sum()
        for scales in (search_scales(w, scheme), fit_scales(w, scheme))
    )
    assert searched < 0.87 * minmax


@pytest.mark.parametrize("target", [HOPPER, GAUDI])
@pytest.mark.parametrize("symmetric", [True, False])
def test_descent_ends_where_no_single_code_helps(target: Target, symmetric: bool) -> None:
    """Every pass lowers the loss or leaves it; after many, changing any one code by one does not lower it."""
    scheme = Scheme(target, 16, symmetric)
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(5, 40, generator=generator) * 0.1
    x = torch.randn(300, 40, generator=generator) @ (torch.eye(40) + 0.3 * torch.randn(40, 40, generator=generator))
    statistics = Statistics(x.T @ x / 300, 300)
    scales = fit_scales(w, scheme)
    codes = round_to_nearest(w, scales, scheme)

    def loss(codes: torch.Tensor) -> torch.Tensor:
        error = (dequantize(weight_of(w, scales, scheme, codes)) - w).double()
        return ((error @ statistics.hessian.double()) * error).sum(-1)

    losses = [loss(codes)] + [loss(descend(w, codes, scales, statistics, scheme, passes)) for passes in (1, 2, 30)]
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-6)).all())
    assert losses[-1].sum() < 0.95 * losses[0].sum()
    final = descend(w, codes, scales, statistics, scheme, 30)
    for column in range(40):
        for step in (-1, 1):
            moved = final.int()
            moved[:, column] = (moved[:, column] + step).clamp(0, 15)
            assert bool((loss(moved.to(torch.uint8)) >= losses[-1] * (1 - 1e-5)).all())


def test_nearest_entry_is_the_nearest() -> None:
    """Against all 16 values, for scales that bend the grid and weights all over it."""
    for target in (HOPPER, GAUDI):
        scheme = Scheme(target, 16)
        w = torch.randn(200, 16, generator=torch.Generator().manual_seed(2)) * 0.1
        scales = fit_scales(w, scheme)
        column = scales.columns()[0]
        table = torch.stack([column.value(torch.full((200,), float(code)), scheme) for code in range(16)], -1)
        for k in range(16):
            _, value = nearest_entry(w[:, k], column, scheme)
            nearest = (table - w[:, k : k + 1]).abs().amin(-1)
            torch.testing.assert_close((value - w[:, k]).abs(), nearest, rtol=0, atol=0)
