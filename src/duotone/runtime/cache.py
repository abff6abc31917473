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


class Room:
    """Keys and values [B, H, room, D], of which `used` tokens are there."""

    def __init__(self, cache: DynamicLayer) -> None:
        assert cache.keys is not None and cache.values is not None
        batch, heads, length, size = cache.keys.shape
        shape = (batch, heads, length + max(_ROOM, length // 8), size)
        self.keys, self.values = cache.keys.new_empty(shape), cache.values.new_empty(shape)
        self.keys[:, :, :length], self.values[:, :, :length] = cache.keys, cache.values
        self.used = length
        self._cache = cache
        self._shown: tuple[Tensor | None, Tensor | None] = (None, None)

    def serves(self, cache: DynamicLayer) -> bool:
        """Whether it holds what the cache shows, nobody has gone on from there, and it may be written."""
        return (
            cache is self._cache
            and cache.keys is not None
            and cache.keys is self._shown[0]
            and cache.values is self._shown[1]
            and self.used == cache.keys.shape[2] < self.keys.shape[2]
            and self.keys.is_inference() == torch.is_inference_mode_enabled()
        )

    def show_new(self) -> None:
        """Have the cache show one token more, which has been written."""
        self.used += 1
        shown = self.keys.narrow(2, 0, self.used), self.values.narrow(2, 0, self.used)
        self._cache.keys, self._cache.values = self._shown = shown


def room_of(layer: Any) -> Room:
    """The room of a layer's cache; a new one where it has none, or another has used it."""
    room = getattr(layer, "_duotone_room", None)
    if room is None or not room.serves(layer):
        room = layer._duotone_room = Room(layer)
    return room


def rooms_of(cache: Any, layers: int) -> list[Room] | None:
    """The room of each layer, where a cache grows by concatenation, holds BF16 on a CPU and as many tokens in every layer."""
    if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) != layers:
        return None
    if not all(_grows(layer) for layer in cache.layers):
        return None
    rooms = [room_of(layer) for layer in cache.layers]
    return rooms if all(room.used == rooms[0].used for room in rooms) else None


def _grows(layer: Any) -> bool:
    if type(layer) is not DynamicLayer or not layer.is_initialized or layer.keys is None or layer.keys.dim() != 4:
        return False
    return layer.keys.dtype == torch.bfloat16 and layer.keys.device.type == "cpu"
