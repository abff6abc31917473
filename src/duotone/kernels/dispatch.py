"""Which backend runs a weight: the first of an ordered tuple that does not refuse, and every refusal is a sentence."""

from types import ModuleType

from duotone.kernels import reference
from duotone.qweight import QuantizedWeight

#: Fastest first; the reference runs everything and comes last.
BACKENDS: tuple[ModuleType, ...] = (reference,)


def choose(weight: QuantizedWeight) -> tuple[ModuleType, list[str]]:
    """The backend for a weight, and the reasons for which faster ones refused it."""
    refusals: list[str] = []
    for backend in BACKENDS:
        reason = backend.refuses(weight)
        if reason is None:
            return backend, refusals
        refusals.append(f"{backend.NAME}: {reason}")
    raise AssertionError("the reference backend never refuses")
