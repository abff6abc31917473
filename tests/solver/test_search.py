"""Searched scales: legal, and never worse than what they start from."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.contract import join_scale, split_scale
from duotone.qweight import QuantizedWeight, dequantize
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.solver.scales import Scales, fit_scales, nearest_entry, round_to_nearest
from duotone.solver.search import refresh_scale, search_scales
from duotone.solver.sweep import Grid, Rule, scale_error_torch


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
def test_column_weights_steer_the_search(target: Target) -> None:
    """The weighted error falls well below the unweighted search's where columns differ; equal weights change nothing."""
    scheme = Scheme(target, 32)
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(40, 150, generator=generator) * 0.02
    weight = torch.exp(2 * torch.randn(150, generator=generator))

    def weighted_error(scales: Scales) -> float:
        return float(((dequantize(weight_of(w, scales, scheme)) - w).double().square() * weight).sum())

    plain, steered = search_scales(w, scheme), search_scales(w, scheme, weight)
    assert weighted_error(steered) < 0.9 * weighted_error(plain)
    assert weighted_error(steered) <= weighted_error(fit_scales(w, scheme))
    equal = search_scales(w, scheme, torch.full((150,), 4.0))
    assert torch.equal(equal.group_scale, plain.group_scale)
    assert torch.equal(equal.outer_scale, plain.outer_scale)


def test_column_weights_are_sampled_with_their_columns() -> None:
    """A row long enough that its outer scale is chosen on a sample (stride 2 over groups of 24, a short one last)."""
    scheme = Scheme(HOPPER, 24)
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(6, 2060, generator=generator) * 0.02
    weight = torch.zeros(2060)
    weight[::24] = 1  # the first column of each group, which every sample holds, and nothing else
    scales = search_scales(w, scheme, weight)
    error = (dequantize(weight_of(w, scales, scheme)) - w)[:, ::24].square().sum()
    plain = (dequantize(weight_of(w, search_scales(w, scheme), scheme)) - w)[:, ::24].square().sum()
    assert error < 0.2 * plain


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 100),
    magnitude=st.sampled_from([1e-7, 1e-3, 1.0, 300.0]),
    moved=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    target=st.sampled_from([HOPPER, GAUDI]),
    symmetric=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_scales_of_moved_weights_are_legal(
    rows: int, columns: int, magnitude: float, moved: float, target: Target, symmetric: bool, seed: int
) -> None:
    """As dpq searches again: a canonical pair (QuantizedWeight checks it), and so is any mix of rows with the first.

    gaudi: the outer scale of the tensor, given, stays, whatever the weights have become.
    """
    scheme = Scheme(target, 32, symmetric)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * magnitude
    w[0] = 0
    wish = w + moved * magnitude * torch.randn(w.shape, generator=generator)
    first = search_scales(w, scheme)
    outer = None if target is HOPPER else first.outer_scale
    again = search_scales(wish, scheme, torch.rand(columns, generator=generator), outer)
    weight_of(wish, again, scheme)
    weight_of(w, first.where(torch.rand(rows, generator=generator) < 0.5, again), scheme)
    assert symmetric == (again.zero_point is None)
    if outer is not None:
        assert torch.equal(again.outer_scale, outer)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_given_outer_scale_moves_no_step(symmetric: bool, weighted: bool) -> None:
    """gaudi: under a power of two that leaves room, group scales are those of the search's own, moved by what it differs."""
    scheme = Scheme(GAUDI, 32, symmetric)
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(60, 200, generator=generator) * 0.02
    weight = torch.rand(200, generator=generator) if weighted else None
    own = search_scales(w, scheme, weight)
    for share in (1, 2, 4):
        found = search_scales(w, scheme, weight, own.outer_scale * share)
        assert torch.equal(found.outer_scale, own.outer_scale * share)
        assert torch.equal(found.group_scale, own.group_scale / share)
        assert symmetric == (found.zero_point is None)
        assert found.zero_point is None or (own.zero_point is not None and torch.equal(found.zero_point, own.zero_point))


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_share_of_the_columns_rebuilds_the_scales(shards: int, weighted: bool) -> None:
    """Ranks split the file's scale on their own columns: the same pair, however many ranks divide it."""
    scheme, generator = Scheme(group_size=16), torch.Generator().manual_seed(shards)
    w = torch.randn(40, 256, generator=generator) * torch.exp(torch.randn(40, 256, generator=generator))
    w[3, 32:] *= 1e-3  # a row whose shares differ much
    weight = torch.rand(256, generator=generator) if weighted else None
    found = search_scales(w, scheme, weight, shards=shards)
    joined = join_scale(found.group_scale, found.outer_scale)
    for ranks in (ranks for ranks in (1, 2, 4) if shards % ranks == 0):
        for share, group in zip(joined.chunk(ranks, 1), found.group_scale.chunk(ranks, 1), strict=True):
            again, outer = split_scale(share, scheme)
            assert torch.equal(again, group) and torch.equal(outer, found.outer_scale)
    apart = [split_scale(share, scheme)[1] for share in join_scale(*_one_shard(w, scheme, weight)).chunk(4, 1)]
    assert not all(torch.equal(outer, apart[0]) for outer in apart), "any scales would do: nothing was tested"


