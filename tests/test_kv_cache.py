"""The FP8 cache: scales against an oracle, in the file as others read it, and a cache of half the bytes that runs."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import duotone
from duotone.calibrate.data import draw_windows
from duotone.checking import check
from duotone.checkpoint.kv_cache import kv_strategy_of
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.contract import dequantize_kv, kv_scale, quantize_kv
from duotone.converting import export_checkpoint, import_checkpoint
from duotone.errors import DuotoneError
from duotone.explanation import explain_model
from duotone.inspection import inspect_model
from duotone.kernels import native
from duotone.models.tokenizer import load_tokenizer
from duotone.publishing import verify
from duotone.qweight import dequantize
from duotone.runtime import attention
from duotone.scheme import GAUDI, HOPPER
from tests.test_cli import invoke

ModelMaker = Callable[..., Path]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
STRATEGIES = ("tensor", "attn_head")
QUICK: dict[str, Any] = {"samples": 6, "seq_len": 32, "device": "cpu"}
PROMPT = torch.arange(40, 57)[None]


def quantized(model: Path, out: Path, text: Path, strategy: str | None = "tensor", **options: Any) -> Path:
    cache = {} if strategy is None else {"kv_cache": "fp8", "kv_cache_strategy": strategy}
    duotone.quantize(model, out, calibration=(str(text),), **(QUICK | {"method": "rtn"} | cache | options))
    return out


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tiny_model: ModelMaker, text_file: Path, tmp_path_factory: Any) -> Path:
    """A scale for each of two heads."""
    windows = {"sliding_window": None} if request.param == "mistral" else {}
    out = tmp_path_factory.mktemp("kv") / "out"
    return quantized(tiny_model(request.param, **windows), out, text_file, "attn_head")


def scales_in(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("k_scale", "v_scale"))}


def seen_by_a_cache(original: Path, folder: Path, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each layer the keys and values that transformers' own cache keeps of all tokens, with the quantized weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    source = open_source(folder)
    for layer in packed_layers(source):
        model.get_submodule(layer).weight.data = dequantize(WeightReader(source).read(layer))
    changed = {name: tensor.float() for name, tensor in source.load(source.tensors).items() if name in model.state_dict()}
    model.load_state_dict(changed, strict=False)
    with torch.no_grad():
        return [(layer.keys, layer.values) for layer in model(tokens, use_cache=True).past_key_values.layers]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"method": "dpq"}),
        ("llama", {"method": "gptq"}),
        ("llama", {"method": "dpq", "equalize": 0.5, "rotate": True, "group_size": 32}),
        ("llama", {"target": "gaudi"}),
        ("phi3", {}),
        ("gemma2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())) or "rtn",
)
def test_scales_are_those_of_what_a_cache_would_keep(
    strategy: str, family: str, options: dict[str, Any], tiny_model: ModelMaker, text_file: Path, tmp_path: Path
) -> None:
    """absmax / 448 over all windows of what the quantized model, run from end to end, puts into transformers' cache."""
    model = tiny_model(family)
    out = quantized(model, tmp_path / "out", text_file, strategy, **options)
    if options.get("rotate"):  # the same model, turned: its own folder has what is not quantized
        model = turned(model, out, tmp_path / "turned")
    windows = draw_windows(load_tokenizer(model), [str(text_file)], QUICK["seq_len"], QUICK["samples"], seed=0)
    found = scales_in(out)
    most = GAUDI.fp8.max if "target" in options else HOPPER.fp8.max
    for i, kept in enumerate(seen_by_a_cache(model, out, windows.tokens)):
        for part, x in zip(("k_scale", "v_scale"), kept, strict=True):
            scale = found.pop(f"model.layers.{i}.self_attn.{part}")
            largest = x.abs().amax((0, 2, 3)) if strategy == "attn_head" else x.abs().amax()[None]
            assert scale.dtype == torch.bfloat16 and scale.shape == ((2, 1, 1) if strategy == "attn_head" else (1,))
            assert torch.allclose(scale.float().flatten(), largest / most, rtol=2.0**-7)
    assert not found


def turned(model: Path, out: Path, to: Path) -> Path:
    """The original's folder with the config of a rotated checkpoint, which may have its embedding and head apart."""
    shutil.copytree(model, to)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (to / "config.json").write_text(json.dumps(config))
    return to


