# Shapes: N out_features, K in_features, G groups along K.
"""Other tools' 4-bit linears as codes and a scale a group: llm-compressor, GPTQModel, AutoRound, AutoAWQ (FORMATS.md 1, 4)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.packing import unpack_int4
from duotone.errors import DuotoneError

#: AWQ packs eight outputs a word in this order.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ZERO_CODE = 8


@dataclass(frozen=True)
class Int4:
    """Codes uint8 [N, K], scales float32 [N, G]. turned: values -8 of groups with a negative scale, which become 7."""

    codes: Tensor
    scale: Tensor
    group_size: int
    turned: int = 0


@dataclass(frozen=True)
class Foreign:
    """A layout that can be read. parts: a linear's tensors, by what follows its name; the first tells that it is one."""

    parts: tuple[str, ...]
    read: Callable[[str, Mapping[str, Tensor], dict[str, Any]], Int4]


def read_packed(layer: str, parts: Mapping[str, Tensor], config: dict[str, Any]) -> Int4:
    """compressed-tensors `pack-quantized`, W4A16 or W4A8."""
    group_size, symmetric = _of_compressed_tensors(config)
    _check_symmetric(layer, symmetric)
    words, shape = _part(layer, parts, "weight_packed", 2, torch.int32), _part(layer, parts, "weight_shape", 1, torch.int64)
    sizes = [int(size) for size in shape]
    columns = sizes[-1]
    if sizes != [len(words), columns] or not 0 < columns <= words.shape[1] * 8:
        raise DuotoneError(f"{layer}: found weight_shape {sizes}, expected that of {list(words.shape)} packed words")
    return _int4(layer, unpack_int4(words, columns), _part(layer, parts, "weight_scale", 2), group_size)


def read_bytes(layer: str, parts: Mapping[str, Tensor], config: dict[str, Any]) -> Int4:
    """compressed-tensors `int-quantized`: llm-compressor's W4AFP8 unless it is told otherwise; a byte a weight."""
    group_size, symmetric = _of_compressed_tensors(config)
    _check_symmetric(layer, symmetric)
    level_NK = _part(layer, parts, "weight", 2, torch.int8)
    if bool((level_NK < -8).any()) or bool((level_NK > 7).any()):
        raise DuotoneError(f"{layer}: found weights beyond -8..7, expected 4-bit levels")
    return _int4(layer, (level_NK + _ZERO_CODE).to(torch.uint8), _part(layer, parts, "weight_scale", 2), group_size)


def read_gptq(layer: str, parts: Mapping[str, Tensor], config: dict[str, Any]) -> Int4:
    """GPTQ's, versions 1 and 2; what AutoRound calls auto_gptq is version 1 without g_idx."""
    qweight, scale_NG = _part(layer, parts, "qweight", 2, torch.int32), _part(layer, parts, "scales", 2).T
    columns = qweight.shape[0] * 8
    group_size = int(config["group_size"]) if int(config["group_size"]) > 0 else columns
    places_K = torch.arange(columns, dtype=torch.int32) // group_size
    if "g_idx" in parts and not torch.equal(_part(layer, parts, "g_idx", 1, torch.int32), places_K):
        raise DuotoneError(f"{layer}: its g_idx scatters the columns of a group, expected groups in place (no desc_act)")
    zero = unpack_int4(_part(layer, parts, "qzeros", 2, torch.int32), scale_NG.shape[0]).long()
    zero = zero if config.get("checkpoint_format") == "gptq_v2" else (zero + 1) % 16
    _check_zeros(layer, zero)
    return _int4(layer, unpack_int4(qweight.T.contiguous(), columns), scale_NG, group_size)


def read_awq(layer: str, parts: Mapping[str, Tensor], config: dict[str, Any]) -> Int4:
    """AutoAWQ's GEMM layout: eight outputs a word, interleaved."""
    code_KN, zero_GN = (_awq(_part(layer, parts, name, 2, torch.int32)) for name in ("qweight", "qzeros"))
    _check_zeros(layer, zero_GN.long())
    group_size = int(config["group_size"]) if int(config["group_size"]) > 0 else len(code_KN)
    return _int4(layer, code_KN.T.contiguous(), _part(layer, parts, "scales", 2).T, group_size)


FOREIGN: dict[str, Foreign] = {
    "compressed-tensors": Foreign(("weight_packed", "weight_scale", "weight_shape"), read_packed),
    "w4a16": Foreign(("weight_packed", "weight_scale", "weight_shape"), read_packed),
    "int-quantized": Foreign(("weight_scale", "weight"), read_bytes),
    "gptq": Foreign(("qweight", "scales", "qzeros", "g_idx"), read_gptq),
    "awq": Foreign(("qweight", "scales", "qzeros"), read_awq),
}
#: Parts that a linear may lack.
OPTIONAL = {"g_idx"}


def _int4(layer: str, codes_NK: Tensor, scale_NG: Tensor, group_size: int) -> Int4:
    """With shapes checked, and the sign of a scale moved to the codes: -8 has no counterpart and becomes 7."""
    (rows, columns), scale_NG = codes_NK.shape, scale_NG.float()
    if group_size < 8 or group_size % 8:
        raise DuotoneError(f"{layer}: found groups of {group_size}, expected a positive multiple of 8")
    if tuple(scale_NG.shape) != (rows, -(-columns // group_size)):
        raise DuotoneError(
            f"{layer}: found scales {list(scale_NG.shape)}, expected {[rows, -(-columns // group_size)]} for {[rows, columns]}"
        )
    if not bool(torch.isfinite(scale_NG).all()):
        raise DuotoneError(f"{layer}: found scales that are not finite")
    negative_NK = (scale_NG < 0).repeat_interleave(group_size, 1)[:, :columns]
    turned = int((negative_NK & (codes_NK == 0)).sum())
    mirrored_NK = (2 * _ZERO_CODE - codes_NK.to(torch.int16)).clamp(max=15).to(torch.uint8)
    return Int4(torch.where(negative_NK, mirrored_NK, codes_NK), scale_NG.abs().contiguous(), group_size, turned)


def _part(layer: str, parts: Mapping[str, Tensor], name: str, dims: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a linear, of so many dimensions, and of a dtype, or floating."""
    tensor = parts[name]
    if tensor.dim() != dims or not tensor.numel() or (tensor.dtype != dtype if dtype else not tensor.is_floating_point()):
        wanted = str(dtype or "floats").removeprefix("torch.")
        raise DuotoneError(f"{layer}.{name}: found {tensor.dtype} {list(tensor.shape)}, expected {wanted} of {dims} dimensions")
    return tensor


def _awq(words: Tensor) -> Tensor:
    """int32 [R, C] -> codes uint8 [R, 8 C]."""
    packed = unpack_int4(words, words.shape[1] * 8).view(len(words), -1, 8)
    return packed[..., list(torch.tensor(_AWQ_ORDER).argsort())].flatten(1)


def _check_zeros(layer: str, zero: Tensor) -> None:
    if bool((zero != _ZERO_CODE).any()):
        raise DuotoneError(f"{layer}: found zero points other than {_ZERO_CODE}, expected a symmetric checkpoint")


def _check_symmetric(layer: str, symmetric: bool) -> None:
    if not symmetric:
        raise DuotoneError(f"{layer}: found zero points, expected a symmetric checkpoint")


def _of_compressed_tensors(config: dict[str, Any]) -> tuple[int, bool]:
    (group,) = config["config_groups"].values()
    return int(group["weights"]["group_size"]), bool(group["weights"]["symmetric"])
