"""Models that see and write: a vision tower makes embeddings of images, and a language model reads them between its tokens.

The language model is the body. The tower and what lies between the two stay in BF16, unless the tower is to be quantized too:
then its blocks are a stack of their own, which runs before the body.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from duotone.errors import DuotoneError
from duotone.models.anatomy import Anatomy, Block, anatomy_of, anatomy_of_tower, example_inputs
from duotone.models.skeleton import find_linears

_TOWER = "vision tower: left in BF16 (see --quantize-vision)"
_MERGER = "between vision tower and text: one projection of every image, left in BF16"


def vision_path(model: PreTrainedModel) -> str | None:
    """Where the vision tower of a model that sees and writes is; None for a model without one."""
    tower = model.get_encoder(modality="image") if hasattr(model.config, "vision_config") else model
    if tower is model or not isinstance(tower, PreTrainedModel) or not model.can_generate():
        return None
    return next(name for name, module in model.named_modules() if module is tower)


def full_anatomy(
    config: dict[str, Any],
    model: PreTrainedModel,
    quantize_vision: bool = False,
    example: Mapping[str, Tensor] | None = None,
) -> Anatomy:
    """The anatomy of a model, with what it sees with. Raises DuotoneError for one that cannot be traced, has no
    tower, or has one and no stack of blocks behind it.

    example: as `anatomy_of` takes it.
    """
    body, path = anatomy_of(config, model, example), vision_path(model)
    if path is None:
        if quantize_vision:
            raise DuotoneError(f"--quantize-vision: found no vision tower in {type(model).__name__}, expected one")
        return body
    if body.whole:
        raise DuotoneError(
            f"{type(model).__name__}: sees with {path}, and its language model is no stack of blocks that hand hidden states "
            "on, expected one"
        )
    inside = [name for block in body.blocks for name in _under(find_linears(model), block.path)]
    head = [name for name, linear in find_linears(model).items() if linear is model.get_output_embeddings()]
    keep = {name: reason for name, reason in body.keep.items() if name in {*inside, *head}}
    seeing = [name for name in find_linears(model) if name not in {*inside, *head}]
    tower = None
    if quantize_vision:
        own: Any = model.get_submodule(path)
        tower = _moved(anatomy_of_tower(own, _example_images(own)), path)
        quantized = {name for block in tower.blocks for group in block.shared_inputs for name in group}
        tower = replace(tower, keep={name: _MERGER for name in seeing if name not in quantized})
        keep |= tower.keep
    else:
        keep |= {name: _TOWER if name in _under(seeing, path) else _MERGER for name in seeing}
    return replace(body, keep=keep, tower=tower, seeing=frozenset(seeing), tower_path=path)


def _under(names: Iterable[str], path: str) -> list[str]:
    return [name for name in names if name.startswith(f"{path}.")]


def _moved(anatomy: Anatomy, path: str) -> Anatomy:
    """The anatomy of a part under the names of the whole."""

    def full(name: str) -> str:
        return f"{path}.{name}" if name else path

    blocks = tuple(
        Block(
            full(block.path),
            tuple(tuple(map(full, group)) for group in block.shared_inputs),
            {full(writer): reader for writer, reader in block.streams.items()},
            tuple(map(full, block.experts)),
        )
        for block in anatomy.blocks
    )
    return replace(anatomy, blocks=blocks)


def _example_images(tower: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of the right names and shapes for a tower: an image, or patches of one with the grid they are cut from."""
    if "grid_thw" not in inspect.signature(tower.forward).parameters:
        return {"pixel_values": example_inputs(tower, "pixel_values")["pixel_values"]}
    config: Any = tower.config
    side = 4 * int(config.spatial_merge_size)
    patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return {"hidden_states": torch.zeros(side * side, patch), "grid_thw": torch.tensor([[1, side, side]])}


def image_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens in whose places a model puts what it sees; none for a model that only reads."""
    config: Any = model.config
    if vision_path(model) is None:
        return ()
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))
