# Shapes: N out_features, K in_features, G groups along K.
"""ModelOpt's W4A8_AWQ, which TensorRT-LLM reads (docs/formats/modelopt.md): two rows of levels a byte, a second scale a tensor.

TensorRT-LLM multiplies FP8(level * FP16(weight_scale / weight_scale_2)) and scales activations by one static number a tensor;
linears that it fuses have to share both numbers. Of a `gaudi` checkpoint these are the contract's weights; `hopper` has a
scale a channel, so its weights fall on another FP8 grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.layouts.layout import ALONE, Layout, Shared, input_scale_of, product_scale, tensor_outer
from duotone.formats import E4M3FN
from duotone.qweight import QuantizedWeight, expand_groups
from duotone.scheme import Scheme

_ALGORITHM = "W4A8_AWQ"


def specs(layer: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
    """weight [N / 2, K], weight_scale [N, G], two scalars, pre_quant_scale [K]."""
    rows, columns = shape
    return {
        f"{layer}.weight": TensorSpec("U8", (rows // 2, columns)),
        f"{layer}.weight_scale": TensorSpec("F32", (rows, scheme.groups(columns))),
        f"{layer}.weight_scale_2": TensorSpec("F32", ()),
        f"{layer}.input_scale": TensorSpec("F32", ()),
        f"{layer}.pre_quant_scale": TensorSpec("BF16", (columns,)),
    }


def to_tensors(layer: str, weight: QuantizedWeight, shared: Shared = ALONE) -> dict[str, Tensor]:
    """The file's tensors; nibbles in two's complement, the even row low. pre_quant_scale is one: TensorRT-LLM asks for it."""
    nibble_NK = weight.codes ^ 8  # level + 8 -> level in two's complement
    outer = shared.outer_scale or tensor_outer(weight, E4M3FN)
    return {
        f"{layer}.weight": nibble_NK[0::2] | nibble_NK[1::2] << 4,
        f"{layer}.weight_scale": product_scale(weight).float(),
        f"{layer}.weight_scale_2": torch.tensor(outer),
        f"{layer}.input_scale": torch.tensor(input_scale_of(layer, weight, shared)),
        f"{layer}.pre_quant_scale": torch.ones(weight.shape[1], dtype=torch.bfloat16),
    }


def levels(packed: Tensor) -> Tensor:
    """uint8 [N / 2, K] -> levels float32 [N, K]."""
    nibble_NK = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1)
    return (nibble_NK ^ 8).float() - 8


def values(layer: str, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """FP8(level * scale) times the second scale, [N, K], with the FP16 numbers that TensorRT-LLM makes on the way."""
    outer, level_NK = tensors[f"{layer}.weight_scale_2"], levels(tensors[f"{layer}.weight"])
    scale_NG = (tensors[f"{layer}.weight_scale"].half() / outer.half()).half()
    product_NK = level_NK.half() * expand_groups(scale_NG, scheme.group_size, level_NK.shape[1])
    return E4M3FN.round(product_NK.float()) * outer


def config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """The quantization_config that ModelOpt writes into config.json, with the group size beside it."""
    method = {"quant_method": "modelopt", "quant_algo": _ALGORITHM, "group_size": scheme.group_size}
    return method | {"ignore": list(ignore), "producer": {"name": "duotone"}}


def hf_quant_config(quantization: dict[str, Any]) -> dict[str, Any]:
    """What TensorRT-LLM reads, hf_quant_config.json."""
    settings = {
        "quant_algo": _ALGORITHM,
        "kv_cache_quant_algo": None,
        "group_size": quantization["group_size"],
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": quantization["ignore"],
    }
    return {"producer": quantization["producer"], "quantization": settings}


def refuses(layer: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Its readers want whole groups, pairs of rows, and no zero points."""
    del layer
    if not scheme.symmetric:
        return "weights have zero points, expected none: W4A8_AWQ is symmetric"
    if shape[1] % scheme.group_size:
        return f"group_size {scheme.group_size} does not divide its {shape[1]} in_features, expected whole groups"
    return f"found {shape[0]} out_features, expected an even number: two share a byte" if shape[0] % 2 else None


MODELOPT = Layout(
    "modelopt", specs, to_tensors, values, config, refuses, ("hf_quant_config.json", hf_quant_config),
    outer=lambda weight: tensor_outer(weight, E4M3FN), static=lambda _: True,
)  # fmt: skip
