"""Whole runs with transforms: what is written computes what the original does, as any checkpoint of the format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import duotone
from duotone.checkpoint.reader import WeightReader
from duotone.checkpoint.source import open_source
from duotone.contract import static_activation_scale
from duotone.inspection import inspect_model
from duotone.models.skeleton import find_linears
from duotone.models.text import TEXT_ADAPTERS
from duotone.plan import make_plan
from duotone.qweight import QuantizedWeight, dequantize
from duotone.runtime.load import load
from duotone.scheme import TARGETS
from duotone.settings import QuantizeConfig
from duotone.solver.methods import Problem
from tests.calibrate.test_curvature import deviation, in_one_pass
from tests.test_pipeline import QUICK, calibration_tokens, folder_hashes, linears_of, plain_model, spied
from tests.transforms.test_rotated import filled, rotated

ModelMaker = Callable[..., Path]
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
BOTH = {"rotate": True, "equalize": 0.5}


def written_model(source: Path, out: Path, tied: bool = False) -> nn.Module:
    """The model of the written tensors in float32, packed weights dequantized: what a run without FP8 activations is."""
    model, written = plain_model(source, out), load_file(out / "model.safetensors")
    if tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    parameters = dict(model.named_parameters())
    for name in written.keys() & parameters.keys():
        parameters[name].data = written[name].float()
    return model


@pytest.fixture(scope="module")
def spread_model(tiny_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """make(model_type) -> folder of a tiny model whose norms and linears have channels up to 64 times apart in size.

    Its function is that of a model without: what one side multiplies the other divides.
    """

    def make(model_type: str) -> Path:
        plain, folder = tiny_model(model_type, initializer_range=0.15), tmp_path_factory.mktemp("spread")
        tensors = load_file(plain / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        for norm, readers in TEXT_ADAPTERS[0].residual.norms:
            for block in ("model.layers.0", "model.layers.1"):
                spread = 2.0 ** torch.randint(-3, 4, (128,), generator=generator).bfloat16()
                tensors[f"{block}.{norm}.weight"] *= spread
                for reader in readers:
                    tensors[f"{block}.{reader}.weight"] /= spread
        for file in plain.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def seen_by(model: nn.Module, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """What linears read, [tokens, K]."""
    found: dict[str, Tensor] = {}
    for name in names:
        watch = lambda _, x, name=name: found.update({name: x[0].flatten(0, 1)})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(watch)
    with torch.no_grad():
        model(tokens)
    return found


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("transforms", [{"rotate": True}, BOTH], ids=["rotated", "both"])
def test_what_is_written_is_near_the_original(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path, model_type: str, tied: bool, transforms: dict[str, Any]
) -> None:
    """With one linear quantized or with all, logits are about as far from the original's as without a transform."""
    source = tiny_model(model_type, tie_word_embeddings=tied, initializer_range=0.05, **SMALL)
    tokens, text = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1)), (str(text_file),)
    with torch.no_grad():
        expected = load(source, torch.float32, "cpu")(tokens).logits
        for name, ignore in (("one", ("re:(?!.*layers.1.self_attn.k_proj)",)), ("all", ())):
            errors = []
            for folder, chosen in ((tmp_path / f"plain-{name}", {}), (tmp_path / name, transforms)):
                duotone.quantize(source, folder, ignore=ignore, calibration=text, **chosen, **QUICK)
                found = load(folder, torch.float32, "cpu")(tokens).logits
                errors.append(float((found - expected).norm() / expected.norm()))
            assert errors[1] < 1.3 * errors[0] + 0.01, (name, errors)
    assert len(linears_of(load(tmp_path / "one", device="cpu"))) == 1