def _one_shard(w: torch.Tensor, scheme: Scheme, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    scales = search_scales(w, scheme, weight)
    return scales.group_scale, scales.outer_scale


@pytest.mark.parametrize("grown", [0.3, 1.0, 2.0])
def test_the_best_groups_under_a_given_outer_scale(grown: float) -> None:
    """gaudi, without zero points: no group has less weighted error at another of the shares of min-max, by a plain loop.

    Weights that outgrew the outer scale saturate: there the shares differ most.
    """
    scheme = Scheme(GAUDI, 16)
    generator = torch.Generator().manual_seed(8)
    w = torch.randn(30, 80, generator=generator) * 0.02
    weight, outer = torch.exp(torch.randn(80, generator=generator)), search_scales(w, scheme).outer_scale
    wish = w * grown
    found = search_scales(wish, scheme, weight, outer)
    parts, weights, level = wish.view(30, 5, 16) / outer, weight.view(5, 16), torch.arange(-8.0, 8)

    def error(scale: torch.Tensor) -> torch.Tensor:
        """[30, 5] with the groups at these scales: to the nearest INT4 level first, then to FP8."""
        product = (parts / scale[..., None]).round().clamp(level[0], level[-1]) * scale[..., None]
        return ((GAUDI.fp8.round(product.clamp(-240, 240)) - parts).square() * weights).sum(-1)

    shares = torch.arange(17) * -0.025 + 1
    minmax = (fit_scales(wish, scheme).step / outer).unsqueeze(-1)
    errors = torch.stack([error(trial) for trial in (minmax * shares).bfloat16().float().unbind(-1)])
    assert bool((error(found.group_scale) <= errors.amin(0) * (1 + 1e-5)).all())
    assert errors.amin(0).sum() < 0.95 * errors[0].sum()


@pytest.mark.parametrize("weighted", [True, False])
def test_the_search_takes_the_best_groups_under_its_outer_scale(weighted: bool) -> None:
    """hopper, without zero points: no group has less error at another of the E4M3 values tried, by a plain loop.

    Tried are seven, downwards from the first that is not below 1.06 of min-max. One group of a row may have to be at the peak;
    a row that min-max serves better keeps it.
    """
    scheme = Scheme(HOPPER, 16)
    generator = torch.Generator().manual_seed(8)
    w = torch.randn(30, 80, generator=generator) * 0.02
    weight = torch.exp(torch.randn(80, generator=generator)) if weighted else torch.ones(80)
    found, minmax = search_scales(w, scheme, weight if weighted else None), fit_scales(w, scheme)
    values = HOPPER.fp8.decode(torch.arange(1, 127, dtype=torch.uint8))
    values = values[torch.isfinite(values) & (values <= scheme.peak_group_scale)].tolist()
    level, parts, weights = torch.arange(-8.0, 8), w.view(30, 5, 16), weight.view(5, 16)

    def error(scale: torch.Tensor) -> torch.Tensor:
        """[30, 5] with every group at the scale [30, 5]: to the nearest INT4 level first, then to FP8."""
        scaled = parts / found.outer_scale[:, None, None]
        product = (scaled / scale[..., None]).round().clamp(level[0], level[-1]) * scale[..., None]
        return ((HOPPER.fp8.round(product) - scaled).square() * weights).sum(-1)

    errors = torch.stack([error(torch.full((30, 5), value)) for value in values])
    covering = (1.06 * minmax.step / found.outer_scale[:, None]).tolist()
    best = torch.empty(30, 5)
    for n, g in itertools.product(range(30), range(5)):
        top = next((i for i, value in enumerate(values) if value >= covering[n][g]), len(values) - 1)
        best[n, g] = errors[top - 6 : top + 1, n, g].min()
    kept = (found.group_scale == minmax.group_scale).all(-1)
    off = (error(found.group_scale) > best * (1 + 1e-5)) & ~kept[:, None]
    assert kept.sum() < 5
    assert bool((found.group_scale[off] == scheme.peak_group_scale).all())
    assert bool((off.sum(-1) <= 1).all())


@pytest.mark.parametrize("target", [HOPPER, GAUDI])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 6])
def test_where_picks_rows(target: Target, symmetric: bool, rows: int) -> None:
    """Each row is that of one or the other, in all three tensors; the outer scale of a whole tensor is not a row's."""
    scheme = Scheme(target, 16, symmetric)
    w = torch.randn(rows, 40, generator=torch.Generator().manual_seed(9)) * 0.1
    outer = None if target is HOPPER else fit_scales(w, scheme).outer_scale
    one, other = fit_scales(w, scheme), search_scales(w * 0.8, scheme, outer_scale=outer)
    if one.zero_point is not None:
        other = Scales(other.group_scale, one.zero_point + (one.zero_point < 7), other.outer_scale)
    for picked in itertools.islice(itertools.product([False, True], repeat=rows), 0, None, 5 if rows > 1 else 1):
        mixed = one.where(torch.tensor(picked), other)
        assert mixed.outer_scale.shape == one.outer_scale.shape
        assert (mixed.zero_point is None) == symmetric
        for n, take in enumerate(picked):
            source = other if take else one
            assert torch.equal(mixed.group_scale[n], source.group_scale[n])
            assert mixed.zero_point is None or torch.equal(mixed.zero_point[n], source.zero_point[n])
            at = n if target is HOPPER else 0
            assert mixed.outer_scale[at] == source.outer_scale[at]


