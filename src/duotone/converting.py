# Shapes: N out_features, K in_features.
"""A checkpoint in another layout, and another tool's in ours: a linear at a time, each told how exact it is."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.compressed_tensors import layout_of, quantization_config, tensor_specs, to_tensors
from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.hub import copy_companions, locate_model
from duotone.checkpoint.layouts import LAYOUTS, Layout
from duotone.checkpoint.layouts.foreign import FOREIGN, OPTIONAL, Foreign, Int4
from duotone.checkpoint.layouts.layout import product_scale, products
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.sidecar import FORMAT_VERSION, SIDECAR
from duotone.checkpoint.source import SourceFolder, load_finite, open_source
from duotone.checkpoint.staging import output_folder
from duotone.checkpoint.writer import CheckpointWriter, write_json
from duotone.contract import split_scale
from duotone.errors import DuotoneError
from duotone.models.skeleton import build_skeleton, find_linears
from duotone.qweight import QuantizedWeight, dequantize
from duotone.scheme import HOPPER, Scheme
from duotone.version import VERSION

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


def export_checkpoint(
    model: str | Path, out: str | Path, layout: str, allow_lossy: bool = False, progress: Progress | None = None
) -> Conversion:
    """Write a checkpoint of ours in another layout: the same codes, scales folded as that layout has them.

    Raises DuotoneError, before anything is written, for a layout that is not known or cannot hold the scheme, and for a linear
    that it holds only approximately, unless `allow_lossy`.
    """
    if layout not in LAYOUTS:
        raise DuotoneError(f"--format: found {layout!r}, expected one of {', '.join(LAYOUTS)}")
    kind, source = LAYOUTS[layout], open_source(locate_model(model))
    reader, layers = WeightReader(source), packed_layers(source)
    shapes = {layer: _stored_shape(source, layer) for layer in layers}
    for layer, shape in shapes.items():
        reason = None if kind.refuses is None else kind.refuses(reader.scheme, shape)
        if reason is not None:
            raise DuotoneError(f"--format {layout}: {layer}: {reason}")
    replaced = {layer: kind.specs(layer, shape, reader.scheme) for layer, shape in shapes.items()}
    report = Conversion(str(model), str(out), layout, original_bytes=source.weight_bytes)

    def tensors_of(layer: str) -> dict[str, Tensor]:
        weight = reader.read(layer)
        tensors = kind.to_tensors(layer, weight)
        report.layers.append(_compared(layer, kind, tensors, weight, allow_lossy))
        return tensors

    ignore = list(source.config["quantization_config"].get("ignore", []))
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    quantization = None if kind.config is None else kind.config(reader.scheme, ignore)
    files = {"config.json": config | ({} if quantization is None else {"quantization_config": quantization})}
    if kind.file is not None and quantization is not None:
        files[kind.file] = quantization
    _write(source, Path(out), replaced, tensors_of, files, report, progress, as_stored=True)
    return report


def import_checkpoint(
    model: str | Path, out: str | Path, allow_lossy: bool = False, progress: Progress | None = None
) -> Conversion:
    """Read another tool's symmetric 4-bit checkpoint into ours, target hopper: codes as they are, scales as vLLM splits them.

    weight_error says what that second rounding costs, against the weights the tool meant. Raises DuotoneError, before anything
    is written, for a layout that is not known, zero points, groups whose columns are scattered, and for values that have no
    place in ours, unless `allow_lossy`.
    """
    source = open_source(locate_model(model))
    quantization: Any = source.config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise DuotoneError(f"{source.path}: is not quantized, expected a 4-bit checkpoint; quantize it with duotone quantize")
    layout, group_size, _ = layout_of(quantization)
    if layout not in FOREIGN:
        raise DuotoneError(f"{source.path}: found the layout {layout}, expected one of {', '.join(FOREIGN)}")
    if group_size < 1:
        raise DuotoneError(f"{source.path}: found one group a row, expected one group_size for all linears")
    kind, scheme = FOREIGN[layout], Scheme(HOPPER, group_size)
    layers = _foreign_layers(source, kind)
    replaced = {layer: tensor_specs(layer, _foreign_shape(source, layout, layer), scheme) for layer in layers}
    report = Conversion(str(model), str(out), "compressed-tensors", original_bytes=source.weight_bytes)
    report.notes.append(f"imported from {quantization.get('quant_method')}, layout {layout}")

    def tensors_of(layer: str) -> dict[str, Tensor]:
        parts = source.load(name for name in _parts_of(source, kind, layer).values())
        given = {name: parts[full] for name, full in _parts_of(source, kind, layer).items()}
        found = kind.read(layer, given, quantization)
        if found.turned and not allow_lossy:
            raise DuotoneError(
                f"{layer}: {found.turned} values of -8 under a negative scale become 7, expected none; --allow-lossy takes them"
            )
        weight = _in_our_contract(found, scheme)
        report.layers.append(_against_what_was_meant(layer, found, weight))
        return to_tensors(layer, weight)

    kept = [name for name in find_linears(build_skeleton(source.config, torch.bfloat16)) if name not in layers]
    config = {key: value for key, value in source.config.items() if key not in {"quantization_config", "torch_dtype"}}
    config |= {"dtype": "bfloat16", "quantization_config": quantization_config(scheme, sorted(kept))}
    sidecar = {
        "format_version": FORMAT_VERSION,
        "producer": f"duotone {VERSION}",
        "layers": {layer: {} for layer in layers},
        "kept": dict.fromkeys(kept, "not quantized in the imported checkpoint"),
        "notes": report.notes,
    }
    files = {"config.json": config, SIDECAR: sidecar}
    _write(source, Path(out), replaced, tensors_of, files, report, progress, as_stored=False)
    return report


def _write(
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
    plan = dict(_planned(source, replaced, as_stored))
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


def _planned(
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


def _compared(
    layer: str, kind: Layout, tensors: dict[str, Tensor], weight: QuantizedWeight, allow_lossy: bool
) -> LayerConversion:
    """What the layout's runtimes multiply, beside the contract's weights."""
    found, contract = kind.values(layer, tensors, weight.scheme), dequantize(weight)
    error = _relative(found - contract, contract)
    if torch.equal(found, contract):
        return LayerConversion(layer, EXACTNESS[0], error)
    level = weight.codes.float() + weight.scheme.levels[0]
    if torch.equal(found, products(level, product_scale(weight), weight.zero_point, weight.scheme.group_size)):
        return LayerConversion(layer, EXACTNESS[1], error)
    if not allow_lossy:
        raise DuotoneError(
            f"--format {kind.name}: {layer}: is held approximately (weights move by {100 * math.sqrt(error):.2f} %), expected "
            "exact codes and scales; --allow-lossy takes it"
        )
    return LayerConversion(layer, EXACTNESS[2], error)


def _in_our_contract(found: Int4, scheme: Scheme) -> QuantizedWeight:
    """With the two scales that vLLM makes of the one at load."""
    group, outer = split_scale(found.scale.to(torch.bfloat16), scheme)
    return QuantizedWeight(found.codes, group, outer, scheme)


def _against_what_was_meant(layer: str, found: Int4, weight: QuantizedWeight) -> LayerConversion:
    meant = products(found.codes.float() + weight.scheme.levels[0], found.scale, None, found.group_size)
    error = _relative(dequantize(weight) - meant, meant)
    return LayerConversion(layer, EXACTNESS[0] if not found.turned else EXACTNESS[2], error)


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.square().sum() / whole.square().sum().clamp(min=1e-30))


def _stored_shape(source: SourceFolder, layer: str) -> tuple[int, int]:
    rows, columns = (int(size) for size in source.load([f"{layer}.weight_shape"])[f"{layer}.weight_shape"])
    return rows, columns


def _foreign_layers(source: SourceFolder, kind: Foreign) -> list[str]:
    first = f".{kind.parts[0]}"
    layers = [name.removesuffix(first) for name in source.tensors if name.endswith(first)]
    if not layers:
        raise DuotoneError(f"{source.path}: config.json says it is quantized, found no tensor {first[1:]!r}")
    return layers


def _foreign_shape(source: SourceFolder, layout: str, layer: str) -> tuple[int, int]:
    """[N, K] from headers, or from the tensor that says so."""
    if "weight_shape" in FOREIGN[layout].parts:
        return _stored_shape(source, layer)
    packed = source.tensors[_parts_of(source, FOREIGN[layout], layer)["weight" if layout == "int-quantized" else "qweight"]]
    if len(packed.shape) != 2:
        raise DuotoneError(f"{layer}: found packed weights of shape {list(packed.shape)}, expected a matrix")
    rows, columns = packed.shape
    return {"gptq": (columns, rows * 8), "awq": (columns * 8, rows)}.get(layout, (rows, columns))


def _parts_of(source: SourceFolder, kind: Foreign, layer: str) -> dict[str, str]:
    """Full names of a linear's tensors, by part. Raises DuotoneError naming one that is missing."""
    names = {part: f"{layer}.{part}" for part in kind.parts}
    for part, name in names.items():
        if name not in source.tensors and part not in OPTIONAL:
            raise DuotoneError(f"{source.path}: found no tensor {name!r}, expected it beside {layer}.{kind.parts[0]}")
    return {part: name for part, name in names.items() if name in source.tensors}
