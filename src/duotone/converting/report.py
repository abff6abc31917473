# Shapes: N out_features, K in_features.
"""What converting a checkpoint leaves behind: each linear with how exact it is; and the writing of what was converted."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.hub import copy_companions
from duotone.checkpoint.source import SourceFolder, load_finite
from duotone.checkpoint.staging import output_folder
from duotone.checkpoint.writer import CheckpointWriter, write_json

#: How exact a layout is, best first: the contract's own FP8 weights; the same codes and scales, without the rounding to FP8;
#: neither.
EXACTNESS = ("bit-exact", "product-exact", "approximate")

#: (done, total, what)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerConversion:
    """One linear. weight_error: relative squared distance of what the layout's runtimes multiply from the contract's."""

    layer: str
    exactness: str
    weight_error: float


@dataclass
class Conversion:
    """What was written where, how exact, linear by linear."""

    model: str
    out: str
    layout: str
    layers: list[LayerConversion] = field(default_factory=list)
    original_bytes: int = 0
    weight_bytes: int = 0
    notes: list[str] = field(default_factory=list)


def write(
    source: SourceFolder,
    out: Path,
    replaced: Mapping[str, dict[str, TensorSpec]],
    tensors_of: Callable[[str], dict[str, Tensor]],
    files: Mapping[str, dict[str, Any]],
    report: Conversion,
    progress: Progress | None,
    *,
    as_stored: bool,
) -> None:
    """Every tensor of the source in order, those of linears replaced. as_stored: other floats keep their dtype."""
    plan = dict(planned(source, replaced, as_stored))
    specs = {name: spec for _, group in plan.items() for name, spec in group.items()}
    with output_folder(out) as folder:
        copy_companions(source.path, folder)
        writer = CheckpointWriter(folder, specs)
        for done, (name, group) in enumerate(plan.items()):
            if progress is not None:
                progress(done, len(plan), name)
            if name in replaced:
                writer.write(tensors_of(name))
            else:
                tensor = load_finite(source, (name,))[name]
                writer.write({name: tensor.to(torch.bfloat16) if group[name].dtype == "BF16" else tensor})
        report.weight_bytes = writer.finish()
        for name, content in files.items():
            write_json(folder / name, content)


def planned(
    source: SourceFolder, replaced: Mapping[str, dict[str, TensorSpec]], as_stored: bool
) -> Iterator[tuple[str, dict[str, TensorSpec]]]:
    """What is written, by linear or by tensor, in the source's order."""
    told: set[str] = set()
    for name, spec in source.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if layer in replaced and leaf != "bias":
            if layer not in told:
                told.add(layer)
                yield layer, replaced[layer]
            continue
        yield name, {name: TensorSpec("BF16" if spec.is_float and not as_stored else spec.dtype, spec.shape)}


def relative(difference: Tensor, whole: Tensor) -> float:
    """Squared size of a difference, of the whole's."""
    return float(difference.square().sum() / whole.square().sum().clamp(min=1e-30))


def stored_shape(source: SourceFolder, layer: str) -> tuple[int, int]:
    """[N, K] of a quantized linear: of a packed one from the tensor that says so."""
    if f"{layer}.weight_shape" not in source.tensors:
        rows, columns = source.tensors[f"{layer}.weight"].shape
        return rows, columns
    rows, columns = (int(size) for size in source.load([f"{layer}.weight_shape"])[f"{layer}.weight_shape"])
    return rows, columns
