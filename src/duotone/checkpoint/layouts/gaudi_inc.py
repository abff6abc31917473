# Shapes: N out_features, K in_features, G groups along K.
"""Intel Neural Compressor's DPQ checkpoint, for Gaudi (docs/formats/gaudi-inc.md): GPTQ's tensors and `scale_bf16_to_fp8`.

Group scales are in FP8 units, as the contract of `gaudi` has them, and the tensor's power of two stands beside them, so its
weights are the contract's. Static activation scales are not in the file: the tool measures them on the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.layouts.layout import ALONE, Layout, Shared, column_specs, product_scale
from duotone.checkpoint.packing import pack_int4, unpack_int4
from duotone.contract import fp8_product, tensor_outer_scale
from duotone.qweight import QuantizedWeight, expand_groups
from duotone.scheme import GAUDI, Scheme


def specs(layer: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
    """qweight [K / 8, N], scales [G, N], qzeros [G, N / 8], scale_bf16_to_fp8 [1]."""
    return column_specs(layer, shape, scheme) | {f"{layer}.scale_bf16_to_fp8": TensorSpec("F16", (1,))}


def to_tensors(layer: str, weight: QuantizedWeight, shared: Shared = ALONE) -> dict[str, Tensor]:
    """The file's tensors. FP16 holds every BF16 group scale of 2^-17 and more; stored zero points are one too small."""
    del shared
    outer, scale_NG = weight.outer_scale, weight.group_scale
    if weight.scheme.target.channel_outer_scale:
        product_NG = product_scale(weight).float()
        outer = tensor_outer_scale(product_NG.max() * 7.5, GAUDI)  # of a tensor whose largest weight gave that scale
        scale_NG = product_NG / outer
    zero_NG = torch.zeros_like(scale_NG) if weight.zero_point is None else weight.zero_point
    stored_NG = ((zero_NG - weight.scheme.levels[0] - 1) % 16).to(torch.uint8)
    return {
        f"{layer}.qweight": pack_int4(weight.codes).T.contiguous(),
        f"{layer}.scales": scale_NG.T.to(torch.float16).contiguous(),
        f"{layer}.qzeros": pack_int4(stored_NG.T.contiguous()),
        f"{layer}.scale_bf16_to_fp8": outer.to(torch.float16),
    }


def values(layer: str, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """Gaudi's FP8((code - zero) * BF16 scale) times the tensor's scale, [N, K]."""
    scale_NG = tensors[f"{layer}.scales"].T.to(torch.bfloat16).float()
    columns = len(tensors[f"{layer}.qweight"]) * 8
    code_NK = unpack_int4(tensors[f"{layer}.qweight"].T.contiguous(), columns).float()
    zero_NG = ((unpack_int4(tensors[f"{layer}.qzeros"], len(scale_NG)) + 1) % 16).T.float()
    zero_NK, scale_NK = (expand_groups(each, scheme.group_size, columns) for each in (zero_NG, scale_NG))
    return fp8_product(code_NK, zero_NK, scale_NK, GAUDI.fp8) * tensors[f"{layer}.scale_bf16_to_fp8"].float()


def config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """What the tool's loader looks at. It says "gptq" itself, and readers of GPTQ lose a factor in silence."""
    del ignore  # a linear without qweight is left alone
    settings = {"quant_method": "neural-compressor-dpq", "bits": 4, "group_size": scheme.group_size, "sym": scheme.symmetric}
    return settings | {"desc_act": False, "true_sequential": False}


def refuses(layer: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Its module for Gaudi packs 32 outputs at a time and counts whole groups."""
    del layer
    rows, columns = shape
    if columns % scheme.group_size:
        return f"group_size {scheme.group_size} does not divide its {columns} in_features, expected whole groups"
    return f"32 does not divide its {rows} out_features, expected whole words for Gaudi" if rows % 32 else None


GAUDI_INC = Layout("gaudi-inc", specs, to_tensors, values, config, refuses, ("quantize_config.json", dict))
