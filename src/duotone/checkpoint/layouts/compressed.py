# Shapes: N out_features, K in_features.
"""compressed-tensors `pack-quantized` with FP8 activations per token: what `quantize` writes for `hopper`, from any target.

Read by vLLM, which makes two scales of the file's one (FORMATS.md 1.4). Of a `gaudi` checkpoint that is a second rounding.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from duotone.checkpoint.compressed_tensors import from_tensors, quantization_config, tensor_specs
from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.layouts.layout import Layout
from duotone.checkpoint.layouts.w4a16 import to_tensors
from duotone.qweight import dequantize
from duotone.scheme import HOPPER, Scheme


def values(layer: str, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """The FP8 weights of vLLM's load-time split, times its channel scale [N, K]."""
    return dequantize(from_tensors(layer, tensors, _hopper(scheme)))


def config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """As `quantize` writes it."""
    return quantization_config(_hopper(scheme), list(ignore))


def specs(layer: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
    """As `quantize` writes them."""
    return tensor_specs(layer, shape, _hopper(scheme))


def _hopper(scheme: Scheme) -> Scheme:
    return Scheme(HOPPER, scheme.group_size, scheme.symmetric)


COMPRESSED = Layout("compressed-tensors", specs, to_tensors, values, config, keeps_kv_scales=True)
