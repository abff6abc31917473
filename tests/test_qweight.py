# Shapes: N out_features, K in_features, G groups along K.
"""The quantized value: its invariants, and its dequantization against a loop."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from duotone.contract import join_scale, split_scale
from duotone.qweight import QuantizedWeight, dequantize, expand_groups, fp8_values
from duotone.scheme import GAUDI, HOPPER, Scheme, Target

ROWS, COLUMNS, GROUP = 3, 20, 8  # the last group is short
CASES = pytest.mark.parametrize(
    ("target", "symmetric"),
    [(HOPPER, True), (HOPPER, False), (GAUDI, True), (GAUDI, False)],
    ids=["hopper-symmetric", "hopper-asymmetric", "gaudi-symmetric", "gaudi-asymmetric"],
)
FP8_OF = {"hopper": ml_dtypes.float8_e4m3fn, "gaudi": ml_dtypes.float8_e4m3}


def fields(target: Target = HOPPER, symmetric: bool = True, rows: int = ROWS, columns: int = COLUMNS) -> dict[str, Any]:
    """Valid random fields; one row is tiny (clamped outer scale) on a channel-scaled target."""
    generator = torch.Generator().manual_seed(7)
    scheme = Scheme(target, group_size=GROUP, symmetric=symmetric)
    groups = scheme.groups(columns)
    step_NG = torch.rand(rows, groups, generator=generator) * 0.1 + 0.01
    if target.channel_outer_scale:
        step_NG[-1] *= 1e-3
        group_NG, outer = split_scale(step_NG.to(torch.bfloat16), scheme)
    else:
        group_NG, outer = (step_NG * 250).to(torch.bfloat16).float(), torch.tensor([2.0**-9])
    zero_NG = torch.randint(-8, 8, (rows, groups), generator=generator).float()
    return {
        "codes": torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8),
        "group_scale": group_NG,
        "outer_scale": outer,
        "scheme": scheme,
        "zero_point": None if symmetric else zero_NG,
        "input_scale": None if target.dynamic_activations else torch.tensor(0.25),
    }


def replaced(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A copy whose first entry is `value`."""
    changed = tensor.clone()
    changed.view(-1)[0] = value
    return changed


