"""What a run did: facts for the user, the sidecar and the records."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from duotone.advice import advice_before
from duotone.calibrate.data import TokenWindows
from duotone.calibrate.samples import Samples
from duotone.calibrate.sources import titles
from duotone.checking import loading_notes
from duotone.checkpoint.sidecar import FORMAT_VERSION
from duotone.models.diffusion import is_diffusers
from duotone.plan import Plan
from duotone.settings import QuantizeConfig
from duotone.solver.methods import LayerReport
from duotone.version import VERSION

#: Settings that do not change what is written.
_NOT_OF_THE_BYTES = {"calibration", "device", "dtype", "runtime", "gpu", "memory_budget"}


@dataclass
class QuantizeReport:
    """Everything `quantize` has to say. kept: linears left in BF16, each with its reason.

    seconds: by phase. work: what each phase had to compute (floors.py). phase_bytes: memory seen in each phase (phases.py).
    resumed_at: the block from which this run went on with one that was killed, None for a run of its own. inputs: of a model
    calibrated on tensors, dtype and sizes of each in one sample (`samples.input_shapes`). device_bytes: most memory of a GPU
    that tensors took. states_in: where the calibration's hidden states were kept from block to block.
    """

    model: str
    out: str
    config: QuantizeConfig
    calibration: dict[str, Any] | None
    layers: list[LayerReport] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weight_bytes: int = 0
    original_bytes: int = 0
    bits_per_weight: float = 0.0
    quantized_macs_share: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    work: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_bytes: int = 0
    phase_bytes: dict[str, int] = field(default_factory=dict)
    resumed_at: int | None = None
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    device_bytes: int = 0
    states_in: str = "memory"

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)


def calibration_facts(windows: Samples | None, dtype: torch.dtype) -> dict[str, Any] | None:
    """The text that was calibrated on: as it was named but without folders, counts, a hash of it, the forward's dtype.

    windows_of and rendering, of token windows: how many of each text, and how its rows became text.
    """
    if windows is None:
        return None
    facts: dict[str, Any] = {"text": titles(windows.sources), "tokens": windows.positions, "windows": len(windows)}
    if isinstance(windows, TokenWindows):
        facts["windows_of"] = list(windows.counts)
        facts["rendering"] = [" and ".join(kinds) for kinds in windows.rendering]
    return facts | {"sha256": windows.sha256, "dtype": str(dtype).removeprefix("torch.")}


def notes_of(plan: Plan, windows: Samples | None) -> list[str]:
    """What the user should know about this run before it starts. Raises DuotoneError where `--runtime` would not load it."""
    notes = list(plan.transforms) + (list(windows.notes) if windows is not None else [])
    if windows is not None and plan.seq_len < plan.config.seq_len:
        notes.append(f"calibration windows have {plan.seq_len} tokens, the model's limit, instead of {plan.config.seq_len}")
    if plan.anatomy.traced:
        notes.append("no table of this architecture: the linears that read one input were found by tracing a forward pass")
    if is_diffusers(plan.source.config):
        notes.append(
            f"{plan.source.path.name} is one component: DiffusionPipeline.from_pretrained(PIPELINE, NAME=duotone.load(OUT))"
        )
    if plan.config.calibrate_all_experts:
        notes.append("every expert was shown all calibration tokens; what went on was the model's own routing")
    if plan.converted:
        notes.append(f"{len(plan.converted)} tensors that are not quantized are stored as BF16, first {plan.converted[0]}")
    return notes + [advice.sentence for advice in advice_before(plan, windows)] + loading_notes(plan)


def sidecar_of(report: QuantizeReport, plan: Plan, scales: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of duotone.json. scales: of each layer, those that the weights' own file cannot hold."""
    layers = {layer: dict(entry) for layer, entry in scales.items()}
    for layer in report.layers:
        layers[layer.layer] |= {k: v for k, v in dataclasses.asdict(layer).items() if k not in {"layer", "method"}}
    layers = {plan.written_layer(layer): entry for layer, entry in layers.items()}
    settings = {k: v for k, v in dataclasses.asdict(plan.config).items() if k not in _NOT_OF_THE_BYTES}
    return {
        "format_version": FORMAT_VERSION,
        "producer": f"duotone {VERSION}",
        "settings": settings | {"order": plan.config.solver.order},
        "calibration": report.calibration,
        **({"inputs": report.inputs} if report.inputs else {}),
        "bits_per_weight": report.bits_per_weight,
        "quantized_macs_share": report.quantized_macs_share,
        "layers": layers,
        "kept": {plan.written_layer(layer): reason for layer, reason in plan.kept.items()},
        "notes": report.notes,
    }
