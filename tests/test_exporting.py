# Shapes: N out_features, K in_features.
"""Layouts of FP8 runtimes and of llama.cpp, against other readers of them and what those runtimes compute."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import duotone
from duotone.checking import check
from duotone.checkpoint.layouts import LAYOUTS, Shared
from duotone.checkpoint.layouts.layout import tensor_outer
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.converting import Calibration, export_checkpoint
from duotone.converting.vocabulary import add_vocabulary
from duotone.errors import DuotoneError
from duotone.formats import E4M3FN
from duotone.qweight import dequantize
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from tests.oracles.vllm_split import fp8_weights, load_split
from tests.test_cli import invoke
from tests.test_converting import a_weight, plain_product

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench" / "peers"))

import arithmetic  # noqa: E402 - the comparison's own readers, verified against the tools  # pyright: ignore[reportMissingImports]
import layouts  # noqa: E402  # pyright: ignore[reportMissingImports]

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tiny_model: ModelMaker, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """made(target, model_type) -> a checkpoint of two blocks, rounded to nearest, groups of 64."""
    folder = tmp_path_factory.mktemp("exporting")

    def make(target: str, model_type: str = "qwen2") -> Path:
        out = folder / f"{target}-{model_type}"
        if not out.exists():
            settings = {"calibration": (str(text_file),), "samples": 4, "seq_len": 64, "group_size": 64, "device": "cpu"}
            wide = {"head_dim": 128} if model_type == "qwen3" else {}  # transformers reads no other out of a GGUF file
            duotone.quantize(tiny_model(model_type, **wide), out, method="rtn", target=target, **settings)
        return out

    return make


# ---- what another reader makes of the file


@pytest.mark.parametrize(("layout", "weights"), [("modelopt", "tensor_scaled_weights"), ("gaudi-inc", "gaudi_weights")])
def test_gaudis_weights_survive(made: Callable[..., Path], tmp_path: Path, layout: str, weights: str) -> None:
    """The comparison's own reader of the tool's files finds our codes, and their runtime's weights are the contract's."""
    ours = made("gaudi")
    report = export_checkpoint(ours, tmp_path / "out", layout)
    assert {(one.exactness, one.weight_error) for one in report.layers} == {("bit-exact", 0.0)}
    if layout == "gaudi-inc":  # that reader goes by the tool's own name
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        config["quantization_config"]["quant_method"] = "gptq"
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    peers, source = layouts.read_peer(tmp_path / "out"), open_source(ours)
    assert set(peers) == set(packed_layers(source))
    for layer, peer in peers.items():
        weight = WeightReader(source).read(layer)
        assert torch.equal(peer.level, weight.codes.float() - 8), layer
        assert torch.equal(getattr(arithmetic, weights)(peer), dequantize(weight)), layer
        assert (peer.bias is None) == (not layer.endswith(("q_proj", "k_proj", "v_proj"))), layer
        if layout == "modelopt":
            assert float(peer.input_scale) == float(weight.input_scale) and bool((peer.pre_scale == 1).all())


def test_modelopts_fused_linears_share_their_scales(made: Callable[..., Path], tmp_path: Path) -> None:
    """TensorRT-LLM asserts it of q/k/v and gate/up, and takes no linear without pre_quant_scale; config and check agree."""
    out, calibration = tmp_path / "out", Calibration((str(ROOT / "assets" / "duotone-10m" / "evaluation.txt"),), 4, 64)
    report = export_checkpoint(made("hopper"), out, "modelopt", allow_lossy=True, calibration=calibration)
    assert {one.exactness for one in report.layers} == {"approximate"}
    assert all(0.001 < one.weight_error**0.5 < 0.045 for one in report.layers)
    tensors = load_file(out / "model.safetensors")
    for block in ("model.layers.0.", "model.layers.1."):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            for part in ("weight_scale_2", "input_scale"):
                assert len({float(tensors[f"{block}{name}.{part}"]) for name in names}) == 1
    settings = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert (settings["quant_algo"], settings["group_size"], settings["exclude_modules"]) == ("W4A8_AWQ", 64, ["lm_head"])
    ada, hopper = check(out, ["tensorrt-llm"], ["l40s", "h100"])  # groups of 64 are Ada's alone
    assert (ada.outcome, ada.layout) == ("w4a8", "modelopt")
    assert hopper.outcome == "refused"


def test_static_scales_are_the_largest_inputs(made: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """max |x| / 448 of what the original arithmetic brings each linear, seen through hooks of another model class."""
    from duotone.calibrate.data import draw_windows
    from duotone.models.tokenizer import load_tokenizer
    from duotone.runtime.linear import QuantizedLinear

    ours = made("hopper", "llama")
    export_checkpoint(ours, tmp_path / "out", "modelopt", allow_lossy=True, calibration=Calibration((str(text_file),), 3, 48))
    model, seen = duotone.load(ours, torch.float32, "cpu"), dict[str, float]()

    def watched(name: str, inner: Callable) -> Callable:
        return lambda x: (seen.update({name: float(x.abs().max())}), inner(x))[1]

    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.forward = watched(name, module.forward)
    with torch.no_grad():
        model(draw_windows(load_tokenizer(ours), (str(text_file),), 48, 3, seed=0).tokens)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert len(seen) == 14
    for name, value in seen.items():
        assert float(tensors[f"{name}.input_scale"]) == pytest.approx(value / 448, rel=1e-5)


def test_a_static_layout_needs_scales(made: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint for hopper has none: one sentence that says what to give, and nothing written."""
    with pytest.raises(DuotoneError, match=r"modelopt: model\.\S+: target hopper scales each token.*--calibration TEXT"):
        export_checkpoint(made("hopper"), tmp_path / "out", "modelopt", allow_lossy=True)
    with pytest.raises(DuotoneError, match="found no such"):
        export_checkpoint(made("hopper"), tmp_path / "out", "modelopt", True, calibration=Calibration(("missing.txt",)))
    with pytest.raises(ValueError, match="a: this layout has a static activation scale, found none"):
        LAYOUTS["modelopt"].to_tensors("a", a_weight(8, 32, Scheme(group_size=32)), Shared())
    assert list(tmp_path.iterdir()) == []