@pytest.mark.parametrize("hidden", [64, 288])
def test_a_rotated_checkpoint_is_an_ordinary_one(tiny_model: ModelMaker, text_file: Path, tmp_path: Path, hidden: int) -> None:
    """Every planned byte and no other tensor, a head of its own, settings and notes in the sidecar; inspect and eval run."""
    source = tiny_model(tie_word_embeddings=True, **SMALL | {"hidden_size": hidden})
    plan = make_plan(open_source(source), QuantizeConfig(rotate=True))
    report = duotone.quantize(source, tmp_path / "out", rotate=True, calibration=(str(text_file),), **QUICK)
    plain = duotone.quantize(source, tmp_path / "plain", calibration=(str(text_file),), **QUICK)
    written, usual = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert report.weight_bytes == plan.disk_bytes == plain.weight_bytes + 260 * hidden * 2
    assert report.original_bytes == plain.original_bytes and report.bits_per_weight == plain.bits_per_weight
    assert written.keys() == usual.keys() | {"lm_head.weight"}
    assert all(written[name].dtype == usual[name].dtype and written[name].shape == usual[name].shape for name in usual)
    norms = [name for name in written if "norm" in name]
    assert len(norms) == 5 and all(bool((written[name] == 1).all()) for name in norms)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "plain")]
    assert configs[0] == configs[1] | {"tie_word_embeddings": False}
    sidecar = json.loads((tmp_path / "out" / "duotone.json").read_text())
    assert sidecar["settings"]["rotate"] is True and sidecar["settings"]["equalize"] is None
    notes = inspect_model(tmp_path / "out").notes
    assert notes == report.notes == sidecar["notes"] and notes[: len(plan.transforms)] == list(plan.transforms)
    result = duotone.evaluate(tmp_path / "out", [str(text_file)], reference=source, seq_len=64, samples=4, device="cpu")
    assert result.kl is not None and 0 < result.kl < 0.1


