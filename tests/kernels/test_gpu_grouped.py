"""Experts multiplied as one against each by itself and against the contract: by Triton's interpreter where there is no GPU."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import duotone
from duotone.contract import quantize_activations
from duotone.kernels import dispatch, reference
from duotone.kernels.gpu import backend, bank
from duotone.models.experts import Experts, find_experts
from duotone.models.skeleton import build_skeleton
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.runtime import experts as runtime
from duotone.runtime.linear import QuantizedLinear
from duotone.runtime.load import load
from duotone.scheme import GAUDI, HOPPER, Scheme
from tests.kernels.test_reference import make_weight
from tests.pretended import _WAITS

pytest.importorskip("triton", reason="needs the package triton (the dev extra brings it on Linux)")

from duotone.kernels.gpu import grouped, launch, trial

#: The interpreter computes with numpy, which warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Tokens of each of 3 experts, then of none: more than a block, one, none.
MANY = (17, 1, 0, 2)
ROWS, COLUMNS = 72, 200


def weight_of(scheme: Scheme, expert: int, part: int, is_signed: bool = False, columns: int = COLUMNS) -> QuantizedWeight:
    """[72, columns], other than those of other experts."""
    weight = make_weight(ROWS + 2 * expert + part, columns, scheme)
    fields = {name: value[:ROWS] for name, value in vars(weight).items() if isinstance(value, Tensor) and value.dim()}
    if is_signed:
        fields["codes"] = fields["codes"].clamp(min=1)
    if weight.input_scale is not None:
        fields["input_scale"] = weight.input_scale * 2.0**-expert
    moved = {name: value.to(DEVICE) for name, value in (vars(weight) | fields).items() if isinstance(value, Tensor)}
    return dataclasses.replace(weight, **moved)


def pairs_of(scheme: Scheme, signed: tuple[bool, ...]) -> list[list[QuantizedWeight]]:
    return [[weight_of(scheme, expert, part, is_signed) for part in (0, 1)] for expert, is_signed in enumerate(signed)]


def packed_of(weights: list[list[QuantizedWeight]]) -> list[list[backend.Packed]]:
    return [[backend.prepack(weight) for weight in pair] for pair in weights]


def chosen_of(many: tuple[int, ...] = MANY, each: int = 2) -> Tensor:
    """[T, each] of as many slots of each expert; the last of none, under two numbers."""
    flat = torch.cat([torch.full((count,), number) for number, count in enumerate(many)])
    flat[-1] = -1
    return flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))].view(-1, each).to(DEVICE)


def alone(x: Tensor, chosen: Tensor, weights: list[list[QuantizedWeight]]) -> list[Tensor]:
    """What each slot's own expert makes of it by itself: [S, N] for each of the linears of one input."""
    answers = [torch.zeros(chosen.numel(), pair.shape[0], dtype=x.dtype, device=DEVICE) for pair in weights[0]]
    for number, pair in enumerate(weights):
        slot = (chosen.flatten() == number).nonzero()[:, 0]
        for answer, weight in zip(answers, pair, strict=True):
            if len(slot):
                answer[slot] = backend.linear(x[slot // (chosen.numel() // len(x))], backend.prepack(weight))
    return answers


@pytest.mark.parametrize(
    ("scheme", "signed", "dtype"),
    [
        (Scheme(HOPPER, 128), (False,) * 3, torch.bfloat16),
        (Scheme(HOPPER, 32), (True,) * 3, torch.float16),
        (Scheme(HOPPER, 64), (True, False, True), torch.bfloat16),
        (Scheme(HOPPER, 32, False), (False,) * 3, torch.float32),
        (Scheme(GAUDI, 64), (False,) * 3, torch.bfloat16),
    ],
    ids=["hopper", "signed", "some signed", "zero points", "gaudi"],
)
def test_the_bits_of_each_expert_by_itself(scheme: Scheme, signed: tuple[bool, ...], dtype: torch.dtype) -> None:
    """Experts with no tokens, one, more than a block; gate and up in one; slots of no expert are zero, even of a NaN."""
    weights, chosen = pairs_of(scheme, signed), chosen_of()
    packed = packed_of(weights)
    assert bank.why_not(packed) is None
    held = bank.stack(packed)
    assert held.is_signed == all(signed)
    assert (held.table_rows == 0) == (len(set(signed)) == 1 and scheme.symmetric and scheme.target is HOPPER)
    x = torch.randn(len(chosen), COLUMNS, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    is_nobodys = (chosen < 0) | (chosen > 2)
    x[is_nobodys.any(1), 3] = torch.nan
    y = grouped.linear(x, grouped.routes(chosen, 3), held)
    assert y.dtype == dtype and y.shape == (20, 256) and not y[is_nobodys.flatten()].any()
    for part, meant in zip(y.split(held.part_rows, -1), alone(x, chosen, weights), strict=True):
        assert same(part[:, :ROWS], meant)
    for pair, ours in zip(weights, bank.split(held), strict=True):
        for weight, one in zip(pair, ours, strict=True):
            assert torch.equal(backend.values(one), fp8_values(weight)) and same(one.outer_scale, weight.outer_scale)


def same(found: Tensor, meant: Tensor) -> bool:
    """Equal values, NaN for NaN."""
    return bool(((found == meant) | (found.isnan() & meant.isnan())).all())


@pytest.mark.parametrize(("many", "size"), [((33, 1), 32), ((66, 1), 64)])
def test_every_size_of_a_block(many: tuple[int, ...], size: int) -> None:
    """The contract, for as many tokens as take wider blocks; a slot's own row as input, as down is given it; a bias of each."""
    weights = [[weight_of(Scheme(HOPPER, 128), expert, 0)] for expert in range(2)]
    held, chosen = bank.stack(packed_of(weights)), chosen_of((*many, 1), 1)
    routed = grouped.routes(chosen, 2)
    assert routed.size == size
    x = torch.randn(len(chosen), COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(2)).bfloat16().to(DEVICE)
    rows = torch.nn.functional.pad(bias, (0, held.part_rows - ROWS)).flatten()
    plain, added = (grouped.linear(x.to(DEVICE), routed, held, one)[:, :ROWS] for one in (None, rows))
    x8, scale = quantize_activations(x, HOPPER)
    for expert, (weight,) in enumerate(weights):
        own = (chosen[:, 0] == expert).cpu()
        outer = weight.outer_scale.cpu() * scale[own]
        assert trial.is_near(plain[own].cpu(), x8[own], fp8_values(weight).cpu(), outer)
        assert torch.equal(added[own], plain[own] + bias[expert]), "after the rounding"
    assert not added[chosen[:, 0] < 0].any()


@pytest.mark.parametrize(
    ("scheme", "each", "dtype"),
    [(Scheme(HOPPER, 128), 4, torch.bfloat16), (Scheme(GAUDI, 32), 8, torch.float16), (Scheme(HOPPER, 64), 2, torch.float32)],
    ids=["4 and 4 and 1", "8 and 1", "4 of 2 and 1"],
)
def test_splits_of_k(scheme: Scheme, each: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of each expert by itself where that splits K alike; a bias; what is of no expert stays zero, even of a NaN."""
    calls: list[int] = []
    monkeypatch.setattr(launch, "chunks_each", lambda *_: calls.append(each) or each)
    weights = [[weight_of(scheme, expert, 0, columns=1100)] for expert in range(2)]
    held, chosen = bank.stack(packed_of(weights)), torch.tensor([[1, 0], [2, 1], [2, -1]], device=DEVICE)
    x = torch.randn(3, 1100, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    bias = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    rows = torch.nn.functional.pad(bias, (0, held.part_rows - ROWS)).flatten()
    if weights[0][0].input_scale is None:
        x[2, 0] = torch.nan
    y = grouped.linear(x, grouped.routes(chosen, 2), held, rows)
    (meant,) = alone(x, chosen, weights)
    is_of_one = [0, 1, 3]
    assert torch.equal(y[is_of_one, :ROWS], meant[is_of_one] + bias[[1, 0, 1]]) and not y[[2, 4, 5]].any()
    assert len(calls) == 3, "the two by themselves are split so too"


def test_how_k_is_split() -> None:
    """As far as multiprocessors are missing, by shapes alone: Mixtral's down and up on 132; never a prompt."""
    each = lambda rows, chunks, slots: grouped.chunks_each(  # noqa: E731
        rows, chunks, slots, grouped.most_blocks(slots, 8, 16), 132, launch.tile_for(slots)
    )
    assert [-(-112 // each(4096, 112, slots)) for slots in (2, 4, 8, 16, 64)] == [4, 2, 1, 4, 1]
    assert each(28672, 32, 4) == 32, "enough rows"
    assert each(128, 64, 1) < 64 and each(128, 64, 64) < 64 and each(128, 64, 65) == 64
    for slots in range(1, 65):
        splits = -(-112 // each(4096, 112, slots))
        assert splits == 1 or splits * slots * 4096 * 4 < 2**22


@given(
    chosen=st.integers(1, 12).flatmap(
        lambda experts: st.tuples(st.just(experts), st.lists(st.integers(-1, experts + 1), min_size=1, max_size=80))
    )
)
@settings(max_examples=15, deadline=None)
def test_blocks_hold_each_slot_once(chosen: tuple[int, list[int]]) -> None:
    """Whatever the numbers: every slot is in one block, with its expert's others and in their order; no block is missing."""
    experts, numbers = chosen
    routed = grouped.routes(torch.tensor(numbers, device=DEVICE)[:, None], experts)
    seen: list[tuple[int, int]] = []
    for expert, first in routed.blocks.tolist():
        places = range(first, min(first + routed.size, int(routed.starts[expert + 1])))
        seen += [(int(routed.order[place]), expert) for place in places]
    assert sorted(seen) == [(slot, number if 0 <= number < experts else experts) for slot, number in enumerate(numbers)]
    assert len(routed.blocks) <= len(numbers) and seen == sorted(seen, key=lambda pair: (pair[1], pair[0]))


def test_no_tokens() -> None:
    """None are multiplied."""
    held = bank.stack(packed_of(pairs_of(Scheme(HOPPER, 32), (False,))))
    routed = grouped.routes(torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), 1)
    assert grouped.linear(torch.zeros(0, COLUMNS, device=DEVICE), routed, held).shape == (0, 256)


def test_the_ops_keep_their_word() -> None:
    """Schema, shapes for compilers, nothing changed in place: what torch.compile and CUDA graphs go by."""
    held, chosen = bank.stack(packed_of(pairs_of(Scheme(GAUDI, 64), (False,) * 2))), chosen_of((3, 2, 1))
    routed = grouped.routes(chosen, 2)
    arguments = (
        torch.randn(3, COLUMNS, device=DEVICE).bfloat16(), *routed[:4], held.codes, held.index, held.table, held.outer_scale,
        held.input_scale, torch.randn(512, device=DEVICE).bfloat16(), routed.size, 2, 2, held.table_rows, held.to_a_word,
        held.is_signed, 64, held.fp8_max, held.smallest_scale,
    )  # fmt: skip
    for op, given_ in ((torch.ops.duotone.gpu_grouped, arguments), (torch.ops.duotone.gpu_routes, (chosen, 2, 16))):
        checks = ("test_schema", "test_faketensor")
        assert set(torch.library.opcheck(op.default, given_, test_utils=checks).values()) == {"SUCCESS"}


def test_experts_that_cannot_be_one() -> None:
    """Each reason names what differs."""
    first, other = (packed_of(pairs_of(Scheme(HOPPER, size), (False,))) for size in (32, 64))
    assert bank.why_not(first + other) == "group_size: found 32 and 64, expected one for all experts"
    wide = backend.prepack(make_weight(ROWS + 1, COLUMNS, Scheme(HOPPER, 32)))
    assert bank.why_not([[first[0][0], wide]]) == "rows: found 72 and 73, expected as many in all experts"
    static = [weight_of(Scheme(GAUDI, 32), expert, 0) for expert in (0, 1)]
    assert bank.why_not([[backend.prepack(weight)] for weight in static]) is None
    said = "input_scale: found several for the linears of one input, expected one"
    assert bank.why_not([[backend.prepack(weight) for weight in static]]) == said


def test_a_trial_finds_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong products are a sentence; the program as it is passes."""
    if DEVICE.type == "cpu":
        for name, less in (("_ROWS", 16), ("_COLUMNS", 160), ("_SLOTS", (3,))):
            monkeypatch.setattr(trial, name, less)
    assert trial.grouped_fault.__wrapped__(64, DEVICE) is None
    original = grouped.linear
    monkeypatch.setattr(grouped, "linear", lambda *given_: original(*given_).roll(1, -1))
    said = f"a trial on {DEVICE} gave other products of 3 tokens with experts than plain torch does"
    assert trial.grouped_fault.__wrapped__(64, DEVICE) == said


SIZES: dict[str, object] = {"num_experts_per_tok": 2, "num_experts": 3, "num_local_experts": 3, "num_hidden_layers": 1}
#: A width that fills no tile, and biases.
MODELS = {"qwen3_moe": SIZES | {"moe_intermediate_size": 64}, "gpt_oss": SIZES | {"layer_types": ["full_attention"]}}


@pytest.mark.parametrize("model_type", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_whole_model(
    model_type: str, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Its experts grouped, a model answers as with each by itself, and as on plain torch, but for roundings; biases too."""
    duotone.quantize(tiny_model(model_type, **MODELS[model_type]), tmp_path / "out", method="rtn", device="cpu")
    monkeypatch.setattr(backend, "refuses", lambda *_: None)
    monkeypatch.setattr(trial, "grouped_fault", lambda *_: None)
    tokens = torch.arange(3, device=DEVICE)[None]
    monkeypatch.setattr(dispatch, "BACKENDS", (reference,))
    model = load(tmp_path / "out", device=DEVICE.type, shortcuts=False)
    runtime.group(model)
    (experts,) = (found for _, found in find_experts(model))
    assert experts.grouped is None, "plain torch has its own way"
    with torch.no_grad():
        meant = model(tokens).logits.float()
    monkeypatch.setattr(dispatch, "BACKENDS", (backend,))
    model = load(tmp_path / "out", device=DEVICE.type, shortcuts=False)
    names = set(model.state_dict())
    with torch.no_grad():
        one_by_one = model(tokens).logits.float()
        runtime.group(model)
        together = model(tokens).logits.float()
    assert set(model.state_dict()) == names
    for found in (one_by_one, together):
        assert torch.allclose(found, meant, atol=0.02 * float(meant.abs().max()))
    (experts,) = (found for _, found in find_experts(model))
    check_bank(experts)


def check_bank(experts: Experts) -> None:
    """The bank is what is run, and the linears' only copy; what is moved to another device goes back to one by one."""
    linears = [module for module in experts.modules() if isinstance(module, QuantizedLinear)]
    (up, down) = experts.grouped._banks
    assert {place_of(layer.packed) for layer in linears} == {place_of(held) for held in (up, down)}
    x, chosen = torch.randn(2, up.in_features, device=DEVICE).bfloat16(), torch.tensor([[0, 1], [2, 1]], device=DEVICE)
    weights = torch.rand(2, 2, device=DEVICE)
    with torch.no_grad():
        together = experts(x, chosen, weights)
        copied = copy.deepcopy(experts).double()
        assert torch.allclose(copied(x, chosen, weights), together, atol=0.02 * float(together.abs().max()))
        with pytest.warns(UserWarning, match="moved are multiplied one after the other"):
            experts.grouped._apply(lambda value: value.to("meta"))
        assert not experts.grouped.is_ready
        one_by_one = experts(x, chosen, weights)
    assert together.dtype == torch.bfloat16 and torch.allclose(one_by_one, together, atol=0.02 * float(together.abs().max()))


def place_of(held: object) -> int:
    """Where the storage of codes or FP8 weights begins."""
    weight: Tensor = vars(held).get("codes", vars(held).get("values"))
    return weight.untyped_storage().data_ptr()


def test_dealt_tokens(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Llama 4's experts as one give the bits of each by itself: tokens of two experts, one, none; nothing is waited for."""
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 1, "intermediate_size": 64}
    duotone.quantize(tiny_model("llama4_text", **sizes, intermediate_size_mlp=64), tmp_path / "out", method="rtn", device="cpu")
    monkeypatch.setattr(backend, "refuses", lambda *_: None)
    monkeypatch.setattr(trial, "grouped_fault", lambda *_: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (backend,))
    model = load(tmp_path / "out", device=DEVICE.type, shortcuts=False)
    (experts,) = (found for _, found in find_experts(model))
    states = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    states[0, :2], states[1, 1:4], states[2, [0, 2, 3, 4]] = 0, 0, 0
    states[:, 3] = 0  # whose each is: 1; 2; 0; none; 0 and 1
    with torch.no_grad(), Waits() as waits:
        one_by_one = experts(states.flatten(0, 1))
        assert waits.seen
        runtime.group(model)
        waits.seen.clear()
        together = experts(states.flatten(0, 1))
    assert experts.grouped is not None and not waits.seen
    assert together.shape == (15, 128) and torch.equal(together, one_by_one) and together.view_as(states)[0, 2].any()
    assert not together.view_as(states)[~states.any(-1)].any()


class Waits(TorchDispatchMode):
    """seen: operations that a host would wait for a GPU with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITS:
            self.seen.append(func)
        return func(*args, **kwargs or {})


def test_llama_4_deals_its_tokens_out() -> None:
    """As no other does; to how many experts, its router says."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16}
    sizes |= {"intermediate_size": 32, "num_local_experts": 2, "moe_layers": [0], "head_dim": 16}
    for model_type in ("llama4_text", "mixtral"):
        model = build_skeleton({"model_type": model_type} | sizes, torch.bfloat16)
        (experts,) = (found for _, found in find_experts(model))
        assert experts.dealt == (model_type == "llama4_text") and (experts.top_k == 1 or not experts.dealt)


def test_a_bank_that_stays_is_told(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Why, and how many: a failed trial, linears that others multiply."""
    out = tmp_path / "out"
    duotone.quantize(
        tiny_model("qwen3_moe", **MODELS["qwen3_moe"]), out, method="rtn", device="cpu", rules=("re:.*experts.1.up_proj=bf16",)
    )
    monkeypatch.setattr(backend, "refuses", lambda *_: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (backend,))
    model = load(out, device=DEVICE.type, shortcuts=False)
    said = r"^1 banks of experts are multiplied one expert after the other, first model\.layers\.0\.mlp\.experts: "
    with pytest.warns(UserWarning, match=said + "1 of 9 linears are neither 4-bit codes nor FP8 weights of these kernels$"):
        runtime.group(model)
    (experts,) = (found for _, found in find_experts(model))
    experts.get_submodule("1").up_proj = QuantizedLinear(make_weight(64, 128, Scheme(HOPPER, 128)), None)
    monkeypatch.setattr(trial, "grouped_fault", lambda *_: "a trial failed")
    with pytest.warns(UserWarning, match=said + "a trial failed$"):
        runtime.group(model)
    experts.dealt, experts.top_k = True, None
    with pytest.warns(UserWarning, match=said + "tokens are dealt out to all of them, found no top_k that says to how many"):
        runtime.group(model)
    assert experts.grouped is None
