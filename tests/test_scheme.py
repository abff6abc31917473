"""Targets and schemes: the constants that follow from the formats, group counts, rules, refusals."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.errors import DuotoneError
from duotone.formats import INT4_LEVELS
from duotone.scheme import GAUDI, HOPPER, TARGETS, Scheme, check_rules, matches


def test_targets_by_name() -> None:
    """Two targets, found under their own names."""
    assert TARGETS == {"hopper": HOPPER, "gaudi": GAUDI}


@pytest.mark.parametrize(("symmetric", "peak", "reach"), [(True, 56.0, 8), (False, 28.0, 15)])
def test_peak_group_scale(symmetric: bool, peak: float, reach: int) -> None:
    """The largest E4M3FN value that cannot overflow; the next one on the grid does."""
    scheme = Scheme(symmetric=symmetric)
    grid = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert scheme.peak_group_scale == peak == grid[grid * reach <= 448].max()


def test_peak_follows_the_levels() -> None:
    """FP4 levels reach 6: 448 / 6 = 74.67, and 72 is the largest E4M3FN value below."""
    fp4 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert Scheme(levels=fp4).peak_group_scale == 72.0


def test_smallest_outer_scale() -> None:
    """1 / 28672: what vLLM's clamp 1 / (448 * 512) becomes after its factor of 8."""
    assert Scheme().smallest_outer_scale == 1 / 28672 == 8 / (448 * 512)
    assert Scheme(symmetric=False).smallest_outer_scale == 1 / (512 * 28)


def test_smallest_activation_scale() -> None:
    """Lower clamp of the dynamic per-token scale."""
    assert HOPPER.smallest_activation_scale == 1 / 229376


def test_protective_range() -> None:
    """240 - 240/15."""
    assert GAUDI.protective_range == 224.0


def test_protective_range_keeps_every_code_inside_the_format() -> None:
    """For any group maximum up to 224, |code * bf16(2 * amax / 15)| <= 240, so the hardware's product cannot overflow."""
    steps = np.arange(1, 0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    amax = steps[steps <= GAUDI.protective_range]
    assert amax.max() == 224.0
    scale = (2 * amax / np.float32(15)).astype(ml_dtypes.bfloat16).astype(np.float64)
    worst = np.abs(np.array(INT4_LEVELS)[:, None] * scale).max()
    assert 238 < worst <= GAUDI.fp8.max


@settings(max_examples=100, deadline=None, derandomize=True)
@given(groups=st.integers(1, 400), group_size=st.integers(1, 64).map(lambda n: 8 * n), missing=st.integers(0, 511))
def test_group_count(groups: int, group_size: int, missing: int) -> None:
    """A short last group counts as one."""
    columns = groups * group_size - missing % group_size
    assert Scheme(group_size=group_size).groups(columns) == groups


@pytest.mark.parametrize("group_size", [0, -8, 7, 4, 12, 129])
def test_bad_group_size(group_size: int) -> None:
    """Not a positive multiple of 8: the message has the name and the value found."""
    with pytest.raises(DuotoneError, match=rf"group_size: found {group_size},"):
        Scheme(group_size=group_size)


@pytest.mark.parametrize("count", [0, 15, 17])
def test_bad_levels(count: int) -> None:
    """A 4-bit type has 16 levels."""
    with pytest.raises(DuotoneError, match=f"levels: found {count} values, expected 16"):
        Scheme(levels=tuple(map(float, range(count))))


@pytest.mark.parametrize(
    ("name", "rule", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", False),
        ("lm_head.weight", "lm_head", False),
        ("layers.0.mlp", "layers.*", False),
        ("layersX0", "layers.0", False),
        ("model.layers.0.mlp.gate", "re:.*mlp", True),
        ("model.layers.0.mlp.gate", "re:mlp", False),
        ("model.layers.0.mlp.gate", "re:model", True),
        ("model.layers.0.mlp.gate", "re:.*gate$", True),
        ("model.layers.0.mlp.gate_proj", "re:.*gate$", False),
    ],
)
def test_rules(name: str, rule: str, expected: bool) -> None:
    """A plain rule is the exact name; `re:` is matched from the left, and need not reach the end."""
    assert matches(name, rule) is expected


def test_check_rules() -> None:
    """A regular expression that does not compile is an error that shows the rule; plain names are never compiled."""
    check_rules(("lm_head", "re:.*mlp", "odd(name"))
    with pytest.raises(DuotoneError, match=r"re:\*mlp"):
        check_rules(("lm_head", "re:*mlp"))
