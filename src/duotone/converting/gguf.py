# Shapes: N out_features, K in_features.
"""A GGUF file, what llama.cpp reads: tensors under its names, and what of config and tokenizer it asks for.

The container, its keys and its names are the `gguf` package's (llama.cpp's own writer); docs/formats/gguf.md has the rest.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.hub import copy_companions
from duotone.checkpoint.source import SourceFolder, architecture_of, load_finite
from duotone.checkpoint.staging import output_folder
from duotone.checkpoint.writer import reporting_full_disk
from duotone.converting.report import Conversion, Progress
from duotone.converting.vocabulary import add_vocabulary
from duotone.errors import DuotoneError

#: model_type -> llama.cpp's architecture, and whether it rotates pairs of neighbors, for which rows of q and k change places.
ARCHITECTURES = {"llama": ("LLAMA", True), "mistral": ("LLAMA", True), "qwen2": ("QWEN2", False), "qwen3": ("QWEN3", False)}
_ROPE_FACTORS = "rope_freqs.weight"


def write_gguf(
    source: SourceFolder,
    out: Path,
    packed: Mapping[str, dict[str, TensorSpec]],
    tensors_of: Callable[[str], dict[str, Tensor]],
    report: Conversion,
    progress: Progress | None,
) -> None:
    """One file in `out`, tokenizer and licence beside it. packed: Q4_0 bytes of linears; norms and biases are F32, others BF16.

    Raises DuotoneError, before anything is written, without the package, and for what llama.cpp has no place for.
    """
    gguf, model_type = _package(), architecture_of(source.config)
    name, turns = ARCHITECTURES.get(model_type, ("", False))
    if not name:
        known = ", ".join(ARCHITECTURES)
        raise DuotoneError(f"--format gguf: config.json: found model_type {model_type!r}, expected one of {known}")
    config = _settings(source.config)
    architecture, factors = getattr(gguf.MODEL_ARCH, name), _rope_factors(config)
    plan = dict(_planned(source, packed, gguf.get_tensor_name_map(architecture, config.num_hidden_layers)))
    with output_folder(out) as folder, reporting_full_disk(out, sum(spec.nbytes for _, spec in plan.values())):
        copy_companions(source.path, folder)
        file = folder / f"{source.path.name}-Q4_0.gguf"
        with contextlib.closing(gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])) as writer:
            _describe(writer, gguf, config, source.path.name)
            report.notes += add_vocabulary(writer, gguf, source.path, config.vocab_size)
            if factors is not None:
                _announce(writer, gguf, _ROPE_FACTORS, TensorSpec("F32", tuple(factors.shape)))
            for gguf_name, spec in plan.values():
                _announce(writer, gguf, gguf_name, spec)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
            for done, (full, (_, spec)) in enumerate(plan.items()):
                if progress is not None:
                    progress(done, len(plan), full)
                layer = full.removesuffix(".weight")
                tensor = tensors_of(layer)[full] if layer in packed else load_finite(source, (full,))[full]
                writer.write_tensor_data(_bytes(_turned(full, tensor, config) if turns else tensor, spec))
                report.weight_bytes += spec.nbytes


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise DuotoneError("--format gguf: needs the package gguf, found none: pip install 'duotone[gguf]'") from None


def _planned(
    source: SourceFolder, packed: Mapping[str, dict[str, TensorSpec]], names: Any
) -> Iterator[tuple[str, tuple[str, TensorSpec]]]:
    """The source's name of each tensor, and the file's with what it is stored as, in the source's order."""
    told: set[str] = set()
    for stored, spec in source.tensors.items():
        layer, _, leaf = stored.rpartition(".")
        full = f"{layer}.weight" if layer in packed and leaf != "bias" else stored
        if full in told or stored.endswith("rotary_emb.inv_freq"):
            continue
        told.add(full)
        found = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise DuotoneError(f"--format gguf: {full}: llama.cpp has no name for it, expected a tensor of the architecture")
        other = TensorSpec("F32" if len(spec.shape) == 1 else "BF16", spec.shape)
        yield full, (found, packed[layer][full] if layer in packed and leaf != "bias" else other)


def _announce(writer: Any, gguf: Any, name: str, spec: TensorSpec) -> None:
    numpy = {"U8": "uint8", "F32": "float32", "BF16": "uint8"}[spec.dtype]
    kind = getattr(gguf.GGMLQuantizationType, {"U8": "Q4_0"}.get(spec.dtype, spec.dtype))
    shape = (*spec.shape[:-1], spec.shape[-1] * 2) if spec.dtype == "BF16" else spec.shape  # of bytes
    writer.add_tensor_info(name, shape, importlib.import_module("numpy").dtype(numpy), spec.nbytes, raw_dtype=kind)


def _bytes(tensor: Tensor, spec: TensorSpec) -> Any:
    kinds = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}
    return tensor.to(kinds[spec.dtype]).contiguous().view(torch.uint8).numpy()


def _turned(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Rows of q and k in llama.cpp's order: it rotates rows 2i and 2i + 1 of a head, transformers i and i + half."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.view(heads, 2, len(tensor) // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)


def _describe(writer: Any, gguf: Any, config: Any, name: str) -> None:
    """The keys that llama.cpp asks for."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rope_factors(config: Any) -> Tensor | None:
    """By how much llama3's scaling slows each pair, float32 [head_dim / 2]; None where nothing is scaled.

    Raises DuotoneError for another scaling.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise DuotoneError(f"--format gguf: config.json: found rope_type {kind!r}, expected default or llama3")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    return plain / scaled


def _settings(config: Mapping[str, Any]) -> Any:
    """The config with transformers' defaults (a PreTrainedConfig of the model_type)."""
    return AutoConfig.for_model(**{key: value for key, value in config.items() if key != "quantization_config"})
