# Shapes: N out_features, K in_features, G groups along K, g = group_size.
"""Scales from weights, against loops written from the contract."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.contract import join_scale, split_scale
from duotone.qweight import expand_groups
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.solver.scales import (
    Scales,
    fit_paper_scales,
    fit_scales,
    fit_single_level,
    nearest_code,
    nearest_entry,
    round_to_nearest,
    single_level,
    split_single_level,
)
from duotone.solver.sweep import Grid, Rule
from tests.oracles.vllm_split import e4m3fn, load_split

GROUP = 8
SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
THOROUGH = settings(max_examples=80, deadline=None, derandomize=True)


def bf16(x: np.ndarray | np.floating) -> np.ndarray:
    return np.asarray(x, dtype=np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def weights(rows: int, columns: int, seed: int, kind: str = "mixed") -> torch.Tensor:
    """Random rows of very different size; `mixed` adds a zero row, a zero group, a tiny row and a one-sided row."""
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(rows, columns, generator=generator) * torch.exp2(torch.randint(-6, 4, (rows, 1), generator=generator))
    if kind == "mixed":
        w_NK[0] = 0
        w_NK[1 % rows, :GROUP] = 0
        w_NK[2 % rows] *= 1e-5
        w_NK[3 % rows] = w_NK[3 % rows].abs()
    return w_NK


def step_oracle(w_NK: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Min-max step and lowest value of each group, group by group, float32, not rounded."""
    groups = -(-w_NK.shape[1] // GROUP)
    step, low = np.zeros((len(w_NK), groups), np.float32), np.zeros((len(w_NK), groups), np.float32)
    for n in range(len(w_NK)):
        for j in range(groups):
            group = w_NK[n, j * GROUP : (j + 1) * GROUP]
            smallest, largest = min(np.float32(0), group.min()), max(np.float32(0), group.max())
            step[n, j] = 2 * max(-smallest, largest) / np.float32(15) if symmetric else (largest - smallest) / np.float32(15)
            low[n, j] = smallest
    return step, low


def assert_canonical(scales: Scales, scheme: Scheme) -> None:
    """ARCHITECTURE section 1: row maximum exactly at the peak or outer clamped; E4M3 values; the file gives all back."""
    group_NG, outer_N = scales.group_scale.numpy(), scales.outer_scale.numpy()
    clamp = np.float32(scheme.smallest_outer_scale)
    assert group_NG.dtype == outer_N.dtype == np.float32
    assert np.array_equal(e4m3fn(group_NG), group_NG)
    assert (group_NG > 0).all()
    assert (group_NG <= scheme.peak_group_scale).all()
    assert (outer_N >= clamp).all()
    assert (group_NG.max(-1)[outer_N > clamp] == scheme.peak_group_scale).all()
    found_group, found_outer = split_scale(join_scale(scales.group_scale, scales.outer_scale), scheme)
    assert torch.equal(found_group, scales.group_scale)
    assert torch.equal(found_outer, scales.outer_scale)


# ---- channel-scaled target


@SYMMETRY
@THOROUGH
@given(rows=st.integers(1, 12), columns=st.integers(1, 260), kind=st.sampled_from(["plain", "mixed"]), seed=st.integers(0, 999))
def test_hopper_scales_are_canonical(symmetric: bool, rows: int, columns: int, kind: str, seed: int) -> None:
    """Any shape, with zero rows, zero groups, tiny rows and one-sided rows; at 56 exactly, recovered from the file."""
    scheme = Scheme(HOPPER, group_size=GROUP, symmetric=symmetric)
    assert_canonical(fit_scales(weights(rows, columns, seed, kind), scheme), scheme)


@SYMMETRY
@THOROUGH
@given(rows=st.integers(1, 12), columns=st.integers(1, 260), kind=st.sampled_from(["plain", "mixed"]), seed=st.integers(0, 999))
def test_hopper_scales_equal_a_loop(symmetric: bool, rows: int, columns: int, kind: str, seed: int) -> None:
    """outer = fl32(bf16(row maximum) / peak), or its clamp; group = E4M3(step / outer) in one rounding, 2^-9 at least."""
    scheme = Scheme(HOPPER, group_size=GROUP, symmetric=symmetric)
    w_NK = weights(rows, columns, seed, kind)
    found = fit_scales(w_NK, scheme)
    peak = np.float32(56 if symmetric else 28)
    step, low = step_oracle(w_NK.numpy(), symmetric)
    for n in range(rows):
        outer = max(bf16(step[n].max()) / peak, np.float32(1 / (512 * peak)))
        assert found.outer_scale[n].item() == outer
        for j in range(step.shape[1]):
            group = min(max(e4m3fn(step[n, j] / outer), np.float32(2.0**-9)), peak)
            if step[n, j] == step[n].max():
                group = max(e4m3fn(bf16(step[n, j]) / outer), np.float32(2.0**-9))
            assert found.group_scale[n, j].item() == group
            if not symmetric:
                assert found.zero_point[n, j].item() == np.clip(np.round(-8 - low[n, j] / (group * outer)), -8, 7)
    assert (found.zero_point is None) == symmetric


def test_hopper_groups_just_below_the_row_maximum() -> None:
    """The row maximum rounds down to BF16, another group lies between the two: outer must still be a BF16 value / 56."""
    scheme = Scheme(HOPPER, group_size=GROUP)
    w_1K = torch.full((1, 2 * GROUP), 7.5 * (1 + 0.0035))  # steps 1.0035 -> BF16 1.0, and 1.002, which is above 1.0
    w_1K[0, GROUP:] = 7.5 * (1 + 0.002)
    scales = fit_scales(w_1K, scheme)
    assert scales.outer_scale.item() == np.float32(1) / np.float32(56)
    assert scales.group_scale.tolist() == [[56.0, 56.0]]
    assert_canonical(scales, scheme)


@SYMMETRY
def test_hopper_zero_rows_and_zero_groups(symmetric: bool) -> None:
    """A row of zeros gets the clamped outer scale and stands for zeros; a group of zeros the smallest group scale."""
    scheme = Scheme(HOPPER, group_size=GROUP, symmetric=symmetric)
    w_NK = torch.randn(2, 3 * GROUP, generator=torch.Generator().manual_seed(0))
    w_NK[0] = 0
    w_NK[1, GROUP : 2 * GROUP] = 0
    scales = fit_scales(w_NK, scheme)
    assert scales.outer_scale[0].item() == np.float32(scheme.smallest_outer_scale)
    assert scales.group_scale[1, 1].item() == 2.0**-9
    codes_NK = round_to_nearest(w_NK, scales, scheme)
    zero_NK = 0 if symmetric else expand_groups(scales.zero_point, GROUP, 3 * GROUP)
    assert ((codes_NK - 8.0 - zero_NK)[w_NK == 0] == 0).all()


def test_hopper_tiny_row() -> None:
    """Largest step below 1/512: outer clamped at 1/28672, the row maximum left where it falls on the E4M3 grid."""
    scheme = Scheme(HOPPER, group_size=GROUP)
    w_1K = torch.full((1, GROUP), 7.5 / 1024)
    scales = fit_scales(w_1K, scheme)
    assert scales.outer_scale.item() == np.float32(1 / 28672)
    assert scales.group_scale.tolist() == [[28.0]]
    assert_canonical(scales, scheme)


def test_single_level_scales_split_as_vllm_does() -> None:
    """A single-level file on vLLM: the same group and outer scales, where no group is below E4M3's normal range."""
    scheme = Scheme(HOPPER, group_size=GROUP)
    step_NG, zero_NG = fit_single_level(weights(16, 160, 5, "plain"), scheme)
    found = split_single_level(step_NG, zero_NG, scheme)
    group_NG, outer_N = load_split(step_NG.numpy(), reciprocal=False)
    assert group_NG.min() >= 2.0**-6
    assert np.array_equal(found.group_scale.numpy(), group_NG)
    assert np.array_equal(found.outer_scale.numpy(), outer_N)
    assert_canonical(found, scheme)


# ---- tensor-scaled target


@SYMMETRY
@THOROUGH
@given(rows=st.integers(1, 8), columns=st.integers(1, 100), exponent=st.integers(-30, 20), seed=st.integers(0, 999))
def test_published_gaudi_scales(symmetric: bool, rows: int, columns: int, exponent: int, seed: int) -> None:
    """outer: the published power of two; group: BF16 min-max step of the FP8-rounded weights; no level leaves +-240."""
    scheme = Scheme(GAUDI, group_size=GROUP, symmetric=symmetric)
    w_NK = weights(rows, columns, seed) * 2.0**exponent
    found = fit_paper_scales(w_NK, scheme)
    outer = found.outer_scale.numpy()
    largest = float(w_NK.abs().max())
    assert outer.shape == (1,)
    assert np.log2(outer[0]) % 1 == 0
    assert outer[0] == 2.0**-16 or largest / 224 <= outer[0] < 2 * largest / 224
    w8_NK = np.clip(w_NK.numpy() / outer, -224, 224).astype(ml_dtypes.float8_e4m3).astype(np.float32)
    step, low = step_oracle(w8_NK, symmetric)
    expected = np.maximum(bf16(step), np.float32(2.0**-24))
    assert np.array_equal(found.group_scale.numpy(), expected)
    assert np.array_equal(bf16(found.group_scale.numpy()), found.group_scale.numpy())
    zero = 0 if symmetric else np.clip(np.round(-8 - low / expected), -8, 7)
    if not symmetric:
        assert np.array_equal(found.zero_point.numpy(), zero)
    for level in (-8, 7):
        assert np.abs((level - zero) * expected).max() <= 240


@SYMMETRY
@THOROUGH
@given(rows=st.integers(1, 8), columns=st.integers(1, 100), exponent=st.integers(-30, 20), seed=st.integers(0, 999))
def test_gaudi_scales(symmetric: bool, rows: int, columns: int, exponent: int, seed: int) -> None:
    """outer: 2^ceil(log2(max|W| / 224)); group: BF16 min-max steps of the weights themselves; no level leaves +-240."""
    scheme = Scheme(GAUDI, group_size=GROUP, symmetric=symmetric)
    w_NK = weights(rows, columns, seed) * 2.0**exponent
    found = fit_scales(w_NK, scheme)
    outer = found.outer_scale.numpy()
    largest = float(w_NK.abs().max())
    step, low = step_oracle(w_NK.numpy(), symmetric)
    step = np.maximum(bf16(step), np.float32(2.0**-24))
    zero = np.zeros_like(step) if symmetric else np.clip(np.round(-8 - low / step), -8, 7)
    assert outer.shape == (1,)
    assert np.log2(outer[0]) % 1 == 0
    assert outer[0] == 2.0**-16 or largest / 224 <= outer[0] < 2 * largest / 224
    assert np.array_equal(found.group_scale.numpy() * outer, step)
    assert np.array_equal(bf16(found.group_scale.numpy()), found.group_scale.numpy())
    assert (found.zero_point is None) == symmetric
    assert symmetric or np.array_equal(found.zero_point.numpy(), zero)
    for level in (-8, 7):
        assert np.abs((level - zero) * found.group_scale.numpy()).max() <= 240


@SYMMETRY
@THOROUGH
@given(rows=st.integers(1, 8), columns=st.integers(1, 100), seed=st.integers(0, 999))
def test_gaudi_single_level_split_does_not_overflow(symmetric: bool, rows: int, columns: int, seed: int) -> None:
    """A single-level INT4 scale under one power of two: steps are kept exactly and no code leaves +-240."""
    scheme = Scheme(GAUDI, group_size=GROUP, symmetric=symmetric)
    step_NG, zero_NG = fit_single_level(weights(rows, columns, seed), scheme)
    found = split_single_level(step_NG, zero_NG, scheme)
    assert found.outer_scale.shape == (1,)
    assert np.log2(found.outer_scale.item()) % 1 == 0
    assert torch.equal(found.step, step_NG)
    zero = 0 if zero_NG is None else zero_NG
    for level in (-8, 7):
        assert ((level - zero) * found.group_scale).abs().max() <= 240


# ---- the single level and the rounding to codes


@SYMMETRY
@THOROUGH
@given(rows=st.integers(1, 6), columns=st.integers(1, 60), seed=st.integers(0, 999))
def test_single_level_equals_a_loop(symmetric: bool, rows: int, columns: int, seed: int) -> None:
    """BF16 of the min-max step (2^-24 for zeros), and the zero point that puts the lowest value on level -8."""
    scheme = Scheme(HOPPER, group_size=GROUP, symmetric=symmetric)
    w_NK = weights(rows, columns, seed)
    step_NG, zero_NG = fit_single_level(w_NK, scheme)
    step, low = step_oracle(w_NK.numpy(), symmetric)
    step = np.maximum(bf16(step), np.float32(2.0**-24))
    assert np.array_equal(step_NG.numpy(), step)
    if symmetric:
        assert zero_NG is None
    else:
        assert np.array_equal(zero_NG.numpy(), np.clip(np.round(-8 - low / step), -8, 7))
    first_step_N, _ = single_level(w_NK[:, :GROUP], scheme)
    assert torch.equal(first_step_N, step_NG[:, 0])


def test_nearest_code_by_hand() -> None:
    """Round half to even on the level axis, clamp to -8..7, code = level + 8; a zero point shifts levels."""
    scheme = Scheme()
    w = torch.tensor([-100.0, -8.5, -7.6, -0.5, 0.0, 0.5, 1.5, 6.6, 7.5, 100.0]) * 0.25
    assert nearest_code(w, torch.tensor(0.25), None, scheme).tolist() == [0, 0, 0, 8, 8, 8, 10, 15, 15, 15]
    shifted = nearest_code(w, torch.tensor(0.25), torch.tensor(-3.0), Scheme(symmetric=False))
    assert shifted.tolist() == [0, 0, 0, 5, 5, 5, 7, 12, 13, 15]


@SYMMETRY
@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=["hopper", "gaudi"])
@THOROUGH
@given(rows=st.integers(1, 40), stretch=st.floats(0.5, 3), seed=st.integers(0, 999))
def test_nearest_entry_equals_a_search(target: Target, symmetric: bool, rows: int, stretch: float, seed: int) -> None:
    """The nearest of all 16 values, also for weights far outside the range, group scales in FP8's subnormals, shared values."""
    scheme = Scheme(target, group_size=GROUP, symmetric=symmetric)
    w_NK = weights(rows, 3 * GROUP, seed)
    scales = fit_scales(w_NK, scheme)
    grid = Grid.of(scales, Rule.NEAREST_VALUE, scheme)
    for j in range(3):
        column = grid.column(j)
        table = np.stack([column.value(torch.full((rows,), float(code)), scheme).numpy() for code in range(16)])
        zero = np.zeros(rows, np.float32) if symmetric else scales.zero_point[:, j].numpy()
        products = (np.arange(-8, 8, dtype=np.float32)[:, None] - zero) * scales.group_scale[:, j].numpy()
        kind = ml_dtypes.float8_e4m3fn if target is HOPPER else ml_dtypes.float8_e4m3
        fp8 = np.clip(products, -target.fp8.max, target.fp8.max).astype(kind).astype(np.float32)
        assert np.array_equal(table, fp8 * scales.outer_scale.numpy())
        w_N = w_NK[:, j * GROUP] * stretch
        code_N, value_N = nearest_entry(w_N, column, scheme)
        assert np.array_equal(value_N.numpy(), np.take_along_axis(table, code_N.long().numpy()[None], 0)[0])
        assert np.array_equal(np.abs(w_N.numpy() - value_N.numpy()), np.abs(w_N.numpy() - table).min(0))


@SYMMETRY
@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=["hopper", "gaudi"])
def test_round_to_nearest_equals_a_loop(target: Target, symmetric: bool) -> None:
    """Every weight on its own, with its group's step and zero point; the last group is short."""
    scheme = Scheme(target, group_size=GROUP, symmetric=symmetric)
    w_NK = weights(6, 28, 11)
    scales = fit_scales(w_NK, scheme)
    codes_NK = round_to_nearest(w_NK, scales, scheme)
    assert codes_NK.dtype == torch.uint8
    for n in range(6):
        outer = scales.outer_scale[n if target is HOPPER else 0].numpy()
        for k in range(28):
            step = scales.group_scale[n, k // GROUP].numpy() * outer
            zero = 0 if symmetric else scales.zero_point[n, k // GROUP].item()
            assert codes_NK[n, k] == np.clip(np.round(w_NK[n, k].numpy() / step) + zero, -8, 7) + 8
