"""Models published in MXFP4 or FP8 blocks: read as the BF16 that transformers makes of them, quantized to the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import duotone
from duotone.checking import check
from duotone.checkpoint.prequantized import from_fp8, from_mxfp4, widened
from duotone.checkpoint.source import open_source
from duotone.errors import DuotoneError
from duotone.runtime.load import load

GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention", "sliding_attention"]}
LATENT = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "kv_lora_rank": 128,
    "q_lora_rank": 128, "head_dim": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def folder_with(base: Path, out: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    """A copy of a model folder with other tensors and another `quantization_config`."""
    out.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json":
            (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": quantization}
    (out / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def as_mxfp4(base: Path, out: Path) -> Path:
    """A GPT-OSS folder with random experts in the hub's layout: blocks of 32 along the inputs, exponents of usual sizes."""
    tensors, draw = {}, torch.Generator().manual_seed(3)
    for name, tensor in load_file(base / "model.safetensors").items():
        if tensor.ndim == 3:
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draw)
            tensors[f"{name}_scales"] = torch.randint(118, 123, shape, dtype=torch.uint8, generator=draw)
        else:
            tensors[name] = tensor
    return folder_with(base, out, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def as_fp8(base: Path, out: Path, block: tuple[int, int] = (128, 128)) -> Path:
    """A folder with every linear of its blocks in E4M3 and a float32 scale for each block, as DeepSeek-V3 comes."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        tensors[name] = tensor
        if tensor.ndim == 2 and ".layers." in name and "mlp.gate.weight" not in name:
            rows, columns = tensor.shape
            grid = -(-rows // block[0]), -(-columns // block[1])
            scale, codes = torch.empty(grid), torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
            for i in range(grid[0]):
                for j in range(grid[1]):
                    part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
                    scale[i, j] = tensor[part].abs().max().float() / 448
                    codes[part] = (tensor[part].float() / scale[i, j]).to(torch.float8_e4m3fn)
            tensors |= {name: codes, f"{name}_scale_inv": scale}
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(block)}
    return folder_with(base, out, tensors, quantization)


def dense(narrow: Path, out: Path, widen: Callable[[Tensor, Tensor], Tensor]) -> Path:
    """The folder in BF16 that an oracle makes of a narrow one."""
    stored = load_file(narrow / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith("_blocks"):
            tensors[name.removesuffix("_blocks")] = widen(tensor, stored[name.replace("_blocks", "_scales")])
        elif f"{name}_scale_inv" in stored:
            tensors[name] = widen(tensor, stored[f"{name}_scale_inv"])
        elif not name.endswith(("_scales", "_scale_inv")):
            tensors[name] = tensor
    return folder_with(narrow, out, tensors, None)


def by_hand(codes: Tensor, scales: Tensor) -> Tensor:
    """Value times scale in float64, one by one: of float32 only the rounding to it may come between."""
    rows, columns = torch.meshgrid(*(torch.arange(size) // 128 for size in codes.shape), indexing="ij")
    return (codes.double() * scales.double()[rows, columns]).float().bfloat16()


def test_mxfp4_is_transformers_to_the_bit() -> None:
    """Every byte under every exponent but the one that means no number."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(2, 255, 16)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(from_mxfp4(blocks, scales).view(torch.int16), expected.view(torch.int16))


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_fp8_blocks_are_transformers_to_the_bit(experts: int, rows: int, columns: int, n: int, k: int, seed: int) -> None:
    """Any blocks that divide, one matrix or many."""
    draw = torch.Generator().manual_seed(seed)
    codes = (100 * torch.randn(experts, rows * n, columns * k, generator=draw)).to(torch.float8_e4m3fn)
    scales = torch.rand(experts, rows, columns, generator=draw)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert torch.equal(from_fp8(codes, scales, (n, k)), expected)


@pytest.mark.parametrize(("kind", "method"), [("mxfp4", "gptq"), ("fp8", "dpq")])
def test_quantizes_as_the_bf16_folder(
    tmp_path: Path, tiny_model: Callable[..., Path], text_file: Path, kind: str, method: str
) -> None:
    """The same bytes as from the folder that an oracle widened, and so the same logits; nothing narrow is left over."""
    if kind == "mxfp4":
        narrow = as_mxfp4(tiny_model("gpt_oss", **GPT_OSS), tmp_path / "narrow")
        wide = dense(narrow, tmp_path / "wide", convert_moe_packed_tensors)
    else:  # 144 rows of kv_a_proj_with_mqa: the last block is cut short, as DeepSeek-V3's is
        narrow = as_fp8(tiny_model("deepseek_v3", **LATENT), tmp_path / "narrow")
        assert any(spec.shape[0] % 128 for spec in open_source(narrow).tensors.values() if spec.dtype == "F8_E4M3")
        wide = dense(narrow, tmp_path / "wide", by_hand)
    settings = {"calibration": (str(text_file),), "samples": 2, "seq_len": 32, "device": "cpu", "method": method}
    report = duotone.quantize(narrow, tmp_path / "of-narrow", **settings)
    duotone.quantize(wide, tmp_path / "of-wide", **settings)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "of-narrow" / file).read_bytes() == (tmp_path / "of-wide" / file).read_bytes()
    assert report.original_bytes == open_source(narrow).weight_bytes < open_source(wide).weight_bytes
    with torch.no_grad():
        ours, theirs = (load(tmp_path / name)(input_ids=IDS).logits for name in ("of-narrow", "of-wide"))
        assert torch.equal(ours, theirs)
        assert torch.equal(*(load(folder)(input_ids=IDS).logits for folder in (narrow, wide)))  # what `eval` measures against