def test_the_command(made: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """Its options reach the conversion; what it says of activations and exactness is in --json."""
    options = ("--allow-lossy", "--calibration", text_file, "--samples", "3", "--seq-len", "48", "--json")
    report = invoke(
        "export", made("hopper"), tmp_path / "out", "--format", "modelopt", "--allow-lossy", *options, "--json"
    ).json()
    assert report["layout"] == "modelopt" and len(report["layers"]) == 14 and "largest seen" in report["notes"][0]
    refused = invoke("export", made("gaudi"), tmp_path / "none", "--format", "compressed-tensors")
    assert refused.code == 2 and "--allow-lossy" in refused.err and "Traceback" not in refused.err
    assert invoke("export", made("gaudi"), tmp_path / "inc", "--format", "gaudi-inc", "--quiet").code == 0


def test_vllms_layout_of_a_gaudi_checkpoint(made: Callable[..., Path], tmp_path: Path) -> None:
    """vLLM's split of the file, by its emulation, is what `export` says it measured; of a hopper checkpoint nothing moves."""
    same = export_checkpoint(made("hopper"), tmp_path / "same", "compressed-tensors")
    assert {one.exactness for one in same.layers} == {"bit-exact"}
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (made("hopper") / "model.safetensors").read_bytes()
    report = export_checkpoint(made("gaudi"), tmp_path / "out", "compressed-tensors", allow_lossy=True)
    tensors, source = load_file(tmp_path / "out" / "model.safetensors"), open_source(made("gaudi"))
    for one in report.layers:
        weight = WeightReader(source).read(one.layer)
        group, channel = load_split(tensors[f"{one.layer}.weight_scale"].float().numpy(), False)
        theirs = fp8_weights(weight.codes.numpy().astype(np.float32) - 8, group, 64) * channel[:, None]
        ours = dequantize(weight).numpy()
        assert one.weight_error == pytest.approx(np.sum((theirs - ours) ** 2) / np.sum(ours**2), rel=1e-4)
        assert one.exactness == "approximate" and one.weight_error > 1e-5
    with torch.no_grad():
        assert bool(torch.isfinite(duotone.load(tmp_path / "out", device="cpu")(torch.arange(8)[None]).logits).all())


# ---- SGLang


def test_sglangs_experts_bit_by_bit() -> None:
    """Two's complement nibbles along K, the even column low; scales multiplied with sums, so levels are exact in FP8."""
    weight, name = a_weight(128, 256, Scheme(GAUDI)), "model.layers.0.mlp.experts.7.up_proj"
    tensors = LAYOUTS["sglang-w4afp8"].to_tensors(name, weight, Shared())
    raw, level = tensors[f"{name}.weight"].numpy().view(np.uint8), weight.codes.numpy().astype(int) - 8
    for k in range(256):
        assert np.array_equal((raw[:, k // 2] >> (4 * (k % 2))) & 15, level[:, k] & 15)
    assert float(tensors[f"{name}.input_scale"]) == 0.5
    found = LAYOUTS["sglang-w4afp8"].values(name, tensors, weight.scheme)
    assert np.array_equal(found.double().numpy(), plain_product(weight))


@pytest.mark.parametrize("target", [HOPPER, GAUDI])
def test_sglangs_blocks(target: Target) -> None:
    """Linears that are no experts: torch's own FP8 under one scale for 128 x 128; exact where that is a power of two."""
    weight = a_weight(256, 384, Scheme(target))
    tensors = LAYOUTS["sglang-w4afp8"].to_tensors("a", weight, Shared())
    stored, scale = tensors["a.weight"], tensors["a.weight_scale_inv"]
    assert stored.dtype == torch.float8_e4m3fn and tuple(scale.shape) == (2, 3)
    for i in range(2):
        for j in range(3):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            wanted = (dequantize(weight)[block] / scale[i, j]).to(torch.float8_e4m3fn)
            assert torch.equal(stored[block].float(), wanted.float())
            assert stored[block].float().abs().max() == 448 or target is GAUDI
    error = LAYOUTS["sglang-w4afp8"].values("a", tensors, weight.scheme) - dequantize(weight)
    assert bool((error == 0).all()) == (target is GAUDI) and error.norm() / dequantize(weight).norm() < 0.04


def test_sglang_leaves_nothing_in_bf16(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """Its loader takes no list of such linears; a whole checkpoint is all FP8, and `check` knows it."""
    settings = {"method": "rtn", "target": "gaudi", "calibration": (str(text_file),), "samples": 4, "seq_len": 64}
    model = tiny_model("llama", hidden_size=128, head_dim=64, num_attention_heads=2)
    duotone.quantize(model, tmp_path / "part", ignore=("model.layers.1.mlp.down_proj",), device="cpu", **settings)
    with pytest.raises(DuotoneError, match=r"sglang-w4afp8: model\.layers\.1\.mlp\.down_proj is in BF16"):
        export_checkpoint(tmp_path / "part", tmp_path / "out", "sglang-w4afp8")
    duotone.quantize(model, tmp_path / "whole", device="cpu", **settings)
    report = export_checkpoint(tmp_path / "whole", tmp_path / "out", "sglang-w4afp8")
    assert {one.exactness for one in report.layers} == {"bit-exact"} and len(report.layers) == 14
    (verdict,) = check(tmp_path / "out", ["sglang"], ["h100"])
    assert (verdict.outcome, verdict.layout) == ("w8a8", "sglang-w4afp8")


def test_sglang_reads_a_mixture(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """Experts stay INT4, attention is FP8, routers BF16; an expert that no token is sent to has the others' largest scale."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_experts": 16}
    model = tiny_model("qwen3_moe", **sizes, num_experts_per_tok=1, decoder_sparse_step=1, num_key_value_heads=2)
    text = {"calibration": (str(text_file),), "samples": 4, "seq_len": 64, "device": "cpu"}
    duotone.quantize(model, tmp_path / "gaudi", method="rtn", target="gaudi", **text)
    report = export_checkpoint(tmp_path / "gaudi", tmp_path / "exact", "sglang-w4afp8")
    kinds = {(".experts." in one.layer, one.exactness) for one in report.layers}
    assert kinds == {(True, "product-exact"), (False, "bit-exact")} and len(report.layers) == 2 * (4 + 3 * 16)
    duotone.quantize(model, tmp_path / "hopper", method="rtn", **text)
    few = Calibration((str(text_file),), 1, 8)
    export_checkpoint(tmp_path / "hopper", tmp_path / "out", "sglang-w4afp8", allow_lossy=True, calibration=few)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    scales = [float(tensors[f"model.layers.0.mlp.experts.{i}.down_proj.input_scale"]) for i in range(16)]
    assert min(scales) > 0 and scales.count(max(scales)) > 8 - 1


def test_an_outer_scale_keeps_products_inside() -> None:
    """A power of two; level -8 of the largest scale stays within 448, and half of it would not do."""
    for seed in range(20):
        weight = a_weight(16, 64, Scheme(group_size=32), seed, size=10.0 ** (seed - 10))
        outer, peak = tensor_outer(weight, E4M3FN), float((weight.group_scale * weight.outer_scale[:, None]).max())
        assert 224 < 8 * peak / outer <= 448 * (1 + 2**-8) and np.log2(outer) % 1 == 0


# ---- GGUF


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_our_gguf(made: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    """Through the gguf package: the same logits to the bit as of w4a16, nothing missing or left over."""
    pytest.importorskip("gguf", reason="needs the gguf package (the extra gguf)")
    from transformers import AutoModelForCausalLM

    ours = made("hopper", model_type)
    report = export_checkpoint(ours, tmp_path / "gguf", "gguf")
    assert {one.exactness for one in report.layers} == {"product-exact"} and report.notes == []
    export_checkpoint(ours, tmp_path / "w4a16", "w4a16")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    assert file.stat().st_size > report.weight_bytes
    kind = {"dtype": torch.float32, "output_loading_info": True}
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file=file.name, **kind)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    reference, _ = AutoModelForCausalLM.from_pretrained(tmp_path / "w4a16", **kind)
    tokens = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, reference(tokens).logits)


def test_transformers_reads_our_vocabulary(bundled: Path, tmp_path: Path) -> None:
    """The same tokens as of the tokenizer.json, with what begins a text; the norms and the head are the model's own."""
    pytest.importorskip("gguf", reason="needs the gguf package (the extra gguf)")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    duotone.quantize(bundled, tmp_path / "ours", method="rtn", device="cpu")
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", "gguf")
    (file,) = (tmp_path / "out").glob("*.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=file.name)
    text = (bundled / "evaluation.txt").read_text()[:5000]
    assert theirs(text).input_ids == AutoTokenizer.from_pretrained(bundled)(text).input_ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=file.name, dtype=torch.float32)
    kept = load_file(bundled / "model.safetensors")
    assert torch.equal(model.model.norm.weight, kept["model.norm.weight"].float())
    assert torch.equal(model.model.embed_tokens.weight, kept["model.embed_tokens.weight"].float())
    assert report.weight_bytes < sum(tensor.nbytes for tensor in kept.values()) / 2


def test_q4_0_by_its_own_decoder() -> None:
    """gguf's dequantization of our bytes, groups of one and of four blocks; a scale that FP16 does not hold is not exact."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package (the extra gguf)")
    for size in (32, 128):
        weight = a_weight(24, 256, Scheme(group_size=size))
        stored = LAYOUTS["gguf"].to_tensors("a", weight, Shared())["a.weight"]
        found = gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType.Q4_0)
        assert np.array_equal(found.astype(np.float64), plain_product(weight))
    tiny = a_weight(8, 32, Scheme(group_size=32), size=1e-6)
    tensors = LAYOUTS["gguf"].to_tensors("a", tiny, Shared())
    assert not np.array_equal(LAYOUTS["gguf"].values("a", tensors, tiny.scheme), plain_product(tiny))


def test_llama3s_scaled_rotation(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """llama.cpp divides each pair's frequency by a factor of the file: what transformers has is the quotient."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package (the extra gguf)")
    from transformers import AutoModelForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    model = tiny_model("llama", rope_parameters=rope)
    duotone.quantize(model, tmp_path / "ours", method="rtn", group_size=32, device="cpu")
    export_checkpoint(tmp_path / "ours", tmp_path / "out", "gguf")
    reader = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    (factors,) = (tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 5e5 ** -(np.arange(0, 32, 2) / 32)
    theirs = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb.inv_freq.numpy()
    assert len(set(factors.tolist())) > 2 and np.allclose(plain / factors, theirs, rtol=1e-6)
    yarn = tiny_model("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    duotone.quantize(yarn, tmp_path / "yarn", method="rtn", group_size=32, device="cpu")
    with pytest.raises(DuotoneError, match="found rope_type 'yarn', expected default or llama3"):
        export_checkpoint(tmp_path / "yarn", tmp_path / "none", "gguf")
    assert not (tmp_path / "none").exists()


def test_without_the_package(made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence that says what to install; nothing written."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DuotoneError, match=r"needs the package gguf, found none: pip install 'duotone\[gguf\]'"):
        export_checkpoint(made("hopper"), tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []


class Keys:
    """Stands for a GGUF writer: keeps what it is given."""

    def __init__(self) -> None:
        self.given: dict[str, object] = {}

    def __getattr__(self, name: str) -> Callable[[object], None]:
        return lambda value: self.given.update({name.removeprefix("add_"): value})


def vocabulary(folder: Path, tokenizer: dict | None, size: int = 8) -> tuple[dict[str, object], list[str]]:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package (the extra gguf)")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    writer = Keys()
    return writer.given, add_vocabulary(writer, gguf, folder, size)


def test_a_vocabulary_with_bytes_to_fall_back_on(tmp_path: Path) -> None:
    """As of Llama 2: kinds of tokens are llama.cpp's, ranks are scores, rows without a token are unused."""
    words = {"<unk>": 0, "<s>": 1, "<0x41>": 2, "\u2581a": 3, "b": 4}
    special = [{"id": 0, "content": "<unk>", "special": True}, {"id": 1, "content": "<s>", "special": True}]
    tokenizer = {"model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": words, "merges": []}}
    given, notes = vocabulary(tmp_path, tokenizer | {"added_tokens": [*special, {"id": 5, "content": "[x]", "special": False}]})
    assert notes == [] and given["tokenizer_model"] == "llama" and "tokenizer_pre" not in given
    assert given["token_list"] == ["<unk>", "<s>", "<0x41>", "\u2581a", "b", "[x]", "[PAD6]", "[PAD7]"]
    assert given["token_types"] == [2, 3, 6, 1, 1, 4, 5, 5]  # of llama.h: unknown, control, byte, normal, user's, unused
    assert given["token_scores"] == [-0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]


def split(regex: str) -> dict:
    steps = [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel", "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        (split("\\p{N}{1,3}| ?"), "llama-bpe"),
        (split("\\p{N}| ?"), "qwen2"),
        (split("[0-9]"), None),
        ({"type": "Whitespace"}, None),
    ],
)
def test_how_text_is_cut_has_a_name(tmp_path: Path, cut: dict, name: str | None) -> None:
    """Known ones by llama.cpp's names; for another its default, and a note."""
    given, notes = vocabulary(tmp_path, {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": cut})
    assert given["tokenizer_model"] == "gpt2" and given["tokenizer_pre"] == (name or "default")
    assert (notes == []) == (name is not None)


@pytest.mark.parametrize("vocab", [{"a": 8}, {"a": "b"}, ["a"], None])
def test_a_damaged_vocabulary(tmp_path: Path, vocab: object) -> None:
    """A token beyond the embedding, and what is no token."""
    with pytest.raises(DuotoneError, match=r"tokenizer\.json: its tokens are damaged .* number below 8"):
        vocabulary(tmp_path, {"model": {"type": "BPE", "vocab": vocab, "merges": []}})


def test_other_vocabularies_are_left_out(tmp_path: Path) -> None:
    """No tokenizer, or none of BPE: tokens go by number, and a note says so."""
    for tokenizer, words in ((None, "found no tokenizer.json"), ({"model": {"type": "WordPiece"}}, "is 'WordPiece'")):
        given, (note,) = vocabulary(tmp_path, tokenizer)
        assert given == {"tokenizer_model": "no_vocab"} and words in note


def test_models_that_llama_cpp_has_no_place_for(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Groups that no block fits, and an architecture that is not in the list: one sentence each."""
    pytest.importorskip("gguf", reason="needs the gguf package (the extra gguf)")
    duotone.quantize(tiny_model(), tmp_path / "small", method="rtn", group_size=16, device="cpu")
    with pytest.raises(DuotoneError, match=r"gguf: .*: found groups of 16, expected a multiple of 32"):
        export_checkpoint(tmp_path / "small", tmp_path / "out", "gguf")
    duotone.quantize(tiny_model(), tmp_path / "ours", method="rtn", group_size=32, device="cpu")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    with pytest.raises(DuotoneError, match="found model_type 'gemma', expected one of llama, mistral, qwen2, qwen3"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
