"""Which backend runs a scheme: the first of an ordered tuple that does not refuse, and every refusal is a sentence."""

from dataclasses import dataclass
from types import ModuleType

import torch

from duotone.kernels import cpu, reference
from duotone.kernels.gpu import backend as gpu
from duotone.kernels.gpu import fp8
from duotone.scheme import AnyScheme

#: Fastest first; the reference runs everything and comes last.
BACKENDS: tuple[ModuleType, ...] = (cpu, gpu, fp8, reference)


def choose(scheme: AnyScheme, device: torch.device) -> tuple[ModuleType, list[str]]:
    """The backend for weights of a scheme on a device, and the reasons for which faster ones refused it."""
    refusals: list[str] = []
    for backend in BACKENDS:
        reason = backend.refuses(scheme, device)
        if reason is None:
            return backend, refusals
        refusals.append(f"{backend.NAME}: {reason}")
    raise AssertionError("the reference backend never refuses")


@dataclass(frozen=True)
class Verdict:
    """What runs a scheme on a device, for people: the backend's name, what runs in words, and why nothing faster does."""

    backend: str
    runs: str
    refusals: tuple[str, ...]


def explain(scheme: AnyScheme, device: torch.device) -> Verdict:
    """The choice in words: faster backends that refused, then faster paths of the one that runs."""
    backend, refusals = choose(scheme, device)
    return Verdict(backend.NAME, backend.describe(scheme), (*refusals, *backend.path_refusals(scheme)))
