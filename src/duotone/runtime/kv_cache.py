# Shapes: B sequences, H key heads, T tokens, D head size.
"""A cache of one byte a value: what attention puts into transformers' cache is FP8, what it reads from there is wide again.

The cache itself stays transformers' own, so that all it can do (grow, crop, reorder, slide) is done to the bytes. Where a call
brings no cache, keys and values still pass through FP8: a text has the same likelihood read at once or token by token.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duotone.checkpoint.compressed_tensors import scheme_from_config
from duotone.checkpoint.kv_cache import PARTS, kv_strategy_of, read_scales
from duotone.checkpoint.source import Source
from duotone.contract import dequantize_kv, quantize_kv
from duotone.errors import DuotoneError
from duotone.kernels.gpu import cache as kernels
from duotone.kernels.gpu.backend import NATIVE
from duotone.models.anatomy import Anatomy
from duotone.models.caching import caching_attentions, key_heads, written_attention
from duotone.runtime.cache import claim
from duotone.scheme import Target


class Scales(NamedTuple):
    """Of keys and of values, float32 [H] each, and the tensors that hold them."""

    keys: Tensor
    values: Tensor
    tensors: set[str]


class _Narrow:
    """A layer's view of a cache, for one call of its attention."""

    def __init__(self, cache: Any, attention: Any, target: Target, home: str | None) -> None:
        self._cache, self._attention, self._target, self._home = cache, attention, target, home

    def update(self, keys: Tensor, values: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Keep new keys and values [B, H, T, D]; all there are, in the dtype of the new ones."""
        scales = self._attention.k_scale, self._attention.v_scale
        if self._is_home(keys, values):
            return kernels.read(self._written((keys, values), scales, *args, **options), scales, keys.dtype)
        kept = tuple(quantize_kv(x, scale, self._target) for x, scale in zip((keys, values), scales, strict=True))
        if self._cache is not None:
            kept = self._updated(*kept, *args, **options)
        wide = (dequantize_kv(x8, scale, keys.dtype) for x8, scale in zip(kept, scales, strict=True))
        return next(wide), next(wide)

    def _is_home(self, *new: Tensor) -> bool:
        """Whether the kernels are for these: where they were tried, and without a gradient, which they do not give."""
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in new)
        return not learns and all(x.device.type == self._home and x.dtype in NATIVE and x.dtype == new[0].dtype for x in new)

    def _written(
        self, new: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor], *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """All that are kept, the new ones by one launch: to where they stay, or for the cache to take."""
        place = claim(self._cache, args[0] if args else None, new)
        if place is not None:
            kernels.write(new, place.kept, scales, self._target.fp8.max, place.positions)
            return place.layer.keys, place.layer.values
        kept = kernels.quantize(new, scales, self._target.fp8.max)
        return kept if self._cache is None else self._updated(*kept, *args, **options)

    def _updated(self, k8: Tensor, v8: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        try:
            keys, values = self._cache.update(k8, v8, *args, **options)
        except RuntimeError as error:
            if "Float8" not in str(error):
                raise
            raise DuotoneError(
                f"FP8 KV cache: found a {type(self._cache).__name__} that cannot keep FP8, or does not from its first token on "
                f"({error}); expected one that grows, such as DynamicCache"
            ) from None
        return keys, values

    def __getattr__(self, name: str) -> Any:
        """Whatever else attention may ask of its cache."""
        return getattr(self._cache, name)


def stored_scales(source: Source, anatomy: Anatomy, whole: PreTrainedModel, prefix: str = "") -> dict[str, Scales]:
    """Of each attention its scales and the tensors they lie in; nothing where the checkpoint has no FP8 cache.

    prefix: of names in `whole`, which the anatomy is of, that the source does not have. Raises DuotoneError for scales that are
    missing or damaged, and for a model that keeps no keys and values.
    """
    if kv_strategy_of(source.config.get("quantization_config")) is None:
        return {}
    found: dict[str, Scales] = {}
    for full in caching_attentions(anatomy, whole, "config.json: kv_cache_scheme"):
        name = full.removeprefix(prefix)
        written = written_attention(source, name)
        found[name] = Scales(*read_scales(source, written, key_heads(whole)), {f"{written}.{part}" for part in PARTS})
    return found


def install(model: PreTrainedModel, source: Source, anatomy: Anatomy, whole: PreTrainedModel, place: torch.device) -> set[str]:
    """Give every attention of a model the FP8 cache of its checkpoint, where that has one; the tensors that this took.

    whole: what the anatomy is of; the model may lack its head, and so a prefix. Raises as `stored_scales`.
    """
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model", None) is model else ""
    found = stored_scales(source, anatomy, whole, prefix)
    home = place.type if found and kernels.refuses(place) is None else None
    for name, scales in found.items():
        attention: Any = model.get_submodule(name)
        for part, scale in zip(PARTS, (scales.keys, scales.values), strict=True):
            attention.register_buffer(part, scale.to(place), persistent=False)
        target = scheme_from_config(source.config["quantization_config"]).target
        attention._wide_way = attention.forward
        attention.forward = partial(_attend, attention, target, home)  # which, unlike a method, is pickled with the model
    return {name for scales in found.values() for name in scales.tensors}


def is_narrow(attention: nn.Module) -> bool:
    """Whether a layer's attention keeps FP8."""
    return hasattr(attention, "_wide_way")


def _attend(self: Any, target: Target, home: str | None, *args: Any, past_key_values: Any = None, **options: Any) -> Any:
    """The forward of an attention of transformers, which names its cache."""
    return self._wide_way(*args, past_key_values=_Narrow(past_key_values, self, target, home), **options)
