"""Experts with FP8 weights multiplied as one, against the contract: by Triton's interpreter where there is no GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import duotone
from duotone.contract import quantize_activations
from duotone.kernels import dispatch, reference
from duotone.kernels.gpu import backend, fp8, fp8_bank
from duotone.models.experts import find_experts
from duotone.qweight import Fp8Weight, fp8_values
from duotone.runtime import experts as runtime
from duotone.runtime.load import load
from duotone.scheme import GAUDI, HOPPER, Fp8Scheme, Target

pytest.importorskip("triton", reason="needs the package triton (the dev extra brings it on Linux)")

from duotone.kernels.gpu import grouped, launch, trial
from tests.kernels.test_gpu_grouped import DEVICE, MANY, MODELS, check_bank, chosen_of

#: The interpreter computes with numpy, which warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ROWS, COLUMNS = 72, 200


def weight_of(expert: int, part: int = 0, target: Target = HOPPER) -> Fp8Weight:
    """[72, 200], other than those of other experts."""
    draw = torch.Generator().manual_seed(2 * expert + part)
    values = (torch.randn(ROWS, COLUMNS, generator=draw) * 80).clamp(-target.fp8.max, target.fp8.max).to(torch.float8_e4m3fn)
    if not target.dynamic_activations:
        static = torch.tensor(2.0**-expert / 64, device=DEVICE)
        return Fp8Weight(values.to(DEVICE), torch.tensor([0.25], device=DEVICE), Fp8Scheme(target), static)
    outer = (torch.rand(ROWS, generator=draw) + 0.1).bfloat16().float()
    return Fp8Weight(values.to(DEVICE), outer.to(DEVICE), Fp8Scheme(target))


def packed_of(weights: list[list[Fp8Weight]]) -> list[list[fp8.Packed]]:
    return [[fp8.prepack(weight) for weight in expert] for expert in weights]


def exact(x: Tensor, weight: Fp8Weight) -> tuple[Tensor, Tensor]:
    """The contract's product in float64, on a CPU, and the size of what is added up."""
    x8, scale = quantize_activations(
        x.cpu(), weight.scheme.target, None if weight.input_scale is None else weight.input_scale.cpu()
    )
    w8, outer = fp8_values(weight).cpu().double(), (weight.outer_scale.cpu() * scale).double()
    return x8.double() @ w8.T * outer, x8.double().abs() @ w8.abs().T * outer


