"""What becomes of models of diffusers: small random ones in folders, by dpq: how far from the original and the contract.

Usage: python bench/diffusion.py [CLASS...], all by default. Appends to bench/records/diffusion.jsonl.
Needs: pip install 'duotone[diffusers]'.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import duotone
from architectures import facts, in_float64
from duotone.bench import append_records, provenance
from duotone.checkpoint.reader import WeightReader
from duotone.checkpoint.source import open_source
from duotone.contract import quantize_activations
from duotone.errors import DuotoneError
from duotone.models.diffusion import nested
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.runtime.linear import QuantizedLinear

RECORDS = Path(__file__).resolve().parent / "records" / "diffusion.jsonl"
COUNT, KNOWN = 40, 32
GROUP = 128
UNET = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (64, 128), "norm_num_groups": 16}
CROSS = UNET | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64, "attention_head_dim": 4,
}  # fmt: skip
HEADS = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 2}
DIT = HEADS | {"in_channels": 4, "sample_size": 16, "patch_size": 2}


def normal(*sizes: int) -> Tensor:
    """Samples of a size."""
    return torch.randn(COUNT, *sizes)


def steps() -> Tensor:
    """A time step for each sample."""
    return torch.randint(0, 1000, (COUNT,))


def places() -> Tensor:
    """Where the 8 x 8 parts of a picture are [64, 3], as Flux has it."""
    return nn.functional.pad(torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)), (1, 0))


#: By what it is called here: class, config, and samples of what it reads.
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "UNet2DModel": (
        "UNet2DModel",
        UNET | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 32,
        },
        lambda: {"sample": normal(3, 16, 16), "timestep": steps()},
    ),
    "UNet2DConditionModel (SD)": (
        "UNet2DConditionModel", CROSS,
        lambda: {"sample": normal(4, 16, 16), "timestep": steps(), "encoder_hidden_states": normal(8, 64)},
    ),
    "UNet2DConditionModel (SDXL)": (
        "UNet2DConditionModel",
        CROSS | {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 32, "use_linear_projection": True,
            "projection_class_embeddings_input_dim": 64 + 6 * 32, "transformer_layers_per_block": (2, 1),
        },
        lambda: {
            "sample": normal(4, 16, 16), "timestep": steps(), "encoder_hidden_states": normal(8, 64),
            "added_cond_kwargs.text_embeds": normal(64), "added_cond_kwargs.time_ids": 64 * normal(6).abs(),
        },
    ),
    "DiTTransformer2DModel": (
        "DiTTransformer2DModel", DIT | {"out_channels": 8, "num_embeds_ada_norm": 1000, "num_layers": 4},
        lambda: {"hidden_states": normal(4, 16, 16), "timestep": steps(), "class_labels": steps()},
    ),
    "PixArtTransformer2DModel": (
        "PixArtTransformer2DModel",
        DIT | {"out_channels": 8, "caption_channels": 64, "cross_attention_dim": 128, "num_layers": 4},
        lambda: {"hidden_states": normal(4, 16, 16), "encoder_hidden_states": normal(8, 64), "timestep": steps()},
    ),
    "SD3Transformer2DModel": (
        "SD3Transformer2DModel",
        DIT | {
            "joint_attention_dim": 64, "caption_projection_dim": 128, "pooled_projection_dim": 64, "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        lambda: {
            "hidden_states": normal(4, 16, 16), "encoder_hidden_states": normal(8, 64), "pooled_projections": normal(64),
            "timestep": steps(),
        },
    ),
    "FluxTransformer2DModel": (
        "FluxTransformer2DModel",
        HEADS | {
            "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 64,
            "pooled_projection_dim": 64, "guidance_embeds": True, "axes_dims_rope": (8, 12, 12),
        },
        lambda: {
            "hidden_states": normal(64, 16), "encoder_hidden_states": normal(8, 64), "pooled_projections": normal(64),
            "timestep": torch.rand(COUNT), "img_ids": places().repeat(COUNT, 1, 1),
            "txt_ids": torch.zeros(COUNT, 8, 3), "guidance": torch.full((COUNT,), 3.5),
        },
    ),
    "AuraFlowTransformer2DModel": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 2,
            "attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 128,
            "out_channels": 4, "pos_embed_max_size": 64,
        },
        lambda: {"hidden_states": normal(4, 16, 16), "encoder_hidden_states": normal(8, 64), "timestep": torch.rand(COUNT)},
    ),
    "SanaTransformer2DModel": (
        "SanaTransformer2DModel",
        HEADS | {
            "in_channels": 32, "out_channels": 32, "num_cross_attention_heads": 4, "cross_attention_head_dim": 32,
            "cross_attention_dim": 128, "caption_channels": 64, "mlp_ratio": 2.5, "sample_size": 8, "patch_size": 1,
        },
        lambda: {"hidden_states": normal(32, 8, 8), "encoder_hidden_states": normal(8, 64), "timestep": steps()},
    ),
    "WanTransformer3DModel (video)": (
        "WanTransformer3DModel",
        HEADS | {
            "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 64, "freq_dim": 64, "ffn_dim": 256,
            "num_layers": 4, "rope_max_seq_len": 32,
        },
        lambda: {"hidden_states": normal(4, 2, 8, 8), "timestep": steps(), "encoder_hidden_states": normal(8, 64)},
    ),
    "AutoencoderKL": (
        "AutoencoderKL",
        {
            "block_out_channels": (64, 128), "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 16, "layers_per_block": 1,
            "sample_size": 32,
        },
        lambda: {"sample": normal(3, 16, 16)},
    ),
}  # fmt: skip


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What a model says."""
    with torch.no_grad():
        return model(**nested(inputs), return_dict=False)[0]