def test_nearest_entry_is_the_nearest() -> None:
    """Against all 16 values, for scales that bend the grid and weights all over it."""
    for target in (HOPPER, GAUDI):
        scheme = Scheme(target, 16)
        w = torch.randn(200, 16, generator=torch.Generator().manual_seed(2)) * 0.1
        scales = fit_scales(w, scheme)
        column = Grid.of(scales, Rule.NEAREST_VALUE, scheme).column(0)
        table = torch.stack([column.value(torch.full((200,), float(code)), scheme) for code in range(16)], -1)
        for k in range(16):
            _, value = nearest_entry(w[:, k], column, scheme)
            nearest = (table - w[:, k : k + 1]).abs().amin(-1)
            torch.testing.assert_close((value - w[:, k]).abs(), nearest, rtol=0, atol=0)


# ---- a group's scale, searched anew when it is reached


def scales_in(grid: Grid) -> Scales:
    zero = None if grid.zero_point_GN is None else grid.zero_point_GN.T.contiguous()
    return Scales(grid.group_scale_GN.T.contiguous(), zero, grid.outer_scale)


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 100),
    magnitude=st.sampled_from([1e-7, 1e-3, 1.0, 300.0]),
    moved=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    target=st.sampled_from([HOPPER, GAUDI]),
    symmetric=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=80, deadline=None)
