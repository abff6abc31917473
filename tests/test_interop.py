"""What others make of our checkpoints: transformers with compressed-tensors, and vLLM's load-time split, emulated."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import duotone
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import open_source
from duotone.qweight import dequantize, fp8_values
from tests.oracles.vllm_split import fp8_weights, load_split

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, quantized with the default method for `hopper`."""
    out = tmp_path_factory.mktemp("interop") / "out"
    duotone.quantize(bundled, out, calibration=(str(bundled / "calibration.txt"),), samples=16, seq_len=128, device="cpu")
    return out


@pytest.mark.parametrize("reciprocal", [False, True], ids=["divide", "multiply by the reciprocal"])
def test_vllm_rebuilds_our_weights_bit_for_bit(checkpoint: Path, reciprocal: bool) -> None:
    """From the file's one BF16 scale, vLLM's loader gets our group scales and FP8 weights exactly, for every layer."""
    source = open_source(checkpoint)
    assert sorted(packed_layers(source)) == sorted(make_names(source.config))
    for layer in packed_layers(source):
        weight = WeightReader(source).read(layer)
        scale = source.load([f"{layer}.weight_scale"])[f"{layer}.weight_scale"].float().numpy()
        group, channel = load_split(scale, reciprocal)
        assert np.array_equal(group, weight.group_scale.numpy()), layer
        levels = weight.codes.numpy().astype(np.float32) - 8
        assert np.array_equal(fp8_weights(levels, group, weight.scheme.group_size), fp8_values(weight).numpy()), layer
        ours = weight.outer_scale.numpy()
        ulps = 1 if reciprocal else 0
        assert np.all(np.abs(channel - ours) <= ulps * np.spacing(np.maximum(channel, ours))), layer


def make_names(config: dict) -> list[str]:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return [f"model.layers.{i}.{part}" for i in range(config["num_hidden_layers"]) for part in parts]


def test_transformers_loads_it_whole(checkpoint: Path) -> None:
    """from_pretrained reports nothing missing, unexpected or mismatched, and its weights are ours up to two known roundings.

    compressed-tensors multiplies code by scale in BF16 and never rounds the product to FP8. Against ours that is at most
    half an E4M3 step (2^-4 relative, half a subnormal step absolute) for the FP8 rounding it skips, and 2^-8 (BF16 of
    the scale and of the product, 2^-9 each) for the roundings it adds.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    source = open_source(checkpoint)
    for layer in packed_layers(source):
        weight = WeightReader(source).read(layer)
        ours, module = dequantize(weight), model.get_submodule(layer)
        theirs = reader_weight(module).float()
        subnormal = weight.scheme.target.fp8.smallest_subnormal / 2 * weight.outer_scale[:, None]
        bound = torch.maximum(ours.abs(), theirs.abs()) * (2**-4 + 2**-8) + subnormal
        assert bool(((ours - theirs).abs() <= bound).all()), layer
        assert (ours - theirs).norm() / ours.norm() < 0.04, layer


def reader_weight(module: torch.nn.Module) -> torch.Tensor:
    """The dense weight of a module compressed-tensors loaded, decompressed if it still is packed."""
    if hasattr(module, "weight") and module.weight is not None and module.weight.is_floating_point():
        return module.weight.detach()
    from compressed_tensors.compressors import decompress_module

    decompress_module(module)
    return module.weight.detach()


def test_transformers_computes_nearly_the_same(checkpoint: Path, bundled: Path) -> None:
    """Logits through transformers and compressed-tensors agree with ours far better than chance (a broken load gives ~1.4)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ours = duotone.load(checkpoint, torch.float32, "cpu")
    tokens = AutoTokenizer.from_pretrained(checkpoint)(
        (bundled / "evaluation.txt").read_text()[:600], return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        a, b = theirs(tokens).logits, ours(tokens).logits
    assert (a - b).norm() / b.norm() < 0.1


def test_gaudi_variant_is_refused_by_other_readers(tiny_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """A reader that does not know the variant's second level raises: it cannot compute garbage in silence."""
    from transformers import AutoModelForCausalLM

    duotone.quantize(
        tiny_model(),
        tmp_path / "out",
        target="gaudi",
        method="rtn",
        calibration=(str(text_file),),
        samples=4,
        seq_len=64,
        device="cpu",
    )
    with pytest.raises(ValueError, match="format"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("made_for", [1, 2])
def test_ranks_rebuild_our_weights_where_made_for_them(
    made_for: int, tiny_model: ModelMaker, text_file: Path, tmp_path: Path
) -> None:
    """vLLM gives each of two ranks half of the columns of what writes to the stream, and the loader sees nothing else.

    Without `--tensor-parallel 2` it rounds their scales a second time.
    """
    model = tiny_model(hidden_size=256, intermediate_size=512, head_dim=64)
    settings = {"calibration": (str(text_file),), "samples": 4, "seq_len": 64, "group_size": 64, "device": "cpu"}
    duotone.quantize(model, tmp_path / "out", tensor_parallel=made_for, **settings)
    source, exact = open_source(tmp_path / "out"), []
    for layer in (layer for layer in packed_layers(source) if layer.endswith(("o_proj", "down_proj"))):
        weight = WeightReader(source).read(layer)
        levels, scale = weight.codes.numpy().astype(np.float32) - 8, source.load([f"{layer}.weight_scale"])
        for rank in range(2):
            groups = np.array_split(scale[f"{layer}.weight_scale"].float().numpy(), 2, 1)[rank]
            group, channel = load_split(groups, False)
            theirs = fp8_weights(np.array_split(levels, 2, 1)[rank], group, 64) * channel[:, None]
            exact.append(np.array_equal(theirs, np.array_split(dequantize(weight).numpy(), 2, 1)[rank]))
    assert len(exact) == 8 and (all(exact) if made_for == 2 else not any(exact))
