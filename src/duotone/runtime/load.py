"""From a checkpoint folder to a running transformers model whose linears are ours."""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from duotone.checkpoint.prequantized import widened
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.sidecar import recorded_inputs
from duotone.checkpoint.source import Source, open_source
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.models.adapter import find_adapter, has_adapter
from duotone.models.anatomy import Anatomy, anatomy_of
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton, expected_tensors, fill, find_linears, tie_weights
from duotone.runtime import attention, decoder, experts, kv_cache, norms
from duotone.runtime.linear import QuantizedLinear, share_call


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: str = "auto", *, shortcuts: bool = True
) -> PreTrainedModel:
    """A model ready to run: a Duotone checkpoint with W4A8 linears, or an ordinary model folder as it is, what is MXFP4 or FP8
    in blocks there widened to BF16.

    dtype: of everything that is not quantized, the config's own by default. device: auto (CUDA if there is one), cpu, cuda.
    shortcuts: run what lies between the linears of a quantized model by faster ops of our own, in BF16 on a CPU (attention.py,
    decoder.py), on a GPU its norms (norms.py) and experts, all at once; without, it is transformers' code.
    Raises DuotoneError when a file is missing or damaged, or a tensor does not fit the architecture.
    """
    folder = widened(open_source(Path(path)))
    place = resolve_device(device)
    dtype = dtype or config_dtype(folder.config)
    model = build_skeleton(folder.config, dtype)
    source = named_source(folder, model)
    is_quantized = source.config.get("quantization_config") is not None
    scales: set[str] = set()
    if is_quantized:
        anatomy = anatomy_of(source.config, model, recorded_inputs(source.path))
        place_quantized(model, source, place)
        share_calls(model, anatomy)
        scales = kv_cache.install(model, source, anatomy, model, place)
    wanted = check_complete(model, source)
    fill(model, source.load(wanted), dtype, place)
    tie_weights(model)
    # Buffers that the model makes itself (position numbers, rotary tables) lie in older checkpoints too.
    known = set(model.state_dict()) | set(wanted) | {name for name, _ in model.named_buffers()} | scales
    unexpected = [name for name in source.tensors if name not in known and not _is_quantized_part(model, name)]
    if unexpected:
        warnings.warn(
            f"{source.path}: {len(unexpected)} tensors are not used by the model, first {unexpected[0]}", stacklevel=2
        )
    nn.Module.to(model, place)
    if shortcuts and is_quantized:
        shorten(model, source.config, dtype, place)
    if (source.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source.path))
    return model


def config_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype a config.json names (`dtype`, formerly `torch_dtype`); BF16 when it names none."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in {torch.bfloat16, torch.float16, torch.float32}:
        raise DuotoneError(f"config.json: found dtype {name!r}, expected bfloat16, float16 or float32")
    return dtype


def check_complete(model: PreTrainedModel, source: Source) -> list[str]:
    """The tensors that a model takes from a checkpoint. Raises DuotoneError where one is not in it."""
    wanted = list(expected_tensors(model))
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        raise DuotoneError(
            f"{source.path}: found no tensor {missing[0]!r}, expected it for this architecture ({len(missing)} missing)"
        )
    return wanted


def place_quantized(model: PreTrainedModel, source: Source, place: torch.device) -> None:
    """Put a QuantizedLinear in the place of every linear the checkpoint holds packed.

    Raises DuotoneError for a packed weight that the model has no linear for, and for one that does not fit.
    """
    reader, linears = WeightReader(source), find_linears(model)
    for layer in packed_layers(source):
        if layer not in linears:
            raise DuotoneError(f"{source.path}: holds a packed weight {layer!r}, found no such linear in this architecture")
        weight = reader.read(layer)
        shape = (linears[layer].out_features, linears[layer].in_features)
        if weight.shape != shape:
            raise DuotoneError(f"{layer}: found shape {list(weight.shape)}, expected {list(shape)} from config.json")
        parent, _, leaf = layer.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantizedLinear(weight, _empty_bias(linears[layer]), place))


def share_calls(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """One call for the linears of each input. model: may lack the head, and so the prefix, of the one that anatomy is of."""
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model", None) is model else ""
    for block in anatomy.blocks:
        for group in block.shared_inputs:
            share_call([model.get_submodule(layer.removeprefix(prefix)) for layer in group])


def shorten(model: PreTrainedModel, config: dict[str, Any], dtype: torch.dtype, place: torch.device) -> None:
    """The faster ops, where the architecture is known to be served by them."""
    experts.group(model)
    blocks = _blocks(model, config)
    if blocks is None:
        return
    residual = find_adapter(config).residual
    if residual is not None:
        norms.install(blocks, residual.norms, dtype)
    if attention.is_better(dtype, place):
        attention.install(model)
    if dtype == torch.bfloat16 and place.type == "cpu":
        decoder.install(model, blocks)


def _blocks(model: PreTrainedModel, config: dict[str, Any]) -> nn.ModuleList | None:
    """The blocks of an architecture that has a table, of the model with its head or without."""
    if not has_adapter(config):
        return None
    path = find_adapter(config).blocks
    if model.base_model is model:
        path = path.removeprefix(f"{model.base_model_prefix}.")
    return cast("nn.ModuleList", model.get_submodule(path))


def _empty_bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.data


def _is_quantized_part(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        return leaf.startswith("weight") and isinstance(model.get_submodule(path), QuantizedLinear)
    except AttributeError:
        return False
