# Shapes: N out_features, K in_features, G groups along K.
"""GPTQ's layout, version 1 (FORMATS.md 4): codes packed along K, FP16 scales, stored zero points one too small.

Read by vLLM (symmetric only), SGLang, GPTQModel and transformers with it. The group of each column is its place: no act-order.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.layouts.layout import ALONE, Layout, Shared, column_specs, product_scale, products
from duotone.checkpoint.packing import pack_int4, unpack_int4
from duotone.qweight import QuantizedWeight
from duotone.scheme import Scheme

#: The stored zero point of version 1 is the code of real zero, 8, less one.
_STORED_ZERO = 7


def specs(layer: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
    """qweight [K / 8, N], scales [G, N], qzeros [G, N / 8], g_idx [K]."""
    return column_specs(layer, shape, scheme) | {f"{layer}.g_idx": TensorSpec("I32", (shape[1],))}


def to_tensors(layer: str, weight: QuantizedWeight, shared: Shared = ALONE) -> dict[str, Tensor]:
    """The file's tensors. A BF16 scale is an FP16 one unless it is below 2^-14 or above 65504."""
    del shared
    (rows, columns), group_size = weight.shape, weight.scheme.group_size
    zeros_GN = torch.full((weight.scheme.groups(columns), rows), _STORED_ZERO, dtype=torch.uint8)
    return {
        f"{layer}.qweight": pack_int4(weight.codes).T.contiguous(),
        f"{layer}.scales": product_scale(weight).T.to(torch.float16).contiguous(),
        f"{layer}.qzeros": pack_int4(zeros_GN),
        f"{layer}.g_idx": (torch.arange(columns) // group_size).to(torch.int32),
    }


def values(layer: str, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """(code - zero) * scale [N, K]."""
    code_NK = unpack_int4(tensors[f"{layer}.qweight"].T.contiguous(), len(tensors[f"{layer}.g_idx"])).float()
    zero_GN = unpack_int4(tensors[f"{layer}.qzeros"], tensors[f"{layer}.scales"].shape[1]).float() + 1
    return products(code_NK, tensors[f"{layer}.scales"].T, zero_GN.T, scheme.group_size)


def config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """What GPTQModel writes; linears left in BF16, other than the head, are negative rules of `dynamic`."""
    rules: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in ignore if name != "lm_head"}
    found: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": scheme.group_size, "sym": True}
    found |= {"desc_act": False, "checkpoint_format": "gptq", "lm_head": False, "pack_dtype": "int32"}
    return found | ({"dynamic": rules} if rules else {})


def refuses(layer: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Its readers want whole groups, whole words of zero points, and none that differ."""
    del layer
    rows, columns = shape
    if not scheme.symmetric:
        return "weights have zero points, expected none: vLLM reads symmetric GPTQ files only"
    if columns % scheme.group_size:
        return f"group_size {scheme.group_size} does not divide its {columns} in_features, expected whole groups"
    if rows % 8:
        return f"8 does not divide its {rows} out_features, expected whole words of zero points"
    return None


GPTQ = Layout("gptq", specs, to_tensors, values, config, refuses, ("quantize_config.json", dict))
