# Shapes: N out_features, K in_features, G groups along K.
"""Other layouts out of ours and ours out of others, against what each layout's own documentation and tools say."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import duotone
from duotone.checking import check
from duotone.checkpoint.headers import TORCH_NAMES
from duotone.checkpoint.layouts import LAYOUTS, Shared
from duotone.checkpoint.layouts.foreign import read_awq, read_gptq
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.converting import export_checkpoint, import_checkpoint
from duotone.errors import DuotoneError
from duotone.qweight import QuantizedWeight, dequantize
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.solver.scales import fit_scales, round_to_nearest
from tests.oracles.vllm_split import fp8_weights, load_split

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "tests" / "fixtures" / "peers"
sys.path.insert(0, str(ROOT / "bench" / "peers"))

import arithmetic  # noqa: E402 - the comparison's own readers, verified against the tools  # pyright: ignore[reportMissingImports]
import layouts  # noqa: E402  # pyright: ignore[reportMissingImports]

ModelMaker = Callable[..., Path]


def a_weight(rows: int, columns: int, scheme: Scheme, seed: int = 0, size: float = 1.0) -> QuantizedWeight:
    """Round to nearest of normal numbers."""
    w_NK = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    scales = fit_scales(w_NK, scheme)
    codes = round_to_nearest(w_NK, scales, scheme)
    scale = None if scheme.target.dynamic_activations else torch.tensor(0.5)
    return QuantizedWeight(codes, scales.group_scale, scales.outer_scale, scheme, scales.zero_point, scale)


def plain_product(weight: QuantizedWeight) -> np.ndarray:
    """(level - zero) times the one BF16 scale, column by column in float64."""
    level = weight.codes.double().numpy() - 8
    scale = (weight.group_scale.double() * weight.outer_scale.double()[:, None]).to(torch.bfloat16).double().numpy()
    zero = np.zeros_like(scale) if weight.zero_point is None else weight.zero_point.double().numpy()
    size = weight.scheme.group_size
    return np.stack([(level[:, k] - zero[:, k // size]) * scale[:, k // size] for k in range(level.shape[1])], 1)


# ---- each layout by its definition


@given(
    rows=st.sampled_from([8, 24, 32]),
    columns=st.sampled_from([32, 40, 64, 96]),
    target=st.sampled_from([HOPPER, GAUDI]),
    symmetric=st.booleans(),
    name=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_a_layout_holds(rows: int, columns: int, target: Target, symmetric: bool, name: str, seed: int) -> None:
    """Tensors are as planned; what runtimes multiply is code times scale, or the contract's weight in BF16."""
    scheme, layout = Scheme(target, 32, symmetric), LAYOUTS[name]
    weight = a_weight(rows, columns, scheme, seed)
    if layout.refuses is not None and (reason := layout.refuses("a", (rows, columns), scheme)) is not None:
        wholes = {"gptq": (8, 32), "modelopt": (2, 32), "gaudi-inc": (32, 32), "sglang-w4afp8": (128, 128), "gguf": (1, 32)}
        fits = not any(size % whole for size, whole in zip((rows, columns), wholes[name], strict=True))
        assert not fits or not (symmetric or name == "gaudi-inc"), reason
        assert "expected" in reason
        return
    shared = Shared(input_scale=0.25) if layout.static else Shared()
    tensors, specs = layout.to_tensors("a", weight, shared), layout.specs("a", (rows, columns), scheme)
    assert {k: (TORCH_NAMES[t.dtype], tuple(t.shape)) for k, t in tensors.items()} == {
        k: (s.dtype, s.shape) for k, s in specs.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    found = layout.values("a", tensors, scheme)
    if name == "dense-bf16":
        assert torch.equal(found, dequantize(weight).to(torch.bfloat16).float())
    elif NATIVE.get(name) is target:
        assert torch.equal(found, dequantize(weight))
    elif name in NATIVE:  # another grid of FP8: half a step of each, and of the smallest one
        step = 2**-9 * float(weight.outer_scale.max() if weight.scheme.target is GAUDI else found.abs().max() / 112)
        assert bool(((found - dequantize(weight)).abs() <= 2**-3 * dequantize(weight).abs() + 2 * step).all())
    else:
        assert np.array_equal(found.double().numpy(), plain_product(weight))


#: Layouts that run in FP8, with the target whose weights they hold bit for bit.
NATIVE = {"compressed-tensors": HOPPER, "modelopt": GAUDI, "gaudi-inc": GAUDI}


def test_gptq_bit_by_bit() -> None:
    """Eight codes along K in a word, the first lowest; zero points stored as 7; a scale too small for FP16 is not the same."""
    weight = a_weight(16, 64, Scheme(group_size=32))
    tensors = LAYOUTS["gptq"].to_tensors("a", weight)
    words, codes = tensors["a.qweight"].numpy().view(np.uint32), weight.codes.numpy()
    for k in range(64):
        assert np.array_equal((words[k // 8] >> (4 * (k % 8))) & 15, codes[:, k])
    assert set(tensors["a.qzeros"].flatten().tolist()) == {0x77777777}
    assert tensors["a.g_idx"].tolist() == [0] * 32 + [1] * 32
    tiny = a_weight(8, 32, Scheme(group_size=32), size=1e-6)
    assert not np.array_equal(
        LAYOUTS["gptq"].values("a", LAYOUTS["gptq"].to_tensors("a", tiny), tiny.scheme), plain_product(tiny)
    )


def test_awq_by_autoawqs_own_packing() -> None:
    """Eight outputs a word in the order 0 2 4 6 1 3 5 7 (AutoAWQ, WQLinear_GEMM.from_linear)."""
    rng = np.random.default_rng(0)
    code_NK, scale_GN = rng.integers(0, 16, (24, 64)), rng.random((2, 24)).astype(np.float16) + np.float16(0.1)

    def packed(values_RN: np.ndarray) -> Tensor:
        words = np.zeros((len(values_RN), values_RN.shape[1] // 8), np.uint32)
        for column in range(words.shape[1]):
            for place, which in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, column] |= values_RN[:, column * 8 + which].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(words.view(np.int32))

    parts = {"qweight": packed(code_NK.T), "qzeros": packed(np.full((2, 24), 8)), "scales": torch.from_numpy(scale_GN)}
    found = read_awq("a", parts, {"group_size": 32})
    assert np.array_equal(found.codes.numpy(), code_NK) and np.array_equal(found.scale.numpy(), scale_GN.T.astype(np.float32))
    parts["qzeros"] = packed(np.full((2, 24), 7))
    with pytest.raises(DuotoneError, match="a: found zero points other than 8"):
        read_awq("a", parts, {"group_size": 32})


# ---- whole checkpoints


@pytest.fixture(scope="module")
def ours(tiny_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases, quantized for hopper; one linear left alone."""
    out = tmp_path_factory.mktemp("converting") / "ours"
    model = tiny_model("qwen2")
    duotone.quantize(model, out, method="rtn", group_size=32, ignore=("model.layers.1.mlp.down_proj",), device="cpu")
    return out


@pytest.mark.parametrize("layout", ["w4a16", "gptq"])
def test_there_and_back_again(ours: Path, tmp_path: Path, layout: str) -> None:
    """The same bytes: codes, scales, biases, norms, the head; and the config says the same of them."""
    told: list[tuple[int, int, str]] = []
    report = export_checkpoint(ours, tmp_path / "there", layout, progress=lambda *step: told.append(step))
    assert {layer.exactness for layer in report.layers} == {"product-exact"} and len(report.layers) == 13
    assert all(1e-5 < layer.weight_error < 4e-3 for layer in report.layers)
    assert report.weight_bytes == sum(t.nbytes for t in load_file(tmp_path / "there" / "model.safetensors").values())
    assert [step[0] for step in told] == list(range(told[0][1]))
    back = import_checkpoint(tmp_path / "there", tmp_path / "back")
    assert {layer.exactness for layer in back.layers} == {"bit-exact"}
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (ours, tmp_path / "back"))
    assert before == after
    assert {file.name for file in ours.iterdir()} - {"README.md", "duotone-run.json"} == {
        file.name for file in (tmp_path / "back").iterdir()
    }
    (verdict,) = check(tmp_path / "there", ["vllm"], ["a100"])
    assert (verdict.outcome, verdict.layout) == ("w4a16", layout)


def test_transformers_reads_w4a16(ours: Path, tmp_path: Path) -> None:
    """Nothing missing or left over, and each weight is code times scale in BF16, to the bit."""
    from transformers import AutoModelForCausalLM

    from tests.test_interop import reader_weight

    export_checkpoint(ours, tmp_path / "out", "w4a16")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    source = open_source(ours)
    for layer in packed_layers(source):
        expected = torch.from_numpy(plain_product(WeightReader(source).read(layer))).to(torch.bfloat16)
        assert torch.equal(reader_weight(model.get_submodule(layer)), expected), layer


def test_dense_needs_leave_where_it_rounds(ours: Path, tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """BF16 holds FP8 times a power of two (gaudi), and an FP32 channel scale only nearly; any transformers reads it."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(DuotoneError, match=r"dense-bf16: model\.layers\.0\.\S+: is held approximately .*--allow-lossy"):
        export_checkpoint(ours, tmp_path / "dense", "dense-bf16")
    assert list(tmp_path.iterdir()) == []
    report = export_checkpoint(ours, tmp_path / "dense", "dense-bf16", allow_lossy=True)
    assert {layer.exactness for layer in report.layers} == {"approximate"}
    assert all(0 < layer.weight_error < 2**-16 for layer in report.layers)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    kept = load_file(ours / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(dense.model.layers[1].mlp.down_proj.weight, kept.float())
    text = {"calibration": (str(text_file),), "samples": 4, "seq_len": 64}
    duotone.quantize(tiny_model(), tmp_path / "gaudi", method="rtn", target="gaudi", device="cpu", **text)
    exact = export_checkpoint(tmp_path / "gaudi", tmp_path / "exact", "dense-bf16")
    assert {(layer.exactness, layer.weight_error) for layer in exact.layers} == {("bit-exact", 0.0)}


# ---- other tools' checkpoints, made by them


@pytest.mark.parametrize("name", ["llmcompressor-packed", "llmcompressor-bytes", "gptqmodel", "autoround"])
def test_import_of_what_the_tools_wrote(name: str, tmp_path: Path) -> None:
    """FP8 weights are what vLLM makes of the file's scales, by two other readers; nothing else is lost, and it runs."""
    report = import_checkpoint(PEERS / name, tmp_path / "out", allow_lossy=name == "autoround")
    assert {layer.exactness for layer in report.layers} == {"approximate" if name == "autoround" else "bit-exact"}
    source = open_source(tmp_path / "out")
    stored = load_file(PEERS / name / "model.safetensors")
    assert len(packed_layers(source)) == 7 == len(report.layers)
    readable = name != "llmcompressor-bytes"  # vLLM does not read it, and so neither does the comparison
    peers = layouts.read_peer(PEERS / name) if readable else {}
    for layer in packed_layers(source):
        weight = WeightReader(source).read(layer)
        if readable:
            signed = peers[layer].level * peers[layer].scale.sign().repeat_interleave(128, 1)
            held = signed < 8  # of AutoRound's negative scales; +8 became 7
            assert torch.equal(dequantize(weight)[held], arithmetic.split_weights(peers[layer])[held]), layer
            assert bool(held.all()) == (name != "autoround")
            level, scale = signed.clamp(max=7).numpy(), peers[layer].scale.abs().to(torch.bfloat16).float().numpy()
        else:
            level, scale = stored[f"{layer}.weight"].float().numpy(), stored[f"{layer}.weight_scale"].float().numpy()
        group, channel = load_split(scale, False)
        assert np.array_equal(dequantize(weight).numpy(), fp8_weights(level, group, 128) * channel[:, None]), layer
    for tensor in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(source.load([tensor])[tensor], stored[tensor].to(torch.bfloat16))
    with torch.no_grad():
        assert bool(torch.isfinite(duotone.load(tmp_path / "out", device="cpu")(torch.arange(8)[None]).logits).all())


def test_import_of_awq_by_the_tool_that_wrote_both(tmp_path: Path) -> None:
    """AutoRound saved the same weights in AutoAWQ's layout and in GPTQ's: both become the same codes and scales."""
    reports = [import_checkpoint(PEERS / name, tmp_path / name, allow_lossy=True) for name in ("autoround-awq", "autoround")]
    ours = [sorted(map(repr, report.layers)) for report in reports]
    assert ours[0] == ours[1]
    awq, gptq = (load_file(tmp_path / name / "model.safetensors") for name in ("autoround-awq", "autoround"))
    packed = [name for name in gptq if ".weight_" in name]
    assert len(packed) == 3 * 7 and all(torch.equal(awq[name], gptq[name]) for name in packed)
    assert awq.keys() == gptq.keys() and all(tensor.dtype is not torch.float16 for tensor in awq.values())
    with pytest.raises(DuotoneError, match=r"values of -8 under a negative scale become 7.*--allow-lossy"):
        import_checkpoint(PEERS / "autoround-awq", tmp_path / "none")
    with torch.no_grad():
        assert bool(torch.isfinite(duotone.load(tmp_path / "autoround-awq", device="cpu")(torch.arange(8)[None]).logits).all())


LAYOUT_OF = {
    "llmcompressor-packed": "compressed-tensors", "llmcompressor-bytes": "int-quantized", "modelopt": "modelopt",
    "autoround-awq": "awq",
}  # fmt: skip


@pytest.mark.parametrize("name", [*LAYOUT_OF, "gptqmodel", "autoround"])
def test_check_of_what_the_tools_wrote(name: str) -> None:
    """Each is known for what it is, its seven linears found; what vLLM reads on an H100 is what FORMATS.md says."""
    (found,) = check(PEERS / name, ["vllm"], ["h100"])
    assert found.layout == LAYOUT_OF.get(name, "gptq")
    assert sum(layer.outcome != "bf16" for layer in found.layers) == 7
    expected = {"compressed-tensors": "w4a8", "gptq": "w4a16", "awq": "w4a16"}
    assert found.outcome == expected.get(found.layout, "refused")


# ---- what cannot be


def damaged(name: str, folder: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """A fixture with some of its quantization_config and of one linear's tensors replaced, or left out."""
    shutil.copytree(PEERS / name, folder)
    stored = load_file(folder / "model.safetensors")
    for part, tensor in tensors.items():
        key = f"model.layers.0.mlp.up_proj.{part}"
        stored.pop(key)
        if tensor is not None:
            stored[key] = tensor
    save_file(stored, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] |= config or {}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "config", "tensors", "words"),
    [
        ("gptqmodel", {}, {"g_idx": (torch.arange(128) % 2).int()}, "g_idx scatters"),
        ("gptqmodel", {}, {"qzeros": torch.full((1, 32), 0x66666666, dtype=torch.int32)}, "zero points other than 8"),
        ("gptqmodel", {}, {"scales": torch.ones(2, 256).half()}, r"found scales \[256, 2\], expected \[256, 1\]"),
        ("gptqmodel", {}, {"scales": torch.full((1, 256), torch.nan).half()}, "scales that are not finite"),
        ("gptqmodel", {}, {"qweight": torch.zeros(16, 256)}, "qweight: found torch.float32 .* expected int32 of 2 dim"),
        ("gptqmodel", {}, {"qzeros": None}, "found no tensor 'model.layers.0.mlp.up_proj.qzeros'"),
        ("gptqmodel", {"group_size": -1}, {}, "one group a row"),
        ("gptqmodel", {"group_size": "x"}, {}, "quantization_config is damaged"),
        ("gptqmodel", {"quant_method": "exl3"}, {}, "found quantization by 'exl3'"),
        ("llmcompressor-bytes", {}, {"weight": torch.full((256, 128), 9, dtype=torch.int8)}, "found weights beyond -8..7"),
        ("modelopt", {}, {}, "found the layout modelopt"),
    ],
)
def test_imports_that_are_refused(name: str, config: dict, tensors: dict, words: str, tmp_path: Path) -> None:
    """One sentence naming the linear or the file, and nothing written."""
    folder = damaged(name, tmp_path / "in", config, **tensors)
    with pytest.raises(DuotoneError, match=words):
        import_checkpoint(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_negative_scale_turns_the_codes(tmp_path: Path) -> None:
    """AutoRound may write one: levels change their sign; -8 has no counterpart, and needs leave to become 7."""
    stored = load_file(PEERS / "gptqmodel" / "model.safetensors")
    qweight = stored["model.layers.0.mlp.up_proj.qweight"]
    lowest = ((qweight[:, :, None] >> torch.arange(0, 32, 4)) & 15 == 0).any(2).any(0)
    row = int(lowest.nonzero()[0])
    scales = stored["model.layers.0.mlp.up_proj.scales"].clone()
    scales[:, row] *= -1
    folder = damaged("gptqmodel", tmp_path / "in", scales=scales)
    parts = {part: stored[f"model.layers.0.mlp.up_proj.{part}"] for part in ("qweight", "qzeros", "g_idx")}
    config = {"group_size": 128}
    plain = read_gptq("a", parts | {"scales": scales.abs()}, config)
    turned = read_gptq("a", parts | {"scales": scales}, config)
    assert torch.equal(turned.codes[row].int(), (16 - plain.codes[row].int()).clamp(max=15))
    assert torch.equal(turned.codes[:row], plain.codes[:row]) and torch.equal(turned.scale, plain.scale)
    assert turned.turned == int((plain.codes[row] == 0).sum()) > 0
    with pytest.raises(DuotoneError, match=r"up_proj: .* values of -8 .*--allow-lossy"):
        import_checkpoint(folder, tmp_path / "out")
    report = import_checkpoint(folder, tmp_path / "out", allow_lossy=True)
    assert [layer.exactness for layer in report.layers if layer.layer.endswith("up_proj")] == ["approximate"]


def test_exports_that_are_refused(ours: Path, tiny_model: ModelMaker, tmp_path: Path) -> None:
    """A format nobody knows, what is not ours, zero points for GPTQ, a folder in use: one sentence, nothing written."""
    for model, layout, words in (
        (ours, "onnx", "--format: found 'onnx', expected one of compressed-tensors, w4a16, gptq"),
        (tiny_model(), "w4a16", "is not quantized, expected a checkpoint"),
        (PEERS / "gptqmodel", "w4a16", "quant_method 'gptq'"),
    ):
        with pytest.raises(DuotoneError, match=words):
            export_checkpoint(model, tmp_path / "out", layout)
    duotone.quantize(tiny_model(), tmp_path / "zeros", method="rtn", symmetric=False, device="cpu")
    with pytest.raises(DuotoneError, match=r"--format gptq: model\.layers\.0\.\S+: weights have zero points"):
        export_checkpoint(tmp_path / "zeros", tmp_path / "out", "gptq")
    assert {layer.exactness for layer in export_checkpoint(tmp_path / "zeros", tmp_path / "out", "w4a16").layers} == {
        "product-exact"
    }
    with pytest.raises(DuotoneError, match="the output folder is not empty"):
        export_checkpoint(ours, tmp_path / "out", "w4a16")
    with pytest.raises(DuotoneError, match="is not quantized"):
        import_checkpoint(tiny_model(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
