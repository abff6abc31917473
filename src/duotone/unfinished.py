"""Going on with a run that was killed: what the two must have in common, and what the second takes over from the first."""

import dataclasses
import json
from typing import Any

import torch
import transformers

from duotone.calibrate.samples import Samples
from duotone.checkpoint.hub import companions
from duotone.checkpoint.journal import Record, differences, model_digests
from duotone.checkpoint.writer import content_hash
from duotone.errors import DuotoneError
from duotone.kernels import native
from duotone.outcome import QuantizeReport
from duotone.phases import Phases
from duotone.plan import Plan
from duotone.ranks import Ranks
from duotone.solver.loops import refusal
from duotone.solver.methods import LayerReport
from duotone.version import VERSION


def run_settings(
    plan: Plan, device: torch.device, dtype: torch.dtype, windows: Samples | None, ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """All that the bytes of a checkpoint depend on, by topic and name: a run goes on only where these are what they were.

    Raises DuotoneError where they are not the same in all processes.
    """
    elsewhere = {"calibration", "device", "dtype", "memory_budget"}  # told below, or of no consequence
    arguments = {name: value for name, value in dataclasses.asdict(plan.config).items() if name not in elsewhere}
    text = {}
    if windows is not None:
        for name, tensor in windows.tensors.items():
            text[name] = content_hash(tensor.contiguous().numpy().data)
            text[f"shape of {name}"] = list(tensor.shape)
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "calibration dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "compiled solver": refusal(device) is None if device.type == "cuda" else native.available(),
        "number of processes": ranks.size,
    }
    settings = {
        "the model's": model_digests(plan.source.path, plan.source.tensors, companions(plan.source.path)),
        "the argument": arguments,
        "the calibration text's": text,
        "the machine's": machine,
        "the version of": {"duotone": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    for rank, text in enumerate(ranks.texts(json.dumps(settings))):
        for what, here, there in differences(json.loads(json.dumps(settings)), json.loads(text)):
            raise DuotoneError(
                f"process {ranks.rank}: has {what} {here!r}, found {there!r} in process {rank}, expected the same"
            )
    return settings


def facts_of(report: QuantizeReport, sidecar_layers: dict[str, dict[str, Any]], phases: Phases) -> dict[str, Any]:
    """What the end of a run will tell of the blocks that are done."""
    layers = [dataclasses.asdict(layer) for layer in report.layers]
    return {"layers": layers, "sidecar_layers": sidecar_layers, "seconds": phases.seconds, "notes": report.notes}


def recall(record: Record | None, report: QuantizeReport, sidecar_layers: dict[str, dict[str, Any]], phases: Phases) -> int:
    """Put in what a killed run had found out; returns how many blocks it had done."""
    if record is None:
        return 0
    report.layers.extend(LayerReport(**layer) for layer in record.facts["layers"])
    sidecar_layers.update(record.facts["sidecar_layers"])
    told = record.facts["notes"]  # with all that was known before the first block; what is new is of this start
    report.notes[:] = [*told, *(note for note in report.notes if note not in told)]
    phases.add(record.facts["seconds"].items())
    report.resumed_at = record.done
    return record.done
