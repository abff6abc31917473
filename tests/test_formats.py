"""Number formats, bit for bit, against torch, ml_dtypes and a search through the table of values."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.contract import fp8_product
from duotone.formats import E4M3, E4M3FN, INT4_LEVELS, FloatFormat

ML_DTYPES = {E4M3FN: ml_dtypes.float8_e4m3fn, E4M3: ml_dtypes.float8_e4m3}
FORMATS = pytest.mark.parametrize("fp8", [E4M3FN, E4M3], ids=lambda fp8: fp8.name)
ALL_CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


def same_bits(found: torch.Tensor, expected: torch.Tensor | np.ndarray) -> bool:
    """Equal float32 bits, signs of zero included; any NaN equals any NaN."""
    a, b = found.detach().numpy(), np.asarray(expected, dtype=np.float32)
    if found.dtype != torch.float32 or a.shape != b.shape:
        return False
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def ml_round(x: torch.Tensor, fp8: FloatFormat) -> np.ndarray:
    """Saturating cast by ml_dtypes; NaN kept."""
    values = np.clip(x.float().numpy(), -fp8.max, fp8.max)
    with np.errstate(invalid="ignore"):
        return values.astype(ML_DTYPES[fp8]).astype(np.float32)


def searched_round(x: np.ndarray, fp8: FloatFormat) -> np.ndarray:
    """Nearest value of the table that ml_dtypes gives, in float64; a tie goes to the even code; sign of x kept."""
    table = np.arange(128, dtype=np.uint8).view(ML_DTYPES[fp8]).astype(np.float64)
    table = table[np.isfinite(table)]
    magnitude = np.minimum(np.abs(x.astype(np.float64)), table[-1])
    upper = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
    lower = upper - 1
    below, above = magnitude - table[lower], table[upper] - magnitude
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.copysign(table[np.where(take_upper, upper, lower)], x).astype(np.float32)


def boundary_grid(fp8: FloatFormat) -> torch.Tensor:
    """Every value, every midpoint of neighbors, the first midpoint past the largest, and one float32 step either side."""
    table = np.arange(128, dtype=np.uint8).view(ML_DTYPES[fp8]).astype(np.float32)
    table = table[np.isfinite(table)]
    past_the_end = np.float32(2 * table[-1] - table[-2])
    points = np.concatenate([table, (table[1:] + table[:-1]) / 2, [(table[-1] + past_the_end) / 2, past_the_end, 3e38, np.inf]])
    points = points.astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(-1)), np.nextafter(points, np.float32(np.inf))])
    return torch.from_numpy(np.concatenate([points, -points]).astype(np.float32))


def test_decode_e4m3fn_all_codes_equal_torch_and_ml_dtypes() -> None:
    """All 256 codes of E4M3FN, NaN and signed zero included."""
    found = E4M3FN.decode(ALL_CODES)
    assert same_bits(found, ALL_CODES.view(torch.float8_e4m3fn).float())
    assert same_bits(found, ALL_CODES.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def test_decode_e4m3_all_codes_equal_ml_dtypes() -> None:
    """All 256 codes of the IEEE-style E4M3, infinities and NaN included."""
    assert same_bits(E4M3.decode(ALL_CODES), ALL_CODES.numpy().view(ml_dtypes.float8_e4m3).astype(np.float32))


@FORMATS
def test_derived_constants_equal_ml_dtypes(fp8: FloatFormat) -> None:
    """max, bias and smallest subnormal follow from the bit counts."""
    info = ml_dtypes.finfo(ML_DTYPES[fp8])
    assert fp8.max == float(info.max)
    assert fp8.smallest_subnormal == float(info.smallest_subnormal)
    assert 2.0 ** (1 - fp8.bias) == float(info.smallest_normal)


def test_maxima_are_448_and_240() -> None:
    """The two largest values that the whole contract is built on."""
    assert (E4M3FN.max, E4M3.max, E4M3FN.bias, E4M3.bias) == (448.0, 240.0, 7, 7)


@FORMATS
def test_round_every_bfloat16(fp8: FloatFormat) -> None:
    """All 65536 BF16 bit patterns (subnormals, infinities, NaN): equal to ml_dtypes and to the table search."""
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    found = fp8.round(x)
    assert same_bits(found, ml_round(x, fp8))
    numbers = ~torch.isnan(x)
    assert same_bits(found[numbers], searched_round(x[numbers].numpy(), fp8))
    assert torch.isnan(found[~numbers]).all()


@FORMATS
def test_round_ties_saturation_and_neighbors(fp8: FloatFormat) -> None:
    """Midpoints go to the even code, one float32 step either side to the nearer value, everything large to +-max."""
    x = boundary_grid(fp8)
    found = fp8.round(x)
    assert same_bits(found, searched_round(x.numpy(), fp8))
    assert same_bits(found, ml_round(x, fp8))
    assert found.abs().max() == fp8.max


def test_round_e4m3fn_equals_torch_cast_inside_the_range() -> None:
    """Where torch's own cast does not overflow, rounding is that cast."""
    x = boundary_grid(E4M3FN)
    x = x[x.abs() <= E4M3FN.max]
    assert same_bits(E4M3FN.round(x), x.to(torch.float8_e4m3fn).float())