def test_check_plans_what_it_would_become(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """`check` of such a folder tells of the checkpoint that would be made of it."""
    narrow = as_fp8(tiny_model("deepseek_v3", **LATENT), tmp_path / "narrow")
    (found,) = check(narrow, ["duotone"], ["cpu"])
    assert found.loads
    assert found.layout == "compressed-tensors"


def test_one_scale_for_a_matrix(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """No weight_block_size: a scale each. What kernels round activations by is left behind."""
    base = tiny_model("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(base / "model.safetensors")
    codes, scale = tensors[name].to(torch.float8_e4m3fn), torch.tensor(0.5)
    tensors |= {name: codes, f"{name}_scale_inv": scale, name.replace("weight", "activation_scale"): scale.clone()}
    narrow = folder_with(base, tmp_path / "narrow", tensors, {"quant_method": "fp8", "weight_block_size": None})
    source = widened(open_source(narrow))
    assert torch.equal(source.load([name])[name], codes.bfloat16() / 2)
    assert set(source.tensors) == set(open_source(base).tensors)


def spoil(tensors: dict[str, Tensor], end: str, change: Callable[[Tensor], Tensor] | None) -> None:
    name = next(name for name in tensors if name.endswith(end))
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)


@pytest.mark.parametrize(
    ("kind", "end", "change", "words"),
    [
        ("mxfp4", "_scales", None, ["no such tensor", "_scales", "expected U8"]),
        ("mxfp4", "_scales", lambda t: t[:, :-1], ["_scales", "expected U8 [4, "]),
        ("mxfp4", "_blocks", lambda t: t.float(), ["is F32", "expected U8"]),
        ("mxfp4", "_blocks", lambda t: t.flatten(-2), ["expected U8 [experts, out, in / 32, 16]"]),
        (
            "fp8",
            "_scale_inv",
            lambda t: torch.cat((t, t)),
            ["has scales F32 [2, 2], expected floats [1, 2] for"],
        ),
        ("fp8", "_scale_inv", lambda t: t.int(), ["has scales I32"]),
        ("fp8", "q_a_proj.weight", lambda t: t.bfloat16(), ["is BF16", "expected a matrix in F8_E4M3"]),
        ("fp8", "_scale_inv", lambda t: t * float("nan"), ["NaN or infinite"]),
    ],
)
def test_what_does_not_belong_together(
    tmp_path: Path, tiny_model: Callable[..., Path], kind: str, end: str, change: Any, words: list[str]
) -> None:
    """One sentence that names the tensor; nothing is written."""
    if kind == "mxfp4":
        narrow = as_mxfp4(tiny_model("gpt_oss", **GPT_OSS), tmp_path / "narrow")
    else:
        narrow = as_fp8(tiny_model("deepseek_v3", **LATENT), tmp_path / "narrow")
    tensors = load_file(narrow / "model.safetensors")
    spoil(tensors, end, change)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, narrow / "model.safetensors", {"format": "pt"})
    with pytest.raises(DuotoneError) as refusal:
        duotone.quantize(narrow, tmp_path / "out", method="rtn", device="cpu")
    for word in ("model.safetensors", *words):
        assert word in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block", ["128", [128], [0, 128], [128.0, 128], {"rows": 128}])
def test_block_sizes_are_two_numbers(tmp_path: Path, tiny_model: Callable[..., Path], block: object) -> None:
    """Anything else in config.json is refused."""
    narrow = as_fp8(tiny_model("deepseek_v3", **LATENT), tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    (narrow / "config.json").write_text(json.dumps(config))
    with pytest.raises(DuotoneError, match="weight_block_size"):
        duotone.quantize(narrow, tmp_path / "out", method="rtn", device="cpu")


def test_fp8_of_another_kind_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """A folder that says fp8 and has no such scales stays what it was: quantized already."""
    base = tiny_model("llama")
    narrow = folder_with(base, tmp_path / "narrow", load_file(base / "model.safetensors"), {"quant_method": "fp8"})
    with pytest.raises(DuotoneError, match=r"already quantized \(fp8\)"):
        duotone.quantize(narrow, tmp_path / "out", method="rtn", device="cpu")
