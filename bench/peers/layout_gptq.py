# Shapes: N out_features, K in_features, G groups along K.
"""Reads GPTQ's layout (v1 and v2; GPTQModel, AutoRound) and the fp8_to_int_sym form that autoround_peer.py writes."""

import json
from pathlib import Path

import torch
from layers import PeerLinear
from safetensors.torch import load_file
from torch import Tensor

NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)


def read_gptq(folder: Path) -> dict[str, PeerLinear]:
    """The quantized linears of a checkpoint folder, by module name."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if config.get("data_type") == "fp8_to_int_sym":
        return {name: _two_level(tensors, name, config) for name in _modules(tensors, "level")}
    if config["bits"] != 4:
        raise ValueError(f"{config['bits']}-bit GPTQ, only 4-bit is read")
    return {name: _gptq(tensors, name, config) for name in _modules(tensors, "qweight")}


def _modules(tensors: dict[str, Tensor], last: str) -> list[str]:
    return [name.removesuffix(f".{last}") for name in tensors if name.endswith(f".{last}")]


def _gptq(tensors: dict[str, Tensor], name: str, config: dict) -> PeerLinear:
    """Columns are in original order in the file even with act-order; only the group a column belongs to is then g_idx's.

    N and K that 8 does not divide are padded in the packed words; scales and g_idx are not.
    """
    scale = tensors[f"{name}.scales"].T.float()  # [N, G]
    group = tensors.get(f"{name}.g_idx")
    code = _nibbles(tensors[f"{name}.qweight"].T)[:, : None if group is None else len(group)]  # [N, K]
    zero = _nibbles(tensors[f"{name}.qzeros"]).T[: len(scale)]  # [N, G]
    if config.get("checkpoint_format", "gptq") != "gptq_v2":
        zero = (zero + 1) % 16  # v1 stores zero - 1
    if config.get("sym", True) and not (zero == 8).all():
        raise ValueError(f"{name}: zero points of a symmetric checkpoint are not 8; v1 and v2 mixed up?")
    columns = code.shape[1]
    size = config["group_size"] if config["group_size"] > 0 else columns
    in_order = torch.arange(columns) // size
    group = in_order if group is None else group.long()
    if not torch.equal(group, in_order):  # a group's columns are scattered: one scale a column
        scale, size = scale[:, group], 1
    level = (code - zero[:, group]).float()
    return PeerLinear(level=level, scale=scale.contiguous(), group_size=size, bias=_float(tensors, f"{name}.bias"))


def _two_level(tensors: dict[str, Tensor], name: str, config: dict) -> PeerLinear:
    level = tensors[f"{name}.level"].float()
    return PeerLinear(
        level=level,
        scale=tensors[f"{name}.scale"],
        group_size=config["group_size"] if config["group_size"] > 0 else level.shape[1],
        input_scale=tensors[f"{name}.input_scale"],
        outer_scale=tensors[f"{name}.outer_scale"],
        bias=_float(tensors, f"{name}.bias"),
    )


def _nibbles(packed: Tensor) -> Tensor:
    """int32 [R, C] -> the unsigned 4-bit codes [R, 8 C], lowest nibble first."""
    return ((packed.unsqueeze(-1) >> NIBBLES) & 15).flatten(-2)


def _float(tensors: dict[str, Tensor], name: str) -> Tensor | None:
    return tensors[name].float() if name in tensors else None
