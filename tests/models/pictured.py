"""Tiny random vision-language models of six families, each with a processor made here: folders as the hub has them."""

from pathlib import Path
from typing import Any

import torch

TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": 272, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 257,
}  # fmt: skip
PATCHES = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TOWER = {"depth": 2, "num_heads": 4, "patch_size": 8, "hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 128}
MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
QWEN = {"image_token_id": 258, "video_token_id": 259, "vision_start_token_id": 260, "vision_end_token_id": 261}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
#: By model_type: config.json.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": QWEN | {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": TOWER | {"embed_dim": 128, "mlp_ratio": 2},
    },
    "qwen2_5_vl": QWEN | {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": TOWER | {"window_size": 32, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": QWEN | {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    },
    "qwen3_vl_moe": QWEN | {
        "text_config": TEXT | MOE | {"rope_parameters": MROPE},
        "vision_config": TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    },
    "llava": {
        "image_token_index": 258, "image_seq_length": 16,
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": PATCHES | {"model_type": "clip_vision_model"},
    },
    "gemma3": {
        "image_token_index": 258, "boi_token_index": 260, "eoi_token_index": 261, "mm_tokens_per_image": 4,
        "text_config": TEXT | {"query_pre_attn_scalar": 32},
        "vision_config": PATCHES | {"model_type": "siglip_vision_model", "vision_use_head": False},
    },
    "idefics3": {
        "image_token_id": 258, "scale_factor": 2, "text_config": TEXT | {"model_type": "llama"}, "vision_config": PATCHES,
    },
    "smolvlm": {
        "image_token_id": 258, "scale_factor": 2, "text_config": TEXT | {"model_type": "llama"}, "vision_config": PATCHES,
    },
}  # fmt: skip


def save_pictured(folder: Path, model_type: str) -> Path:
    """A random BF16 model of a family, in the form in which transformers saves it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(model_type, **FAMILIES[model_type])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():  # Gemma's projection begins as zeros
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


#: Families whose processor takes videos too, and those it needs torchvision for: transformers resizes others by Pillow alone.
WITH_VIDEO = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm"}
BY_TORCHVISION = {*WITH_VIDEO, "idefics3"}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
)
QWEN_SIZE = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 16 * 16, "max_pixels": 48 * 48}


def save_processor(folder: Path, model_type: str, template: bool = True) -> None:
    """The family's own processor, for images of 32 x 32 or a little more, with a byte tokenizer."""
    import transformers

    from tests.conftest import _byte_tokenizer

    square = {"height": 32, "width": 32}
    special = ["<image>", "<video>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    extra: dict[str, Any] = {}
    if model_type.startswith("qwen"):
        special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
        images = transformers.Qwen2VLImageProcessorPil(**QWEN_SIZE)
        shown = "<|vision_start|><|image_pad|><|vision_end|>"
    elif model_type == "gemma3":
        extra = {"image_seq_length": 4}
        special = ["<image_soft_token>", "<unused>", "<start_of_image>", "<end_of_image>"]
        images = transformers.Gemma3ImageProcessorPil(size=square)
        shown = "<start_of_image>"
    elif model_type == "llava":
        extra = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
        shown = "<image>"
    else:
        extra = {"image_seq_len": 4}
        name = "Idefics3ImageProcessorPil" if model_type == "idefics3" else "SmolVLMImageProcessorPil"
        edge = {"longest_edge": 32}
        images = getattr(transformers, name)(size=edge, max_image_size=edge, do_image_splitting=False)
        shown = "<image>"
    tokenizer = _byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if model_type == "gemma3":
        names = dict(zip(("image_token", "boi_token", "eoi_token"), (special[0], *special[2:]), strict=True))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=names
        )
    kind = getattr(transformers, transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES[model_type])
    parts = {"image_processor": images, "tokenizer": tokenizer}
    if model_type in WITH_VIDEO:
        name = "Qwen2VLVideoProcessor" if model_type.startswith("qwen") else "SmolVLMVideoProcessor"
        parts["video_processor"] = getattr(transformers, name)()
    chat = TEMPLATE.replace("IMAGE", shown) if template else None
    made = kind(*(parts[part] for part in kind.get_attributes()), chat_template=chat, **extra)
    made.save_pretrained(folder)


def picture(model_type: str, seed: int = 0, words: int = 12) -> dict[str, torch.Tensor]:
    """An image of 32 x 32 with text before and behind it, as the family's processor gives it to the model."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 256, (words + 3,), generator=generator).tolist()
    ids = torch.tensor([[256, *text[:3], 260, *[258] * (16 if model_type == "llava" else 4), 261, *text[3:]]])
    kinds = (ids == 258).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model_type.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4]])
        patches = torch.randn(16, 3 * 2 * 8 * 8, generator=generator)
        return inputs | {"mm_token_type_ids": kinds, "pixel_values": patches, "image_grid_thw": grid}
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    if model_type == "gemma3":
        return inputs | {"token_type_ids": kinds, "pixel_values": pixels}
    if model_type == "llava":
        return inputs | {"pixel_values": pixels}
    return inputs | {"pixel_values": pixels[None], "pixel_attention_mask": torch.ones(1, 1, 32, 32)}


def pictures(model_type: str, count: int) -> Any:
    """Samples of that kind, of different lengths."""
    from duotone.calibrate.pairs import ImageTextPairs

    samples = tuple(picture(model_type, seed, 12 + seed % 3) for seed in range(count))
    return ImageTextPairs(samples, ("pictures.jsonl",), "0", 100)
