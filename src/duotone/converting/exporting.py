# Shapes: N out_features, K in_features.
"""A checkpoint of ours in another layout: a linear at a time, each told how exact it is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.kv_cache import kv_cache_scheme, kv_strategy_of, without_scales
from duotone.checkpoint.layouts import LAYOUTS, Layout, Shared, dense
from duotone.checkpoint.layouts.layout import ALONE, product_scale, products
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import SourceFolder, open_source
from duotone.converting.activations import static_scales
from duotone.converting.gguf import write_gguf
from duotone.converting.report import EXACTNESS, Conversion, LayerConversion, Progress, relative, stored_shape, write
from duotone.errors import DuotoneError
from duotone.models.anatomy import anatomy_of, linears_by_input
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton, find_linears
from duotone.qweight import AnyWeight, Fp8Weight, QuantizedWeight, dequantize
from duotone.scheme import Fp8Scheme


@dataclass(frozen=True)
class Calibration:
    """Text to find static activation scales with, where a layout has them and the checkpoint does not."""

    text: tuple[str, ...] = ()
    samples: int = 64
    seq_len: int = 256


def export_checkpoint(
    model: str | Path,
    out: str | Path,
    layout: str,
    allow_lossy: bool = False,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> Conversion:
    """Write a checkpoint of ours in another layout: the same codes, scales folded as that layout has them.

    Raises DuotoneError, before anything is written, for a layout that is not known or cannot hold the scheme, for one with
    static activation scales where neither the checkpoint nor a calibration gives any, and for a linear that it holds only
    approximately, unless `allow_lossy`.
    """
    if layout not in LAYOUTS:
        raise DuotoneError(f"--format: found {layout!r}, expected one of {', '.join(LAYOUTS)}")
    kind, source = LAYOUTS[layout], open_source(locate_model(model))
    if not source.config.get("quantization_config"):
        raise DuotoneError(f"{model}: is not quantized, expected a checkpoint; make one with duotone quantize")
    reader, layers = WeightReader(source), packed_layers(source)
    shapes = {layer: stored_shape(source, layer) for layer in layers}
    for layer, shape in shapes.items():
        reason = None if kind.refuses is None else kind.refuses(layer, shape, reader.scheme)
        if isinstance(reader.scheme_of(layer), Fp8Scheme) and kind is not dense.DENSE:
            reason = "is stored in FP8, which only dense-bf16 can follow; quantize without the --rule that asks for it"
        if reason is not None:
            raise DuotoneError(f"--format {layout}: {layer}: {reason}")
    quantization = source.config["quantization_config"]
    settings = None if kind.config is None else kind.config(reader.scheme, list(quantization.get("ignore", [])))
    report = Conversion(str(model), str(out), layout, original_bytes=source.weight_bytes)
    strategy = kv_strategy_of(quantization)
    if settings is not None and kind.keeps_kv_scales:
        settings["kv_cache_scheme"] = kv_cache_scheme(strategy)
    elif strategy is not None:
        report.notes.append(f"{layout} has no place for the scales of the FP8 KV cache: they are left out")
        source = without_scales(source)
    shared = _shared(source, reader, kind, _measured(source, kind, layers, calibration or Calibration(), report))

    def tensors_of(layer: str) -> dict[str, Tensor]:
        weight = reader.read(layer)
        if isinstance(weight, Fp8Weight):
            tensors = dense.to_tensors(layer, weight)
        else:
            tensors = kind.to_tensors(layer, weight, shared.get(layer, ALONE))
        report.layers.append(_compared(layer, kind, tensors, weight, allow_lossy))
        return tensors

    replaced = {layer: kind.specs(layer, shape, reader.scheme) for layer, shape in shapes.items()}
    if kind.container == "gguf":
        write_gguf(source, Path(out), replaced, tensors_of, report, progress)
        return report
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    files: dict[str, dict[str, Any]] = {"config.json": config}
    if settings is not None:
        files["config.json"] = config | {"quantization_config": settings}
        if kind.file is not None:
            files[kind.file[0]] = kind.file[1](settings)
    write(source, Path(out), replaced, tensors_of, files, report, progress, as_stored=True)
    return report


def _measured(
    source: SourceFolder, kind: Layout, layers: Sequence[str], calibration: Calibration, report: Conversion
) -> dict[str, float]:
    """Static activation scales by linear, where the layout has them and a text is given; notes what became of activations."""
    static = [layer for layer in layers if kind.static is not None and kind.static(layer)]
    if not static:
        return {}
    target = WeightReader(source).scheme.target
    if calibration.text:
        stored, _ = _named(source)
        found = static_scales(source.path, calibration.text, calibration.samples, calibration.seq_len)
        scales = {stored[name]: scale for name, scale in found.items()}
        report.notes.append("activations: one static scale a tensor, the largest seen in the calibration text / 448")
        return {layer: scales[layer] for layer in static}
    if target.dynamic_activations:
        raise DuotoneError(
            f"--format {kind.name}: {static[0]}: target {target.name} scales each token, the layout has one static scale a "
            "tensor, expected a text to find it with: --calibration TEXT (or a checkpoint of target gaudi)"
        )
    report.notes.append("activations: the checkpoint's own static scales")
    return {}


def _shared(source: SourceFolder, reader: WeightReader, kind: Layout, measured: Mapping[str, float]) -> dict[str, Shared]:
    """What linears of one input have in common, by linear: the largest of each of their scales."""
    if kind.outer is None:
        return {layer: Shared(input_scale=scale) for layer, scale in measured.items()}
    found: dict[str, Shared] = {}
    for names in _named(source)[1]:
        weights = [weight for name in names if isinstance(weight := reader.read(name), QuantizedWeight)]
        outer = max(kind.outer(weight) for weight in weights)
        own = [float(weight.input_scale) for weight in weights if weight.input_scale is not None]
        scales = [measured[name] for name in names if name in measured] or own
        found |= dict.fromkeys(names, Shared(outer, max(scales) if scales else None))
    return found


def _named(source: SourceFolder) -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """The folder's name of each quantized linear by its module's; and those that read the same input together."""
    model, part = build_skeleton(source.config, torch.bfloat16), ".weight_packed"
    named = named_source(source, model)
    packed = [name for name in find_linears(model) if f"{name}{part}" in named.tensors]
    stored = {name: named.written_as(f"{name}{part}").removesuffix(part) for name in packed}
    groups = linears_by_input(anatomy_of(source.config, model), packed)
    return stored, [tuple(stored[name] for name in names) for names in groups]


def _compared(layer: str, kind: Layout, tensors: dict[str, Tensor], weight: AnyWeight, allow_lossy: bool) -> LayerConversion:
    """What the layout's runtimes multiply, beside the contract's weights."""
    scheme, contract = weight.scheme, dequantize(weight)
    found = dense.values(layer, tensors, scheme) if isinstance(scheme, Fp8Scheme) else kind.values(layer, tensors, scheme)
    error = relative(found - contract, contract)
    if torch.equal(found, contract):
        return LayerConversion(layer, EXACTNESS[0], error)
    if isinstance(weight, QuantizedWeight):
        level = weight.codes.float() + weight.scheme.levels[0]
        if torch.equal(found, products(level, product_scale(weight), weight.zero_point, weight.scheme.group_size)):
            return LayerConversion(layer, EXACTNESS[1], error)
    if not allow_lossy:
        raise DuotoneError(
            f"--format {kind.name}: {layer}: is held approximately (weights move by {100 * math.sqrt(error):.2f} %), expected "
            "exact codes and scales; --allow-lossy takes it"
        )
    return LayerConversion(layer, EXACTNESS[2], error)
