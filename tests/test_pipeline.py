"""The whole line on tiny models: quantize, read back, run, and compare with the contract done by hand."""

import dataclasses
import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import duotone
from duotone.calibrate.data import draw_windows
from duotone.calibrate.walk import BlockWalk
from duotone.checkpoint.hub import companions
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.sidecar import RUN_RECORD, read_record
from duotone.checkpoint.source import open_source
from duotone.contract import quantize_activations
from duotone.errors import DuotoneError
from duotone.estimate import estimate
from duotone.models.skeleton import find_linears
from duotone.models.tokenizer import load_tokenizer
from duotone.plan import make_plan
from duotone.qweight import QuantizedWeight, dequantize, fp8_values
from duotone.runtime.linear import QuantizedLinear
from duotone.runtime.load import load
from duotone.settings import QuantizeConfig
from duotone.solver.couple import couple
from duotone.solver.methods import METHODS, LayerReport, Problem
from tests.calibrate.test_curvature import deviation, in_one_pass

ModelMaker = Callable[..., Path]
QUICK: dict[str, Any] = {"samples": 8, "seq_len": 64, "device": "cpu"}


def linears_of(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def folder_hashes(folder: Path) -> dict[str, str]:
    """Of all files but the one that tells of times."""
    files = (file for file in sorted(folder.iterdir()) if file.name != RUN_RECORD)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("target", ["hopper", "gaudi"])
def test_runs_what_was_written(tiny_model: ModelMaker, text_file: Path, tmp_path: Path, model_type: str, target: str) -> None:
    """Loaded logits equal, to float32 rounding, the original model with the contract written out in each linear.

    Biases (Qwen2 has some) are those of the checkpoint, which make up for the weights.
    """
    source = tiny_model(model_type)
    duotone.quantize(source, tmp_path / "out", target=target, calibration=(str(text_file),), **QUICK)
    model = load(tmp_path / "out", torch.float32, "cpu")
    by_hand = load(source, torch.float32, "cpu")
    ours = linears_of(model)
    assert set(ours) == {name for name in find_linears(by_hand) if name != "lm_head"}
    reader, written = WeightReader(open_source(tmp_path / "out")), load_file(tmp_path / "out" / "model.safetensors")
    for name in ours:
        weight = reader.read(name)
        linear = by_hand.get_submodule(name)
        if linear.bias is not None:
            assert not torch.equal(written[f"{name}.bias"], linear.bias.bfloat16())
            linear.bias.data = written[f"{name}.bias"].float()

        def forward(x: torch.Tensor, weight=weight, linear=linear) -> torch.Tensor:
            x8, scale = quantize_activations(x, weight.scheme.target, weight.input_scale)
            y = (x8.double() @ fp8_values(weight).double().T) * weight.outer_scale.double() * scale.double()
            return (y if linear.bias is None else y + linear.bias.double()).float()

        linear.forward = forward
    tokens = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = by_hand(tokens).logits, model(tokens).logits
    # A float32 sum that falls on another side of an FP8 rounding moves one activation by 1/16 at most; few do.
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3
    assert (found - expected).abs().median().item() < 1e-4 * expected.abs().max().item()


@pytest.mark.parametrize("method", ["rtn", "gptq", "dpq-paper", "dpq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_methods_keep_the_model(tiny_model: ModelMaker, text_file: Path, tmp_path: Path, method: str, symmetric: bool) -> None:
    """Every method, symmetric or not, gives weights within INT4's reach of the original and lists each linear once."""
    report = duotone.quantize(
        tiny_model(), tmp_path / "out", method=method, symmetric=symmetric, calibration=(str(text_file),), **QUICK
    )
    assert [layer.layer for layer in report.layers] == make_plan(open_source(tiny_model()), QuantizeConfig()).layers
    assert all(0 < layer.weight_error < 0.05 for layer in report.layers)
    assert (report.calibration is None) == (method == "rtn")
    original = load_file(tiny_model() / "model.safetensors")
    for name, linear in linears_of(load(tmp_path / "out", device="cpu")).items():
        assert linear.scheme.symmetric is symmetric
        error = (linear.dequantize() - original[f"{name}.weight"].float()).norm()
        assert error / original[f"{name}.weight"].float().norm() < 0.25


def test_solvers_beat_rounding_on_their_own_objective(bundled: Path, tmp_path: Path) -> None:
    """On real weights, output error under the layer's Hessian: dpq < dpq-paper < gptq."""
    text = (str(bundled / "calibration.txt"),)
    mean: dict[str, float] = {}
    for method in ("gptq", "dpq-paper", "dpq"):
        report = duotone.quantize(
            bundled, tmp_path / method, method=method, calibration=text, samples=16, seq_len=128, device="cpu"
        )
        first_block = [layer.output_error for layer in report.layers if ".layers.0." in layer.layer]
        mean[method] = sum(error or 0.0 for error in first_block) / len(first_block)
    assert mean["dpq"] < mean["dpq-paper"] < mean["gptq"], mean


def test_same_seed_same_bytes(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """Two runs write identical folders; another seed draws other windows."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        duotone.quantize(tiny_model(), tmp_path / name, calibration=(str(text_file),), seed=seed, **QUICK)
    assert folder_hashes(tmp_path / "a") == folder_hashes(tmp_path / "b")
    assert folder_hashes(tmp_path / "a")["model.safetensors"] != folder_hashes(tmp_path / "c")["model.safetensors"]


def test_times_lie_in_a_file_of_their_own(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """duotone-run.json has what the report had, but for the last moments; no path of this machine; no model copies it on."""
    report = duotone.quantize(tiny_model(), tmp_path / "out", calibration=(str(text_file),), **QUICK)
    record = read_record(tmp_path / "out", RUN_RECORD)
    assert record is not None and record["model"] == "tiny" and record["resumed_at"] is None
    assert (record["original_bytes"], record["weight_bytes"]) == (report.original_bytes, report.weight_bytes)
    assert record["seconds"].keys() == report.seconds.keys() == record["phase_bytes"].keys()
    assert all(0 < record["seconds"][phase] <= spent for phase, spent in report.seconds.items())
    assert 0 < max(record["phase_bytes"].values()) <= record["peak_bytes"]
    assert record["machine"]["calibration dtype"] == "float32" and record["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in (tmp_path / "out" / RUN_RECORD).read_text()
    assert (tmp_path / "out" / RUN_RECORD) not in companions(tmp_path / "out")
    (tmp_path / "out" / RUN_RECORD).write_text('{"format_version": 2}')
    with pytest.raises(DuotoneError, match="found format_version 2, expected 1: update duotone"):
        read_record(tmp_path / "out", RUN_RECORD)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_calibration_in_bfloat16_is_as_good(tiny_model: ModelMaker, text_file: Path, tmp_path: Path, model_type: str) -> None:
    """Other weights, the KL of the model in float32 within a twentieth; a small model takes float32 unless asked otherwise."""
    source, kl = tiny_model(model_type, initializer_range=0.15), {}
    for dtype in ("auto", "float32", "bfloat16"):
        report = duotone.quantize(source, tmp_path / dtype, dtype=dtype, calibration=(str(text_file),), **QUICK)
        assert report.calibration is not None
        assert report.calibration["dtype"] == ("float32" if dtype == "auto" else dtype)
        assert all(error is not None and 0 < error < 0.05 for error in (layer.output_error for layer in report.layers))
        if dtype != "auto":
            held = duotone.evaluate(tmp_path / dtype, [str(text_file)], reference=source, seq_len=64, samples=64, device="cpu")
            kl[dtype] = held.kl
    hashes = [folder_hashes(tmp_path / dtype) for dtype in ("auto", "float32", "bfloat16")]
    assert hashes[0] == hashes[1]
    assert hashes[1]["model.safetensors"] != hashes[2]["model.safetensors"]
    assert kl["bfloat16"] == pytest.approx(kl["float32"], rel=0.05) and 0 < kl["float32"] < 0.2


def test_shards_do_not_change_the_model(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint cut into many shards holds the same tensors as one in a single file, and loads."""
    duotone.quantize(tiny_model(), tmp_path / "one", calibration=(str(text_file),), **QUICK)
    from duotone.checkpoint import writer

    monkeypatch.setattr(writer.CheckpointWriter.__init__, "__defaults__", (100_000, None))
    duotone.quantize(tiny_model(), tmp_path / "many", calibration=(str(text_file),), **QUICK)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3
    many = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert many.keys() == one.keys() and all(torch.equal(many[name], one[name]) for name in one)
    assert len(linears_of(load(tmp_path / "many", device="cpu"))) == 14


def test_ignored_layers_are_listed_and_copied(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """An ignored linear keeps its bytes, is named with its reason, and its group still works without it."""
    report = duotone.quantize(
        tiny_model(),
        tmp_path / "out",
        ignore=("re:.*down_proj", "model.layers.0.self_attn.q_proj"),
        calibration=(str(text_file),),
        **QUICK,
    )
    assert report.kept["model.layers.1.mlp.down_proj"] == "ignored by the rule re:.*down_proj"
    assert "lm_head" in report.kept and len(report.layers) == 14 - 3
    written, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(tiny_model() / "model.safetensors")
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        assert torch.equal(written[name], original[name])
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == sorted(report.kept)


def test_block_inputs_come_from_the_quantized_prefix(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """The second block's Hessian changes when the first block is quantized otherwise, the first block's does not."""
    errors: dict[str, list[float | None]] = {}
    for name, ignore in (("plain", ()), ("kept", ("re:model.layers.0.mlp.*",))):
        report = duotone.quantize(tiny_model(), tmp_path / name, ignore=ignore, calibration=(str(text_file),), **QUICK)
        errors[name] = [
            layer.output_error for layer in report.layers if layer.layer.endswith(("0.self_attn.q_proj", "1.self_attn.q_proj"))
        ]
    assert errors["plain"][0] == errors["kept"][0]
    assert errors["plain"][1] != errors["kept"][1]


def spied(monkeypatch: pytest.MonkeyPatch, method: str) -> dict[str, Problem]:
    """Every problem that the method will be given, by layer."""
    given: dict[str, Problem] = {}
    solve = METHODS[method].solve

    def spy(problem: Problem) -> tuple[QuantizedWeight, LayerReport]:
        given[problem.layer] = problem
        return solve(problem)

    monkeypatch.setitem(METHODS, method, dataclasses.replace(METHODS[method], solve=spy))
    return given


def plain_model(source: Path, out: Path) -> PreTrainedModel:
    """The original float32 model with the dequantized weights and the biases of `out`: what calibration runs."""
    model, reader = load(source, torch.float32, "cpu"), WeightReader(open_source(out))
    written = load_file(out / "model.safetensors")
    for name in packed_layers(open_source(out)):
        linear = model.get_submodule(name)
        linear.weight.data = dequantize(reader.read(name))
        if linear.bias is not None:
            linear.bias.data = written[f"{name}.bias"].float()
    return model


def calibration_tokens(source: Path, text_file: Path) -> Tensor:
    """The tokens that a run with QUICK calibrates on."""
    return draw_windows(load_tokenizer(source), [str(text_file)], QUICK["seq_len"], QUICK["samples"], 0).tokens


@pytest.mark.parametrize("target", ["hopper", "gaudi"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_drift_brings_the_model_nearer_to_the_original(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path, model_type: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Final hidden states on the calibration tokens: nearer to the original's than with the same method blind to drift."""
    source = tiny_model(model_type, initializer_range=0.15)
    tokens = calibration_tokens(source, text_file)
    with torch.no_grad():
        original = load(source, torch.float32, "cpu").model(tokens).last_hidden_state
        errors = []
        for name in ("seeing", "blind"):
            duotone.quantize(source, tmp_path / name, target=target, calibration=(str(text_file),), **QUICK)
            found = plain_model(source, tmp_path / name).model(tokens).last_hidden_state
            errors.append(float((found - original).square().sum() / original.square().sum()))
            monkeypatch.setitem(METHODS, "dpq", dataclasses.replace(METHODS["dpq"], drift=False))
    assert errors[0] < 0.85 * errors[1], errors


def mean_outputs(model: nn.Module, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """Means over all tokens of what the linears give."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        return lambda *call: found.update({name: call[-1].flatten(0, 1).mean(0)})

    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    with torch.no_grad():
        model(tokens)
    return found


def test_biases_keep_the_mean_output(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """Where a linear has a bias (Qwen2's q, k, v) its mean output on the calibration is the original's, to BF16's precision."""
    source = tiny_model("qwen2", initializer_range=0.15)
    duotone.quantize(source, tmp_path / "out", calibration=(str(text_file),), **QUICK)
    tokens, names = (
        calibration_tokens(source, text_file),
        [f"model.layers.{i}.self_attn.{c}_proj" for i in range(2) for c in "qkv"],
    )
    original, quantized = load(source, torch.float32, "cpu"), plain_model(source, tmp_path / "out")
    wanted, found = (mean_outputs(model, names, tokens) for model in (original, quantized))
    for name in names:
        before, bias = (model.get_submodule(name).bias for model in (original, quantized))
        assert bool(((found[name] - wanted[name]).abs() <= 2.0**-8 * bias.abs() + 1e-4).all())
        assert (bias - before).abs().max() > 1e-2, "the biases hardly moved: nothing was tested"


def test_dpq_solves_for_what_its_linears_read(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H of each linear is taken in the quantized model itself; covariances where a bias takes up the mean."""
    source = tiny_model("qwen2", initializer_range=0.15)
    given: dict[str, Problem] = {}
    solve = METHODS["dpq"].solve

    def spy(problem: Problem) -> tuple[QuantizedWeight, LayerReport]:
        given[problem.layer] = problem
        return solve(problem)

    monkeypatch.setitem(METHODS, "dpq", dataclasses.replace(METHODS["dpq"], solve=spy))
    duotone.quantize(source, tmp_path / "out", calibration=(str(text_file),), **QUICK)
    model, seen = plain_model(source, tmp_path / "out"), {}

    def watch(name: str) -> Any:
        return lambda _, x: seen.update({name: x[0].flatten(0, 1).double()})

    for name in given:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model(calibration_tokens(source, text_file))
    assert len(given) == 14
    for name, problem in given.items():
        x = seen[name] - seen[name].mean(0) if name.endswith(("q_proj", "k_proj", "v_proj")) else seen[name]
        expected, statistics = x.T @ x / len(x), problem.statistics
        assert statistics is not None and (statistics.hessian.double() - expected).norm() < 1e-4 * expected.norm()
        writes = name.endswith(("o_proj", "down_proj"))
        assert (statistics.stream_target is not None, statistics.input_drift is not None) == (writes, not writes)
        # The first linears of a model read what they always did; no other does.
        first = name.startswith("model.layers.0.self_attn.") and "o_proj" not in name
        assert statistics.input_drift is None or bool(statistics.input_drift.any()) != first


@pytest.mark.parametrize("method", ["gptq", "dpq-paper"])
def test_methods_that_take_a_block_as_a_whole(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each linear is given X^T X of the block with its original weights behind the quantized prefix, and nothing else.

    Against a plain reference of two passes a block: one with the original weights, watched, then one with the quantized ones.
    """
    source, text = tiny_model("qwen2", initializer_range=0.15), (str(text_file),)
    given = spied(monkeypatch, method)
    duotone.quantize(source, tmp_path / "out", method=method, calibration=text, **QUICK)
    model, quantized = load(source, torch.float32, "cpu"), plain_model(source, tmp_path / "out")
    tokens = calibration_tokens(source, text_file)
    for index in range(2):
        for name, module in model.model.layers[index].named_modules():
            if isinstance(module, nn.Linear):
                seen: list[Tensor] = []
                handle = module.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].flatten(0, 1).double()))
                with torch.no_grad():
                    model(tokens)
                handle.remove()
                statistics = given[f"model.layers.{index}.{name}"].statistics
                assert statistics is not None and statistics.tokens == len(seen[0])
                assert statistics.input_drift is None and statistics.stream_target is None
                expected = seen[0].T @ seen[0] / len(seen[0])
                assert (statistics.hessian.double() - expected).norm() < 1e-5 * expected.norm()
        model.model.layers[index].load_state_dict(quantized.model.layers[index].state_dict())
    original = load_file(source / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], bias) for name, bias in original.items() if name.endswith("proj.bias"))


@pytest.mark.parametrize("method", ["gptq", "dpq"])
def test_batches_that_walk_anew_give_the_same_bytes(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for batches that wait inside a block costs time only."""
    monkeypatch.setattr("duotone.calibrate.data.BATCH_POSITIONS", 192)
    begun: dict[str, int] = {}
    run = BlockWalk._run
    for name, budget in (("wait", None), ("anew", 1e-6)):
        monkeypatch.setattr(BlockWalk, "_run", counted(run, name, begun))
        options = {"method": method, "calibration": (str(text_file),), "memory_budget": budget}
        duotone.quantize(tiny_model("qwen2"), tmp_path / name, **options, **QUICK)
    assert folder_hashes(tmp_path / "wait") == folder_hashes(tmp_path / "anew")
    assert begun["anew"] > 3 * begun["wait"]


def counted(run: Callable[..., object], name: str, counts: dict[str, int]) -> Callable[..., object]:
    """The same function, counting its calls under a name."""

    def counting(*given: object) -> object:
        counts[name] = counts.get(name, 0) + 1
        return run(*given)

    return counting


def test_the_plan_knows_stops_and_streams(tiny_model: ModelMaker) -> None:
    """A stop before each group that is left, by its first linear; streams of the writers that are left."""
    source, path = open_source(tiny_model()), "model.layers.1"
    block = make_plan(source, QuantizeConfig()).blocks[1]
    stops = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert list(block.stops.items()) == [(f"{path}.{name}", name) for name in stops]
    assert block.streams == {
        f"{path}.self_attn.o_proj": "input_layernorm",
        f"{path}.mlp.down_proj": "post_attention_layernorm",
    }
    ignore = ("re:.*q_proj", f"{path}.self_attn.o_proj", "re:.*layers.0.*")
    nothing, block = make_plan(source, QuantizeConfig(ignore=ignore)).blocks
    assert nothing.stops == nothing.streams == {}
    assert list(block.stops.values()) == ["self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert block.streams == {f"{path}.mlp.down_proj": "post_attention_layernorm"}


def test_a_block_of_which_nothing_is_quantized_is_walked_through(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path
) -> None:
    """Nothing is observed in it, and the next one is calibrated on all that comes out of it."""
    ignore = ("re:model.layers.0.*",)
    report = duotone.quantize(tiny_model(), tmp_path / "out", ignore=ignore, calibration=(str(text_file),), **QUICK)
    assert len(report.layers) == 7 and all(layer.tokens == 512 for layer in report.layers)
    assert all(layer.output_error is not None and layer.output_error < 0.05 for layer in report.layers)


def test_static_scales_cover_what_was_seen(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """`gaudi` stores powers of two; linears that read one input share one activation scale."""
    duotone.quantize(tiny_model(), tmp_path / "out", target="gaudi", method="rtn", calibration=(str(text_file),), **QUICK)
    layers = json.loads((tmp_path / "out" / "duotone.json").read_text())["layers"]
    for entry in layers.values():
        for key in ("outer_scale", "input_scale"):
            mantissa, _ = torch.frexp(torch.tensor(entry[key]))
            assert mantissa == 0.5
    block = "model.layers.0.self_attn."
    assert layers[block + "q_proj"]["input_scale"] == layers[block + "v_proj"]["input_scale"]


def test_awkward_widths_are_padded_not_dropped(shared: Path, tmp_path: Path) -> None:
    """stories260K (hidden 64, ffn 172): every block linear is quantized at group 128 and 32, with vLLM's refusal said."""
    source = shared / "models" / "stories260K"
    stories = json.loads((shared / "data" / "tinystories" / "tinystories_1000.json").read_text())
    (tmp_path / "stories.txt").write_text("\n\n".join(stories[:300]))
    kl = {}
    for group_size in (128, 32):
        out = tmp_path / str(group_size)
        text = (str(tmp_path / "stories.txt"),)
        report = duotone.quantize(source, out, group_size=group_size, calibration=text, strict=True, samples=32, seq_len=256)
        assert len(report.layers) == 35 and set(report.kept) == {"lm_head"}
        assert any("will not load in vLLM" in note for note in report.notes)
        model = load(out, torch.float32, "cpu")
        down = model.get_submodule("model.layers.0.mlp.down_proj")
        assert (down.in_features, down.out_features) == (172, 64)
        unseen = [str(shared / "data" / "tinystories" / "tinystories_val.txt")]
        result = duotone.evaluate(out, unseen, reference=source, seq_len=256, samples=4, device="cpu")
        kl[group_size] = result.kl
    assert 0 < kl[32] < kl[128] < 0.15


def test_companions_travel(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Tokenizer and generation config arrive unchanged; calibration text and old weights do not."""
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_model().iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "calibration.txt").write_text("not part of a checkpoint")
    (source / "evil.py").write_text("raise SystemExit")
    duotone.quantize(source, tmp_path / "out", method="rtn", device="cpu")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert not names & {"calibration.txt", "evil.py"} and {"config.json", "duotone.json", "model.safetensors"} <= names


def test_fp16_and_fp32_sources_become_bf16(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """A float32 source gives a BF16 checkpoint, and the report says so."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")
    report = duotone.quantize(tmp_path / "source", tmp_path / "out", method="rtn", device="cpu")
    assert any("stored as BF16" in note for note in report.notes)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.int32, torch.int64}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_estimates_are_of_the_right_size(tiny_model: ModelMaker) -> None:
    """The plan's disk figure is exact, and time and memory grow with the calibration."""
    plans = [make_plan(open_source(tiny_model()), QuantizeConfig(samples=n, seq_len=128)) for n in (8, 800)]
    small, large = (estimate(plan) for plan in plans)
    assert small.disk_bytes == large.disk_bytes == plans[0].disk_bytes
    assert small.peak_bytes < large.peak_bytes
    assert large.seconds > small.seconds


def test_bits_per_weight(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """4 bits a code, 16 a group of 128, and the 16 bytes of each logical shape."""
    report = duotone.quantize(tiny_model(), tmp_path / "out", method="rtn", device="cpu")
    weights = sum(weight_counts(tmp_path / "out"))
    assert report.bits_per_weight == pytest.approx(4 + 16 / 128 + 14 * 128 / weights, rel=1e-9)


def weight_counts(folder: Path) -> list[int]:
    source = open_source(folder)
    return [WeightReader(source).read(name).codes.numel() for name in packed_layers(source)]


def test_unknown_option_is_refused(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """A misspelt option of the Python interface is an error, not ignored."""
    with pytest.raises(TypeError, match="group_sise"):
        duotone.quantize(tiny_model(), tmp_path / "out", group_sise=64)
    with pytest.raises(DuotoneError, match="--order"):
        duotone.quantize(tiny_model(), tmp_path / "out", order="random")
    with pytest.raises(DuotoneError, match=r"^--dtype: found 'float16', expected one of auto, float32, bfloat16$"):
        duotone.quantize(tiny_model(), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


# ---- effort high

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_high_effort_leaves_an_ordinary_checkpoint(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same bytes each time, the files and scales of a default run with other codes, no scratch, and it loads and runs."""
    monkeypatch.setattr("duotone.solver.couple.BEAM_WIDTH", 16)
    source, text = tiny_model(model_type, initializer_range=0.15, **SMALL), (str(text_file),)
    told: list[tuple[int, int, str]] = []
    report = duotone.quantize(
        source, tmp_path / "a", progress=lambda *step: told.append(step), effort="high", calibration=text, **QUICK
    )
    for name, effort in (("b", "high"), ("default", "default")):
        duotone.quantize(source, tmp_path / name, effort=effort, calibration=text, **QUICK)
    assert folder_hashes(tmp_path / "a") == folder_hashes(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "default"]
    assert folder_hashes(tmp_path / "a").keys() == folder_hashes(tmp_path / "default").keys()
    settings = [json.loads((tmp_path / name / "duotone.json").read_text())["settings"] for name in ("a", "default")]
    assert settings[0] == settings[1] | {"effort": "high"} != settings[1]
    high, default = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "default"))
    assert len(report.layers) == 14 and all(0 < layer.weight_error < 0.1 for layer in report.layers)
    for layer in (layer.layer for layer in report.layers):
        assert not torch.equal(high[f"{layer}.weight_packed"], default[f"{layer}.weight_packed"])
    first = "model.layers.0.self_attn.q_proj.weight_scale"  # what comes before it is the same: so are its scales
    assert torch.equal(high[first], default[first])
    model = load(tmp_path / "a", torch.float32, "cpu")
    assert len(linears_of(model)) == 14
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(48)[None]).logits).all())
    done, steps, _ = zip(*told, strict=True)
    assert list(done) == sorted(done) and done[-1] == steps[-1] and set(steps) == {6}
    assert {"curvature", "couple"} <= report.seconds.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_high_effort_is_given_the_curvature_of_the_original(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O of each group is that of one backward pass through the whole original model on the calibration windows.

    The output head is loaded for it, whether its weights are its own or those of the embedding; an ignored linear has no rows.
    """
    source, ignore = tiny_model(tie_word_embeddings=tied, initializer_range=0.15, **SMALL), ("re:.*k_proj",)
    given: dict[str, list[Tensor]] = {}

    def spy(problems: list[Problem], weights: list[QuantizedWeight], curvature: list[Tensor]) -> Any:
        given[problems[0].layer] = curvature
        return couple(problems, weights, curvature)

    monkeypatch.setattr("duotone.solving.couple", spy)
    monkeypatch.setattr("duotone.solver.couple.BEAM_WIDTH", 1)
    duotone.quantize(source, tmp_path / "out", effort="high", ignore=ignore, calibration=(str(text_file),), **QUICK)
    groups = [
        group for block in make_plan(open_source(source), QuantizeConfig(ignore=ignore)).blocks for group in block.shared_inputs
    ]
    tokens, original = calibration_tokens(source, text_file), load(source, torch.float32, "cpu")
    assert deviation(given, in_one_pass(original, groups, [tokens], 0)) <= 1e-4
    assert [len(parts[0]) for parts in given.values()] == [64 + 32, 64, 2 * 96, 64] * 2


def test_high_effort_on_a_full_disk(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full in the middle of the backward pass: one sentence, and nothing is left."""
    write, written = Path.write_bytes, []

    def fill_up(path: Path, data: bytes) -> int:
        if path.suffix == ".safetensors":
            written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(DuotoneError, match=r"\.curvature: the disk is full"):
        duotone.quantize(tiny_model(**SMALL), tmp_path / "out", effort="high", calibration=(str(text_file),), **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["rtn", "gptq", "dpq-paper"])
def test_high_effort_needs_dpq(tiny_model: ModelMaker, tmp_path: Path, method: str) -> None:
    """Another method has no target to search codes for: refused before any work, both options named."""
    with pytest.raises(DuotoneError, match=rf"^--effort high: found --method {method}, expected dpq"):
        duotone.quantize(tiny_model(), tmp_path / "out", method=method, effort="high")
    with pytest.raises(DuotoneError, match=r"^--effort: found 'highest', expected one of default, high"):
        duotone.quantize(tiny_model(), tmp_path / "out", effort="highest")
    assert list(tmp_path.iterdir()) == []


def test_high_effort_is_nearer_to_the_original(shared: Path, tmp_path: Path) -> None:
    """stories260K: the KL on text that nobody calibrated on falls by a tenth or two."""
    source = shared / "models" / "stories260K"
    stories = json.loads((shared / "data" / "tinystories" / "tinystories_1000.json").read_text())
    (tmp_path / "stories.txt").write_text("\n\n".join(stories[:300]))
    text, unseen = (str(tmp_path / "stories.txt"),), [str(shared / "data" / "tinystories" / "tinystories_val.txt")]
    kl = {}
    for effort in ("default", "high"):
        out = tmp_path / effort
        duotone.quantize(source, out, group_size=32, effort=effort, calibration=text, samples=32, seq_len=128, device="cpu")
        kl[effort] = duotone.evaluate(out, unseen, reference=source, seq_len=128, samples=16, device="cpu").kl
    assert 0 < kl["high"] < 0.95 * kl["default"], kl
