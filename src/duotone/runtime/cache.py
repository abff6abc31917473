# Shapes: B sequences, H key heads, D head size.
"""transformers' growing cache, with room behind what it holds: a new token is written there instead of everything copied.

What the cache shows are ordinary tensors, so whatever else transformers does with them (crop, reorder, repeat, copy) stays
right: a room serves only a cache that shows what the room showed last, and any other step than ours drops it.
"""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

#: Tokens that a cache has room for at least, beyond what it holds.
_ROOM = 64
_ATTRIBUTE = "_duotone_room"


class Room:
    """Keys and values [B, H, room, D], of which `used` tokens are there."""

    def __init__(self, cache: DynamicLayer, more: int = 1) -> None:
        """Take over what a cache holds; for so many tokens more at least."""
        assert cache.keys is not None and cache.values is not None
        batch, heads, length, size = cache.keys.shape
        shape = (batch, heads, length + max(_ROOM, length // 8, more), size)
        self.keys, self.values = cache.keys.new_empty(shape), cache.values.new_empty((*shape[:3], cache.values.shape[3]))
        self.keys[:, :, :length], self.values[:, :, :length] = cache.keys, cache.values
        self.show(cache, length)  # at once, so that what was there before is freed

    def show(self, cache: DynamicLayer, used: int) -> None:
        """Have the cache show this many tokens."""
        self.used = used
        self._shown: tuple[Tensor, Tensor] = self.keys.narrow(2, 0, used), self.values.narrow(2, 0, used)
        cache.keys, cache.values = self._shown

    def serves(self, cache: DynamicLayer, more: int) -> bool:
        """Whether it holds what the cache shows, nobody has gone on from there, and so many tokens more may be written."""
        return (
            cache.keys is self._shown[0]
            and cache.values is self._shown[1]
            and self.used + more <= self.keys.shape[2]
            and self.keys.is_inference() == torch.is_inference_mode_enabled()
        )

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a cache begins without one."""
        return (type(None), ())


class Claim(NamedTuple):
    """Where new tokens go: `kept` keys and values, their rows `positions` int64 [T], or their first; and whose they are."""

    kept: tuple[Tensor, Tensor]
    positions: Tensor | None
    layer: Any


def room_of(layer: Any, more: int = 1) -> Room:
    """The room of a layer's cache for more tokens; a new one where it has none, it is full, or another has used it."""
    room = layer.__dict__.get(_ATTRIBUTE)
    if room is None or not room.serves(layer, more):
        room = Room(layer, more)
        setattr(layer, _ATTRIBUTE, room)
    return room


def drop_rooms(cache: Any) -> None:
    """Leave a cache to transformers, which may replace what it shows: nothing is kept beside it."""
    if type(cache) is DynamicCache:
        for layer in cache.layers:
            if hasattr(layer, _ATTRIBUTE):
                delattr(layer, _ATTRIBUTE)


def growing_layers(cache: Any, count: int, dtype: torch.dtype = torch.bfloat16) -> list[DynamicLayer] | None:
    """Its layers, where a cache grows by concatenation, holds one dtype on a CPU and as many tokens in each of them."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or len(cache.layers) != count:
        return None
    layers = [layer for layer in cache.layers if _grows(layer, dtype, "cpu")]
    return layers if len(layers) == count and len({layer.get_seq_length() for layer in layers}) == 1 else None


def claim(cache: Any, index: Any, new: tuple[Tensor, Tensor]) -> Claim | None:
    """Where a cache that has begun a layer in FP8 wants its new keys and values [B, H, T, D]: it shows them from now on.

    None where it is for the cache to add them, which then says what does not fit: any kind but transformers' growing and
    static one, layers of a window.
    """
    if type(cache) not in {DynamicCache, StaticCache} or cache.offloading or not isinstance(index, int):
        return None
    layer = cache.layers[index] if index < len(cache.layers) else None
    if layer is None or not layer.is_initialized or not all(map(_continues, new, (layer.keys, layer.values))):
        return None
    tokens = new[0].shape[2]
    if type(layer) is StaticLayer:
        kept: Any = layer.keys, layer.values
        positions = torch.arange(tokens, device=new[0].device) + layer.cumulative_length
        layer.cumulative_length.add_(tokens)
        return Claim(kept, positions, layer)
    if torch.compiler.is_compiling() or not _grows(layer, torch.float8_e4m3fn, new[0].device.type):
        return None
    room = room_of(layer, tokens)
    used = room.used
    room.show(layer, used + tokens)
    return Claim((room.keys[:, :, used:], room.values[:, :, used:]), None, layer)


def _continues(new: Tensor, kept: Tensor) -> bool:
    shapes = [(*x.shape[:2], *x.shape[3:]) for x in (new, kept)]
    return kept.dtype == torch.float8_e4m3fn and kept.device == new.device and shapes[0] == shapes[1]


def _grows(layer: Any, dtype: torch.dtype, device: str) -> TypeGuard[DynamicLayer]:
    if type(layer) is not DynamicLayer or not layer.is_initialized or layer.keys is None or layer.keys.dim() != 4:
        return False
    return layer.keys.dtype == dtype and layer.keys.device.type == device