@FORMATS
@settings(max_examples=50, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=64))
def test_round_any_float(fp8: FloatFormat, values: list[float]) -> None:
    """Any float32, NaN and infinities included."""
    x = torch.tensor(values, dtype=torch.float32)
    assert same_bits(fp8.round(x), ml_round(x, fp8))


@FORMATS
@settings(max_examples=50, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=64))
def test_encode_then_decode_is_round(fp8: FloatFormat, values: list[float]) -> None:
    """The code of a number decodes to its rounded value."""
    x = torch.tensor(values, dtype=torch.float32)
    assert same_bits(fp8.decode(fp8.encode(x)), fp8.round(x))


@FORMATS
def test_encode_inverts_decode(fp8: FloatFormat) -> None:
    """Every finite code comes back; infinities saturate to the largest finite code."""
    value = fp8.decode(ALL_CODES)
    finite = torch.isfinite(value)
    assert torch.equal(fp8.encode(value[finite]), ALL_CODES[finite])
    assert finite.sum() == {448.0: 254, 240.0: 240}[fp8.max]
    largest = fp8.encode(torch.tensor([torch.inf, -torch.inf]))
    assert fp8.decode(largest).tolist() == [fp8.max, -fp8.max]


@FORMATS
def test_encode_refuses_nan(fp8: FloatFormat) -> None:
    """NaN has no saturated code: an error that names the format."""
    with pytest.raises(ValueError, match=fp8.name):
        fp8.encode(torch.tensor([1.0, torch.nan]))


@FORMATS
def test_products_of_all_levels_and_scale_codes(fp8: FloatFormat) -> None:
    """All 16 x 256 (level, group scale code) products, saturation, subnormals and special codes included."""
    scale = np.arange(256, dtype=np.uint8).view(ML_DTYPES[fp8]).astype(np.float32)
    level = np.arange(-8, 8, dtype=np.float32)[:, None]
    with np.errstate(invalid="ignore"):
        product = level * scale
    found = fp8_product(torch.tensor(INT4_LEVELS)[:, None], None, torch.from_numpy(scale), fp8)
    assert same_bits(found, ml_round(torch.from_numpy(product), fp8))
    finite = product[np.isfinite(product)]
    assert (np.abs(finite) > fp8.max).any(), "the table has no saturating product, so this test would not see saturation"


@FORMATS
def test_products_of_all_levels_zero_points_and_scale_codes(fp8: FloatFormat) -> None:
    """All 16 x 16 x 256 (level, zero point, scale code) products of the asymmetric scheme."""
    scale = np.arange(256, dtype=np.uint8).view(ML_DTYPES[fp8]).astype(np.float32)
    level = np.arange(-8, 8, dtype=np.float32)[:, None, None]
    zero = np.arange(-8, 8, dtype=np.float32)[:, None]
    with np.errstate(invalid="ignore"):
        product = (level - zero) * scale
    found = fp8_product(torch.from_numpy(level), torch.from_numpy(zero), torch.from_numpy(scale), fp8)
    assert same_bits(found, ml_round(torch.from_numpy(product), fp8))


def test_levels_are_twos_complement_int4_in_offset_binary() -> None:
    """code = level + 8."""
    assert tuple(float(code - 8) for code in range(16)) == INT4_LEVELS