@given(
    x=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    target=st.sampled_from([HOPPER, GAUDI]),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_is_kept_is_near(x: list[float], target: Any) -> None:
    """Within half a step of FP8 and BF16's rounding of the scale; nothing calibrated is beyond the format's largest value."""
    values = torch.tensor(x)[None, None, :, None]
    scale = kv_scale(values.abs().amax().reshape(1), target)
    kept = quantize_kv(values, scale, target)
    assert kept.dtype == torch.float8_e4m3fn and float(kept.float().abs().max()) <= target.fp8.max
    off = (dequantize_kv(kept, scale, torch.float32) - values).abs()
    assert bool((off <= values.abs() * (2.0**-4 + 2.0**-8) + scale * 2.0**-10).all())


def test_scales_of_nothing_and_of_nonsense() -> None:
    """A head that is always zero keeps what it gets later as it is; NaN is no scale."""
    assert kv_scale(torch.tensor([0.0, 448.0]), HOPPER).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="NaN"):
        kv_scale(torch.tensor([torch.nan]), HOPPER)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_else_changes(strategy: str, tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """The same weights to the bit; config.json and the sidecar say what has been added, and how it was asked for."""
    options = {"method": "dpq", "group_size": 32}
    plain = quantized(tiny_model(), tmp_path / "plain", text_file, None, **options)
    cached = quantized(tiny_model(), tmp_path / "cached", text_file, strategy, **options)
    before, after = load_file(plain / "model.safetensors"), load_file(cached / "model.safetensors")
    added = after.keys() - before.keys()
    assert added == {f"model.layers.{i}.self_attn.{part}" for i in range(2) for part in ("k_scale", "v_scale")}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (plain, cached)]
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    assert [config["quantization_config"].pop("kv_cache_scheme") for config in configs] == [None, scheme]
    assert configs[0] == configs[1]
    settings = json.loads((cached / "duotone.json").read_text())["settings"]
    assert (settings["kv_cache"], settings["kv_cache_strategy"]) == ("fp8", strategy)
    assert "FP8 E4M3" in (cached / "README.md").read_text() and "KV cache" not in (plain / "README.md").read_text()


def test_compressed_tensors_reads_the_scheme(checkpoint: Path) -> None:
    """Its own schema takes the config; transformers loads the folder whole, with every scale as it lies in the file."""
    from compressed_tensors.quantization import QuantizationArgs

    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    args = QuantizationArgs.model_validate(config["kv_cache_scheme"])
    assert (args.num_bits, args.type, args.strategy, args.dynamic, args.symmetric) == (8, "float", "attn_head", False, True)
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    for name, scale in scales_in(checkpoint).items():
        assert torch.equal(model.get_parameter(name).data, scale)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_transformers_rounds_to_the_same_values(strategy: str, tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """What compressed-tensors puts into its cache of given keys and values is what ours holds, times the scale."""
    from compressed_tensors.modeling import QuantizedKVCache

    out = quantized(tiny_model(), tmp_path / "out", text_file, strategy)
    theirs: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    mine: Any = duotone.load(out, torch.float32, "cpu")
    module, own = theirs.model.layers[1].self_attn, mine.model.layers[1].self_attn
    given = [torch.randn(2, 2, 9, 32, generator=torch.Generator().manual_seed(i)) * 3 for i in range(2)]
    cache = module.kv_cache
    assert isinstance(cache, QuantizedKVCache)
    for x, found, scale in zip(given, cache(*given), (own.k_scale, own.v_scale), strict=True):
        assert torch.allclose(dequantize_kv(quantize_kv(x, scale, HOPPER), scale, torch.float32), found, rtol=2.0**-20)


def cache_bytes(cache: DynamicCache) -> int:
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))


def told(model: PreTrainedModel, tokens: Tensor, cache: DynamicCache | None = None) -> Tensor:
    with torch.no_grad():
        return model(tokens, past_key_values=cache, use_cache=cache is not None).logits


