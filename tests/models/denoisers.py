"""Tiny random models of diffusers, and inputs in the shapes that each of them reads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_UNET = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8}
_DIT = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}

#: By class: the config.
DENOISERS: dict[str, dict[str, Any]] = {
    "UNet2DModel": _UNET | {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 16,
    },
    "UNet2DConditionModel": _UNET | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32, "attention_head_dim": 2, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
    "DiTTransformer2DModel": _DIT | {"out_channels": 8, "num_embeds_ada_norm": 1000},
    "SD3Transformer2DModel": _DIT | {
        "joint_attention_dim": 32, "caption_projection_dim": 64, "pooled_projection_dim": 32, "out_channels": 4,
        "pos_embed_max_size": 8,
    },
    "FluxTransformer2DModel": {
        "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
}  # fmt: skip


def denoiser(name: str) -> Any:
    """A random model of a class; biases and norms random too."""
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, name)(**DENOISERS[name]).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():  # some begin as zeros, so that they do nothing
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs_of(name: str, count: int, seed: int = 1) -> dict[str, Tensor]:
    """Samples of what a class reads, by name; SDXL's dict by dotted names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(count, *sizes, generator=generator)

    steps = torch.randint(0, 1000, (count,), generator=generator)
    text: dict[str, Callable[[], dict[str, Tensor]]] = {
        "UNet2DModel": lambda: {"sample": normal(3, 8, 8), "timestep": steps},
        "UNet2DConditionModel": lambda: {
            "sample": normal(4, 8, 8), "timestep": steps, "encoder_hidden_states": normal(5, 32),
            "added_cond_kwargs.text_embeds": normal(32), "added_cond_kwargs.time_ids": normal(6),
        },
        "DiTTransformer2DModel": lambda: {
            "hidden_states": normal(4, 8, 8), "timestep": steps,
            "class_labels": torch.randint(0, 1000, (count,), generator=generator),
        },
        "SD3Transformer2DModel": lambda: {
            "hidden_states": normal(4, 8, 8), "encoder_hidden_states": normal(5, 32), "pooled_projections": normal(32),
            "timestep": steps,
        },
        "FluxTransformer2DModel": lambda: {
            "hidden_states": normal(16, 16), "encoder_hidden_states": normal(5, 32), "pooled_projections": normal(32),
            "timestep": steps / 1000, "img_ids": torch.arange(3.0).repeat(count, 16, 1),
            "txt_ids": torch.zeros(count, 5, 3), "guidance": torch.full((count,), 3.5),
        },
    }  # fmt: skip
    return text[name]()
