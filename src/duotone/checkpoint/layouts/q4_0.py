# Shapes: N out_features, K in_features, B = K / 32 blocks.
"""GGML's Q4_0, of GGUF files (docs/formats/gguf.md): blocks of 32 along K, an FP16 scale and 16 bytes of codes each.

Value = scale * (code - 8), which is a symmetric group of ours where 32 divides it. llama.cpp rounds no weight to FP8.
"""

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.layouts.layout import ALONE, Layout, Shared, product_scale
from duotone.qweight import QuantizedWeight, expand_groups
from duotone.scheme import Scheme

BLOCK = 32
#: Of one block: the scale, then code i in the low and code i + 16 in the high half of byte i.
BLOCK_BYTES = 2 + BLOCK // 2


def specs(layer: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
    """One tensor of bytes, [N, B * 18]."""
    del scheme
    return {f"{layer}.weight": TensorSpec("U8", (shape[0], shape[1] // BLOCK * BLOCK_BYTES))}


def to_tensors(layer: str, weight: QuantizedWeight, shared: Shared = ALONE) -> dict[str, Tensor]:
    """The file's bytes. A BF16 scale is an FP16 one unless it is below 2^-17 (or has more bits than are left there)."""
    del shared
    rows, columns = weight.shape
    scale_NB = expand_groups(product_scale(weight), weight.scheme.group_size, columns)[:, ::BLOCK].to(torch.float16)
    low, high = weight.codes.view(rows, -1, 2, BLOCK // 2).unbind(2)
    scale_bytes = scale_NB.contiguous().view(torch.uint8).view(rows, -1, 2)
    return {f"{layer}.weight": torch.cat((scale_bytes, low | high << 4), -1).flatten(1)}


def values(layer: str, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """scale * (code - 8) [N, K]."""
    del scheme
    stored = tensors[f"{layer}.weight"]
    blocks = stored.view(len(stored), -1, BLOCK_BYTES)
    scale_NB = blocks[..., :2].contiguous().view(torch.float16)
    codes = torch.cat((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), -1)
    return ((codes.float() - 8) * scale_NB.float()).flatten(1)


def refuses(layer: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Blocks are whole, lie inside one group, and have no zero points."""
    del layer
    if not scheme.symmetric:
        return "weights have zero points, expected none: Q4_0 is symmetric"
    if scheme.group_size % BLOCK:
        return f"found groups of {scheme.group_size}, expected a multiple of {BLOCK}: Q4_0 has a scale for so many"
    return f"{BLOCK} does not divide its {shape[1]} in_features, expected whole blocks" if shape[1] % BLOCK else None


GGUF = Layout("gguf", specs, to_tensors, values, refuses=refuses, container="gguf")
