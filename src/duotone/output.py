"""The folder that is made: what is written to it, saved in it and taken up from it. Only the first process has one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotone.calibrate.stream import BlockStream
from duotone.card import CARD, base_name, license_in, model_card
from duotone.checkpoint.behind import WriteBehind
from duotone.checkpoint.compressed_tensors import quantization_config, side_scales, to_tensors
from duotone.checkpoint.hub import copy_companions
from duotone.checkpoint.journal import Journal
from duotone.checkpoint.sidecar import FORMAT_VERSION, RUN_RECORD, SIDECAR
from duotone.checkpoint.source import load_finite
from duotone.checkpoint.staging import output_folder
from duotone.checkpoint.writer import CheckpointWriter, write_json, write_text
from duotone.device import processor_name
from duotone.models.diffusion import library_of
from duotone.outcome import sidecar_of
from duotone.plan import BlockPlan
from duotone.qweight import AnyWeight
from duotone.run import Run
from duotone.solving import round_unseen
from duotone.unfinished import facts_of, recall


class Output:
    """The new checkpoint while it is made; for a process that is not the first, what that one tells of it.

    done: how many blocks an earlier run had behind it; None where this one begins.
    """

    def __init__(
        self,
        run: Run,
        folder: Path | None,
        settings: dict[str, dict[str, Any]],
        save_every: float,
        behind: WriteBehind,
    ) -> None:
        self.folder, self._run, self._behind = folder, run, behind
        self._journal = self._writer = None
        done = -1
        if folder is not None:
            self._journal = Journal(folder, settings, save_every)
            record = self._journal.record
            done = recall(record, run.report, run.sidecar_layers, run.phases) if record else -1
            self._writer = CheckpointWriter(folder, run.plan.outputs, written=record.written if record else None)
            if not record:
                copy_companions(run.plan.source.path, folder)
                self._copy_through(self._writer, run.plan.outside)
        done = run.ranks.from_first(done)
        self.done = None if done < 0 else done

    def take_up(self, stream: BlockStream) -> None:
        """Put the stream where the earlier run had it when it was saved."""
        held = self._journal.held() if self._journal is not None else {}
        stream.take_up(self._run.ranks.deal(held, stream.held()))

    def save_if_due(self, done: int, stream: BlockStream | None) -> None:
        """Between two blocks: make what was done last, once in a while."""
        run, journal = self._run, self._journal
        if not run.ranks.from_first(int(journal is not None and journal.is_due())):
            return
        with run.phases("write"):
            held = run.ranks.collect(stream.held()) if stream is not None else {}
            if journal is not None and self._writer is not None:
                self._behind.settle()
                self._writer.settle()
                journal.save(done, self._writer.written, facts_of(run.report, run.sidecar_layers, run.phases), held)

    def write_block(self, block: BlockPlan, weights: Mapping[str, AnyWeight], changed: Mapping[str, Tensor]) -> None:
        """Pack a block's weights, copy its other tensors, and have all of them put on disk."""
        if self._writer is None:
            return
        with self._run.phases("write"):
            for layer, weight in weights.items():
                self._write_weight(self._writer, layer, weight)
            packed = {f"{layer}.weight" for layer in weights}
            for name, tensor in changed.items():
                if name not in packed:
                    self._write_other(self._writer, name, tensor.to("cpu", torch.bfloat16))
            replaced = packed | changed.keys()
            self._copy_through(self._writer, tuple(name for name in block.tensors if name not in replaced))

    def finish(self) -> None:
        """Write what says how to read the weights and where they come from, and record that all is there."""
        run = self._run
        if self._writer is None or self._journal is None or self.folder is None:
            return
        with run.phases("write"):
            self._behind.settle()
            run.report.weight_bytes = self._writer.finish()
            config = {key: value for key, value in run.plan.source.config.items() if key != "torch_dtype"}
            settings = run.plan.config
            quantization = quantization_config(settings.scheme, run.plan.ignored, settings.kv_strategy, run.plan.in_fp8)
            config |= {"dtype": "bfloat16", "quantization_config": quantization}
            write_json(self.folder / "config.json", config)
            sidecar = sidecar_of(run.report, run.plan, run.sidecar_layers)
            write_json(self.folder / SIDECAR, sidecar)
            license_of_base, library = license_in(run.plan.source.path), library_of(run.plan.source.config)
            card = model_card(run.report.model, sidecar, run.plan.generates, license_of_base, library)
            write_text(self.folder / CARD, card)
        write_json(self.folder / RUN_RECORD, self._run_record(self._journal.settings))  # with the time of the writing above
        with run.phases("write"):
            facts = facts_of(run.report, run.sidecar_layers, run.phases)
            self._journal.save(len(run.plan.blocks), self._writer.written, facts)
            if run.curvatures is not None:
                run.curvatures.remove()

    def _run_record(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What duotone.json may not hold, since another run of the same command would have it otherwise; no path either."""
        report, config = self._run.report, self._run.plan.config
        return {
            "format_version": FORMAT_VERSION,
            "model": base_name(report.model)[0],
            "asked": {name: getattr(config, name) for name in ("device", "dtype", "runtime", "gpu")},
            "original_bytes": report.original_bytes,
            "weight_bytes": report.weight_bytes,
            "seconds": self._run.phases.seconds,
            "phase_bytes": self._run.phases.peaks,
            "peak_bytes": self._run.phases.peak_bytes(),
            "resumed_at": report.resumed_at,
            "machine": {"processor": processor_name()} | settings["the machine's"],
            "versions": settings["the version of"],
        }

    def _copy_through(self, writer: CheckpointWriter, names: Sequence[str]) -> None:
        """Copy tensors that are not quantized, floats as BF16, one at a time."""
        for name in names:
            self._write_other(writer, name, load_finite(self._run.plan.source, (name,))[name])

    def _write_other(self, writer: CheckpointWriter, name: str, tensor: Tensor) -> None:
        """A tensor that calibration has not quantized: the weight of an unseen linear in FP8, all others as they are."""
        plan, layer = self._run.plan, name.removesuffix(".weight")
        if layer in plan.unseen and layer != name:
            self._write_weight(writer, layer, round_unseen(self._run, layer, tensor))
            return
        written = plan.source.written_as(name)
        tensor = plan.source.as_stored(name, tensor)
        tensor = tensor.to(torch.bfloat16) if plan.outputs[written].dtype == "BF16" else tensor
        self._behind.write({written: tensor}, writer.write)

    def _write_weight(self, writer: CheckpointWriter, layer: str, weight: AnyWeight) -> None:
        source = self._run.plan.source
        parts = {source.written_as(name): part for name, part in to_tensors(layer, weight).items()}
        self._behind.write(parts, writer.write)
        self._run.sidecar_layers[layer] = dict(side_scales(weight))


@contextmanager
def made_output(run: Run, out: Path, resume: bool, settings: dict[str, dict[str, Any]], save_every: float) -> Iterator[Output]:
    """A folder that becomes `out` when the work ends well. resume: take up what an earlier run has saved there."""
    folder_made = output_folder(out, resume) if run.ranks.first else nullcontext()
    with folder_made as folder, WriteBehind(run.device) as behind:
        with run.phases("write"):
            output = Output(run, folder, settings, save_every, behind)
        yield output
