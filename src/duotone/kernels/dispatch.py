"""Which backend runs a scheme: the first of an ordered tuple that does not refuse, and every refusal is a sentence."""

from types import ModuleType

import torch

from duotone.kernels import cpu, reference
from duotone.scheme import Scheme

#: Fastest first; the reference runs everything and comes last.
BACKENDS: tuple[ModuleType, ...] = (cpu, reference)


def choose(scheme: Scheme, device: torch.device) -> tuple[ModuleType, list[str]]:
    """The backend for weights of a scheme on a device, and the reasons for which faster ones refused it."""
    refusals: list[str] = []
    for backend in BACKENDS:
        reason = backend.refuses(scheme, device)
        if reason is None:
            return backend, refusals
        refusals.append(f"{backend.NAME}: {reason}")
    raise AssertionError("the reference backend never refuses")
