# Shapes: N out_features, K in_features.
"""Which kernel will run each linear of a model on this machine, and why nothing faster does: from headers alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from duotone.checkpoint.compressed_tensors import scheme_from_config
from duotone.checkpoint.hub import locate_model
from duotone.checkpoint.kv_cache import describe_kv_cache
from duotone.checkpoint.sidecar import read_sidecar
from duotone.checkpoint.source import architecture_of, open_source
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.inspection import LayerFacts, inspect_source, why_kept
from duotone.kernels.dispatch import Verdict, explain
from duotone.kernels.gpu import backend, cache
from duotone.models.names import named_source
from duotone.models.skeleton import build_skeleton, find_linears
from duotone.runtime.load import config_dtype
from duotone.scheme import Fp8Scheme


@dataclass(frozen=True)
class LayerKernel:
    """One linear: [N, K], scheme (`w4a8 hopper g128`, or the dtype it is stored in), and what multiplies it.

    runs: the kernel and its path in words. refusals: why nothing faster runs, a sentence each. kept_because: why it is not
    quantized. macs_share: of all linears' multiply-accumulates of a token.
    """

    layer: str
    shape: tuple[int, int]
    scheme: str
    backend: str
    runs: str
    refusals: tuple[str, ...]
    kept_because: str | None
    macs_share: float


@dataclass(frozen=True)
class KernelShare:
    """All linears that one kernel runs: how many, their weights, and their share of the multiply-accumulates of a token."""

    backend: str
    runs: str
    refusals: tuple[str, ...]
    layers: int
    weights: int
    macs_share: float


@dataclass(frozen=True)
class Explanation:
    """The linears of a model on a device, in module order, and what each kernel runs of them, the largest share first.

    kv_cache: how keys and values are kept, in words; None: as the model's dtype has them.
    """

    path: str
    model_type: str
    device: str
    kernels: list[KernelShare]
    layers: list[LayerKernel]
    kv_cache: str | None = None


def explain_model(model: str | Path, device: str = "auto") -> Explanation:
    """What `duotone.load(model, device=device)` would run. Reads config, headers and sidecar, no weights.

    Raises DuotoneError for a folder that holds no model, a device that is not there, or a packed weight that the architecture
    has no linear for.
    """
    place = resolve_device(device)
    source = open_source(locate_model(model))
    facts = {layer.layer: layer for layer in inspect_source(source).layers}
    sidecar, quantization = read_sidecar(source.path) or {}, source.config.get("quantization_config")
    dtype = config_dtype(source.config)
    skeleton = build_skeleton(source.config, dtype)
    named = named_source(source, skeleton)
    linears = {named.written_as(f"{name}.weight").removesuffix(".weight"): it for name, it in find_linears(skeleton).items()}
    stray = [name for name, fact in facts.items() if fact.is_quantized and name not in linears]
    if stray:
        raise DuotoneError(f"{source.path}: holds a packed weight {stray[0]!r}, found no such linear in this architecture")
    ordinary = Verdict("nn.Linear", f"torch's own linear in {str(dtype).removeprefix('torch.')}", ())
    packed = {"w4a8": ordinary, "w8a8": ordinary}
    if quantization is not None:
        scheme = scheme_from_config(quantization)
        packed = {"w4a8": explain(scheme, place), "w8a8": explain(Fp8Scheme(scheme.target), place)}
    macs = sum(linear.weight.numel() for linear in linears.values())
    layers: list[LayerKernel] = []
    for name, linear in linears.items():
        fact = facts.get(name)
        reason = None
        if not (fact and fact.is_quantized):
            reason = why_kept(name, sidecar, quantization) or "the model is not quantized"
        verdict = ordinary if reason or fact is None else packed[fact.scheme.split()[0]]
        shape = (linear.out_features, linear.in_features)
        share = linear.weight.numel() / macs
        layers.append(LayerKernel(name, shape, _scheme(fact), verdict.backend, verdict.runs, verdict.refusals, reason, share))
    return Explanation(
        str(source.path), architecture_of(source.config), str(place), _shares(layers), layers, _cache(quantization, place)
    )


def _cache(quantization: dict[str, Any] | None, place: torch.device) -> str | None:
    """How keys and values are kept, and on a GPU what does that."""
    kept = describe_kv_cache(quantization)
    if kept is None or place.type != backend.DEVICE:
        return kept
    refusal = cache.refuses(place)
    return f"{kept}; written and read by " + ("Triton kernels" if refusal is None else f"plain torch (triton: {refusal})")


def _scheme(fact: LayerFacts | None) -> str:
    """A linear without a tensor of its own shares the embedding's."""
    return "tied" if fact is None else fact.scheme


def _shares(layers: list[LayerKernel]) -> list[KernelShare]:
    """What each kernel runs."""
    by_kernel: dict[tuple[str, str, tuple[str, ...]], list[LayerKernel]] = {}
    for layer in layers:
        by_kernel.setdefault((layer.backend, layer.runs, layer.refusals), []).append(layer)
    shares = [
        KernelShare(*kernel, len(its), sum(n * k for n, k in (layer.shape for layer in its)), sum(x.macs_share for x in its))
        for kernel, its in by_kernel.items()
    ]
    return sorted(shares, key=lambda share: -share.macs_share)
