# Shapes: B sequences, H key heads, T tokens, D head size.
"""What a cache would be given: keys behind the rotation and values, as the quantized block makes them."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from duotone.errors import DuotoneError
from duotone.ranks import ALONE, Ranks


class CacheWatch:
    """A context: stands where an attention expects its cache, keeps nothing, and knows the largest magnitudes that went by.

    Attention of every decoder in transformers hands keys and values to `update` and goes on with what that returns, so no
    architecture needs code of its own. A batch that walks a block again shows the same values again.
    """

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention
        self._largest: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> Self:
        self._handle = self._attention.register_forward_pre_hook(self._take_place, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """transformers' interface: [B, H, T, D] each, which come back as they are."""
        found = tuple(x.abs().amax((0, 2, 3)).float() for x in (keys, values))
        before = self._largest or found
        self._largest = torch.maximum(before[0], found[0]), torch.maximum(before[1], found[1])
        return keys, values

    def absmax(self, attention: str, heads: int, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
        """The largest magnitudes of keys and of values, float32 [H] each, of all processes.

        Raises DuotoneError naming the layer when its attention has shown none, or those of another number of heads.
        """
        if self._largest is None:
            raise DuotoneError(f"{attention}: the forward pass gave a cache no keys and values, expected some to calibrate on")
        if any(len(of_heads) != heads for of_heads in self._largest):
            found = " and ".join(str(len(of_heads)) for of_heads in self._largest)
            raise DuotoneError(f"{attention}: gave a cache {found} heads of keys and values, expected {heads} from config.json")
        if ranks.size > 1:
            ranks.max_(*self._largest)
        return self._largest

    def _take_place(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, named | {"past_key_values": self}