def test_the_cache_is_half_as_large_and_the_text_as_likely(checkpoint: Path) -> None:
    """One byte a value. At once without a cache, at once with one, in two parts, token by token: the same logits."""
    for dtype in (torch.float32, torch.bfloat16):
        model = duotone.load(checkpoint, dtype, "cpu")
        caches = [DynamicCache(config=model.config) for _ in range(3)]
        meant = told(model, PROMPT)
        found = [
            told(model, PROMPT, caches[0]),
            torch.cat([told(model, part, caches[1]) for part in PROMPT.split(9, 1)], 1),
            torch.cat([told(model, token, caches[2]) for token in PROMPT.split(1, 1)], 1),
        ]
        assert torch.equal(found[0], meant)
        for logits in found[1:]:  # a sum in another order may turn the rounding of a key
            assert float((logits - meant).float().norm() / meant.float().norm()) < (0.02 if dtype == torch.float32 else 0.05)
        assert all(layer.keys.dtype == layer.values.dtype == torch.float8_e4m3fn for c in caches for layer in c.layers)
        assert cache_bytes(caches[0]) == PROMPT.numel() * 2 * 2 * 2 * 32  # layers, keys and values, heads, head size


def test_logits_are_those_of_rounded_keys_and_values(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle in transformers' place of attention, which rounds with torch's own cast; and without it they differ."""
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.mistral import modeling_mistral as mistral
    from transformers.models.qwen2 import modeling_qwen2 as qwen2
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    rounded = told(duotone.load(checkpoint, torch.float32, "cpu"), PROMPT)
    plain = without_scheme(checkpoint, checkpoint.parent / "plain")
    exact = duotone.load(plain, torch.float32, "cpu")
    scales = scales_in(checkpoint)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        for_layer = [scales[f"model.layers.{module.layer_idx}.self_attn.{part}"].float() for part in ("k_scale", "v_scale")]
        key, value = (
            (x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s for x, s in zip((key, value), for_layer, strict=True)
        )
        return original(module, query, key, value, mask, **options)

    original = llama.ALL_ATTENTION_FUNCTIONS["sdpa"]
    unrounded = told(exact, PROMPT)
    for place in (llama, mistral, qwen2, qwen3):
        monkeypatch.setattr(place.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: attend)
    assert torch.allclose(told(exact, PROMPT), rounded, atol=1e-4)
    assert not torch.allclose(unrounded, rounded, atol=1e-3)


def without_scheme(folder: Path, to: Path) -> Path:
    """The checkpoint as if nobody had asked for an FP8 cache."""
    if not to.exists():
        shutil.copytree(folder, to)
        config = json.loads((to / "config.json").read_text())
        config["quantization_config"]["kv_cache_scheme"] = None
        (to / "config.json").write_text(json.dumps(config))
        tensors = load_file(to / "model.safetensors")
        save_file({name: t for name, t in tensors.items() if name not in scales_in(folder)}, to / "model.safetensors")
    return to


@pytest.mark.skipif(not native.available(), reason=f"compiled ops: {native.unavailable()}")
def test_the_one_op_writes_the_same_bytes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, with room in the cache: the short way is taken, and its cache and text are those of the long way."""
    monkeypatch.setattr(attention, "is_better", lambda dtype, device: dtype == torch.bfloat16 and device.type == "cpu")
    short: Any = duotone.load(checkpoint, device="cpu")
    long: Any = duotone.load(checkpoint, device="cpu", shortcuts=False)
    attention.install(long)
    ways: list[int] = []
    original = short.model._long_way
    monkeypatch.setattr(short.model, "_long_way", lambda *a, **k: ways.append(1) or original(*a, **k))
    caches = [DynamicCache(config=short.config) for _ in range(2)]
    found, meant = (
        torch.cat([told(model, part, cache) for part in (PROMPT[:, :8], *PROMPT[:, 8:].split(1, 1))], 1).float()
        for model, cache in zip((short, long), caches, strict=True)
    )
    assert len(ways) == 1, "the prompt alone goes the long way"
    assert float((found - meant).norm() / meant.norm()) < 0.05
    first = [cache.layers[0] for cache in caches]
    for mine, theirs in zip((first[0].keys, first[0].values), (first[1].keys, first[1].values), strict=True):
        assert mine.dtype == torch.float8_e4m3fn and mine.shape == theirs.shape
        assert float((mine.contiguous().view(torch.uint8) != theirs.view(torch.uint8)).float().mean()) < 0.01
    texts = [model.generate(PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0) for model in (short, long)]
    assert torch.equal(*texts)


def test_whatever_transformers_does_with_a_cache(checkpoint: Path) -> None:
    """Copying, cropping, repeating, choosing, beams."""
    model = duotone.load(checkpoint, device="cpu")
    cache = DynamicCache(config=model.config)
    told(model, PROMPT, cache)
    twin = copy.deepcopy(cache)
    meant = told(model, torch.tensor([[30]]), twin)
    cache.crop(-3)
    told(model, PROMPT[:, -3:], cache)
    cache.batch_repeat_interleave(2)
    found = told(model, torch.tensor([[30], [30]]), cache)
    assert all(float((row - meant[0]).float().norm() / meant.float().norm()) < 0.05 for row in found)
    text = model.generate(PROMPT, num_beams=3, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert text.shape[1] > PROMPT.shape[1]


def test_a_static_cache_holds_it_too(checkpoint: Path) -> None:
    """transformers' own of a fixed size, one byte a value: the text is that of one that grows."""
    model = duotone.load(checkpoint, device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    static = model.generate(PROMPT, cache_implementation="static", return_dict_in_generate=True, **options)
    assert {layer.keys.dtype for layer in static.past_key_values.layers} == {torch.float8_e4m3fn}
    assert torch.equal(static.sequences, model.generate(PROMPT, **options))


def test_a_cache_that_holds_something_else_is_refused(checkpoint: Path) -> None:
    """One that was begun by somebody else: a sentence, not a cache in another precision."""
    model = duotone.load(checkpoint, device="cpu")
    begun = DynamicCache(config=model.config)
    for i in range(2):
        begun.update(torch.ones(1, 2, 3, 32).bfloat16(), torch.ones(1, 2, 3, 32).bfloat16(), i)
    with pytest.raises(DuotoneError, match=r"FP8 KV cache: found a DynamicCache that cannot keep FP8"):
        told(model, PROMPT, begun)


def test_a_copy_is_a_model_of_its_own(checkpoint: Path) -> None:
    """Its attention reads its own scales."""
    model = duotone.load(checkpoint, torch.float32, "cpu")
    twin: Any = copy.deepcopy(model)
    meant = told(model, PROMPT)
    model.model.layers[0].self_attn.k_scale.fill_(3.0)
    assert torch.equal(told(twin, PROMPT), meant) and not torch.equal(told(model, PROMPT), meant)


def test_a_window_slides_over_fp8(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """Mistral's cache of a window keeps its last tokens, token by token as at once."""
    out = quantized(tiny_model("mistral", sliding_window=8), tmp_path / "out", text_file)
    model = duotone.load(out, torch.float32, "cpu")
    cache = DynamicCache(config=model.config)
    found = torch.cat([told(model, token, cache) for token in PROMPT.split(1, 1)], 1)
    assert cache.layers[0].keys.dtype == torch.float8_e4m3fn and cache.layers[0].keys.shape[2] == 7
    meant = told(model, PROMPT)
    assert float((found - meant).norm() / meant.norm()) < 0.02


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.mark.parametrize(
    ("family", "options", "name"),
    [
        ("gpt2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "num_key_value_heads": 4}, "transformer.h.1.attn"),
        ("gemma3_text", {"sliding_window": 16}, "model.layers.1.self_attn"),
        ("qwen3_moe", MIXTURE, "model.layers.1.self_attn"),
    ],
)
def test_families_that_nobody_wrote_a_line_for(
    family: str, options: dict[str, Any], name: str, tiny_model: ModelMaker, text_file: Path, tmp_path: Path
) -> None:
    """Scales in the file under the folder's names; at once and token by token the same text; nothing left unused."""
    out = quantized(tiny_model(family, **options), tmp_path / "out", text_file, "attn_head", group_size=32)
    found = scales_in(out)
    assert len(found) == 4 and found[f"{name}.k_scale"].shape == (options.get("num_key_value_heads", 2), 1, 1)
    with warnings.catch_warnings(action="error", category=UserWarning):
        model = duotone.load(out, torch.float32, "cpu")
    cache = DynamicCache(config=model.config)
    stepped = torch.cat([told(model, token, cache) for token in PROMPT.split(1, 1)], 1)
    assert {layer.keys.dtype for layer in cache.layers} == {torch.float8_e4m3fn}
    meant = told(model, PROMPT)
    assert float((stepped - meant).norm() / meant.norm()) < 0.02


def test_a_family_that_names_its_cache_otherwise_is_refused(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """GPT-NeoX calls it layer_past: a sentence before any work."""
    outcome = invoke("quantize", tiny_model("gpt_neox"), tmp_path / "out", "--kv-cache", "fp8", "--dry-run")
    assert outcome.code == 2 and "--kv-cache: found 0 modules in gpt_neox.layers.0 that keep keys and values" in outcome.err


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_run_that_is_resumed_gives_the_same_bytes(
    blocks: int, tiny_model: ModelMaker, text_file: Path, tmp_path: Path
) -> None:
    """Scales of the blocks before the save lie in the shard already; another cache is another run."""
    from tests.test_resume import Stopped, contents, stopped_after

    model, options = tiny_model(num_hidden_layers=3, hidden_size=64, intermediate_size=96, head_dim=16), {"save_every": 0.0}
    whole, out = quantized(model, tmp_path / "whole", text_file, "attn_head", method="dpq"), tmp_path / "out"
    with pytest.raises(Stopped):
        quantized(model, out, text_file, "attn_head", method="dpq", progress=stopped_after(blocks), **options)
    with pytest.raises(DuotoneError, match="kv_cache_strategy 'attn_head', found 'tensor'"):
        quantized(model, out, text_file, "tensor", method="dpq", resume=True)
    quantized(model, out, text_file, "attn_head", method="dpq", resume=True)
    assert contents(out) == contents(whole)


BAD_OPTIONS = (
    ({"kv_cache": "int8"}, r"--kv-cache: found 'int8', expected one of fp8"),
    (
        {"kv_cache": "fp8", "kv_cache_strategy": "channel"},
        r"--kv-cache-strategy: found 'channel', expected one of tensor, attn_",
    ),
)


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS)
def test_bad_options_are_refused(options: dict[str, str], words: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Before any work."""
    with pytest.raises(DuotoneError, match=words):
        duotone.quantize(tiny_model(), tmp_path / "out", method="rtn", device="cpu", **options)
    assert not (tmp_path / "out").exists()


def test_an_encoder_has_no_cache(tmp_path: Path) -> None:
    """And the sentence says which models have one."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    outcome = invoke("quantize", tmp_path / "bert", tmp_path / "out", "--kv-cache", "fp8", "--dry-run")
    assert outcome.code == 2 and "--kv-cache: found BertModel, which writes no text, expected a decoder" in outcome.err


def test_text_is_needed_even_by_rtn(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """The command line: measured on the text that is given, told by --json, shown by inspect and explain."""
    arguments = ("quantize", tiny_model(), tmp_path / "out", "--method", "rtn", "--kv-cache", "fp8", "--device", "cpu")
    arguments += ("--samples", "4", "--seq-len", "32", "--calibration", text_file)
    report = invoke(*arguments, "--json").json()
    assert report["calibration"]["tokens"] == 4 * 32 and report["config"]["kv_cache"] == "fp8"
    said = "FP8 E4M3, one byte a value, a scale for each layer's keys and one for its values"
    assert inspect_model(tmp_path / "out").kv_cache == explain_model(tmp_path / "out", "cpu").kv_cache == said
    for command in ("inspect", "explain"):
        assert "KV cache" in invoke(command, tmp_path / "out").out
        assert invoke(command, tmp_path / "out", "--json").json()["kv_cache"] == said


Break = Callable[[dict[str, Tensor], dict[str, Any]], object]
DAMAGED: dict[str, tuple[Break, str]] = {
    "missing": (lambda t, _: t.pop("model.layers.1.self_attn.v_scale"), "found no tensor 'model.layers.1.self_attn.v_scale'"),
    "shape": (lambda t, _: t.update({KEY: torch.ones(3, 1, 1).bfloat16()}), r"k_scale: found BF16 \[3, 1, 1\], expected BF16"),
    "dtype": (lambda t, _: t.update({KEY: torch.ones(2, 1, 1, dtype=torch.int32)}), r"k_scale: found I32"),
    "zero": (lambda t, _: t[KEY].zero_(), "k_scale: found a scale that is not positive"),
    "negative": (lambda t, _: t[KEY].neg_(), "k_scale: found a scale that is not positive"),
    "NaN": (lambda t, _: t[KEY].fill_(torch.nan), "k_scale: found a scale that is not positive"),
    "int8": (lambda _, c: c.update(type="int"), "found a kv_cache_scheme of .*'int'"),
    "dynamic": (lambda _, c: c.update(dynamic=True), "found a kv_cache_scheme of .*True"),
    "channels": (lambda _, c: c.update(strategy="channel"), "expected null, or 8-bit floats .* tensor or attn_head"),
}
KEY = "model.layers.0.self_attn.k_scale"


@pytest.mark.parametrize(("damage", "words"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_told(damage: Break, words: str, tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """By the tensor's name, or the config's entry."""
    out = quantized(tiny_model(), tmp_path / "out", text_file, "attn_head")
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    damage(tensors, config["quantization_config"]["kv_cache_scheme"])
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(DuotoneError, match=words):
        duotone.load(out, device="cpu")


def test_layouts_that_read_scales_keep_them(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """w4a16 is compressed-tensors' too; the others leave them out, and say so. What is imported brings its own."""
    out = quantized(tiny_model(), tmp_path / "out", text_file, "attn_head")
    kept = export_checkpoint(out, tmp_path / "w4a16", "w4a16")
    assert not kept.notes and scales_in(tmp_path / "w4a16").keys() == scales_in(out).keys()
    config = json.loads((tmp_path / "w4a16" / "config.json").read_text())["quantization_config"]
    assert kv_strategy_of(config) == "attn_head"
    left = export_checkpoint(out, tmp_path / "dense", "dense-bf16", allow_lossy=True)
    assert not scales_in(tmp_path / "dense") and "scales of the FP8 KV cache: they are left out" in left.notes[0]
    import_checkpoint(tmp_path / "w4a16", tmp_path / "back")
    assert told(duotone.load(tmp_path / "back", device="cpu"), PROMPT, DynamicCache()).isfinite().all()
    for name, scale in scales_in(out).items():
        assert torch.equal(scales_in(tmp_path / "back")[name], scale)


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
def test_from_pretrained_with_our_linears_has_our_cache(kind: Any, checkpoint: Path) -> None:
    """The same bits as `duotone.load`, with a head or without, and one byte a value."""
    with duotone.use_in_transformers():
        model, info = kind.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and {*info["unexpected_keys"]} <= {"lm_head.weight"}
    mine, cache = duotone.load(checkpoint, model.dtype, "cpu"), DynamicCache(config=model.config)
    mine = mine if kind is AutoModelForCausalLM else mine.base_model
    with torch.no_grad():
        assert torch.equal(model(PROMPT, past_key_values=cache)[0], mine(PROMPT)[0])
    assert {layer.keys.dtype for layer in cache.layers} == {torch.float8_e4m3fn}


def test_what_is_pushed_is_read_first(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """A damaged scale does not leave the machine; a module has no cache."""
    out = quantized(tiny_model(), tmp_path / "out", text_file, "attn_head")
    verify(out)
    tensors = load_file(out / "model.safetensors")
    tensors[KEY].zero_()
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(DuotoneError, match="k_scale: found a scale that is not positive"):
        verify(out)
    with pytest.raises(DuotoneError, match="--kv-cache: found Linear, which writes no text"):
        duotone.quantize_module(torch.nn.Linear(64, 64), [torch.ones(2, 64)], kv_cache="fp8", group_size=32)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_check_knows_who_reads_them(strategy: str, tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """Of a checkpoint, and of one exported: scales of heads are for FlashAttention 3 and 4 alone; SGLang ignores them."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 64}
    out = quantized(tiny_model(**sizes), tmp_path / "out", text_file, strategy)
    export_checkpoint(out, tmp_path / "w4a16", "w4a16")
    here = {(one.runtime, one.gpu): one for one in check(out)}
    there = {(one.runtime, one.gpu): one for one in check(tmp_path / "w4a16")}
    heads = " with a scale for each head" if strategy == "attn_head" else ""
    assert here["vllm", "h100"].runs == f"CUTLASS W4A8; FP8 KV cache{heads}"
    assert (here["transformers", "cpu"].runs or "").endswith("keys and values rounded to FP8, the KV cache as large as before")
    assert (here["duotone", "cpu"].runs or "").endswith("; FP8 KV cache")
    a100, sglang = there["vllm", "a100"], there["sglang", "a100"]
    assert a100.loads == (strategy == "tensor") and there["vllm", "h100"].loads
    if strategy == "attn_head":
        assert (
            "the FP8 cache has a scale for each head, the device is a100" in a100.reasons[0]
            and "flash_attn.py" in a100.reasons[0]
        )
        assert "--kv-cache-strategy tensor" in a100.advice[0] and "it ignores a scale for each head" in (sglang.runs or "")
