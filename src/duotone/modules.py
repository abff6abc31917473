# Shapes: N out_features, K in_features.
"""Any `torch.nn.Module` given in Python: no folder, no config, no table. The module is one block of the story in pipeline.py.

What it reads is what its calibration batches are; which linears and convolutions read one input is seen by running it once.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from duotone.calibrate.stream import BlockStream
from duotone.checkpoint.compressed_tensors import quantization_config, side_scales, to_tensors
from duotone.checkpoint.headers import TORCH_NAMES, TensorSpec
from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.sidecar import SIDECAR
from duotone.checkpoint.source import MemorySource, architecture_of, open_source
from duotone.checkpoint.staging import check_output, output_folder
from duotone.checkpoint.writer import CheckpointWriter, write_json
from duotone.device import resolve_device
from duotone.errors import DuotoneError
from duotone.models.anatomy import anatomy_of_module
from duotone.models.experts import put
from duotone.models.norms import fold_norms
from duotone.models.rewrite import all_linears
from duotone.models.skeleton import expected_tensors, find_linears
from duotone.outcome import QuantizeReport, sidecar_of
from duotone.phases import Phases
from duotone.pipeline import quantize_block
from duotone.plan import Plan, plan_of
from duotone.qweight import AnyWeight
from duotone.ranks import ALONE
from duotone.run import Run
from duotone.runtime.linear import QuantizedLinear
from duotone.settings import QuantizeConfig
from duotone.solving import round_unseen, use_solver

#: What config.json says a saved module is; only `load_module` reads it.
MODEL_TYPE = "duotone-module"


@dataclass(frozen=True)
class QuantizedModule:
    """What has come of a module: the module itself with W4A8 linears, and the report of its quantization."""

    module: nn.Module
    report: QuantizeReport
    weights: dict[str, AnyWeight] = field(repr=False)
    _plan: Plan = field(repr=False)

    def save(self, out: str | Path) -> None:
        """Write a folder that `load_module` reads. Raises DuotoneError when it cannot be; then nothing is left."""
        out = Path(out)
        check_output(out)
        tensors: dict[str, Tensor] = {}
        for layer, weight in self.weights.items():
            tensors |= to_tensors(layer, weight)
        tensors |= {name: self.module.state_dict()[name] for name in expected_tensors(self.module)}
        specs = {name: TensorSpec(TORCH_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        sides = {layer: dict(side_scales(weight)) for layer, weight in self.weights.items()}
        with output_folder(out) as folder:
            writer = CheckpointWriter(folder, specs)
            writer.write(tensors)
            writer.finish()
            scheme = quantization_config(self._plan.config.scheme, self._plan.ignored, fp8=self._plan.in_fp8)
            write_json(folder / "config.json", {"model_type": MODEL_TYPE, "quantization_config": scheme})
            write_json(folder / SIDECAR, sidecar_of(self.report, self._plan, sides))


def quantize_module(module: nn.Module, calibration_batches: Iterable[Any], **options: Any) -> QuantizedModule:
    """Quantize a module's linears and convolutions; the module itself stays as it is.

    calibration_batches: what it is called with, each a tensor, a tuple of positional arguments or a dict of named ones.
    options: fields of `QuantizeConfig` (method, target, group_size, ignore, damping_frac...). Batch norms behind a linear or a
    convolution are folded into it first. The last projection, whose output is the module's, stays as it is, and so does
    whatever the report's `kept` lists. Raises DuotoneError for batches that are none, for a forward that fails, and as
    `quantize` does.
    """
    calls = [_call(batch) for batch in calibration_batches]
    if not calls:
        raise DuotoneError(f"{type(module).__name__}: found no calibration batch, expected at least one")
    config = QuantizeConfig(**options)
    if config.high_effort:
        raise DuotoneError("--effort high: found a module, expected a language model, whose loss is known")
    device = resolve_device(config.device)
    with torch.no_grad():
        found = _prepared(module, calls[0])
        anatomy = anatomy_of_module(found, *calls[0])
        found = found.to(device)
        source = MemorySource(Path(type(module).__name__), {name: t.detach() for name, t in found.state_dict().items()})
        plan = plan_of(source, found, anatomy, config)
        report = QuantizeReport(type(module).__name__, "", config, _facts(calls), kept=plan.kept)
        report.original_bytes, report.bits_per_weight = source.weight_bytes, plan.bits_per_weight
        report.quantized_macs_share = plan.quantized_macs_share
        run = Run(plan, device, torch.float32, Phases(), report, ALONE)
        use_solver(run)
        stream = _stream(calls, run, config) if config.needs_calibration else None
        weights, changed = quantize_block(run, 0, plan.blocks[0], copy.deepcopy(found), stream)
        weights |= {layer: round_unseen(run, layer, found.get_parameter(f"{layer}.weight")) for layer in plan.unseen}
    report.seconds = dict(run.phases.seconds)
    for name, value in changed.items():
        if name.removesuffix(".weight") not in weights:
            found.get_parameter(name).data = value.to(found.get_parameter(name))
    return QuantizedModule(_with(found, weights, device), report, weights, plan)


def load_module(module: nn.Module, folder: str | Path, calibration_batch: Any, device: str = "auto") -> nn.Module:
    """A module like the one that was quantized, with the weights that `QuantizedModule.save` wrote.

    calibration_batch: one batch as for `quantize_module`, which shows where batch norms are folded. Raises DuotoneError for a
    folder that holds something else, and for tensors that the module does not have.
    """
    source, place = open_source(Path(folder)), resolve_device(device)
    if architecture_of(source.config) != MODEL_TYPE:
        raise DuotoneError(
            f"{folder}: holds a {architecture_of(source.config)!r} model, expected a saved module; use duotone.load"
        )
    found, reader = _prepared(module, _call(calibration_batch)), WeightReader(source)
    linears = find_linears(found)
    weights = {layer: reader.read(layer) for layer in packed_layers(source)}
    for layer, weight in weights.items():
        if layer not in linears or weight.shape != tuple(linears[layer].weight.shape):
            shape = list(linears[layer].weight.shape) if layer in linears else None
            raise DuotoneError(f"{folder}: holds {layer!r} of shape {list(weight.shape)}, found {shape} in the module")
    found = _with(found, weights, place)
    wanted = expected_tensors(found)
    for name, tensor in source.load(wanted).items():
        if tuple(tensor.shape) != wanted[name]:
            raise DuotoneError(f"{folder}: {name} has shape {list(tensor.shape)}, expected {list(wanted[name])}")
        path, _, leaf = name.rpartition(".")
        getattr(found.get_submodule(path), leaf).data.copy_(tensor)
    return found


def _call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module is called with, by position and by name. Raises DuotoneError for a batch of another kind."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, list | tuple) and batch:
        return tuple(batch), {}
    raise DuotoneError(f"found a calibration batch of type {type(batch).__name__}, expected a tensor, a tuple or a dict")


def _prepared(module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> nn.Module:
    """A copy that answers as in use, its batch norms folded, all its matrix products linears."""
    found = copy.deepcopy(module).eval().requires_grad_(False)
    try:
        fold_norms(found, *call)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DuotoneError(f"{type(module).__name__}: cannot be run on a calibration batch ({reason})") from None
    all_linears(found)
    return found


def _stream(calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], run: Run, config: QuantizeConfig) -> BlockStream:
    """All batches before the module, as before a block."""
    hidden: list[Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for positional, named in calls:
        rest = dict(named)
        first = positional[0] if positional else rest.pop(next(iter(rest)))
        hidden.append(first)
        arguments.append(tree_map_only(Tensor, lambda tensor: tensor.to(run.device), (positional[1:], rest)))
    stream = BlockStream(hidden, [arguments], run.phases, run.device)
    if config.method_facts.drift:
        stream.carry_original()
    return stream


def _facts(calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> dict[str, Any]:
    return {"text": ["batches given in Python"], "windows": len(calls)}


def _with(module: nn.Module, weights: Mapping[str, AnyWeight], device: torch.device) -> nn.Module:
    """Put the quantized linears in their places."""
    for layer, weight in weights.items():
        bias: Any = module.get_submodule(layer).bias
        put(module, layer, QuantizedLinear(weight, None if bias is None else bias.data, device))
    return module
