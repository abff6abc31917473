"""Architectures by the dozen: the same numbers as transformers under our names, and all their linears in the contract."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import duotone
from duotone.checkpoint.reader import WeightReader
from duotone.checkpoint.source import open_source
from duotone.contract import quantize_activations
from duotone.errors import DuotoneError
from duotone.models import adapter as adapter_module
from duotone.models.adapter import find_adapter, has_adapter
from duotone.models.anatomy import _from_table, _from_trace
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton, expected_tensors, fill, find_linears
from duotone.models.table import Adapter
from duotone.models.text import TEXT_ADAPTERS
from duotone.plan import make_plan
from duotone.qweight import fp8_values
from duotone.runtime.load import load
from duotone.settings import QuantizeConfig

GPT = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "kv_lora_rank": 128,
    "q_lora_rank": 128, "head_dim": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip
SEPARATE = ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"]
GATED = [*SEPARATE, "mlp.gate_proj mlp.up_proj", "mlp.down_proj"]
FUSED = ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
#: By model_type: what differs from the tiny Llama, the groups of a block's linears (None: a bank's are tested by themselves)
#: and which of them write to the residual stream.
DENSE: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "llama": ({}, GATED, ["self_attn.o_proj", "mlp.down_proj"]),
    "qwen3": ({}, GATED, ["self_attn.o_proj", "mlp.down_proj"]),
    "gemma": ({}, GATED, ["self_attn.o_proj", "mlp.down_proj"]),
    "gemma2": ({}, GATED, []),
    "gemma3_text": ({}, GATED, []),
    "olmo2": ({}, GATED, []),
    "phi3": ({}, ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
             ["self_attn.o_proj", "mlp.down_proj"]),
    "phi": ({}, ["self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1", "self_attn.dense", "mlp.fc2"], []),
    "gpt_neox": ({}, [name.replace("self_attention", "attention") for name in FUSED], []),
    "gpt2": (GPT, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], ["attn.c_proj", "mlp.c_proj"]),
    "falcon": ({"head_dim": None}, [f"{FUSED[0]} {FUSED[2]}", FUSED[1], FUSED[3]], []),
    "bloom": ({"n_layer": 2, "n_head": 4}, FUSED, [FUSED[1], FUSED[3]]),
    "starcoder2": ({}, [*SEPARATE, "mlp.c_fc", "mlp.c_proj"], ["self_attn.o_proj", "mlp.c_proj"]),
    "cohere": ({}, [f"{SEPARATE[0]} mlp.gate_proj mlp.up_proj", "self_attn.o_proj", "mlp.down_proj"], ["self_attn.o_proj"]),
    "opt": ({"ffn_dim": 256, "word_embed_proj_dim": 128},
            [SEPARATE[0], "self_attn.out_proj", "fc1", "fc2"], ["self_attn.out_proj", "fc2"]),
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 128},
    "qwen3_moe": MOE,
    "olmoe": MOE,
    "deepseek_v2": LATENT | {"n_group": 1},
    "deepseek_v3": LATENT,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention", "sliding_attention"]},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 128},
    "jamba": MOE | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
                    "mamba_d_state": 8, "mamba_dt_rank": 8, "head_dim": None},
}  # fmt: skip
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def skeleton(tiny_model: Callable[..., Path], model_type: str, **sizes: object) -> Any:
    return build_skeleton(open_source(tiny_model(model_type, **sizes)).config, torch.float32)


def test_tables_say_what_tracing_finds(tiny_model: Callable[..., Path]) -> None:
    """Each table of a decoder against a forward pass of it."""
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        config = open_source(tiny_model(model_type)).config
        model = build_skeleton(config, torch.float32)
        by_table, traced = _from_table(find_adapter(config), model), _from_trace(model)
        assert by_table.blocks == traced.blocks
        assert by_table.keep == traced.keep


@pytest.mark.parametrize("model_type", DENSE)
def test_groups_of_dense_decoders(tiny_model: Callable[..., Path], model_type: str) -> None:
    """What tracing finds is what the architecture's paper says: who reads one input, who writes to the stream."""
    sizes, groups, writers = DENSE[model_type]
    for block in _from_trace(skeleton(tiny_model, model_type, **sizes)).blocks:
        inside = [" ".join(name.removeprefix(block.prefix) for name in group) for group in block.shared_inputs]
        assert inside == groups
        assert [name.removeprefix(block.prefix) for name in block.streams] == writers


