"""What experts are calibrated on: their own tokens, those of others where these are few, or all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import duotone
from duotone import pipeline
from duotone.calibrate.observer import Observer
from duotone.calibrate.walk import BlockWalk, Call
from duotone.errors import DuotoneError, UnfinishedError
from duotone.models.experts import Experts
from duotone.models.skeleton import build_skeleton
from duotone.phases import Phases
from duotone.settings import QuantizeConfig
from duotone.solver.statistics import Statistics
from tests.test_resume import Stopped, stopped_after

SHORT: dict[str, Any] = {"samples": 2, "seq_len": 32}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


def settings(text_file: Path, **changed: object) -> dict[str, Any]:
    return {"calibration": (str(text_file),), "samples": 8, "seq_len": 64, "device": "cpu", "method": "gptq"} | changed


def bank(experts: int = 4, seed: int = 0) -> Experts:
    """A bank of random experts of Mixtral's class, 32 wide, 64 inside."""
    config = {"model_type": "mixtral", "num_local_experts": experts, "hidden_size": 32, "intermediate_size": 64}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16}
    model = build_skeleton(config | sizes, torch.float32)
    found = next(module for module in model.modules() if isinstance(module, Experts))
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in list(found.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        weight = torch.nn.Parameter(torch.randn(parameter.shape, generator=draw) / 8, requires_grad=False)
        setattr(found.get_submodule(parent), leaf, weight)
    return found


def routing(tokens: int, experts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two different experts for each token, and weights."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=draw).topk(2).indices, torch.rand(tokens, 2, generator=draw)


def test_all_experts_see_all_tokens(
    tmp_path: Path, tiny_model: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One Hessian for the first linears of all experts of a block; the router sends tokens on as it did."""
    seen: dict[str, Statistics] = {}
    solve = pipeline.solve_group

    def spy(run: Any, group: tuple[str, ...], originals: Any, statistics: Any) -> Any:
        seen[group[0]] = statistics
        return solve(run, group, originals, statistics)

    monkeypatch.setattr(pipeline, "solve_group", spy)
    folder = tiny_model("mixtral", **MIXTRAL)
    report = duotone.quantize(folder, tmp_path / "all", **settings(text_file, **SHORT, calibrate_all_experts=True))
    for layer in (0, 1):
        first, *others = (seen[f"model.layers.{layer}.mlp.experts.{expert}.gate_proj"] for expert in range(4))
        assert first.tokens == 2 * 32
        for other in others:
            torch.testing.assert_close(other.hessian, first.hessian)
    assert {entry.tokens for entry in report.layers} == {2 * 32}


@pytest.mark.parametrize("shown", [{1}, {0, 1, 2, 3}])
def test_what_goes_on_is_the_routing_s(shown: set[int]) -> None:
    """An expert that is shown all tokens answers for its own."""
    experts, hidden = bank(), torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    expected = experts(hidden, *routing(50, 4, 1))
    experts.shown_all = frozenset(shown)
    torch.testing.assert_close(experts(hidden, *routing(50, 4, 1)), expected)


def test_reports_say_so(tmp_path: Path, tiny_model: Callable[..., Path], text_file: Path) -> None:
    """Report, sidecar and card tell of it; a run that was begun without it does not go on with it."""
    folder, asked = tiny_model("mixtral", **MIXTRAL), settings(text_file, **SHORT, calibrate_all_experts=True)
    report = duotone.quantize(folder, tmp_path / "out", **asked)
    words = "every expert was shown all calibration tokens"
    assert any(words in note for note in report.notes)
    assert json.loads((tmp_path / "out" / "duotone.json").read_text())["settings"]["calibrate_all_experts"] is True
    assert words in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(Stopped):
        duotone.quantize(folder, tmp_path / "half", **asked, progress=stopped_after(1), save_every=0)
    with pytest.raises(UnfinishedError, match="calibrate_all_experts True, found False"):
        duotone.quantize(folder, tmp_path / "half", **asked | {"calibrate_all_experts": False}, resume=True)
    duotone.quantize(folder, tmp_path / "half", **asked, resume=True)
    assert all(
        (tmp_path / "half" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
        for file in ("model.safetensors", "duotone.json", "README.md")
    )


def test_no_experts_to_show_them_to(tmp_path: Path, tiny_model: Callable[..., Path], text_file: Path) -> None:
    """A dense model has none, and a method that looks at no input has nothing to show."""
    with pytest.raises(DuotoneError, match=r"--calibrate-all-experts: .* has no experts"):
        duotone.quantize(tiny_model("llama"), tmp_path / "out", **settings(text_file, calibrate_all_experts=True))
    with pytest.raises(DuotoneError, match="--calibrate-all-experts: found --method rtn"):
        QuantizeConfig(method="rtn", calibrate_all_experts=True)


class Routed(nn.Module):
    """A block of a router and a bank: hidden states [1, T, 32] to the two experts that like them best."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.router = torch.randn(32, experts.count, generator=torch.Generator().manual_seed(3))
        self.experts = experts

    def sends(self, hidden: torch.Tensor) -> torch.Tensor:
        """Which experts [T, 2]."""
        return (hidden[0] @ self.router).topk(2).indices

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.experts(hidden[0], self.sends(hidden), torch.full((hidden.shape[1], 2), 0.5))[None]


def batches(change: float) -> list[torch.Tensor]:
    """Four batches, some so short that an expert gets nothing of them; and what they are in another model."""
    draw = torch.Generator().manual_seed(4)
    states = [torch.randn(1, tokens, 32, generator=draw) for tokens in (800, 3, 500, 2)]
    return [state + change * torch.randn(state.shape, generator=draw) for state in states]


@pytest.mark.parametrize("waiting", [None, 0])
@pytest.mark.parametrize("least", [0, 620, 5000])
def test_drift_is_that_of_the_same_tokens(waiting: int | None, least: int) -> None:
    """Of each expert: its tokens in the quantized model, beside the same ones in the original, whichever expert these go to
    there. least: fewest tokens of an expert that is not shown all.
    """
    quantized, original = Routed(bank(seed=5)), Routed(bank(seed=6))
    here, there = batches(0.0), batches(0.4)
    moved = sum(int((quantized.sends(x) != original.sends(x0)).sum()) for x, x0 in zip(here, there, strict=True))
    assert moved > 10
    stops = {f"{expert}.{linear}": f"experts.{expert}.{linear}" for expert in range(4) for linear in ("gate_proj", "down_proj")}
    stops = {"bank": "experts.routing"} | stops

    def walk(block: Routed, states: list[torch.Tensor]) -> BlockWalk:
        at = {name: block.get_submodule(path) for name, path in stops.items()}
        return BlockWalk(block, [Call(state, (), {}) for state in states], at, {}, waiting)

    def inside(block: Routed, expert: int, x: torch.Tensor) -> torch.Tensor:
        of = block.experts.get_submodule(str(expert))
        return nn.functional.silu(of.gate_proj(x)) * of.up_proj(x)

    pairs = []
    for expert in range(4):
        tokens = [(quantized.sends(x) == expert).any(-1) for x in here]
        every = sum(int(sent.sum()) for sent in tokens) < least
        x, x0 = (torch.cat([s[0][sent | every] for s, sent in zip(states, tokens, strict=True)]) for states in (here, there))
        pairs.append((x, x0, inside(quantized, expert, x), inside(original, expert, x0)))
    expected = [block(state) for block, states in ((quantized, here), (original, there)) for state in states]
    with walk(quantized, here) as left, walk(original, there) as right:
        observer = Observer(left, right, Phases())
        starved = observer.show_starved("bank", quantized.experts, original.experts, least)
        assert starved == sum(len(pair[0]) == 1305 for pair in pairs)
        for expert, (x, x0, z, z0) in enumerate(pairs):
            for linear, at, meant in (("gate_proj", x, x0), ("down_proj", z, z0)):
                found = observer.observe(f"{expert}.{linear}", expert=True)
                assert found is not None
                assert found.input_drift is not None
                assert found.tokens == len(at)
                torch.testing.assert_close(found.hessian, at.T @ at / len(at))
                torch.testing.assert_close(found.input_drift, (meant - at).T @ at / len(at))
        for state, unchanged in zip([*left.finish(), *right.finish()], expected, strict=True):
            torch.testing.assert_close(state, unchanged)


def test_drift_of_few_tokens_is_left_alone() -> None:
    """With fewer than four for each input its estimate is mostly noise; the second moments are what they are."""
    for tokens, told in ((127, False), (128, True)):
        one, other = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)
        states = [torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        left, right = (
            BlockWalk(nn.Sequential(linear), [Call(state, (), {})], {"e": linear}, {})
            for linear, state in zip((one, other), states, strict=True)
        )
        with left, right:
            found = Observer(left, right, Phases()).observe("e", expert=True)
        assert found is not None
        assert (found.input_drift is not None) == told
        torch.testing.assert_close(found.hessian, states[0][0].T @ states[0][0] / tokens)


def test_a_static_target_finds_its_scales(tmp_path: Path, tiny_model: Callable[..., Path], text_file: Path) -> None:
    """duotone.json has a `gaudi` checkpoint's scales by the names in its files, where a mixture's linears have others."""
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    options = {"target": "gaudi", "method": "rtn", "samples": 2, "seq_len": 16, "calibration": (str(text_file),)}
    duotone.quantize(tiny_model("mixtral", **sizes), tmp_path / "out", device="cpu", **options)
    with torch.no_grad():
        assert duotone.load(tmp_path / "out", device="cpu")(torch.arange(5)[None]).logits.isfinite().all()
