# Shapes: B sequences, H key heads, D head size.
"""transformers' growing cache, with room behind what it holds: a new token is written there instead of everything copied.

What the cache shows are ordinary tensors, so whatever else transformers does with them (crop, reorder, repeat, copy) stays
right: the room is given up as soon as the cache shows anything but what the room showed last.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

#: Tokens that a cache has room for at least, beyond what it holds.
_ROOM = 64


def growing_layer(cache: Any, number: int) -> DynamicLayer | None:
    """A layer's part of a cache, where it is one that grows by concatenation and holds BF16 on a CPU."""
    if type(cache) is not DynamicCache or cache.offloading or number >= len(cache.layers):
        return None
    layer = cache.layers[number]
    if type(layer) is not DynamicLayer or not layer.is_initialized or layer.keys is None or layer.keys.dim() != 4:
        return None
    return layer if layer.keys.dtype == torch.bfloat16 and layer.keys.device.type == "cpu" else None


class Room:
    """Keys and values [B, H, room, D], of which `used` tokens are there."""

    def __init__(self, cache: DynamicLayer) -> None:
        assert cache.keys is not None and cache.values is not None
        batch, heads, length, size = cache.keys.shape
        shape = (batch, heads, length + max(_ROOM, length // 8), size)
        self.keys, self.values = cache.keys.new_empty(shape), cache.values.new_empty(shape)
        self.keys[:, :, :length], self.values[:, :, :length] = cache.keys, cache.values
        self.used = length
        self._shown: tuple[Tensor | None, Tensor | None] = (None, None)

    def serves(self, cache: DynamicLayer) -> bool:
        """Whether it holds what the cache shows, nobody has gone on from there, and it may be written."""
        return (
            cache.keys is not None
            and cache.keys is self._shown[0]
            and cache.values is self._shown[1]
            and self.used == cache.keys.shape[2] < self.keys.shape[2]
            and self.keys.is_inference() == torch.is_inference_mode_enabled()
        )

    def show_new(self, cache: DynamicLayer) -> None:
        """Have the cache show one token more, which has been written."""
        self.used += 1
        cache.keys, cache.values = self._shown = (self.keys[:, :, : self.used], self.values[:, :, : self.used])


def room_of(layer: Any) -> Room:
    """The room of a layer's cache; a new one where it has none, or another has used it."""
    room = getattr(layer, "_duotone_room", None)
    if room is None or not room.serves(layer):
        room = layer._duotone_room = Room(layer)
    return room
