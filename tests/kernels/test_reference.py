"""The reference kernel against the contract in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.contract import quantize_activations
from duotone.kernels import dispatch, reference
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.solver.scales import fit_scales, round_to_nearest


def make_weight(rows: int, columns: int, scheme: Scheme, input_scale: float = 0.5) -> QuantizedWeight:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * 0.05
    scales = fit_scales(w, scheme)
    static = None if scheme.target.dynamic_activations else torch.tensor(input_scale)
    codes = round_to_nearest(w, scales, scheme)
    return QuantizedWeight(codes, scales.group_scale, scales.outer_scale, scheme, scales.zero_point, static)


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 200),
    tokens=st.integers(1, 9),
    target=st.sampled_from([HOPPER, GAUDI]),
    symmetric=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_equals_float64(rows: int, columns: int, tokens: int, target: Target, symmetric: bool) -> None:
    """Any shape: within the error of a float32 sum and its last three roundings of the float64 product of the same operands."""
    weight = make_weight(rows, columns, Scheme(target, 32, symmetric))
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    x8, scale = quantize_activations(x, target, weight.input_scale)
    operands = fp8_values(weight).double()
    exact = x8.double() @ operands.T * weight.outer_scale.double() * scale.double()
    magnitude = x8.double().abs() @ operands.abs().T * weight.outer_scale.double() * scale.double()
    found = reference.linear(x, reference.prepack(weight))
    assert found.shape == (tokens, rows) and found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= magnitude * (columns + 3) * 2**-24 + 1e-30).all())


def test_bitwise_on_exact_sums() -> None:
    """Where every product and sum is exact in float32, BF16 output equals the rounded float64 result bit for bit."""
    scheme = Scheme(HOPPER, 32)
    group = torch.tensor([[56.0, 28.0], [56.0, 14.0], [56.0, 56.0]])
    codes = torch.randint(0, 16, (3, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weight = QuantizedWeight(codes, group, torch.tensor([0.5, 0.25, 1.0]), scheme)
    x = torch.randint(-7, 8, (5, 64), generator=torch.Generator().manual_seed(1)).bfloat16() * 64
    x[:, 0] = 448  # s_x is exactly 1
    found = reference.linear(x, reference.prepack(weight))
    exact = (x.double() @ fp8_values(weight).double().T * weight.outer_scale.double()).bfloat16()
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact)


def test_same_result_for_a_token_whatever_the_batch_shape() -> None:
    """Leading dimensions are only a shape."""
    weight = make_weight(16, 64, Scheme(HOPPER, 32))
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2))
    packed = reference.prepack(weight)
    assert torch.equal(reference.linear(x, packed), reference.linear(x.reshape(6, 64), packed).reshape(2, 3, 16))


def test_dispatch_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first backend that does not refuse is chosen; refusals are sentences with the backend's name."""

    class Picky:
        NAME = "picky"

        @staticmethod
        def refuses(scheme: Scheme, device: torch.device) -> str | None:
            return f"needs groups of 4096 on {device.type}" if scheme.group_size != 4096 else None

    monkeypatch.setattr(dispatch, "BACKENDS", (Picky, reference))
    backend, refusals = dispatch.choose(Scheme(HOPPER, 32), torch.device("cpu"))
    assert backend is reference and refusals == ["picky: needs groups of 4096 on cpu"]
