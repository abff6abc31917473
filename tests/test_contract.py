# Shapes: M tokens, K in_features, N out_features, G groups along K.
"""The arithmetic that runs: activations, the split of scales, powers of two; bit for bit against independent oracles."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.contract import (
    join_scale,
    power_of_two_at_least,
    quantize_activations,
    split_scale,
    static_activation_scale,
    tensor_outer_scale,
)
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.scheme import GAUDI, HOPPER, Scheme
from tests.oracles import vllm_split

SCHEMES = {"symmetric": Scheme(group_size=8), "asymmetric": Scheme(group_size=8, symmetric=False)}
BOTH = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
THOROUGH = settings(max_examples=100, deadline=None, derandomize=True)


def e4m3_scales(scheme: Scheme) -> torch.Tensor:
    """All positive E4M3FN values up to the peak, subnormals included."""
    value = torch.arange(1, 0x7F, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    return value[value <= scheme.peak_group_scale]


def bf16_between(low: float, high: float) -> np.ndarray:
    """All positive BF16 values in [low, high]."""
    value = np.arange(1, 0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    return value[(value >= low) & (value <= high)]


def canonical_pairs(row_max_N: np.ndarray, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose largest real scale is the given BF16 value >= 1/512; every row holds all E4M3 group scales up to the peak."""
    outer_N = torch.from_numpy(row_max_N / np.float32(scheme.peak_group_scale))
    return e4m3_scales(scheme).expand(len(row_max_N), -1).contiguous(), outer_N