@pytest.mark.parametrize("model_type", [*DENSE, *EXPERTS])
def test_loads_as_transformers_does(tiny_model: Callable[..., Path], model_type: str) -> None:
    """Logits equal transformers' own bit for bit, whatever the names on disk and the form that experts lie in.

    But where that multiplies with transposed experts, as no linear does: a library may take its sums in another order.
    """
    folder = tiny_model(model_type, **(DENSE[model_type][0] if model_type in DENSE else EXPERTS[model_type]))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found, meant = logits(load(folder, torch.float32)), logits(theirs)
    assert torch.allclose(found, meant, rtol=0, atol=1e-6 if model_type == "gpt_oss" else 0)


def run_by_hand(model: Any, reader: WeightReader, layers: list[str]) -> None:
    """Put the contract, written out in float64, in the place of a float model's linears."""
    for layer in layers:
        weight, linear = reader.read(layer), model.get_submodule(layer)

        def forward(x: torch.Tensor, weight=weight, linear=linear) -> torch.Tensor:
            x8, scale = quantize_activations(x, weight.scheme.target, weight.input_scale)
            y = (x8.double() @ fp8_values(weight).double().T) * weight.outer_scale.double() * scale.double()
            return (y if linear.bias is None else y + linear.bias.double()).float()

        linear.forward = forward


@pytest.mark.parametrize("model_type", [*(name for name in DENSE if name not in {"llama", "qwen3"}), *EXPERTS])
def test_runs_what_was_written(tmp_path: Path, tiny_model: Callable[..., Path], model_type: str) -> None:
    """A quantized checkpoint, loaded, is the original with the contract in every linear but those listed."""
    folder = tiny_model(model_type, **(DENSE[model_type][0] if model_type in DENSE else EXPERTS[model_type]))
    report = duotone.quantize(folder, tmp_path / "out", method="rtn", device="cpu")
    by_hand, found = load(folder, torch.float32), load(tmp_path / "out", torch.float32)
    layers = [layer.layer for layer in report.layers]
    assert {*layers, *report.kept} >= set(find_linears(by_hand))
    assert not set(layers) & set(report.kept)
    source = open_source(tmp_path / "out")
    run_by_hand(by_hand, WeightReader(named_source(source, build_skeleton(source.config, torch.float32))), layers)
    expected = logits(by_hand)
    # A sum that falls on another side of an FP8 rounding moves an activation by 1/16; of tiny models a few do.
    assert ((logits(found) - expected).norm() / expected.norm()).item() < 0.02
    assert report.bits_per_weight < 4.4


@pytest.mark.parametrize(
    ("model_type", "method"),
    [("falcon", "dpq"), ("gpt2", "dpq"), ("qwen3_moe", "gptq"), ("gpt_oss", "dpq"), ("llama4_text", "dpq")],
)
def test_calibrates_by_tracing(
    tmp_path: Path, tiny_model: Callable[..., Path], text_file: Path, model_type: str, method: str
) -> None:
    """`dpq` walks through blocks nobody wrote a table for, and makes every layer's outputs better than rounding does."""
    folder = tiny_model(model_type, **(DENSE[model_type][0] if model_type in DENSE else EXPERTS[model_type]))
    settings = {"calibration": (str(text_file),), "samples": 8, "seq_len": 64, "device": "cpu", "method": method}
    report = duotone.quantize(folder, tmp_path / "out", **settings)
    assert any("tracing" in note for note in report.notes)
    assert all(layer.tokens > 0 and layer.output_error is not None for layer in report.layers)
    rounded = duotone.quantize(folder, tmp_path / "rtn", method="rtn", device="cpu")
    better = [ours.output_error < 1.2 * theirs.weight_error for ours, theirs in zip(report.layers, rounded.layers, strict=True)]
    assert sum(better) > 0.9 * len(better)


