# Shapes: N out_features, K in_features.
"""compressed-tensors `pack-quantized` without activations: the same tensors, run as 4-bit weights with BF16 activations.

What vLLM loads where it has no W4A8 kernel (FORMATS.md 1.7). Its runtimes do not round the weights to FP8.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from duotone.checkpoint.compressed_tensors import quantization_config, tensor_specs
from duotone.checkpoint.compressed_tensors import to_tensors as packed_tensors
from duotone.checkpoint.layouts.layout import ALONE, Layout, Shared, product_scale, products
from duotone.checkpoint.packing import unpack_int4
from duotone.qweight import QuantizedWeight
from duotone.scheme import HOPPER, Scheme


def to_tensors(layer: str, weight: QuantizedWeight, shared: Shared = ALONE) -> dict[str, Tensor]:
    """The file's tensors; `gaudi`'s group scales are multiplied by the tensor's power of two, which is exact."""
    del shared
    return packed_tensors(layer, weight) | {f"{layer}.weight_scale": product_scale(weight)}


def values(layer: str, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """level * scale [N, K]."""
    rows, columns = (int(size) for size in tensors[f"{layer}.weight_shape"])
    lowest = scheme.levels[0]
    level_NK = unpack_int4(tensors[f"{layer}.weight_packed"], columns).float() + lowest
    zero_NG = None
    if not scheme.symmetric:
        zero_NG = unpack_int4(tensors[f"{layer}.weight_zero_point"].T.contiguous(), rows).T.float() + lowest
    return products(level_NK, tensors[f"{layer}.weight_scale"], zero_NG, scheme.group_size)


def config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """As for W4A8, without input activations."""
    found = quantization_config(Scheme(HOPPER, scheme.group_size, scheme.symmetric), list(ignore))
    found["config_groups"]["group_0"]["input_activations"] = None
    return found


W4A16 = Layout("w4a16", tensor_specs, to_tensors, values, config, keeps_kv_scales=True)
