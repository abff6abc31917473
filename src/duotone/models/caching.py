"""Which modules keep keys and values from one token to the next, and under what name a folder has them."""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from duotone.checkpoint.source import Source
from duotone.errors import DuotoneError
from duotone.models.anatomy import Anatomy

#: What every attention of transformers calls the cache it is given.
CACHE = "past_key_values"


def caching_attentions(anatomy: Anatomy, model: nn.Module, option: str) -> tuple[str, ...]:
    """Of each block the one module that keeps keys and values, by full name. Raises DuotoneError where there is no such."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise DuotoneError(f"{option}: found {type(model).__name__}, which writes no text, expected a decoder that does")
    found: list[str] = []
    for block in anatomy.blocks:
        inside = model.get_submodule(block.path).named_modules()
        names = [f"{block.prefix}{name}" for name, module in inside if name and _keeps(module)]
        if anatomy.whole or len(names) != 1:
            where = "the model, which is no stack of blocks," if anatomy.whole else block.path
            raise DuotoneError(
                f"{option}: found {len(names)} modules in {where} that keep keys and values from token to token, expected a "
                "decoder with one in each of its blocks"
            )
        found += names
    return tuple(found)


def key_heads(model: Any) -> int:
    """How many heads of keys, and of values, each layer of a transformers model has."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def written_attention(source: Source, attention: str) -> str:
    """The name of a module in a folder, by that of one of its tensors."""
    for name in source.tensors:
        if name.startswith(f"{attention}."):
            leaf = name.removeprefix(attention)
            written = source.written_as(name)
            return written.removesuffix(leaf) if written.endswith(leaf) else attention
    return attention


def _keeps(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int) and CACHE in inspect.signature(module.forward).parameters
