"""The whole line on tiny models: quantize, read back, run, and compare with the contract done by hand."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import duotone
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.contract import quantize_activations
from duotone.errors import DuotoneError
from duotone.models.skeleton import find_linears
from duotone.plan import QuantizeConfig, estimate, make_plan
from duotone.qweight import fp8_values
from duotone.runtime.linear import QuantizedLinear
from duotone.runtime.load import load

ModelMaker = Callable[..., Path]
QUICK = {"samples": 8, "seq_len": 64, "device": "cpu"}


def linears_of(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def folder_hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("target", ["hopper", "gaudi"])
def test_runs_what_was_written(tiny_model: ModelMaker, text_file: Path, tmp_path: Path, model_type: str, target: str) -> None:
    """Loaded logits equal, to float32 rounding, the original model with the contract written out in each linear."""
    source = tiny_model(model_type)
    duotone.quantize(source, tmp_path / "out", target=target, calibration=(str(text_file),), **QUICK)
    model = load(tmp_path / "out", torch.float32, "cpu")
    by_hand = load(source, torch.float32, "cpu")
    ours = linears_of(model)
    assert set(ours) == {name for name in find_linears(by_hand) if name != "lm_head"}
    reader = WeightReader(open_source(tmp_path / "out"))
    for name in ours:
        weight = reader.read(name)
        linear = by_hand.get_submodule(name)

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
        error = (
            linear._packed.values.float() * linear._packed.outer_scale[:, None] - original[f"{name}.weight"].float()
        ).norm()
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


def test_shards_do_not_change_the_model(
    tiny_model: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint cut into many shards holds the same tensors as one in a single file, and loads."""
    duotone.quantize(tiny_model(), tmp_path / "one", calibration=(str(text_file),), **QUICK)
    from duotone.checkpoint import writer

    monkeypatch.setattr(writer.CheckpointWriter.__init__, "__defaults__", (100_000,))
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