@pytest.mark.parametrize(
    ("target", "many", "each", "dtype"),
    [
        (HOPPER, MANY, None, torch.bfloat16),
        (GAUDI, MANY, None, torch.bfloat16),
        (HOPPER, (98, 1, 0, 1), None, torch.float16),
        (HOPPER, (3, 0, 2, 1), 1, torch.float32),
    ],
    ids=["hopper", "gaudi", "wide blocks", "K split"],
)
def test_each_experts_product(
    target: Target, many: tuple[int, ...], each: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract's, but for the order of sums; gate and up in one; a bias after the rounding; slots of no expert are zero."""
    if each is not None:
        monkeypatch.setattr(launch, "chunks_each", lambda *_: each)
    weights, chosen = [[weight_of(expert, part, target) for part in (0, 1)] for expert in range(3)], chosen_of(many)
    held = fp8_bank.stack(packed_of(weights))
    x = torch.randn(len(chosen), COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)
    is_nobodys = (chosen < 0) | (chosen > 2)
    x[is_nobodys.any(1).cpu(), 3] = torch.nan
    bias = torch.randn(3 * held.part_rows * 2, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    routed = grouped.routes(chosen, 3)
    y = grouped.linear(x.to(DEVICE), routed, held)
    added = y if each is None else grouped.linear(x.to(DEVICE), routed, held, bias)
    assert y.dtype == dtype and y.shape == (chosen.numel(), 256) and not y[is_nobodys.flatten()].any()
    sums = 2.0**-12 if DEVICE.type == "cuda" else (COLUMNS + 3) * 2.0**-24
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 0.0)
    for expert, pair in enumerate(weights):
        slot = (chosen.flatten() == expert).nonzero()[:, 0]
        slot = slot[~is_nobodys.any(1)[slot // 2]]
        for part, weight in enumerate(pair):
            meant, size = exact(x[(slot // 2).cpu()], weight)
            found = y[slot, part * held.part_rows :][:, :ROWS].cpu().double()
            assert bool(((found - meant).abs() <= size * sums + meant.abs() * rounding + 1e-7).all())
        assert each is None or torch.equal(added[slot], y[slot] + bias.view(3, 256)[expert])


@pytest.mark.parametrize("each", [1, 2])
def test_bitwise_on_exact_sums(each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every product and sum is exact, so is the output, K split or not; a slot's own row as input, as down gets it."""
    monkeypatch.setattr(launch, "chunks_each", lambda *_: each)
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 9, (2, ROWS, COLUMNS), generator=draw).to(torch.float8_e4m3fn)
    outer = torch.full((ROWS,), 0.25, device=DEVICE)
    held = fp8_bank.stack(packed_of([[Fp8Weight(one.to(DEVICE), outer, Fp8Scheme())] for one in values]))
    x = torch.randint(-3, 4, (4, COLUMNS), generator=draw).bfloat16() * 64
    x[..., 0] = 448  # s_x is exactly 1
    chosen = torch.tensor([[1, 0], [1, 2]], device=DEVICE)
    meant = torch.einsum("sk,snk->sn", x.double(), values.double()[[1, 0, 1, 1]]) * 0.25
    meant[3] = 0
    for dtype in (torch.bfloat16, torch.float32):
        y = grouped.linear(x.to(DEVICE, dtype), grouped.routes(chosen, 2), held)
        assert torch.equal(y[:, :ROWS].cpu(), meant.to(dtype))


@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=lambda target: target.name)
def test_a_bank_gives_its_weights_back(target: Target) -> None:
    """As views, equal in every bit, and ready for torch's product."""
    weights = [[weight_of(expert, part, target) for part in (0, 1)] for expert in range(2)]
    packed = packed_of(weights)
    assert fp8_bank.why_not(packed) is None
    held = fp8_bank.stack(packed)
    for pair, ours in zip(packed, fp8_bank.split(held), strict=True):
        for one, again in zip(pair, ours, strict=True):
            assert torch.equal(one.values, again.values) and torch.equal(one.outer_scale, again.outer_scale)
            assert again.values.untyped_storage().data_ptr() == held.values.data_ptr()
            assert (one.input_scale is None and again.input_scale is None) or one.input_scale == again.input_scale
    wide = [fp8.prepack(Fp8Weight(torch.zeros(ROWS, 300, dtype=torch.float8_e4m3fn), torch.ones(ROWS), Fp8Scheme()))]
    said = "in_features: found 200 and 300, expected one for all experts"
    if target is HOPPER:
        assert fp8_bank.why_not([*packed, wide]) == said


def test_the_op_keeps_its_word() -> None:
    """Schema, shapes for compilers, nothing changed in place."""
    held, chosen = fp8_bank.stack(packed_of([[weight_of(expert, 0, GAUDI)] for expert in range(2)])), chosen_of((3, 2, 1))
    routed = grouped.routes(chosen, 2)
    arguments = (
        torch.randn(3, COLUMNS, device=DEVICE).bfloat16(), *routed[:4], held.values, held.outer_scale, held.input_scale,
        torch.randn(256, device=DEVICE).bfloat16(), routed.size, 2, held.fp8_max, held.smallest_scale,
    )  # fmt: skip
    checks = torch.library.opcheck(
        torch.ops.duotone.gpu_grouped_fp8.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert set(checks.values()) == {"SUCCESS"}


def test_a_trial_finds_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong products are a sentence; the program as it is passes."""
    if DEVICE.type == "cpu":
        for name, less in (("_ROWS", 16), ("_COLUMNS", 160), ("_SLOTS", (3,))):
            monkeypatch.setattr(trial, name, less)
    assert trial.grouped_fp8_fault.__wrapped__(DEVICE) is None
    original = grouped.linear
    monkeypatch.setattr(grouped, "linear", lambda *given_: original(*given_).roll(1, -1))
    said = f"a trial on {DEVICE} gave other products of 3 tokens with experts of FP8 weights than plain torch does"
    assert trial.grouped_fp8_fault.__wrapped__(DEVICE) == said


def test_a_whole_model(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Gate and up in FP8, down in codes: a model answers as on plain torch, but for roundings; kinds mixed in one are told."""
    rules = (r"re:.*experts\.\d+\.(gate|up)_proj=w8a8",)
    settings = {"method": "rtn", "device": "cpu", "rules": rules}
    duotone.quantize(tiny_model("qwen3_moe", **MODELS["qwen3_moe"]), tmp_path / "out", **settings)
    monkeypatch.setattr(backend, "device_refuses", lambda *_: None)
    for fault in ("fault", "fp8_fault", "grouped_fault", "grouped_fp8_fault"):
        monkeypatch.setattr(trial, fault, lambda *_: None)
    tokens = torch.arange(3, device=DEVICE)[None]
    answers = []
    for backends in ((reference,), (backend, fp8)):
        monkeypatch.setattr(dispatch, "BACKENDS", backends)
        model = load(tmp_path / "out", device=DEVICE.type, shortcuts=False)
        runtime.group(model)
        with torch.no_grad():
            answers.append(model(tokens).logits.float())
    meant, together = answers
    assert torch.allclose(together, meant, atol=0.02 * float(meant.abs().max()))
    (experts,) = (found for _, found in find_experts(model))
    assert [type(held).__module__.rpartition(".")[2] for held in experts.grouped._banks] == ["fp8_bank", "bank"]
    check_bank(experts)
    experts.get_submodule("1").up_proj = experts.get_submodule("1").down_proj
    with pytest.warns(UserWarning, match="weights: found 4-bit codes and FP8 ones for the same input, expected one kind$"):
        runtime.group(model)
