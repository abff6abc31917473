# Shapes: N out_features, K in_features, T tokens of a window.
"""What each phase of a run has to compute at least, and how long this machine would take for that alone.

Products are counted where the method as it is needs them, once each; moving data, rounding and everything elementwise count
for nothing. The ceilings are measured: matrix products of a good size, best of several, and a file written to the disk.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from duotone.device import resolve_dtype
from duotone.outcome import QuantizeReport
from duotone.plan import BlockPlan, Plan
from duotone.solver.local_search import steps_of
from duotone.solver.methods import REFITS
from duotone.solver.search import SCALE_TRIALS


@dataclass
class Work:
    """Floating-point operations in the calibration's dtype (narrow) and in float32 (wide), and bytes to write."""

    narrow: float = 0.0
    wide: float = 0.0
    nbytes: float = 0.0

    def __iadd__(self, other: "Work") -> "Work":
        self.narrow, self.wide, self.nbytes = self.narrow + other.narrow, self.wide + other.wide, self.nbytes + other.nbytes
        return self


@dataclass(frozen=True)
class Ceiling:
    """Of this machine: operations a second in the calibration's dtype and in float32, bytes a second to its disk."""

    narrow: float
    wide: float
    disk: float

    def seconds(self, work: Work) -> float:
        """The least time that work takes."""
        return work.narrow / self.narrow + work.wide / self.wide + work.nbytes / self.disk


def floor_seconds(report: QuantizeReport) -> dict[str, float]:
    """By phase, the least that a finished run could have taken on this machine."""
    if report.calibration is None:
        return {}
    ceiling = measured_ceiling(resolve_dtype(report.calibration["dtype"]), Path(report.out))
    return {phase: ceiling.seconds(Work(**work)) for phase, work in report.work.items()}


def phase_work(plan: Plan, tokens: int, seq_len: int) -> dict[str, Work]:
    """By phase, what quantizing takes in all. Not counted: the search of `--effort high`, methods without statistics."""
    config = plan.config
    work = {phase: Work() for phase in ("forward", "hessian", "factorize", "solve", "write")}
    work["write"].nbytes = plan.disk_bytes
    if not config.needs_statistics:
        return work
    prefixes = 2 if config.method_facts.drift else 1
    attention = 2 * tokens * seq_len * int(plan.source.config.get("hidden_size", 0)) * len(plan.blocks)
    work["forward"].narrow = prefixes * (2 * tokens * plan.weights + attention)
    for block in plan.blocks:
        for group in block.shared_inputs:
            shapes = [plan.shapes[layer] for layer in group]
            width = shapes[0][1]
            work["hessian"] += _moments(plan, block, group, tokens)
            work["factorize"].wide += width**3 / 3
            work["solve"] += _drift(plan, block, group)
            for rows, columns in shapes:
                work["solve"] += _solve(plan, rows, columns)
    return work


def _moments(plan: Plan, block: BlockPlan, group: tuple[str, ...], tokens: int) -> Work:
    rows, width = plan.shapes[group[0]]
    flops = tokens * width**2  # symmetric
    if plan.config.method_facts.drift:
        flops += 4 * tokens * rows * width if group[0] in block.streams else 2 * tokens * width**2
    return Work(narrow=flops)


def _drift(plan: Plan, block: BlockPlan, group: tuple[str, ...]) -> Work:
    """What the corrected target takes."""
    if not plan.config.method_facts.drift:
        return Work()
    rows, width = plan.shapes[group[0]]
    if group[0] in block.streams:
        return Work(wide=width**3 / 3 + 2 * rows * width**2)
    return Work(wide=width**3 / 3 + 2 * width**3 + sum(2 * plan.shapes[layer][0] * width**2 for layer in group))


def _solve(plan: Plan, rows: int, columns: int) -> Work:
    """Column loops, the loss that is reported, and with dpq the gradient, the search for codes and that for scales."""
    square = rows * columns**2
    if plan.config.method != "dpq":
        return Work(wide=5 * square)
    loops = 1 + REFITS
    search = 10 * rows * columns * steps_of(columns)  # each step looks at all columns, ten operations each
    scales = 14 * rows * columns * loops * SCALE_TRIALS
    return Work(wide=(loops + 1 + 4) * square + search + scales)


def measured_ceiling(dtype: torch.dtype, folder: Path, size: int = 2048) -> Ceiling:
    """What this machine reaches: products of `size` cubed, the best of several, and 64 MiB written to `folder` and synced."""

    def flops(dtype: torch.dtype) -> float:
        a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        return 2.0 * size**3 / _best(lambda: torch.mm(a, b), 5)

    data = bytes(64 * 2**20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def write() -> None:
            file.seek(0)
            file.write(data)
            os.fsync(file.fileno())

        disk = len(data) / _best(write, 2)
    wide = flops(torch.float32)
    return Ceiling(wide if dtype == torch.float32 else flops(dtype), wide, disk)


def _best(work: Callable[[], object], times: int) -> float:
    least = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return least
