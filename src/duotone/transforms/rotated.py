# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A model folder seen with its norms folded away and its residual stream turned: each tensor is made when it is loaded.

Norm weights go into the linears behind them, whatever writes to the stream is turned, whatever reads it is turned back, and so
are attention's values, by a second rotation within each head. The model computes what it did, and nothing is added at run time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.source import Source, load_finite
from duotone.models.table import Adapter, NormedStream
from duotone.transforms.rotation import Rotation, draw_rotation, turn

_TIED = "tie_word_embeddings"


@dataclass(frozen=True, eq=False)
class Fold:
    """What becomes of one tensor. stored: the tensor of the folder it is made of.

    scaled_by: the norm whose weight goes into its columns. columns, rows: what turns the side that it reads with, and the side
    that it writes with (a bias has only this one). ones: a norm's weight that has gone elsewhere.
    """

    stored: str
    scaled_by: str | None = None
    columns: Rotation | None = None
    rows: Rotation | None = None
    ones: bool = False


@dataclass(frozen=True)
class RotatedSource:
    """A model folder behind its rotation. folds: of the tensors that change. notes: what was done, a line each."""

    original: Source
    config: dict[str, Any]
    tensors: dict[str, TensorSpec]
    folds: dict[str, Fold]
    notes: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The folder."""
        return self.original.path

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors of the folder, as they lie there."""
        return self.original.weight_bytes

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name on the CPU, those that change in float32. Raises DuotoneError as `Source` does, and for NaN."""
        return {name: self._load(name) for name in names}

    def written_as(self, name: str) -> str:
        """As the folder has it."""
        return self.original.written_as(name)

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """As the folder has it."""
        return self.original.as_stored(name, tensor)

    def _load(self, name: str) -> Tensor:
        fold = self.folds.get(name)
        if fold is None:
            return self.original.load((name,))[name]
        stored = load_finite(self.original, (fold.stored,) if fold.scaled_by is None else (fold.stored, fold.scaled_by))
        scale = None if fold.scaled_by is None else stored[fold.scaled_by]
        return apply(fold, stored[fold.stored], scale)


def apply(fold: Fold, stored: Tensor, norm_K: Tensor | None = None) -> Tensor:
    """The tensor that takes a stored one's place: float32, but ones keep their dtype. stored: [N, K], or a bias [N]."""
    if fold.ones:
        return torch.ones_like(stored)
    value = stored.float() if norm_K is None else stored.float() * norm_K.float()
    if fold.columns is not None:
        value = turn(value, fold.columns)
    if fold.rows is not None:
        value = turn(value.movedim(0, -1), fold.rows).movedim(-1, 0)
    return value.contiguous()


def rotate(
    source: Source, adapter: Adapter, residual: NormedStream, blocks: Sequence[str], shapes: Mapping[str, tuple[int, ...]],
    heads: int, seed: int,
) -> RotatedSource:  # fmt: skip
    """A source whose residual stream, and values within each head, are turned by rotations that the seed draws.

    blocks: the blocks' paths. shapes: of every tensor the model needs; a head that is tied to the embedding is not among them,
    and becomes a tensor of its own. heads: of attention's queries.
    """
    width = shapes[f"{residual.embedding}.weight"][1]
    averaged = shapes[f"{blocks[0]}.{residual.values[1]}.weight"][1]
    generator = torch.Generator().manual_seed(seed)
    stream, values = draw_rotation(width, generator), draw_rotation(averaged // heads, generator)
    folds = _outside_folds(residual, shapes, stream)
    for block in blocks:
        folds |= _block_folds(adapter, residual, block, stream, values)
    head = f"{residual.head}.weight"
    folds = {name: fold for name, fold in folds.items() if name in shapes or name == head}
    specs = {name: source.tensors[fold.stored] for name, fold in folds.items()}
    changed = {name: spec if folds[name].ones else replace(spec, dtype="F32") for name, spec in specs.items()}
    notes = [
        f"rotated: the residual stream by {stream.describe()}, values in each head by {values.describe()}, norms folded away"
    ]
    if head not in shapes:
        added = 2 * specs[head].shape[0] * width
        notes.append(f"{residual.head} was tied to {residual.embedding}; rotated it is a tensor of its own: {added} bytes more")
    config = source.config if head in shapes else source.config | {_TIED: False}
    return RotatedSource(source, config, source.tensors | changed, folds, tuple(notes))


def _outside_folds(residual: NormedStream, shapes: Mapping[str, tuple[int, ...]], stream: Rotation) -> dict[str, Fold]:
    embedding, head, norm = (f"{path}.weight" for path in (residual.embedding, residual.head, residual.final_norm))
    return {
        embedding: Fold(embedding, columns=stream),
        norm: Fold(norm, ones=True),
        head: Fold(head if head in shapes else embedding, scaled_by=norm, columns=stream),
    }


def _block_folds(adapter: Adapter, residual: NormedStream, block: str, stream: Rotation, values: Rotation) -> dict[str, Fold]:
    folds: dict[str, Fold] = {}
    for norm, readers in residual.norms:
        weight = f"{block}.{norm}.weight"
        folds[weight] = Fold(weight, ones=True)
        for name in (f"{block}.{path}.weight" for path in readers):
            folds[name] = Fold(name, scaled_by=weight, columns=stream)
    for path, _ in adapter.streams:
        for name in (f"{block}.{path}.{leaf}" for leaf in ("weight", "bias")):
            folds[name] = Fold(name, rows=stream)
    value, average = (f"{block}.{path}" for path in residual.values)
    folds[f"{value}.weight"] = replace(folds[f"{value}.weight"], rows=values)
    folds[f"{value}.bias"] = Fold(f"{value}.bias", rows=values)
    folds[f"{average}.weight"] = replace(folds[f"{average}.weight"], columns=values)
    return folds