def test_transformers_loads_a_transformed_checkpoint(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """from_pretrained finds every tensor it expects and none besides, the head apart from the embedding."""
    from transformers import AutoModelForCausalLM

    source = tiny_model(tie_word_embeddings=True, **SMALL)
    duotone.quantize(source, tmp_path / "out", calibration=(str(text_file),), group_size=32, **BOTH, **QUICK)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(model.lm_head.weight, written["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, written["model.embed_tokens.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_seed_draws_the_rotation(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Without any calibration: same seed, same bytes; another seed, another rotation."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        duotone.quantize(tiny_model(), tmp_path / name, method="rtn", rotate=True, seed=seed, device="cpu")
    hashes = [folder_hashes(tmp_path / name) for name in "abc"]
    assert hashes[0] == hashes[1] and hashes[0]["model.safetensors"] != hashes[2]["model.safetensors"]


@pytest.mark.parametrize("transforms", [{"equalize": 0.5}, BOTH], ids=["equalized", "both"])
@pytest.mark.parametrize("target", ["hopper", "gaudi"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_equalized_linears_are_solved_for_what_they_read(
    spread_model: ModelMaker, text_file: Path, tmp_path: Path, model_type: str, target: str, transforms: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """H of each problem, and the static scale of its input, are those of the model as it is written, norms and all."""
    source, ignore = spread_model(model_type), ("re:.*0.mlp.gate_proj",)
    given = spied(monkeypatch, "dpq")
    options = {"target": target, "ignore": ignore, "calibration": (str(text_file),), **transforms, **QUICK}
    duotone.quantize(source, tmp_path / "out", **options)
    model, layers = (
        written_model(source, tmp_path / "out"),
        json.loads((tmp_path / "out" / "duotone.json").read_text())["layers"],
    )
    seen = seen_by(model, list(given), calibration_tokens(source, text_file))
    # Rotated, the embedding that is written has been rounded to BF16.
    close = 2e-2 if transforms.get("rotate") else 1e-4
    assert len(given) == 13
    for name, problem in given.items():
        x = seen[name].double()
        if target == "gaudi":
            assert layers[name]["input_scale"] == float(static_activation_scale(x.abs().amax(), TARGETS[target]))
        if model_type == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
            x = x - x.mean(0)
        expected, statistics = x.T @ x / len(x), problem.statistics
        assert statistics is not None and (statistics.hessian.double() - expected).norm() < close * expected.norm()


def test_what_is_written_of_an_equalized_norm(spread_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """What it lost all its readers have gained, powers of two where one of them stays BF16; nothing else has changed."""
    source, ignore = spread_model("llama"), ("re:.*0.mlp.gate_proj",)
    report = duotone.quantize(source, tmp_path / "out", ignore=ignore, equalize=0.5, calibration=(str(text_file),), **QUICK)
    original, written = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    reader = WeightReader(open_source(tmp_path / "out"))
    for norm, linears in TEXT_ADAPTERS[0].residual.norms:
        for block in ("model.layers.0", "model.layers.1"):
            s_K = original[f"{block}.{norm}.weight"].float() / written[f"{block}.{norm}.weight"].float()
            assert float(s_K.log2().std()) > 0.5
            for name in (f"{block}.{linear}" for linear in linears):
                w_NK = original[f"{name}.weight"].float()
                if f"{name}.weight" in written:
                    assert name == "model.layers.0.mlp.gate_proj"
                    assert torch.equal(written[f"{name}.weight"].float(), w_NK * s_K)
                    assert torch.equal(torch.frexp(s_K).mantissa, torch.full_like(s_K, 0.5))
                else:
                    assert ((dequantize(reader.read(name)) / s_K - w_NK).norm() / w_NK.norm()) < 0.25
    others = [name for name in written if name in original and not name.endswith((*NORMS, "gate_proj.weight"))]
    assert others and all(torch.equal(written[name], original[name]) for name in others)
    assert "equalized: channels between 4 norms and the linears that read them, exponent 0.5" in report.notes
    assert json.loads((tmp_path / "out" / "duotone.json").read_text())["settings"]["equalize"] == 0.5


@pytest.mark.parametrize("method", ["gptq", "dpq-paper", "dpq"])
def test_equalization_takes_out_what_was_spread(spread_model: ModelMaker, text_file: Path, tmp_path: Path, method: str) -> None:
    """Columns that share a group's scale across 64-fold sizes lose the small ones; equalized, none does."""
    source, errors = spread_model("llama"), []
    tokens = calibration_tokens(source, text_file)
    with torch.no_grad():
        original = load(source, torch.float32, "cpu")(tokens).logits
        for name, alpha in (("plain", None), ("equalized", 0.5)):
            duotone.quantize(source, tmp_path / name, method=method, equalize=alpha, calibration=(str(text_file),), **QUICK)
            found = load(tmp_path / name, torch.float32, "cpu")(tokens).logits
            errors.append(float((found - original).norm() / original.norm()))
    assert errors[1] < 0.9 * errors[0], errors


@pytest.mark.parametrize("transforms", [{"rotate": True}, {"equalize": 0.5}], ids=["rotated", "equalized"])
def test_high_effort_sees_the_model_that_is_rounded(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path, transforms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curvature is that of the rotated original (an equalized one has the same outputs); the search finds better codes."""
    from duotone.solver.couple import couple

    source = tiny_model(initializer_range=0.15, tie_word_embeddings=True, **SMALL)
    given: dict[str, list[Tensor]] = {}
    losses: list[tuple[float, float]] = []

    def loss(problems: list[Problem], weights: list[QuantizedWeight], o_NN: Tensor) -> float:
        error = torch.cat([problem.weight - dequantize(weight) for problem, weight in zip(problems, weights, strict=True)])
        statistics = problems[0].statistics
        assert statistics is not None
        return float(((o_NN @ error @ statistics.hessian) * error).sum())

    def spy(problems: list[Problem], weights: list[QuantizedWeight], curvature: list[Tensor]) -> Any:
        given[problems[0].layer] = curvature
        solved = couple(problems, weights, curvature)
        if ".layers.0.self_attn.q_proj" in problems[0].layer:  # nothing has drifted yet: the target is the weight
            losses.append(
                (loss(problems, weights, curvature[0]), loss(problems, [weight for weight, _ in solved], curvature[0]))
            )
        return solved

    monkeypatch.setattr("duotone.solving.couple", spy)
    monkeypatch.setattr("duotone.solver.couple.BEAM_WIDTH", 4)
    duotone.quantize(source, tmp_path / "out", effort="high", calibration=(str(text_file),), **transforms, **QUICK)
    groups = [group for block in make_plan(open_source(source), QuantizeConfig()).blocks for group in block.shared_inputs]
    model = filled(rotated(source)).float() if transforms.get("rotate") else load(source, torch.float32, "cpu")
    assert deviation(given, in_one_pass(model, groups, [calibration_tokens(source, text_file)], 0)) <= 1e-4
    assert losses and all(after < before for before, after in losses)
    assert len(find_linears(load(tmp_path / "out", device="cpu"))) == 1
