"""From a checkpoint folder to a running transformers model whose linears are ours."""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import Source, open_source
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.models.adapter import find_adapter, has_adapter
from duotone.models.anatomy import anatomy_of
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton, expected_tensors, fill, find_linears
from duotone.runtime import attention, decoder
from duotone.runtime.linear import QuantizedLinear, share_call


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: str = "auto", *, shortcuts: bool = True
) -> PreTrainedModel:
    """A model ready to run: a Duotone checkpoint with W4A8 linears, or an ordinary model folder as it is.

    dtype: of everything that is not quantized, the config's own by default. device: auto (CUDA if there is one), cpu, cuda.
    shortcuts: run what lies between the linears of a quantized BF16 model on a CPU by faster ops of our own (attention.py,
    decoder.py); without, it is transformers' code.
    Raises DuotoneError when a file is missing or damaged, or a tensor does not fit the architecture.
    """
    folder = open_source(Path(path))
    place = resolve_device(device)
    dtype = dtype or config_dtype(folder.config)
    model = build_skeleton(folder.config, dtype)
    source = named_source(folder, model)
    if source.config.get("quantization_config") is not None:
        anatomy = anatomy_of(source.config, model)
        _place_quantized(model, source, place)
        for block in anatomy.blocks:
            for group in block.shared_inputs:
                share_call([model.get_submodule(layer) for layer in group])
    wanted = expected_tensors(model)
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        raise DuotoneError(
            f"{source.path}: found no tensor {missing[0]!r}, expected it for this architecture ({len(missing)} missing)"
        )
    fill(model, source.load(wanted), dtype, place)
    model.tie_weights()
    # Buffers that the model makes itself (position numbers, rotary tables) lie in older checkpoints too.
    known = set(model.state_dict()) | set(wanted) | {name for name, _ in model.named_buffers()}
    unexpected = [name for name in source.tensors if name not in known and not _is_quantized_part(model, name)]
    if unexpected:
        warnings.warn(
            f"{source.path}: {len(unexpected)} tensors are not used by the model, first {unexpected[0]}", stacklevel=2
        )
    nn.Module.to(model, place)
    blocks = _blocks(model, source.config)
    if shortcuts and blocks is not None and source.config.get("quantization_config") is not None:
        _shorten(model, blocks, dtype, place)
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


def _place_quantized(model: PreTrainedModel, source: Source, place: torch.device) -> None:
    """Put a QuantizedLinear in the place of every linear the checkpoint holds packed."""
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


def _shorten(model: PreTrainedModel, blocks: nn.ModuleList, dtype: torch.dtype, place: torch.device) -> None:
    """The faster ops, where the architecture is known to be served by them."""
    if attention.is_better(dtype, place):
        attention.install(model)
    if dtype == torch.bfloat16 and place.type == "cpu":
        decoder.install(model, blocks)


def _blocks(model: PreTrainedModel, config: dict[str, Any]) -> nn.ModuleList | None:
    """The blocks of an architecture that has a table."""
    return cast("nn.ModuleList", model.get_submodule(find_adapter(config).blocks)) if has_adapter(config) else None


def _empty_bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.data


def _is_quantized_part(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        return leaf.startswith("weight") and isinstance(model.get_submodule(path), QuantizedLinear)
    except AttributeError:
        return False
