"""W8A8 linears as a GPU runs them, against the contract: without one by Triton's interpreter and torch's product on a CPU."""

import dataclasses

import pytest
import torch
from torch import Tensor

from duotone.contract import quantize_activations
from duotone.kernels import dispatch, reference
from duotone.kernels.gpu import backend, fp8
from duotone.qweight import Fp8Weight, fp8_values
from duotone.runtime.linear import QuantizedLinear, share_call
from duotone.scheme import GAUDI, HOPPER, Fp8Scheme, Scheme, Target

pytest.importorskip("triton", reason="needs the package triton (the dev extra brings it on Linux)")

from duotone.kernels.gpu import launch, trial

#: The interpreter computes with numpy, which warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = torch.device("cuda")


def weight_of(rows: int, columns: int, target: Target = HOPPER) -> Fp8Weight:
    draw = torch.Generator().manual_seed(rows)
    values = (torch.randn(rows, columns, generator=draw) * 80).clamp(-target.fp8.max, target.fp8.max)
    is_static = not target.dynamic_activations
    outer = torch.tensor([0.25]) if is_static else (torch.rand(rows, generator=draw) + 0.1).bfloat16().float()
    values, static = values.to(torch.float8_e4m3fn), torch.tensor(1 / 64) if is_static else None
    return Fp8Weight(values.to(DEVICE), outer.to(DEVICE), Fp8Scheme(target), static if static is None else static.to(DEVICE))


def tokens_of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=lambda target: target.name)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 32, 256), (3, 21, 300), (5, 48, 24)])
def test_products(tokens: int, rows: int, columns: int, target: Target, dtype: torch.dtype) -> None:
    """Rows and columns that have to be padded and some that do not: the contract, but for the order of its sums."""
    weight, x = weight_of(rows, columns, target), tokens_of(tokens, columns, dtype=dtype)
    packed, bias = fp8.prepack(weight), tokens_of(rows, dtype=dtype)
    assert torch.equal(fp8.values(packed), fp8_values(weight))
    y = fp8.linear(x, packed)
    x8, scale = quantize_activations(x.float(), target, weight.input_scale)
    outer = (weight.outer_scale * scale).double()
    exact = x8.double() @ fp8_values(weight).double().T * outer
    size = x8.double().abs() @ fp8_values(weight).double().abs().T * outer
    sums = size * (2.0**-12 if DEVICE.type == "cuda" else (columns + 3) * 2.0**-24)
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 0.0)
    assert y.dtype == dtype and y.shape == (tokens, rows) and y.is_contiguous()
    assert bool(((y.double() - exact).abs() <= sums + exact.abs() * rounding + 1e-7).all())
    assert torch.equal(fp8.linear(x, packed, bias), y + bias), "the bias is added after the rounding"


def test_bitwise_on_exact_sums() -> None:
    """Where every product and sum is exact, so is the output, of any shape; no tokens give none."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 9, (40, 200), generator=draw).to(torch.float8_e4m3fn)
    weight = Fp8Weight(values.to(DEVICE), torch.full((40,), 0.25, device=DEVICE), Fp8Scheme())
    x = torch.randint(-3, 4, (5, 2, 200), generator=draw).bfloat16() * 64
    x[..., 0] = 448  # s_x is exactly 1
    packed, meant = fp8.prepack(weight), (x.double() @ values.double().T * 0.25).to(DEVICE)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(fp8.linear(x.to(DEVICE, dtype), packed), meant.to(dtype))
    assert fp8.linear(x[:0].to(DEVICE), packed).shape == (0, 2, 40)


def test_nothing_is_copied_that_needs_no_padding() -> None:
    """The file's own tensor is the only copy then."""
    weight = weight_of(32, 256)
    assert fp8.prepack(weight).values.data_ptr() == weight.values.data_ptr()
    assert fp8.prepack(weight_of(20, 256)).values.shape == (32, 256)


