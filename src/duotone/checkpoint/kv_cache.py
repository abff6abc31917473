# Shapes: H key heads.
"""The scales of an FP8 cache in a compressed-tensors checkpoint, as vLLM, SGLang and transformers read them (FORMATS.md 1.6).

`kv_cache_scheme` in config.json says that there are some; `ATTENTION.k_scale` and `.v_scale` are BF16, [1] for all of a layer
(strategy tensor) or [H, 1, 1] (attn_head). vLLM renames them to `ATTENTION.attn.k_scale` as it loads.
"""

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.source import Source, SourceFolder
from duotone.errors import DuotoneError
from duotone.scheme import KV_CACHE_STRATEGIES

#: Of keys and of values, behind the name of a layer's attention.
PARTS = ("k_scale", "v_scale")


def kv_cache_scheme(strategy: str | None) -> dict[str, Any] | None:
    """The entry of `quantization_config`; None says that the cache is not quantized."""
    if strategy is None:
        return None
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}


def kv_strategy_of(quantization: dict[str, Any] | None) -> str | None:
    """The strategy of a `quantization_config`; None without an FP8 cache. Raises DuotoneError for a scheme of another kind."""
    scheme = (quantization or {}).get("kv_cache_scheme")
    if scheme is None:
        return None
    for strategy in KV_CACHE_STRATEGIES:
        wanted = (kv_cache_scheme(strategy) or {}).items()
        if isinstance(scheme, dict) and wanted <= cast("dict[str, Any]", scheme).items():
            return strategy
    raise DuotoneError(
        f"config.json: found a kv_cache_scheme of {scheme!r}, expected null, or 8-bit floats with static symmetric scales of "
        f"strategy {' or '.join(KV_CACHE_STRATEGIES)}"
    )


def describe_kv_cache(quantization: dict[str, Any] | None) -> str | None:
    """How a checkpoint has keys and values kept, for people; None where it says nothing. Raises as `kv_strategy_of`."""
    shared = {None: None, "tensor": "layer's", "attn_head": "head's"}[kv_strategy_of(quantization)]
    return shared and f"FP8 E4M3, one byte a value, a scale for each {shared} keys and one for its values"


def scale_specs(attention: str, strategy: str, heads: int) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of a layer's scales."""
    shape = (1,) if strategy == "tensor" else (heads, 1, 1)
    return {f"{attention}.{part}": TensorSpec("BF16", shape) for part in PARTS}


def scale_tensors(attention: str, strategy: str, scales: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The file's tensors of a layer, from the scales of its keys and its values: [1] of strategy tensor, [H] of attn_head.

    BF16 holds what `contract.kv_scale` gives as it is.
    """
    specs = scale_specs(attention, strategy, len(scales[0]))
    return {
        name: scale.to("cpu", torch.bfloat16).reshape(spec.shape)
        for (name, spec), scale in zip(specs.items(), scales, strict=True)
    }


def read_scales(source: Source, attention: str, heads: int) -> tuple[Tensor, Tensor]:
    """A layer's scales of keys and of values, float32 [H] each. Raises DuotoneError for missing ones and for what is none."""
    strategy = kv_strategy_of(source.config.get("quantization_config"))
    if strategy is None:
        raise DuotoneError(
            f"{source.path}: found no kv_cache_scheme in config.json, expected one beside {attention}.{PARTS[0]}"
        )
    found: list[Tensor] = []
    for name, spec in scale_specs(attention, strategy, heads).items():
        stored = source.tensors.get(name)
        if stored is None:
            raise DuotoneError(f"{source.path}: found no tensor {name!r}, expected it with the kv_cache_scheme in config.json")
        if not stored.is_float or math.prod(stored.shape) != math.prod(spec.shape):
            raise DuotoneError(f"{name}: found {stored.dtype} {list(stored.shape)}, expected {spec.dtype} {list(spec.shape)}")
        scale = source.load([name])[name]
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise DuotoneError(f"{name}: found a scale that is not positive and finite, expected absmax / 448")
        found.append(scale.float().flatten().expand(heads).contiguous())
    return found[0], found[1]


def without_scales(source: SourceFolder) -> SourceFolder:
    """A folder seen without the scales of its cache."""
    kept = {name: spec for name, spec in source.tensors.items() if name.rpartition(".")[2] not in PARTS}
    return replace(source, tensors=kept)