@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text"])
def test_every_expert_is_shown_tokens(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path, model_type: str
) -> None:
    """Experts that the router sends few calibration tokens see all of them; the note says how many these were."""
    folder = tiny_model(model_type, **EXPERTS[model_type])
    report = duotone.quantize(
        folder, tmp_path / "out", calibration=(str(text_file),), samples=2, seq_len=64, device="cpu", method="dpq"
    )
    tokens = {layer.tokens for layer in report.layers if ".experts." in layer.layer}
    assert 128 in tokens
    assert any("were shown all" in note for note in report.notes)


@pytest.mark.parametrize("method", ["gptq", "dpq"])
def test_experts_fit_any_budget(
    tmp_path: Path, tiny_model: Callable[..., Path], text_file: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to no memory every batch walks anew to every expert, and the bytes stay the same."""
    monkeypatch.setattr("duotone.calibrate.data.BATCH_POSITIONS", 64)
    folder = tiny_model("qwen3_moe", **EXPERTS["qwen3_moe"])
    settings = {"calibration": (str(text_file),), "samples": 4, "seq_len": 32, "device": "cpu", "method": method}
    for name, budget in (("much", None), ("little", 1e-6)):
        duotone.quantize(folder, tmp_path / name, **settings, memory_budget=budget)
    files = ("model.safetensors", "config.json", "duotone.json")
    assert all((tmp_path / "much" / file).read_bytes() == (tmp_path / "little" / file).read_bytes() for file in files)


def test_names_on_disk_are_the_folder_s(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Mixtral's experts keep the names that vLLM reads; GPT-OSS's, in one tensor so far, get one each."""
    for model_type, name in (
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight_packed"),
        ("gpt_oss", "model.layers.0.mlp.experts.3.gate_proj.weight_packed"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight_packed"),
    ):
        folder = tiny_model(model_type, **(EXPERTS.get(model_type) or DENSE[model_type][0]))
        duotone.quantize(folder, tmp_path / model_type, method="rtn", device="cpu")
        with safe_open(tmp_path / model_type / "model.safetensors", "pt") as file:
            assert name in set(file.keys())


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_are_called_as_vllm_calls_them(tmp_path: Path, tiny_model: Callable[..., Path], model_type: str) -> None:
    """vLLM 0.33.0 models/: `ckpt_names` of mixtral.py, `fused_moe_make_expert_params_mapping` of the others.

    It has no reader of GPT-OSS's experts one by one: their names are as the others' here.
    """
    duotone.quantize(tiny_model(model_type, **EXPERTS[model_type]), tmp_path / "out", method="rtn", device="cpu")
    place = {"mixtral": "block_sparse_moe", "llama4_text": "feed_forward", "jamba": "feed_forward"}.get(model_type, "mlp")
    linears = ("w1", "w2", "w3") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found = {name for name in open_source(tmp_path / "out").tensors if ".experts." in name and not name.endswith(".bias")}
    mixed = {"deepseek_v2": (1,), "deepseek_v3": (1,), "jamba": (1,)}  # the first layer has no experts
    assert found == {
        f"model.layers.{layer}.{place}.experts.{expert}.{linear}.weight_{part}"
        for layer in mixed.get(model_type, (0, 1))
        for expert in range(4)
        for linear in linears
        for part in ("packed", "scale", "shape")
    }


def test_left_alone_is_stored_as_it_was(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """A GPT-2 linear that is ignored stays transposed on disk, and loads."""
    folder = tiny_model("gpt2", **GPT)
    duotone.quantize(folder, tmp_path / "out", method="rtn", device="cpu", ignore=("re:.*c_fc",))
    before, after = (open_source(path).load(["transformer.h.1.mlp.c_fc.weight"]) for path in (folder, tmp_path / "out"))
    assert torch.equal(*(tensors["transformer.h.1.mlp.c_fc.weight"].bfloat16() for tensors in (before, after)))
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_cuts_are_whole(tiny_model: Callable[..., Path]) -> None:
    """Every tensor the modules want is found in the folder, with its shape, in whichever form it lies there."""
    for model_type, sizes in EXPERTS.items():
        source = open_source(tiny_model(model_type, **sizes))
        model = build_skeleton(source.config, torch.float32)
        named = named_source(source, model)
        for name, shape in expected_tensors(model).items():
            assert named.tensors[name].shape == shape
            assert named.load([name])[name].shape == shape


def test_no_table_no_blocks_no_guess(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that cannot be traced ends in a sentence that says what to write."""
    folder = tiny_model("gpt2", **GPT)
    assert not has_adapter(open_source(folder).config)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr("duotone.models.anatomy.trace", broken)
    with pytest.raises(DuotoneError, match=r"no such thing.*write a table"):
        make_plan(open_source(folder), QuantizeConfig(method="rtn"))


def test_the_page_on_tables_can_be_followed(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table in docs/add-a-model.md is short, is taken, and says what a trace says."""
    page = (Path(__file__).parents[2] / "docs" / "add-a-model.md").read_text(encoding="utf-8")
    blocks = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    source = next(block for block in blocks if "Adapter(" in block)
    assert len(source.splitlines()) < 15
    names: dict[str, Any] = {"Adapter": Adapter}
    exec(source, names)
    monkeypatch.setattr(adapter_module, "_ADAPTERS", (*TEXT_ADAPTERS, names["GPT_NEOX"]))
    config = open_source(tiny_model("gpt_neox")).config
    model = build_skeleton(config, torch.float32)
    assert has_adapter(config)
    by_table, traced = _from_table(find_adapter(config), model), _from_trace(model)
    assert by_table.blocks == traced.blocks
    assert by_table.keep == traced.keep
    assert not make_plan(open_source(tiny_model("gpt_neox")), QuantizeConfig(method="rtn")).anatomy.traced


PYRAMID = {"image_size": 32, "num_channels": 3, "patch_size": 4}
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": (
        "vit", PYRAMID | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "SwinForImageClassification": (
        "swin", PYRAMID | {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "ResNetForImageClassification": (
        "resnet", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VISION)
def test_what_reads_pictures(tmp_path: Path, name: str) -> None:
    """Logits equal transformers' own; calibrated on tensors, the checkpoint is the contract in every linear it lists."""
    model_type, sizes = VISION[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(model_type, **sizes)).eval()
    model.save_pretrained(tmp_path / "model")
    pictures = torch.randn(12, 3, 32, 32)
    save_file({"pixel_values": pictures[:8].contiguous()}, tmp_path / "pictures.safetensors")

    def seen(network: Any) -> torch.Tensor:
        with torch.no_grad():
            return network(pixel_values=pictures[8:]).logits

    by_hand = load(tmp_path / "model", torch.float32)
    torch.testing.assert_close(seen(by_hand), seen(model), rtol=1e-5, atol=1e-5)
    settings = {"calibration": (str(tmp_path / "pictures.safetensors"),), "samples": 8, "group_size": 32, "device": "cpu"}
    report = duotone.quantize(tmp_path / "model", tmp_path / "out", **settings)
    found, source = load(tmp_path / "out", torch.float32), open_source(tmp_path / "out")
    named = named_source(source, build_skeleton(source.config, torch.float32))
    fill(
        by_hand,
        named.load([key for key in expected_tensors(by_hand) if key in named.tensors]),
        torch.float32,
        torch.device("cpu"),
    )
    run_by_hand(by_hand, WeightReader(named), [layer.layer for layer in report.layers])
    expected = seen(by_hand)
    assert ((seen(found) - expected).norm() / expected.norm()).item() < 0.02
    assert {*(layer.layer for layer in report.layers), *report.kept} >= set(find_linears(by_hand))
    with pytest.raises(DuotoneError, match="reads pixel_values, expected --calibration"):
        duotone.quantize(tmp_path / "model", tmp_path / "text", calibration=("some.txt",), device="cpu")