def relative(found: Tensor, expected: Tensor) -> float:
    """Of the norms."""
    return float((found - expected).norm() / expected.norm())


def counted(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Multiply-accumulates of every linear and convolution in one forward pass."""
    macs: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(module: Any, _: Any, output: Tensor) -> None:
            macs[name] = macs.get(name, 0) + output.numel() * module.weight[0].numel()

        return count

    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    handles = [part.register_forward_hook(hook(name)) for name, part in model.named_modules() if isinstance(part, kinds)]
    answer(model, inputs)
    for handle in handles:
        handle.remove()
    return macs


def furthest(model: nn.Module, weights: dict[str, QuantizedWeight], inputs: dict[str, Tensor]) -> float:
    """How far any linear's output is from the contract in float64, on what the linear really reads."""
    apart: list[float] = []

    def hook(weight: QuantizedWeight) -> Callable[..., None]:
        def compare(linear: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            x8, scale = quantize_activations(given[0], weight.scheme.target, weight.input_scale)
            y = (x8.double() @ fp8_values(weight).double().T) * weight.outer_scale.double() * scale.double()
            apart.append(relative(output, y if linear.bias is None else y + linear.bias.double()))

        return compare

    handles = [model.get_submodule(layer).register_forward_hook(hook(weight)) for layer, weight in weights.items()]
    answer(model, inputs)
    for handle in handles:
        handle.remove()
    return max(apart)


def row_of(name: str) -> dict[str, Any]:
    """One model at random: quantize, load, compare. The row says why where it cannot be."""
    kind, config, samples = MODELS[name]
    torch.manual_seed(0)
    model: Any = getattr(diffusers, kind)(**config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():  # what begins as zeros does nothing
            parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = samples()
    held_out = {key: tensor[KNOWN:] for key, tensor in inputs.items()}
    with tempfile.TemporaryDirectory() as place:
        folder, out, file = Path(place, "model"), Path(place, "out"), Path(place, "samples.safetensors")
        model.save_pretrained(folder)
        save_file({key: tensor[:KNOWN].contiguous() for key, tensor in inputs.items()}, file)
        try:
            report = duotone.quantize(folder, out, calibration=(str(file),), samples=KNOWN, group_size=GROUP, device="cpu")
        except DuotoneError as error:
            return {"refused": str(error)}
        found = duotone.load(out, torch.float32, "cpu")
        source = open_source(out)
        reader = WeightReader(named_source(source, build_skeleton(source.config, torch.float32)))
        layers = {path: reader.read(path) for path, part in found.named_modules() if isinstance(part, QuantizedLinear)}
    expected, given, macs = answer(model, held_out), answer(found, held_out), counted(model, held_out)
    quantized = sum(macs.get(layer, macs.get(layer.removesuffix(".linear"), 0)) for layer in layers)
    linear_error = furthest(found, layers, held_out)
    in_float64(found, layers)
    return facts(report) | {
        "computed_share": quantized / sum(macs.values()),
        "padded": sum(weight.shape[1] % GROUP > 0 for weight in layers.values()),
        "group_size": GROUP,
        "max_linear_error": linear_error,
        "max_error_vs_reference": relative(given, answer(found, held_out)),
        "metric": "relative error of the output",
        "original": 0.0,
        "quantized": relative(given, expected),
        "diffusers": diffusers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--records", type=Path, default=RECORDS)
    arguments = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    for name in arguments.models or MODELS:
        row = {"model_class": name, "source": "random weights", "method": "dpq"} | row_of(name)
        append_records(arguments.records, [provenance(0) | row])
        print(name, row.get("refused") or f"{row['quantized']:.3f} from the original", flush=True)


if __name__ == "__main__":
    main()