@CASES
def test_dequantize_equals_a_loop(target: Target, symmetric: bool) -> None:
    """FP8((level - zero) * group_scale) * outer_scale, entry by entry, short last group included."""
    weight = QuantizedWeight(**fields(target, symmetric))
    expected_fp8 = np.zeros((ROWS, COLUMNS), dtype=np.float32)
    expected = np.zeros((ROWS, COLUMNS), dtype=np.float32)
    for n in range(ROWS):
        outer = weight.outer_scale[n if target.channel_outer_scale else 0].numpy()
        for k in range(COLUMNS):
            level = int(weight.codes[n, k]) - 8
            zero = 0 if weight.zero_point is None else int(weight.zero_point[n, k // GROUP])
            product = np.float32(level - zero) * weight.group_scale[n, k // GROUP].numpy()
            product = np.clip(product, -target.fp8.max, target.fp8.max)
            expected_fp8[n, k] = product.astype(FP8_OF[target.name]).astype(np.float32)
            expected[n, k] = expected_fp8[n, k] * outer
    assert np.array_equal(fp8_values(weight).numpy(), expected_fp8)
    assert np.array_equal(dequantize(weight).numpy(), expected)
    assert weight.shape == (ROWS, COLUMNS)


def test_dequantize_follows_the_levels() -> None:
    """The 16 levels are data: other levels, other values."""
    levels = tuple(level / 2 for level in range(-8, 8))
    given = fields()
    scheme = Scheme(group_size=GROUP, levels=levels)
    group_NG = given["group_scale"] * (scheme.peak_group_scale / 56)
    outer_N = given["outer_scale"] * (56 / scheme.peak_group_scale)
    halved = QuantizedWeight(given["codes"], group_NG, outer_N, scheme)
    assert scheme.peak_group_scale == 112
    assert torch.equal(fp8_values(halved), fp8_values(QuantizedWeight(**given)))


def test_gaudi_weights_are_exact_in_bfloat16() -> None:
    """outer * W8 has four significant bits: a fake-quantized BF16 model holds it exactly (DPQ.md section 8)."""
    given = fields(GAUDI)
    steps = torch.arange(0x3C00, 0x41F0, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()  # 2^-7 .. 29.875
    rows = steps.repeat_interleave(16)[:, None]
    codes = torch.arange(16).repeat(len(steps))[:, None].to(torch.uint8)
    weight = QuantizedWeight(codes, rows, given["outer_scale"], given["scheme"])
    real = dequantize(weight)
    assert torch.equal(real.to(torch.bfloat16).float(), real)
    assert (real != 0).sum() == 15 * len(steps), "products vanished, so this test would not see their rounding"


def test_frozen() -> None:
    """No field can be set after birth."""
    weight = QuantizedWeight(**fields())
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.codes = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)


def test_expand_groups() -> None:
    """One value a column, the last group short."""
    assert expand_groups(torch.tensor([[1, 2], [3, 4]]), 3, 5).tolist() == [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]


SHAPE_AND_TYPE_ERRORS = {
    "codes-type": ("codes", lambda f: f["codes"].int()),
    "codes-vector": ("codes", lambda f: f["codes"][0]),
    "codes-stack": ("codes", lambda f: f["codes"][None]),
    "codes-above-15": ("codes", lambda f: replaced(f["codes"], 16)),
    "group-type": ("group_scale", lambda f: f["group_scale"].double()),
    "group-count": ("group_scale", lambda f: f["group_scale"][:, :-1]),
    "group-rows": ("group_scale", lambda f: f["group_scale"][:-1]),
    "outer-type": ("outer_scale", lambda f: f["outer_scale"].double()),
    "outer-column": ("outer_scale", lambda f: f["outer_scale"][:, None]),
    "outer-count": ("outer_scale", lambda f: f["outer_scale"].repeat(2)),
}


@CASES
@pytest.mark.parametrize(("name", "change"), SHAPE_AND_TYPE_ERRORS.values(), ids=SHAPE_AND_TYPE_ERRORS.keys())
def test_shape_and_type_invariants(target: Target, symmetric: bool, name: str, change: Any) -> None:
    """A wrong shape or type raises, and the message starts with the field's name."""
    given = fields(target, symmetric)
    QuantizedWeight(**given)
    with pytest.raises(ValueError, match=f"^{name}: "):
        QuantizedWeight(**{**given, name: change(given)})


@CASES
@pytest.mark.parametrize("name", ["group_scale", "outer_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan])
def test_scales_are_finite_and_positive(target: Target, symmetric: bool, name: str, value: float) -> None:
    """Zero, negative, infinite and NaN scales are refused by name."""
    given = fields(target, symmetric)
    with pytest.raises(ValueError, match=f"^{name}: expected finite positive values"):
        QuantizedWeight(**{**given, name: replaced(given[name], value)})


@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=["hopper", "gaudi"])
def test_zero_point_exactly_when_asymmetric(target: Target) -> None:
    """One too many or too few is refused by name."""
    symmetric, asymmetric = fields(target, True), fields(target, False)
    with pytest.raises(ValueError, match=r"^zero_point: "):
        QuantizedWeight(**{**symmetric, "zero_point": asymmetric["zero_point"]})
    with pytest.raises(ValueError, match=r"^zero_point: "):
        QuantizedWeight(**{**asymmetric, "zero_point": None})


@pytest.mark.parametrize("value", [-9.0, 8.0, 0.5, torch.nan, torch.inf])
def test_zero_points_are_levels(value: float) -> None:
    """Integers from -8 to 7, of the shape and type of the group scales."""
    given = fields(HOPPER, False)
    with pytest.raises(ValueError, match=r"^zero_point: expected integers in \[-8, 7\]"):
        QuantizedWeight(**{**given, "zero_point": replaced(given["zero_point"], value)})


def test_zero_point_shape_and_type() -> None:
    """Found and expected are in the message."""
    given = fields(HOPPER, False)
    for wrong in (given["zero_point"][:, :-1], given["zero_point"].to(torch.int8)):
        with pytest.raises(ValueError, match=r"^zero_point: found .*, expected torch.float32 \(3, 3\)"):
            QuantizedWeight(**{**given, "zero_point": wrong})


def test_input_scale_only_when_static() -> None:
    """A dynamic target has none; a static one may wait for its calibration."""
    with pytest.raises(ValueError, match=r"^input_scale: "):
        QuantizedWeight(**{**fields(HOPPER), "input_scale": torch.tensor(1.0)})
    assert QuantizedWeight(**{**fields(GAUDI), "input_scale": None}).input_scale is None


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(2), torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(torch.nan)],
    ids=["two", "float64", "zero", "negative", "nan"],
)
def test_input_scale_is_one_positive_float32(wrong: torch.Tensor) -> None:
    """The activations are divided by it."""
    with pytest.raises(ValueError, match=r"^input_scale: "):
        QuantizedWeight(**{**fields(GAUDI), "input_scale": wrong})


# ---- the canonical form (ARCHITECTURE section 1: no other split is legal)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("factor", [0.5, 2.0, 0.96875, 1.001], ids=["half", "double", "next-below", "off-grid"])
def test_row_maximum_is_the_peak(symmetric: bool, factor: float) -> None:
    """An ordinary row whose largest group scale is not exactly 56 (28) is refused."""
    given = fields(HOPPER, symmetric)
    group_NG = given["group_scale"].clone()
    group_NG[0, group_NG[0].argmax()] *= factor
    with pytest.raises(ValueError, match=r"^group_scale: expected"):
        QuantizedWeight(**{**given, "group_scale": group_NG})


def test_no_row_exceeds_the_peak() -> None:
    """Even under the clamped outer scale: 60 is on the E4M3 grid but level -8 would saturate."""
    given = fields(HOPPER)
    group_NG = given["group_scale"].clone()
    group_NG[-1, 0] = 60
    with pytest.raises(ValueError, match=r"^group_scale: expected"):
        QuantizedWeight(**{**given, "group_scale": group_NG})


def test_group_scales_lie_on_the_fp8_grid() -> None:
    """A value between two E4M3FN neighbors is refused, in a clamped row too."""
    given = fields(HOPPER)
    group_NG = given["group_scale"].clone()
    group_NG[-1, 0] = 1.03
    with pytest.raises(ValueError, match=r"^group_scale: expected E4M3FN values"):
        QuantizedWeight(**{**given, "group_scale": group_NG})


@pytest.mark.parametrize("factor", [0.5, 0.999999], ids=["half", "just-below"])
def test_outer_scale_is_not_below_the_clamp(factor: float) -> None:
    """Row maximum 56 under an outer scale below 1/28672: the loader would rebuild other group scales."""
    given = fields(HOPPER)
    group_NG = torch.full_like(given["group_scale"], 56)
    outer_N = torch.full_like(given["outer_scale"], factor / 28672)
    with pytest.raises(ValueError, match=r"^(outer|group)_scale: "):
        QuantizedWeight(**{**given, "group_scale": group_NG, "outer_scale": outer_N})


def test_outer_scale_comes_from_a_bfloat16_row_maximum() -> None:
    """56 * outer must be what the BF16 scale of the file can hold, or the file cannot give the outer scale back."""
    given = fields(HOPPER)
    outer_N = replaced(given["outer_scale"], float(given["outer_scale"][0]) * (1 + 2.0**-10))
    _, recovered_N = split_scale(join_scale(given["group_scale"], outer_N), given["scheme"])
    assert not torch.equal(recovered_N, outer_N)
    with pytest.raises(ValueError, match=r"^(outer|group)_scale: "):
        QuantizedWeight(**{**given, "outer_scale": outer_N})


def test_gaudi_group_scale_is_bfloat16() -> None:
    """The file stores it in BF16: anything finer would change when written."""
    given = fields(GAUDI)
    with pytest.raises(ValueError, match=r"^group_scale: "):
        QuantizedWeight(**{**given, "group_scale": replaced(given["group_scale"], 1 + 2.0**-12)})


def test_gaudi_outer_scale_is_a_power_of_two() -> None:
    """An exponent shift on the accelerator, exact in BF16."""
    given = fields(GAUDI)
    with pytest.raises(ValueError, match=r"^outer_scale: "):
        QuantizedWeight(**{**given, "outer_scale": torch.tensor([0.3])})
