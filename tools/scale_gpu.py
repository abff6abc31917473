# Shapes: N out_features, K in_features.
"""Where one GPU's time goes when it quantizes, on paper: what duotone/gpu_costs.py counts, at data-sheet speed.

Nothing here is measured.
"""

from scale import Shape, dense

from duotone.gpu_costs import Gpu, Group, Job, Phase
from duotone.gpu_costs import phases as counted

#: Data sheet; a lane does one instruction at a time, and none of the solver's are fused.
H200 = Gpu("H200", 989e12, 67e12, 4.8e12, 50e6, 132, 67e12 / 2)


def phases(shape: Shape, gpu: Gpu, tokens: int = 128 * 2048, window: int = 2048) -> dict[str, Phase]:
    """Of a run of `dpq` with those calibration tokens. Reading and writing are not here: both go on beside the work."""
    groups = [Group(group.columns, group.rows, group.writes, group.share, shape.layers * group.count) for group in shape.groups]
    return counted(groups, gpu, Job(tokens, window, shape.layers, shape.hidden))


def gpu_lines() -> list[tuple[str, ...]]:
    """By phase, seconds of Llama-3-8B's shapes on one H200, and their sum."""
    found = phases(dense("8B", 4096, 14336, 32, 1024, 128256), H200)
    parts = ("arithmetic", "memory", "launches")
    found["all"] = Phase(*(sum(getattr(phase, part) for phase in found.values()) for part in parts))
    return [
        (name, f"{phase.arithmetic:.1f}", f"{phase.memory:.1f}", f"{phase.launches:.1f}", f"{phase.seconds:.1f}")
        for name, phase in found.items()
    ]
