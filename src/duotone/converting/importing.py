# Shapes: N out_features, K in_features.
"""Another tool's 4-bit checkpoint as one of ours: a linear at a time, each told how exact it is."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.compressed_tensors import layout_of, quantization_config, tensor_specs, to_tensors
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.kv_cache import kv_strategy_of
from duotone.checkpoint.layouts.foreign import FOREIGN, OPTIONAL, Foreign, Int4
from duotone.checkpoint.layouts.layout import products
from duotone.checkpoint.sidecar import FORMAT_VERSION, SIDECAR
from duotone.checkpoint.source import SourceFolder, open_source
from duotone.contract import split_scale
from duotone.converting.report import EXACTNESS, Conversion, LayerConversion, Progress, relative, stored_shape, write
from duotone.errors import DuotoneError
from duotone.models.skeleton import build_skeleton, find_linears
from duotone.qweight import QuantizedWeight, dequantize
from duotone.scheme import HOPPER, Scheme
from duotone.version import VERSION


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
    written = quantization_config(scheme, sorted(kept), kv_strategy_of(quantization))
    config |= {"dtype": "bfloat16", "quantization_config": written}
    sidecar = {
        "format_version": FORMAT_VERSION,
        "producer": f"duotone {VERSION}",
        "layers": {layer: {} for layer in layers},
        "kept": dict.fromkeys(kept, "not quantized in the imported checkpoint"),
        "notes": report.notes,
    }
    files = {"config.json": config, SIDECAR: sidecar}
    write(source, Path(out), replaced, tensors_of, files, report, progress, as_stored=False)
    return report


def _in_our_contract(found: Int4, scheme: Scheme) -> QuantizedWeight:
    """With the two scales that vLLM makes of the one at load."""
    group, outer = split_scale(found.scale.to(torch.bfloat16), scheme)
    return QuantizedWeight(found.codes, group, outer, scheme)


def _against_what_was_meant(layer: str, found: Int4, weight: QuantizedWeight) -> LayerConversion:
    meant = products(found.codes.float() + weight.scheme.levels[0], found.scale, None, found.group_size)
    error = relative(dequantize(weight) - meant, meant)
    return LayerConversion(layer, EXACTNESS[0] if not found.turned else EXACTNESS[2], error)


def _foreign_layers(source: SourceFolder, kind: Foreign) -> list[str]:
    first = f".{kind.parts[0]}"
    layers = [name.removesuffix(first) for name in source.tensors if name.endswith(first)]
    if not layers:
        raise DuotoneError(f"{source.path}: config.json says it is quantized, found no tensor {first[1:]!r}")
    return layers


def _foreign_shape(source: SourceFolder, layout: str, layer: str) -> tuple[int, int]:
    """[N, K] from headers, or from the tensor that says so."""
    if "weight_shape" in FOREIGN[layout].parts:
        return stored_shape(source, layer)
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
