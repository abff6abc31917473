"""Duotone: weights stored as INT4, arithmetic in FP8, outputs in BF16.

import duotone
report = duotone.quantize("meta-llama/Llama-3.2-1B", "Llama-3.2-1B-W4AFP8", calibration=("text.txt",))
model = duotone.load("Llama-3.2-1B-W4AFP8")          # a transformers model whose linears are W4A8
duotone.evaluate("Llama-3.2-1B-W4AFP8", ["held_out.txt"], reference="meta-llama/Llama-3.2-1B")
quantized = duotone.quantize_module(any_torch_module, calibration_batches).module
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from duotone.errors import DuotoneError
    from duotone.evaluation import evaluate
    from duotone.modules import load_module, quantize_module
    from duotone.outcome import QuantizeReport
    from duotone.pipeline import Progress
    from duotone.runtime.in_transformers import use_in_transformers
    from duotone.runtime.load import load

__all__ = ["DuotoneError", "evaluate", "load", "load_module", "quantize", "quantize_module", "use_in_transformers"]

_LAZY = {
    "DuotoneError": "duotone.errors",
    "evaluate": "duotone.evaluation",
    "load": "duotone.runtime.load",
    "load_module": "duotone.modules",
    "quantize_module": "duotone.modules",
    "use_in_transformers": "duotone.runtime.in_transformers",
}


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    resume: bool = False,
    save_every: float = 60.0,
    offload: str | Path | None = None,
    **options: Any,
) -> QuantizeReport:
    """Quantize a model folder or hub id into the folder `out`.

    resume: go on with a run on this output that was killed, or begin. save_every: seconds of work between two saves. offload: a
    folder for the hidden states of calibration, which are in memory otherwise. options: the fields of
    `duotone.settings.QuantizeConfig` (method, target, group_size, calibration, samples, ignore...). In a script that torchrun
    has started, every process calls this and they share the work. Raises DuotoneError; then `out` is as it was before, or what
    was saved lies beside it.
    """
    from duotone.pipeline import quantize as run
    from duotone.ranks import joined
    from duotone.settings import QuantizeConfig

    with joined() as ranks:
        return run(
            model, out, QuantizeConfig(**options), progress, resume=resume, save_every=save_every, offload=offload, ranks=ranks
        )


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when they are needed."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'duotone' has no attribute {name!r}")
