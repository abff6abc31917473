"""Which backend runs a weight: the first of an ordered tuple that does not refuse, and every refusal is a sentence."""

from types import ModuleType

import torch

from duotone.kernels import cpu, reference
from duotone.qweight import QuantizedWeight

#: Fastest first; the reference runs everything and comes last.
BACKENDS: tuple[ModuleType, ...] = (cpu, reference)


def choose(weight: QuantizedWeight, device: torch.device) -> tuple[ModuleType, list[str]]:
    """The backend for a weight on a device, and the reasons for which faster ones refused it."""
    refusals: list[str] = []
    for backend in BACKENDS:
        reason = backend.refuses(weight, device)
        if reason is None:
            return backend, refusals
        refusals.append(f"{backend.NAME}: {reason}")
    raise AssertionError("the reference backend never refuses")
