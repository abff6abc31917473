"""What is inside a model folder, from its headers, config and sidecar alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from duotone.checkpoint.compressed_tensors import scheme_from_config, tensor_specs
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.kv_cache import describe_kv_cache
from duotone.checkpoint.reader import is_fp8_weight, packed_layers
from duotone.checkpoint.sidecar import read_sidecar
from duotone.checkpoint.source import SourceFolder, architecture_of, open_source
from duotone.kernels.dispatch import explain
from duotone.scheme import Fp8Scheme, Scheme

#: How the scheme of a quantized layer begins.
_QUANTIZED = ("w4a8", "w8a8")


@dataclass(frozen=True)
class LayerFacts:
    """One matrix: [rows, columns], scheme (`w4a8 hopper g128`) or dtype, bytes on disk, error if known, why it was kept."""

    layer: str
    shape: tuple[int, ...]
    scheme: str
    nbytes: int
    output_error: float | None = None
    kept_because: str | None = None

    @property
    def is_quantized(self) -> bool:
        """Does it hold 4-bit codes or FP8 values?"""
        return self.scheme.startswith(_QUANTIZED)


@dataclass(frozen=True)
class Inspection:
    """The layers of a folder and their totals. bits_per_weight is over the quantized layers; 0 when there is none.

    backend: what multiplies the quantized layers on this machine's CPU. refusals: why nothing faster does. kv_cache: how
    keys and values are kept, in words; None: as the model's dtype has them.
    """

    path: str
    model_type: str
    layers: list[LayerFacts]
    total_bytes: int
    quantized_bytes: int
    bits_per_weight: float
    calibration: dict[str, Any] | None
    notes: list[str]
    backend: str | None = None
    refusals: tuple[str, ...] = ()
    kv_cache: str | None = None


def inspect_model(model: str | Path) -> Inspection:
    """Read a checkpoint or an ordinary model folder without loading it. Raises DuotoneError for a damaged one."""
    return inspect_source(open_source(locate_model(model)))


def inspect_source(source: SourceFolder) -> Inspection:
    """`inspect_model` of a folder whose headers have been read."""
    sidecar = read_sidecar(source.path) or {}
    quantization = source.config.get("quantization_config")
    scheme = None if quantization is None else scheme_from_config(quantization)
    layers = [] if scheme is None else _quantized_layers(source, scheme, sidecar)
    kernel = None if scheme is None else explain(scheme, torch.device("cpu"))
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    quantized_bytes = sum(layer.nbytes for layer in layers)
    return Inspection(
        path=str(source.path),
        model_type=architecture_of(source.config),
        layers=layers + _other_layers(source, sidecar, quantization),
        total_bytes=source.weight_bytes,
        quantized_bytes=quantized_bytes,
        bits_per_weight=8 * quantized_bytes / weights if weights else 0.0,
        calibration=sidecar.get("calibration"),
        notes=list(sidecar.get("notes", [])),
        backend=None if kernel is None else kernel.runs,
        refusals=() if kernel is None else kernel.refusals,
        kv_cache=describe_kv_cache(quantization),
    )


def _quantized_layers(source: SourceFolder, scheme: Scheme, sidecar: dict[str, Any]) -> list[LayerFacts]:
    stored = source.load(name for name in source.tensors if name.endswith(".weight_shape"))
    shapes = {name.removesuffix(".weight_shape"): tuple(int(size) for size in shape) for name, shape in stored.items()}
    layers: list[LayerFacts] = []
    for layer in packed_layers(source):
        found = shapes.get(layer)
        kind = Fp8Scheme(scheme.target) if found is None else scheme
        rows, columns = found or source.tensors[f"{layer}.weight"].shape
        nbytes = sum(
            source.tensors[part].nbytes for part in tensor_specs(layer, (rows, columns), kind) if part in source.tensors
        )
        error = sidecar.get("layers", {}).get(layer, {}).get("output_error")
        layers.append(LayerFacts(layer, (rows, columns), kind.label, nbytes, error))
    return layers


def _other_layers(source: SourceFolder, sidecar: dict[str, Any], quantization: dict[str, Any] | None) -> list[LayerFacts]:
    """Matrices that are stored as floats, with the reason where one is known."""
    layers: list[LayerFacts] = []
    for name, spec in source.tensors.items():
        if len(spec.shape) != 2 or not spec.is_float or not name.endswith(".weight") or is_fp8_weight(source, name):
            continue
        layer = name.removesuffix(".weight")
        kept_because = why_kept(layer, sidecar, quantization)
        layers.append(LayerFacts(layer, spec.shape, spec.dtype, spec.nbytes, kept_because=kept_because))
    return layers


def why_kept(layer: str, sidecar: dict[str, Any], quantization: dict[str, Any] | None) -> str | None:
    """Why a matrix of a quantized model is stored as floats; None for a model that is not quantized."""
    reasons: dict[str, str] = sidecar.get("kept", {})
    if layer in reasons:
        return reasons[layer]
    if quantization is None:
        return None
    if layer in quantization.get("ignore", []):
        return "in the ignore list"
    return "an embedding table, not a linear" if "embed" in layer else "not a quantized linear"