def test_refreshed_scales_stay_canonical(
    rows: int, columns: int, magnitude: float, moved: float, target: Target, symmetric: bool, seed: int
) -> None:
    """Groups visited in any sequence, their weights moved a little or beyond recognition: the pair is legal after each."""
    scheme = Scheme(target, 32, symmetric)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * magnitude
    w[0] = 0
    scales = search_scales(w, scheme)
    grid = Grid.of(scales, Rule.NEAREST_VALUE, scheme)
    for group in torch.randperm(scheme.groups(columns), generator=generator).tolist():
        part = w[:, group * 32 : (group + 1) * 32]
        refresh_scale(grid, group, (part + moved * magnitude * torch.randn(part.shape, generator=generator)).T)
        weight_of(w, scales_in(grid), scheme)  # QuantizedWeight checks the canonical form
    assert torch.equal(grid.outer_scale, scales.outer_scale)


@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=["hopper", "gaudi"])
def test_refreshed_scale_is_the_best_for_the_updated_weights(target: Target) -> None:
    """On weights that shrank or grew: no E4M3 value has less error (hopper), no other row's BF16 scale much less (gaudi)."""
    scheme = Scheme(target, 32)
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(60, 96, generator=generator) * 0.02
    updated = w[:, 32:64] * torch.where(torch.rand(60, 1, generator=generator) < 0.5, 0.6, 1.5)
    grid = Grid.of(search_scales(w, scheme), Rule.NEAREST_VALUE, scheme)
    before = grid.group_scale_GN.clone()
    bound = (before[1] == scheme.peak_group_scale) & ((before == scheme.peak_group_scale).sum(0) == 1)
    refresh_scale(grid, 1, updated.T)
    if target is HOPPER:
        values = target.fp8.decode(torch.arange(1, 127, dtype=torch.uint8))
        values = values[values <= scheme.peak_group_scale]
        assert 5 < int(bound.sum()) < 40, "no row had to keep its peak, or all had"
        assert torch.equal(grid.group_scale_GN[1, bound], torch.full((int(bound.sum()),), scheme.peak_group_scale))
    else:
        values, bound = grid.group_scale_GN[1].unique(), torch.zeros_like(bound)
    scales = scales_in(grid)
    given = Scales(scales.group_scale[:, 1:2], None, scales.outer_scale)
    error, all_errors = (
        scale_error_torch(updated, trial, given, scheme, 32)[~bound, 0]
        for trial in (given.group_scale[..., None], values.expand(60, 1, -1).contiguous())
    )
    best = all_errors.min(-1).values
    if target is HOPPER:
        assert bool((error[:, 0] <= best * (1 + 1e-6)).all())
    else:  # 17 shares of min-max are no whole grid: FP8 rounds a scale between two of them now and then much better
        assert float(error.sum()) < 1.1 * float(best.sum())
    assert torch.equal(grid.group_scale_GN[[0, 2]], before[[0, 2]]) and not torch.equal(grid.group_scale_GN[1], before[1])


def test_a_grid_is_a_copy() -> None:
    """Scales of one group, whose transpose is contiguous as it is, do not change with the grid that is made of them."""
    scales = Scales(torch.ones(5, 1), torch.zeros(5, 1), torch.ones(5))
    grid = Grid.of(scales, Rule.NEAREST_VALUE, Scheme(HOPPER, 32, symmetric=False))
    assert grid.zero_point_GN is not None and scales.zero_point is not None
    grid.group_scale_GN[0], grid.zero_point_GN[0] = 2, 3
    assert torch.equal(scales.group_scale, torch.ones(5, 1)) and torch.equal(scales.zero_point, torch.zeros(5, 1))
