# Shapes: N out_features, K in_features, G groups along K.
"""Reads the quantized linears of a peer's checkpoint, whichever tool wrote it, and the tensors it left unquantized."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from layers import PeerLinear
from safetensors.torch import load_file
from torch import Tensor

NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)


def read_peer(folder: Path) -> dict[str, PeerLinear]:
    """Every quantized linear of a checkpoint folder, by full module name. Raises ValueError for a layout it does not know."""
    layout = _layout(folder)
    if layout not in READERS:
        raise ValueError(f"{folder}: quant_method {layout!r}, expected one of {', '.join(READERS)}")
    return READERS[layout](folder)


def other_tensors(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors that belong to no quantized linear, as stored: a peer may have changed them (AWQ's norms)."""
    linears = read_peer(folder)
    return {name: tensor for name, tensor in _tensors(folder).items() if name.rpartition(".")[0] not in linears}


def read_compressed_tensors(folder: Path) -> dict[str, PeerLinear]:
    """compressed-tensors' pack-quantized W4AFP8 (llm-compressor): offset-binary nibbles along K, one BF16 scale a group."""
    tensors = _tensors(folder)
    (group,) = _config(folder)["config_groups"].values()
    if group["format"] != "pack-quantized" or not group["weights"]["symmetric"] or group["weights"]["num_bits"] != 4:
        raise ValueError(f"{folder}: expected symmetric 4-bit pack-quantized, found {group['format']}, {group['weights']}")

    def linear(name: str) -> PeerLinear:
        columns = int(tensors[f"{name}.weight_shape"][1])
        code = ((tensors[f"{name}.weight_packed"].unsqueeze(-1) >> NIBBLES) & 15).flatten(-2)[:, :columns]
        return PeerLinear(
            level=(code - 8).float(),
            scale=tensors[f"{name}.weight_scale"].float(),
            group_size=group["weights"]["group_size"],
            bias=_bias(tensors, name),
        )

    return {name: linear(name) for name in _modules(tensors, "weight_packed")}


def read_modelopt(folder: Path) -> dict[str, PeerLinear]:
    """ModelOpt's W4A8_AWQ: two's complement nibbles, two output rows a byte with the even row low; a second scale a tensor.

    The second scale is the FP8 step's: outer_scale here. pre_quant_scale is there only where no norm could take it up.
    """
    tensors = _tensors(folder)
    if _config(folder)["quant_algo"] != "W4A8_AWQ":
        raise ValueError(f"{folder}: expected quant_algo W4A8_AWQ, found {_config(folder)['quant_algo']}")

    def linear(name: str) -> PeerLinear:
        pair = tensors[f"{name}.weight"]  # [N / 2, K]
        code = torch.stack((pair & 15, pair >> 4), dim=1).flatten(0, 1).to(torch.int8)
        scale = tensors[f"{name}.weight_scale"]
        smooth = tensors.get(f"{name}.pre_quant_scale")
        return PeerLinear(
            level=(code - 16 * (code > 7)).float(),
            scale=scale.float(),
            group_size=code.shape[1] // scale.shape[1],
            input_scale=tensors[f"{name}.input_scale"],
            pre_scale=None if smooth is None else smooth.float(),
            outer_scale=tensors[f"{name}.weight_scale_2"],
            bias=_bias(tensors, name),
        )

    return {name: linear(name) for name in _modules(tensors, "weight_scale_2")}


def read_inc(folder: Path) -> dict[str, PeerLinear]:
    """Neural Compressor's DPQ: GPTQ's layout and `scale_bf16_to_fp8`, a power of two a tensor.

    The file's group scales are in FP8 units; here, as everywhere, level * scale is the weight, so they are multiplied by
    outer_scale, which is exact. The biases of zeros that the tool gives to linears without one are left out.
    """
    tensors = _tensors(folder)

    def linear(name: str, found: PeerLinear) -> PeerLinear:
        outer = tensors[f"{name}.scale_bf16_to_fp8"].float().squeeze()
        bias = None if found.bias is None or not found.bias.any() else found.bias
        return replace(found, scale=found.scale * outer, outer_scale=outer, bias=bias)

    return {name: linear(name, found) for name, found in _read_gptq(folder).items()}


def _read_gptq(folder: Path) -> dict[str, PeerLinear]:
    from layout_gptq import read_gptq

    return read_gptq(folder)


READERS: dict[str, Callable[[Path], dict[str, PeerLinear]]] = {
    "compressed-tensors": read_compressed_tensors,
    "modelopt": read_modelopt,
    "inc": read_inc,
    "gptq": _read_gptq,
    "auto-round": _read_gptq,
}


def _layout(folder: Path) -> str:
    """The config's quant_method; but INC calls its own "gptq" too."""
    method = _config(folder)["quant_method"]
    is_inc = method == "gptq" and any(name.endswith(".scale_bf16_to_fp8") for name in _tensors(folder))
    return "inc" if is_inc else method


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _modules(tensors: dict[str, Tensor], last: str) -> list[str]:
    return [name.removesuffix(f".{last}") for name in tensors if name.endswith(f".{last}")]


def _bias(tensors: dict[str, Tensor], name: str) -> Tensor | None:
    bias = tensors.get(f"{name}.bias")
    return None if bias is None else bias.float()