def test_linears_of_one_input_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as alone, one call for all; not where rows would have to be padded in the middle, nor with 4-bit codes.

    On a GPU the same but for roundings: products of another shape may be added up in another order.
    """
    monkeypatch.setattr(fp8, "refuses", lambda *_: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (fp8, reference))
    weights = [weight_of(rows, 96) for rows in (32, 16, 20)]
    alone, together = ([QuantizedLinear(weight, None) for weight in weights] for _ in range(2))
    assert alone[0].backend is fp8 and share_call(together)
    calls: list[int] = []
    original = fp8.linear
    monkeypatch.setattr(fp8, "linear", lambda *given: calls.append(1) or original(*given))
    x = tokens_of(1, 2, 96)
    with torch.no_grad():
        meant, calls[:] = [layer(x) for layer in alone], []
        slack = {"rtol": 2.0**-7, "atol": 0.1} if DEVICE.type == "cuda" else {"rtol": 0.0, "atol": 0.0}
        assert all(torch.allclose(together[i](x), meant[i], **slack) for i in (1, 0, 2)) and len(calls) == 1
    for layer, weight in zip(together, weights, strict=True):
        assert torch.equal(layer.dequantize(), fp8_values(weight) * weight.outer_scale[:, None])
    assert not share_call([QuantizedLinear(weight_of(rows, 96), None) for rows in (20, 32)])


def test_a_missing_activation_scale_is_refused() -> None:
    """A static target's weight never calibrated becomes no linear."""
    with pytest.raises(ValueError, match=r"^input_scale: found none, expected the calibrated one"):
        fp8.prepack(dataclasses.replace(weight_of(8, 64, GAUDI), input_scale=None))


def test_the_op_keeps_its_word() -> None:
    """Schema, shapes for compilers, nothing changed in place: what torch.compile and CUDA graphs go by."""
    packed = fp8.prepack(weight_of(24, 64))
    arguments = (tokens_of(2, 3, 64), packed.values, packed.outer_scale, None, packed.fp8_max, packed.smallest_scale)
    assert set(torch.library.opcheck(launch.linear_fp8, arguments).values()) == {"SUCCESS"}


def test_a_trial_finds_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong products or activations, and whatever fails, are a sentence; the linear as it is passes."""
    if DEVICE.type == "cpu":
        for name, less in (("_TOKENS", (3,)), ("_ROWS", 16), ("_COLUMNS", 160)):
            monkeypatch.setattr(trial, name, less)
    assert trial.fp8_fault.__wrapped__(DEVICE) is None
    for name, wrong, said in (
        (
            "linear_fp8",
            lambda x, *_: torch.zeros(len(x), trial._ROWS - 3, dtype=x.dtype),
            "products of 1 tokens with FP8 weights",
        ),
        ("quantize", lambda x, *_: (torch.zeros_like(x), x[:, 0].float()), "FP8 activations"),
    ):
        monkeypatch.setattr(launch, name, wrong)
        assert trial.fp8_fault.__wrapped__(DEVICE) == f"a trial on {DEVICE} gave other {said} than plain torch does"

    def fails(*_: object) -> Tensor:
        raise RuntimeError("no row-wise scales\nat all")

    monkeypatch.setattr(launch, "quantize", fails)
    assert trial.fp8_fault.__wrapped__(DEVICE) == f"a trial on {DEVICE} failed (RuntimeError: no row-wise scales)"


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit codes, whatever the other kernels for GPUs want of a device, a failed trial."""
    assert fp8.refuses(Scheme(), CUDA) == "multiplies FP8 weights, not 4-bit codes"
    assert fp8.refuses(Fp8Scheme(), torch.device("cpu")) == "runs on NVIDIA GPUs, not on cpu"
    monkeypatch.setattr(backend, "device_refuses", lambda _: None)
    monkeypatch.setattr(trial, "fp8_fault", lambda device: f"a trial on {device} failed")
    assert fp8.refuses(Fp8Scheme(), CUDA) == "a trial on cuda failed"
    monkeypatch.setattr(trial, "fp8_fault", lambda _: None)
    chosen, refusals = dispatch.choose(Fp8Scheme(), CUDA)
    assert chosen is fp8
    assert refusals == [f"{name}: multiplies 4-bit codes, not FP8 weights" for name in ("cpu", "triton")]