@st.composite
def canonical_pair(draw: st.DrawFn, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """A canonical (group [N, G], outer [N]) of any small shape; tiny rows (below 1/512) among the others."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    grid, maxima = e4m3_scales(scheme), bf16_between(1 / 512, 2.0**20)
    group_NG = grid[torch.tensor(draw(st.lists(st.integers(0, len(grid) - 1), min_size=rows * groups, max_size=rows * groups)))]
    group_NG = group_NG.view(rows, groups).clone()
    outer = []
    for row in range(rows):
        if draw(st.booleans()):
            outer.append(np.float32(scheme.smallest_outer_scale))
        else:
            group_NG[row, draw(st.integers(0, groups - 1))] = scheme.peak_group_scale
            outer.append(maxima[draw(st.integers(0, len(maxima) - 1))] / np.float32(scheme.peak_group_scale))
    return group_NG, torch.from_numpy(np.array(outer, dtype=np.float32))


def assert_round_trip(group_NG: torch.Tensor, outer_N: torch.Tensor, scheme: Scheme) -> None:
    stored = join_scale(group_NG, outer_N)
    assert stored.dtype == torch.bfloat16
    found_group, found_outer = split_scale(stored, scheme)
    assert torch.equal(found_group, group_NG)
    assert torch.equal(found_outer, outer_N)


# ---- activations


def activations_oracle(x_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dynamic per token, row by row."""
    rows, scales = [], []
    for row in x_MK.astype(np.float32):
        scale = max(np.float32(np.abs(row).max() / np.float32(448)), np.float32(1 / 229376))
        rows.append(np.clip(row / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
        scales.append([scale])
    return np.array(rows), np.array(scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@THOROUGH
@given(m=st.integers(1, 9), k=st.integers(1, 70), exponent=st.integers(-40, 35), seed=st.integers(0, 2**16))
def test_dynamic_activations(dtype: torch.dtype, m: int, k: int, exponent: int, seed: int) -> None:
    """Per token: values and scales equal the row-by-row oracle and torch's FP8 cast; rows differ by large factors."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-8, 9, (m, 1), generator=generator).float())
    x_MK = (torch.randn(m, k, generator=generator) * spread * 2.0**exponent).to(dtype)
    values, scale = quantize_activations(x_MK, HOPPER)
    expected_values, expected_scale = activations_oracle(x_MK.float().numpy())
    assert scale.shape == (m, 1)
    assert np.array_equal(scale.numpy(), expected_scale)
    assert np.array_equal(values.numpy(), expected_values)
    cast = (x_MK.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(values, cast)
    assert (values.abs().amax(-1)[scale[:, 0] > 1 / 229376] == 448).all()


def test_dynamic_scale_of_zero_tiny_and_huge_rows() -> None:
    """Zero and tiny rows take the clamp (no division by zero); a row near the end of float32 stays finite."""
    x = torch.tensor([[0.0, 0.0], [1e-7, -1e-30], [448 / 229376, 0.0], [3e38, -1.0]])
    values, scale = quantize_activations(x, HOPPER)
    smallest = np.float32(1 / 229376)
    assert scale[:3, 0].tolist() == [smallest] * 3
    assert scale[3, 0].item() == np.float32(3e38) / np.float32(448)
    assert values[0].tolist() == [0, 0]
    assert values[1, 0].item() == ml_dtypes.float8_e4m3fn(np.float32(1e-7) / smallest)
    assert values[2, 0].item() == values[3, 0].item() == 448.0


def test_activations_of_any_leading_shape() -> None:
    """Leading dimensions only multiply tokens."""
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    values, scale = quantize_activations(x, HOPPER)
    flat_values, flat_scale = quantize_activations(x.reshape(6, 16), HOPPER)
    assert values.shape == (2, 3, 16)
    assert scale.shape == (2, 3, 1)
    assert torch.equal(values.reshape(6, 16), flat_values)
    assert torch.equal(scale.reshape(6, 1), flat_scale)


@THOROUGH
@given(exponent=st.integers(-20, 10), seed=st.integers(0, 2**16))
def test_static_activations(exponent: int, seed: int) -> None:
    """One given scale: divide, saturate at 240, round to E4M3; the scale comes back as given."""
    x_MK = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)) * 300 * 2.0**exponent
    given_scale = torch.tensor(2.0**exponent)
    values, scale = quantize_activations(x_MK, GAUDI, given_scale)
    assert scale is given_scale
    clipped = np.clip(x_MK.numpy() / np.float32(2.0**exponent), -240, 240)
    assert np.array_equal(values.numpy(), clipped.astype(ml_dtypes.float8_e4m3).astype(np.float32))
    assert values.abs().max() == 240, "no value saturated, so this test would not see the clamp"


def test_activation_scale_is_given_exactly_when_static() -> None:
    """A scale too many or too few names the target."""
    with pytest.raises(ValueError, match=r"gaudi.*input_scale"):
        quantize_activations(torch.ones(1, 8), GAUDI)
    with pytest.raises(ValueError, match=r"hopper.*input_scale"):
        quantize_activations(torch.ones(1, 8), HOPPER, torch.tensor(1.0))


# ---- the two levels of the weight scale


@BOTH
def test_split_inverts_join_for_every_row_maximum_and_group_scale(scheme: Scheme) -> None:
    """All BF16 row maxima in [1/512, 2] x all E4M3 group scales, plus large ones: bit for bit."""
    for maxima in (bf16_between(1 / 512, 2.0), bf16_between(2.0**20, 2.0**21), bf16_between(2.0**126, 3.39e38)):
        group_NG, outer_N = canonical_pairs(maxima, scheme)
        assert_round_trip(group_NG, outer_N, scheme)


@BOTH
def test_split_inverts_join_for_tiny_rows(scheme: Scheme) -> None:
    """Below 1/512 the outer scale is clamped and the row maximum is free: any E4M3 value comes back."""
    group_N1 = e4m3_scales(scheme)[:, None]
    outer_N = torch.full((len(group_N1),), scheme.smallest_outer_scale, dtype=torch.float32)
    assert_round_trip(group_N1, outer_N, scheme)


@BOTH
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_split_inverts_join_for_any_canonical_pair(scheme: Scheme, data: st.DataObject) -> None:
    """Tiny and ordinary rows side by side, any shape."""
    assert_round_trip(*data.draw(canonical_pair(scheme)), scheme)


@BOTH
@THOROUGH
@given(rows=st.lists(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=4, max_size=4), min_size=1, max_size=5))
def test_split_of_any_bf16_scale_is_stable(scheme: Scheme, rows: list[list[float]]) -> None:
    """Whatever BF16 scales a file holds, splitting gives a canonical pair: joined and split again it does not move."""
    group_NG, outer_N = split_scale(torch.tensor(rows).to(torch.bfloat16), scheme)
    assert (outer_N >= torch.tensor(scheme.smallest_outer_scale)).all()
    assert (group_NG >= 2.0**-9).all()
    assert (group_NG <= scheme.peak_group_scale).all()
    assert torch.equal(group_NG, group_NG.to(torch.float8_e4m3fn).float())
    ordinary = outer_N > torch.tensor(scheme.smallest_outer_scale)
    assert (group_NG[ordinary].amax(-1) == scheme.peak_group_scale).all()
    assert_round_trip(group_NG, outer_N, scheme)


@pytest.mark.parametrize("reciprocal", [False, True], ids=["divide", "reciprocal"])
def test_split_equals_vllm_for_every_scale_we_write(reciprocal: bool) -> None:
    """vLLM's loader finds our group scales bit for bit; its outer scale too when it divides, else within one ulp."""
    scheme = SCHEMES["symmetric"]
    group_NG, outer_N = canonical_pairs(bf16_between(1 / 512, 4.0), scheme)
    tiny_N1 = e4m3_scales(scheme)[:, None].expand(-1, group_NG.shape[1])
    clamped_N = torch.full((len(tiny_N1),), scheme.smallest_outer_scale, dtype=torch.float32)
    group_NG, outer_N = torch.cat([group_NG, tiny_N1]), torch.cat([outer_N, clamped_N])
    stored = join_scale(group_NG, outer_N).float().numpy()
    vllm_group, vllm_channel = vllm_split.load_split(stored, reciprocal)
    assert np.array_equal(vllm_group, group_NG.numpy())
    apart = np.abs(vllm_channel.view(np.int32).astype(np.int64) - outer_N.numpy().view(np.int32))
    assert apart.max() <= (1 if reciprocal else 0)


@pytest.mark.parametrize("reciprocal", [False, True], ids=["divide", "reciprocal"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(pair=canonical_pair(SCHEMES["symmetric"]), short=st.integers(0, 7), seed=st.integers(0, 2**16))
def test_fp8_weights_equal_vllm(reciprocal: bool, pair: tuple[torch.Tensor, torch.Tensor], short: int, seed: int) -> None:
    """The FP8 operand that vLLM multiplies is ours, bit for bit, short last group included."""
    scheme, (group_NG, outer_N) = SCHEMES["symmetric"], pair
    columns = group_NG.shape[1] * scheme.group_size - short
    codes = torch.randint(0, 16, (len(group_NG), columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    ours = fp8_values(QuantizedWeight(codes, group_NG, outer_N, scheme))
    vllm_group, _ = vllm_split.load_split(join_scale(group_NG, outer_N).float().numpy(), reciprocal)
    theirs = vllm_split.fp8_weights(codes.numpy().astype(np.float32) - 8, vllm_group, scheme.group_size)
    assert np.array_equal(ours.numpy(), theirs)


# ---- powers of two


def exact_power_at_least(x: float | Fraction) -> float:
    """Smallest power of two >= x in rational arithmetic."""
    value, power = Fraction(x), Fraction(1)
    while power < value:
        power *= 2
    while power / 2 >= value:
        power /= 2
    return float(power)


def test_power_of_two_at_least_of_exact_powers_and_their_neighbors() -> None:
    """Powers of two stay; one float32 step above goes to the next, one below comes back up; zero stays zero."""
    power = torch.tensor([2.0**e for e in range(-126, 127)])
    assert torch.equal(power_of_two_at_least(power), power)
    assert torch.equal(power_of_two_at_least(torch.nextafter(power, torch.tensor(torch.inf))), 2 * power)
    assert torch.equal(power_of_two_at_least(torch.nextafter(power[1:], torch.tensor(0.0))), power[1:])
    assert power_of_two_at_least(torch.zeros(3)).tolist() == [0, 0, 0]


@THOROUGH
@given(x=st.floats(2.0**-126, 2.0**127, width=32))
def test_power_of_two_at_least_of_any_float(x: float) -> None:
    """Equal to rational arithmetic."""
    assert power_of_two_at_least(torch.tensor(x)).item() == exact_power_at_least(x)


@THOROUGH
@given(absmax=st.one_of(st.floats(0, 2.0**100, width=32), st.integers(-40, 90).map(lambda e: 224 * 2.0**e)))
def test_tensor_outer_scale(absmax: float) -> None:
    """2^ceil(log2(max(absmax / 224, 1 / (224 * 512)))) exactly, as a vector of one."""
    found = tensor_outer_scale(torch.tensor(absmax), GAUDI)
    assert found.shape == (1,)
    assert found.dtype == torch.float32
    assert found.item() == exact_power_at_least(max(Fraction(absmax) / 224, Fraction(1, 224 * 512)))


def test_tensor_outer_scale_at_the_edge() -> None:
    """224 fits under scale 1; the next float32 does not."""
    assert tensor_outer_scale(torch.tensor(224.0), GAUDI).item() == 1.0
    assert tensor_outer_scale(torch.nextafter(torch.tensor(224.0), torch.tensor(300.0)), GAUDI).item() == 2.0


@THOROUGH
@given(absmax=st.one_of(st.floats(0, 2.0**100, width=32), st.integers(-40, 90).map(lambda e: 240 * 2.0**e)))
def test_static_activation_scale(absmax: float) -> None:
    """The smallest power of two that brings absmax to 240 or less, not below 2^-30."""
    found = static_activation_scale(torch.tensor(absmax), GAUDI).item()
    expected = 2.0**-30 if absmax == 0 else max(exact_power_at_least(Fraction(absmax) / 240), 2.0**-30)
    assert found == expected


def test_static_activation_scale_keeps_the_shape() -> None:
    """One scale for each entry, so a stack of layers can be done at once."""
    assert static_activation_scale(torch.tensor([[240.0], [241.0]]), GAUDI).tolist() == [[1.0], [2.0]]
