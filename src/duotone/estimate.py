# Shapes: N out_features, K in_features.
"""What a run will take on this machine, from shapes and one short measurement of its matrix products."""

import time
from dataclasses import dataclass

import torch

from duotone.calibrate.stream import WAITING_BYTES
from duotone.plan import Plan
from duotone.solver.couple import BEAM_WIDTH, REVISITS, row_parts


@dataclass(frozen=True)
class Estimate:
    """Seconds, peak memory, and disk with what is kept there while the run lasts.

    saved_bytes: what a save holds besides, of a run that is long enough for one; twice that while the next is written.
    """

    seconds: float
    peak_bytes: int
    disk_bytes: int
    saved_bytes: int


#: Interpreter, torch and transformers before any weight.
_BASE_BYTES = 500_000_000
#: Share of the measured matrix-product speed that mixed work reaches; and seconds a column of the solver's Python loop.
_EFFICIENCY, _COLUMN_SECONDS = 0.6, 1.5e-4

#: Of the beam search, one thread: a path's step, and what each earlier column adds to it.
_PATH_SECONDS, _PATH_COLUMN_SECONDS = 5e-8, 3.5e-11


def estimate(plan: Plan) -> Estimate:
    """Seconds, peak memory and disk of a plan. An estimate: within about a factor of two."""
    config = plan.config
    tokens = config.samples * plan.seq_len if config.needs_calibration else 0
    weights = sum(n * k for n, k in plan.shapes.values())
    flops, columns, hessian_bytes = 4.0 * tokens * weights, 0, 0
    if config.needs_statistics:
        for block in plan.blocks:
            widths = [plan.shapes[group[0]][1] for group in block.shared_inputs]
            flops += sum((3.0 if config.method_facts.drift else 1.5) * tokens * k**2 + k**3 for k in widths)
            hessian_bytes = max(hessian_bytes, 4 * 5 * max(widths) ** 2)  # a group's, and what its factor takes
        flops += sum(4.0 * n * k**2 for n, k in plan.shapes.values())
        columns = sum(k for _, k in plan.shapes.values())
    if config.high_effort:
        flops += 6.0 * tokens * weights + sum(1.2 * tokens * rows**2 for rows in _parts(plan))
    block_bytes = 4 * max(
        sum(n * k for g in block.shared_inputs for n, k in (plan.shapes[x] for x in g)) for block in plan.blocks
    )
    largest = 4 * max(n * k for n, k in plan.shapes.values())
    outside_bytes = 4 * sum(plan.source.tensors[name].nbytes // 2 for name in plan.outside)
    # Windows wait inside a block: about six states of the hidden width each, and the widest linear's input.
    hidden, widest = plan.hidden_size, max(k for _, k in plan.shapes.values())
    prefixes = 2 if config.method_facts.drift else 1
    allowed = WAITING_BYTES if plan.waiting_bytes is None else plan.waiting_bytes
    waiting_bytes = prefixes * min(4 * tokens * (6 * hidden + widest), allowed)
    state_bytes = 2 * prefixes * 4 * tokens * hidden
    peak = _BASE_BYTES + 3 * block_bytes + 6 * largest + outside_bytes + hessian_bytes + waiting_bytes + state_bytes
    seconds = flops / (_EFFICIENCY * _measured_flops()) + columns * _COLUMN_SECONDS + weights * 2e-8
    disk = plan.disk_bytes
    if config.high_effort:
        steps = BEAM_WIDTH * (1 + REVISITS)
        seconds += steps * sum(n * k * (_PATH_SECONDS + k * _PATH_COLUMN_SECONDS) for n, k in plan.shapes.values())
        peak += 4 * tokens * hidden * len(plan.blocks)  # hidden states at every block's entrance, for the way back
        disk += 4 * sum(rows**2 for rows in _parts(plan))
    return Estimate(seconds, peak, disk, prefixes * 4 * tokens * hidden)


def _parts(plan: Plan) -> list[int]:
    """Rows of every part whose curvature is kept."""
    groups = [[plan.shapes[layer][0] for layer in group] for block in plan.blocks for group in block.shared_inputs]
    return [sum(len(rows) for rows in part) for group in groups for part in row_parts(group)]


def _measured_flops(size: int = 768) -> float:
    """FLOP/s of a float32 matrix product here, best of a few."""
    a = torch.ones(size, size)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
