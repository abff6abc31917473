# Shapes: N out_features, K in_features, G groups along K.
"""What SGLang's quantization `w4afp8` reads (docs/formats/sglang-w4afp8.md): experts in INT4, every other linear in FP8 blocks.

Experts: its kernel multiplies the levels themselves by static FP8 activations and each group's sum by a BF16 scale, so weights
are never rounded to FP8. Other linears: FP8 in blocks of 128 x 128 under one scale each; of a `gaudi` checkpoint that scale is
the tensor's power of two and nothing moves.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.layouts.layout import ALONE, Layout, Shared, input_scale_of, product_scale, products
from duotone.errors import DuotoneError
from duotone.formats import E4M3FN
from duotone.qweight import QuantizedWeight, dequantize
from duotone.scheme import Scheme

_GROUP = _BLOCK = 128
#: What chooses among experts; SGLang never quantizes it.
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_EXPERT = re.compile(r"\.experts\.\d+\.")


def is_expert(layer: str) -> bool:
    """One of a mixture's experts, by its name."""
    return _EXPERT.search(layer) is not None


def specs(layer: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
    """Experts: weight [N, K / 2], weight_scale_inv [N, G], input_scale. Others: weight [N, K], weight_scale_inv a block."""
    rows, columns = shape
    if is_expert(layer):
        return {
            f"{layer}.weight": TensorSpec("I8", (rows, columns // 2)),
            f"{layer}.weight_scale_inv": TensorSpec("F32", (rows, scheme.groups(columns))),
            f"{layer}.input_scale": TensorSpec("BF16", ()),
        }
    return {
        f"{layer}.weight": TensorSpec("F8_E4M3", shape),
        f"{layer}.weight_scale_inv": TensorSpec("F32", (-(-rows // _BLOCK), -(-columns // _BLOCK))),
    }


def to_tensors(layer: str, weight: QuantizedWeight, shared: Shared = ALONE) -> dict[str, Tensor]:
    """The file's tensors; nibbles in two's complement, the even column low."""
    if is_expert(layer):
        nibble_NK = weight.codes ^ 8
        return {
            f"{layer}.weight": (nibble_NK[:, 0::2] | nibble_NK[:, 1::2] << 4).view(torch.int8),
            f"{layer}.weight_scale_inv": product_scale(weight).float(),
            f"{layer}.input_scale": torch.tensor(input_scale_of(layer, weight, shared), dtype=torch.bfloat16),
        }
    w_NK = dequantize(weight)
    if weight.scheme.target.channel_outer_scale:
        scale = _blocks(w_NK.abs()).amax((1, 3)).clamp(min=1e-30) / E4M3FN.max
    else:
        scale = weight.outer_scale.expand(-(-len(w_NK) // _BLOCK), -(-w_NK.shape[1] // _BLOCK)).contiguous()
    return {
        f"{layer}.weight": E4M3FN.round(w_NK / _per_weight(scale, w_NK)).to(torch.float8_e4m3fn),
        f"{layer}.weight_scale_inv": scale,
    }


def values(layer: str, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """level * BF16 scale, or FP8 value * scale of the block, [N, K]."""
    stored, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale_inv"]
    if not is_expert(layer):
        return stored.float() * _per_weight(scale, stored)
    pair = stored.view(torch.uint8)
    level_NK = (torch.stack((pair & 15, pair >> 4), -1).flatten(1) ^ 8).float() - 8
    return products(level_NK, scale.to(torch.bfloat16), None, scheme.group_size)


def config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """The quantization_config. Raises DuotoneError for linears in BF16: the loader takes no list of those from a file."""
    kept = [name for name in ignore if name != "lm_head" and name.rpartition(".")[2] not in _ROUTERS]
    if kept:
        raise DuotoneError(f"--format sglang-w4afp8: {kept[0]} is in BF16, expected all but head and routers to be quantized")
    return {"quant_method": "w4afp8", "group_size": scheme.group_size, "weight_block_size": [_BLOCK, _BLOCK]}


def refuses(layer: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Its loader knows one group size, and its FP8 blocks have to be whole where linears are fused."""
    if not scheme.symmetric:
        return "weights have zero points, expected none: the layout is symmetric"
    if is_expert(layer) and (scheme.group_size != _GROUP or shape[1] % _GROUP):
        return f"found groups of {scheme.group_size} in {shape[1]} in_features, expected whole groups of {_GROUP}"
    if shape[0] % _BLOCK or shape[1] % _BLOCK:
        return f"found {shape[0]} x {shape[1]}, expected multiples of {_BLOCK}: whole FP8 blocks"
    return None


def _blocks(w_NK: Tensor) -> Tensor:
    """[N, K] -> [N / 128, 128, K / 128, 128], the last ones padded with zeros."""
    rows, columns = (-(-size // _BLOCK) for size in w_NK.shape)
    padded = torch.nn.functional.pad(w_NK, (0, columns * _BLOCK - w_NK.shape[1], 0, rows * _BLOCK - len(w_NK)))
    return padded.view(rows, _BLOCK, columns, _BLOCK)


def _per_weight(scale: Tensor, like_NK: Tensor) -> Tensor:
    rows, columns = like_NK.shape
    return scale.repeat_interleave(_BLOCK, 0)[:rows].repeat_interleave(_BLOCK, 1)[:, :columns]


SGLANG = Layout("sglang-w4afp8", specs, to_tensors, values, config, refuses, static=is_expert)
