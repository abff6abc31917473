# Shapes: N out_features, K in_features.
"""W8A8 beside W4A8: what a rule asks for is what is written, run and read by others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import duotone
from duotone.checking import check
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.errors import DuotoneError
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton, find_linears
from duotone.qweight import Fp8Weight, QuantizedWeight, dequantize
from duotone.runtime.linear import QuantizedLinear
from duotone.scheme import GAUDI, HOPPER, Fp8Scheme, Scheme, Target
from duotone.solver.fp8 import fp8_scale, round_fp8, solve_fp8
from duotone.solver.methods import Problem, SolverOptions, shared_factor
from duotone.solver.statistics import Statistics
from tests.models.test_architectures import logits, run_by_hand
from tests.test_cli import invoke
from tests.test_interop import reader_weight

ModelMaker = Callable[..., Path]
QUICK: dict[str, Any] = {"samples": 8, "seq_len": 64, "device": "cpu"}
UNTIED = {"tie_word_embeddings": False}


def quantized(model: Path, out: Path, text_file: Path, *rules: str, **options: Any) -> Path:
    duotone.quantize(model, out, calibration=(str(text_file),), rules=rules, **QUICK, **options)
    return out


# ---- the weight


@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=lambda target: target.name)
def test_invariants_are_checked_at_birth(target: Target) -> None:
    """Each field that does not fit is named."""
    values, outer = torch.ones(4, 8).to(torch.float8_e4m3fn), torch.ones(4 if target is HOPPER else 1)
    Fp8Weight(values, outer, Fp8Scheme(target))
    beyond = torch.full((4, 8), 448.0 if target is GAUDI else torch.nan).to(torch.float8_e4m3fn)
    for wrong, name in (
        ((values[0], outer), "values"),
        ((values.float(), outer), "values"),
        ((beyond, outer), "values"),
        ((values, outer[:0]), "outer_scale"),
        ((values, -outer), "outer_scale"),
        ((values, outer * (1 + 2**-12)), "outer_scale"),
    ):
        with pytest.raises(ValueError, match=name):
            Fp8Weight(*wrong, Fp8Scheme(target))


@settings(max_examples=30, deadline=None)
@given(target=st.sampled_from([HOPPER, GAUDI]), size=st.floats(-80, 30), seed=st.integers(0, 1000))
def test_nearest_value_of_a_good_scale(target: Target, size: float, seed: int) -> None:
    """No value is nearer than the one chosen; a weight moves by half a step of its octave at most, whatever its size."""
    w_NK = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    w_NK[1] = 0
    weight = round_fp8(w_NK, Fp8Scheme(target))
    grid = target.fp8.decode(torch.arange(256, dtype=torch.uint8))
    grid = grid[torch.isfinite(grid)] * weight.outer_scale.double()[:, None]  # [N or 1, values]
    error = (w_NK.double() - dequantize(weight).double()).abs()
    nearest = (w_NK.double()[..., None] - grid[:, None]).abs().amin(-1)
    torch.testing.assert_close(error, nearest, rtol=1e-6, atol=2.0 ** (size - 30))
    step = w_NK.abs() / 16 + target.fp8.smallest_subnormal / 2 * weight.outer_scale[:, None]
    assert bool((error <= step * (1 + 2**-8)).all())


def naive(w_NK: Tensor, hessian_KK: Tensor, damping: float, outer: Tensor, target: Target) -> Tensor:
    """GPTQ as published, from the inverse, in float64; each column to the nearest FP8 value."""
    w_NK, h_KK = w_NK.double().clone(), hessian_KK.double().clone()
    h_KK.diagonal().add_(damping * h_KK.diagonal().mean())
    upper_KK = torch.linalg.cholesky(torch.linalg.inv(h_KK), upper=True)
    v_NK = torch.empty_like(w_NK)
    for k in range(w_NK.shape[1]):
        v_NK[:, k] = target.fp8.round(w_NK[:, k] / outer).double() * outer
        error_N = (w_NK[:, k] - v_NK[:, k]) / upper_KK[k, k]
        w_NK[:, k:] -= error_N[:, None] * upper_KK[k, k:]
    return v_NK


@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=lambda target: target.name)
def test_column_loop_is_gptq_on_fp8s_grid(target: Target) -> None:
    """Against the published loop; the loss is far below that of rounding."""
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(400, 60, generator=generator) @ torch.randn(60, 60, generator=generator)
    w_NK = torch.randn(20, 60, generator=generator)
    statistics = Statistics(x_TK.T @ x_TK, 400)
    options = SolverOptions("none")
    factor = shared_factor(statistics, Scheme(target), options, "layer")
    problem = Problem("layer", w_NK, statistics, factor, Scheme(target), options, fp8=True)
    weight, report = solve_fp8("gptq", problem)
    expected = naive(w_NK, statistics.hessian, options.damping_frac, fp8_scale(w_NK, target), target)
    agree = (dequantize(weight).double() - expected).abs() < 1e-5
    assert agree.double().mean() > 0.99  # a tie that float32 breaks otherwise moves what comes behind it
    rounded = solve_fp8("rtn", Problem("layer", w_NK, statistics, None, Scheme(target), options, fp8=True))[1]
    assert report.output_error is not None and rounded.output_error is not None
    assert report.output_error < 0.7 * rounded.output_error
    assert report.scheme == "w8a8"


# ---- from the rule to the logits


@pytest.mark.parametrize("method", ["rtn", "dpq"])
@pytest.mark.parametrize(
    ("model_type", "target", "sizes"),
    [
        ("qwen2", "hopper", UNTIED),
        ("qwen2", "gaudi", {}),
        ("gpt2", "hopper", {"n_embd": 128, "n_layer": 2, "n_head": 4}),
        ("mixtral", "hopper", {"num_local_experts": 4}),
    ],
)
def test_runs_what_was_written(
    tmp_path: Path, tiny_model: ModelMaker, text_file: Path, model_type: str, target: str, sizes: dict[str, Any], method: str
) -> None:
    """Logits are those of the original with the contract in each linear, in FP8 where the rules say so, the head included."""
    rules = ["re:.*(down_proj|c_proj)$=w8a8", *(["lm_head=w8a8"] if sizes == UNTIED else [])]
    folder = tiny_model(model_type, **sizes)
    out = quantized(folder, tmp_path / "out", text_file, *rules, method=method, target=target)
    source = open_source(out)
    by_hand, found = duotone.load(folder, torch.float32, "cpu"), duotone.load(out, torch.float32, "cpu")
    named = named_source(source, build_skeleton(source.config, torch.float32))
    layers, reader = packed_layers(named), WeightReader(named)
    in_fp8 = {layer for layer in layers if isinstance(reader.read(layer), Fp8Weight)}
    assert in_fp8 == {layer for layer in layers if layer.endswith(("down_proj", "c_proj", "lm_head"))}
    assert in_fp8 and set(layers) - in_fp8 and ("lm_head" in in_fp8) == (sizes == UNTIED)
    ours = {name for name, module in found.named_modules() if isinstance(module, QuantizedLinear)}
    assert ours == set(layers)
    for name in set(layers) & {name for name, linear in find_linears(by_hand).items() if linear.bias is not None}:
        by_hand.get_parameter(f"{name}.bias").data = found.get_parameter(f"{name}.bias").float()
    run_by_hand(by_hand, reader, layers)
    expected = logits(by_hand)
    assert ((logits(found) - expected).norm() / expected.norm()).item() < 0.02


def test_eight_bits_are_nearer(tmp_path: Path, tiny_model: ModelMaker, text_file: Path) -> None:
    """All linears in FP8: logits much nearer; some: their weights are. Sidecar, `inspect`, `explain`, report know which."""
    folder = tiny_model("llama")
    exact = duotone.load(folder, torch.float32, "cpu")
    original, errors, of_down = logits(exact), [], []
    for name, rules in (("four", ()), ("mixed", ("re:.*down_proj=w8a8",)), ("eight", ("re:.*_proj=w8a8",))):
        found = duotone.load(quantized(folder, tmp_path / name, text_file, *rules), torch.float32, "cpu")
        errors.append((logits(found) - original).norm().item())
        down = {path: module.dequantize() for path, module in found.named_modules() if path.endswith("down_proj")}
        of_down.append(sum((exact.get_submodule(path).weight - weight).norm().item() for path, weight in down.items()))
    assert 1.1 * errors[0] > errors[1] > 2 * errors[2]
    # What a linear aims at makes up for the errors of others, so it is nearest where those are in FP8, too.
    assert of_down[0] > 2 * of_down[1] > 2 * of_down[2] > 0
    facts = json.loads((tmp_path / "mixed" / "duotone.json").read_text())
    schemes = {layer: entry["scheme"] for layer, entry in facts["layers"].items()}
    assert set(schemes.values()) == {"w4a8", "w8a8"}
    assert all((scheme == "w8a8") == layer.endswith("down_proj") for layer, scheme in schemes.items())
    assert 4.5 < facts["bits_per_weight"] < 6
    seen = {layer["layer"]: layer for layer in invoke("inspect", tmp_path / "mixed", "--json").json()["layers"]}
    assert all(seen[layer]["scheme"].startswith(scheme) for layer, scheme in schemes.items())
    ran = {layer["layer"]: layer for layer in invoke("explain", tmp_path / "mixed", "--json").json()["layers"]}
    assert all("not FP8 weights" in ran[layer]["refusals"][0] for layer, scheme in schemes.items() if scheme == "w8a8")
    page = invoke("report", tmp_path / "mixed", "--format", "json", "--out", tmp_path / "page.json")
    assert page.code == 0, page.err
    shown = json.loads((tmp_path / "page.json").read_text())
    assert all((4 < layer["code_bits"] <= 8) == (schemes[layer["layer"]] == "w8a8") for layer in shown["linears"])


def test_first_rule_that_names_a_linear_decides(tmp_path: Path, tiny_model: ModelMaker) -> None:
    """Also one that stays BF16 by default; --ignore comes before, and a shared weight is left alone with its reason."""
    rules = ("re:.*layers\\.0.*down_proj=w4a8", "re:.*up_proj=bf16", "re:.*(up|down)_proj=w8a8", "re:.*layers\\.1.*=w8a8")
    folder = tiny_model("llama", num_hidden_layers=2)
    report = duotone.quantize(
        folder, tmp_path / "out", rules=rules, ignore=("model.layers.1.self_attn.q_proj",), method="rtn", device="cpu"
    )
    found = {layer.layer.removeprefix("model.layers."): layer.scheme for layer in report.layers}
    assert found["0.mlp.down_proj"] == found["0.mlp.gate_proj"] == "w4a8"
    assert found["1.mlp.down_proj"] == found["1.self_attn.k_proj"] == "w8a8"
    assert report.kept["model.layers.0.mlp.up_proj"] == "ignored by the rule re:.*up_proj=bf16"
    assert report.kept["model.layers.1.self_attn.q_proj"] == "ignored by the rule model.layers.1.self_attn.q_proj"
    tied = duotone.quantize(
        tiny_model("llama", tie_word_embeddings=True), tmp_path / "tied", rules=("re:.*=w8a8",), method="rtn", device="cpu"
    )
    assert tied.kept == {"lm_head": "its weight is also model.embed_tokens.weight"}
    assert {layer.scheme for layer in tied.layers} == {"w8a8"}


@pytest.mark.parametrize(
    ("rule", "target", "sentence"),
    [
        ("re:.*nothing=w8a8", "hopper", "matches no linear"),
        ("model.layers.0.mlp.down_proj", "hopper", "expected NAME=SCHEME"),
        ("re:.*down_proj=w2a8", "hopper", "one of w4a8, w8a8, bf16"),
        ("re:.*(=w8a8", "hopper", "not a regular expression"),
        ("lm_head=w4a8", "hopper", "cannot have 4 bits"),
        ("lm_head=w8a8", "gaudi", "needs the size of its input"),
    ],
)
def test_a_rule_that_cannot_be_followed(
    tmp_path: Path, tiny_model: ModelMaker, text_file: Path, rule: str, target: str, sentence: str
) -> None:
    """One sentence, exit code 2, nothing written."""
    model = tiny_model("llama", **UNTIED)
    ended = invoke("quantize", model, tmp_path / "out", "--rule", rule, "--target", target, "--calibration", text_file)
    assert ended.code == 2 and sentence in " ".join(ended.err.split()), ended.err
    assert not (tmp_path / "out").exists()


def test_a_module_given_in_python(tmp_path: Path) -> None:
    """Its last projection, which calibration's walk does not pass, and an inner one; saved and loaded bit for bit."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.Linear(64, 24))
    batches = [torch.randn(50, 32) for _ in range(3)]
    made = duotone.quantize_module(module, batches, rules=("3=w8a8", "0=w8a8"), group_size=32, device="cpu")
    kinds = {name: type(weight) for name, weight in made.weights.items()}
    assert kinds == {"0": Fp8Weight, "2": QuantizedWeight, "3": Fp8Weight}
    made.save(tmp_path / "saved")
    again = duotone.load_module(module, tmp_path / "saved", batches[0], device="cpu")
    assert torch.equal(again(batches[0]), made.module(batches[0]))


# ---- what others make of it


@pytest.fixture(scope="module")
def mixed(tiny_model: ModelMaker, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 where down is projected, for q, k and v of the first block, and for the head."""
    rules = ("re:.*down_proj=w8a8", "re:.*layers\\.0.*\\.[qkv]_proj=w8a8", "lm_head=w8a8")
    out = tmp_path_factory.mktemp("mixed") / "out"
    return quantized(tiny_model("qwen2", **UNTIED), out, text_file, *rules)


def test_transformers_reads_both_formats(mixed: Path) -> None:
    """compressed-tensors' own reader has our FP8 weights up to BF16's rounding of the product, and nothing is left over."""
    from compressed_tensors.compressors import decompress_module
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(mixed, output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    reader = WeightReader(open_source(mixed))
    layers = packed_layers(open_source(mixed))
    assert {type(reader.read(layer)) for layer in layers} == {Fp8Weight, QuantizedWeight}
    for layer in layers:
        ours, module = dequantize(reader.read(layer)), model.get_submodule(layer)
        if isinstance(reader.read(layer), Fp8Weight) and module.weight.dtype == torch.float8_e4m3fn:
            decompress_module(module)
        theirs = reader_weight(module).float()
        if isinstance(reader.read(layer), Fp8Weight):
            torch.testing.assert_close(theirs, ours, rtol=2**-8, atol=0)
        else:
            assert (ours - theirs).norm() / ours.norm() < 0.04, layer


def test_our_linears_in_transformers(mixed: Path) -> None:
    """With Duotone asked for, logits are those of duotone.load bit for bit."""
    from transformers import AutoModelForCausalLM

    with duotone.use_in_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(duotone.load(mixed, torch.float32, "cpu")))


def test_check_knows_both(mixed: Path, tmp_path: Path, tiny_model: ModelMaker, text_file: Path) -> None:
    """vLLM takes what is of one precision where it fuses, and nothing else; exports that have no place for FP8 refuse."""
    (found,) = check(mixed, ["vllm"], ["h100"])
    schemes = {layer.layer: layer.outcome for layer in found.layers}
    assert found.loads and schemes["model.layers.0.mlp.gate_proj"] == "w4a8"
    assert {schemes[f"model.layers.0.{name}"] for name in ("mlp.down_proj", "self_attn.q_proj")} == {"w8a8"}
    half = quantized(tiny_model("qwen2"), tmp_path / "half", text_file, "re:.*k_proj=w8a8", method="rtn")
    (found,) = check(half, ["vllm"], ["h100"])
    assert any("k_proj is in FP8, linears it is fused with are not" in reason for reason in found.reasons)
    refused = invoke("export", mixed, tmp_path / "gptq", "--format", "gptq")
    assert refused.code == 2 and "is stored in FP8" in " ".join(refused.err.split())
    assert invoke("export", mixed, tmp_path / "dense", "--format", "dense-bf16", "--allow-lossy").code == 0
    dense, ours = open_source(tmp_path / "dense"), open_source(mixed)
    for layer in packed_layers(ours):
        expected = dequantize(WeightReader(ours).read(layer)).bfloat16()
        assert torch.equal(dense.load([f"{layer}.weight"])[f"{layer}.weight"], expected), layer


def test_damaged_files_are_named(mixed: Path, tmp_path: Path) -> None:
    """A second config group of another kind, and a scale of the wrong shape."""
    for name, change in (("group", "config"), ("scale", "scale")):
        folder = tmp_path / name
        shutil.copytree(mixed, folder)
        if change == "config":
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"]["config_groups"]["group_1"]["weights"]["num_bits"] = 6
            (folder / "config.json").write_text(json.dumps(config))
        else:
            tensors = load_file(folder / "model.safetensors")
            tensors["lm_head.weight_scale"] = tensors["lm_head.weight_scale"][:-1].contiguous()
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(DuotoneError, match="config group" if change == "config" else "lm_head.weight_scale"):
            duotone.load(folder, device="cpu")
