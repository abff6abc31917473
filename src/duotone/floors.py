# Shapes: N out_features, K in_features, T tokens of a window.
"""What each phase of a run has to compute at least, and how long this machine would take for that alone.

Products are counted where the method as it is needs them, once each; moving data, rounding and everything elementwise count
for nothing. The ceilings are measured: matrix products of a good size, best of several, and a file written to the disk.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from duotone.device import multiplies_narrow, resolve_device
from duotone.outcome import QuantizeReport
from duotone.plan import Plan
from duotone.solver.local_search import steps_of
from duotone.solver.methods import REFITS
from duotone.solver.search import SCALE_TRIALS

_CPU = torch.device("cpu")


@dataclass
class Work:
    """Floating-point operations in BF16 (narrow) and in float32 (wide), and bytes to write."""

    narrow: float = 0.0
    wide: float = 0.0
    nbytes: float = 0.0

    def add(self, operations: float, narrow: bool) -> None:
        """Count operations in the one arithmetic or the other."""
        self.narrow += operations if narrow else 0.0
        self.wide += 0.0 if narrow else operations


@dataclass(frozen=True)
class Ceiling:
    """Of this machine: operations a second in BF16 and in float32, bytes a second to its disk."""

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
    ceiling = measured_ceiling(Path(report.out), resolve_device(report.config.device))
    return {phase: ceiling.seconds(Work(**work)) for phase, work in report.work.items()}


def phase_work(plan: Plan, tokens: int, seq_len: int, dtype: torch.dtype, device: torch.device) -> dict[str, Work]:
    """By phase, what quantizing takes, calibrated in `dtype`. Not counted: `--effort high`, methods without statistics."""
    config = plan.config
    work = {phase: Work() for phase in ("forward", "hessian", "factorize", "solve", "write")}
    work["write"].nbytes = plan.disk_bytes
    if not config.needs_statistics:
        return work
    prefixes = 2 if config.method_facts.drift else 1
    attention = 2 * tokens * seq_len * plan.hidden_size * len(plan.blocks)
    calibrated = dtype == torch.bfloat16
    work["forward"].add(prefixes * (2 * tokens * plan.weights + attention), calibrated)
    for block in plan.blocks:
        for group in block.shared_inputs:
            shapes = [plan.shapes[layer] for layer in group]
            width = shapes[0][1]
            writes, drift = group[0] in block.streams, config.method_facts.drift
            work["hessian"].add(moments(shapes[0][0], width, tokens, writes, drift), calibrated)
            work["factorize"].wide += width**3 / 3
            parts = [solving(rows, width, config.method == "dpq") for rows, _ in shapes]
            parts += [correcting([rows for rows, _ in shapes], width, writes)] if drift else []
            for products, others in parts:
                work["solve"].add(products, multiplies_narrow(device, width))
                work["solve"].wide += others
    return work


def moments(rows: int, columns: int, tokens: float, writes: bool, drift: bool = True) -> float:
    """Operations of second moments: of the input with itself, which is symmetric, and of the drift of input or stream."""
    return tokens * columns * (columns + (2 * (rows if writes else columns) if drift else 0))


def correcting(rows: Sequence[int], columns: int, writes: bool) -> tuple[float, float]:
    """Of the target that drift asks for, for all linears that read one input: whole products; a factorization and its use."""
    square, every = float(columns**2), sum(rows)
    return 0.0 if writes else 2 * every * square, square * (columns / 3 + 2 * (every if writes else columns))


def solving(rows: int, columns: int, search: bool = True) -> tuple[float, float]:
    """Whole products of a column loop and the loss that is reported, with dpq of its other loops and the gradient; and dpq's
    searches for scales and codes.
    """
    square = float(rows * columns**2)  # two operations each, for a triangle
    if not search:
        return 3 * square, 0.0
    loops = 1 + REFITS
    codes = 10 * rows * columns * steps_of(columns)  # each step looks at all columns, ten operations each
    return (loops + 3) * square, codes + 14 * rows * columns * loops * SCALE_TRIALS


def measured_ceiling(folder: Path, device: torch.device = _CPU, size: int | None = None) -> Ceiling:
    """What this machine reaches: products of `size` cubed on a device, the best of several, and 64 MiB written to `folder` and
    synced. size: 2048 on a CPU and 8192 on a GPU, unless given.
    """
    size = size or (2048 if device.type == "cpu" else 8192)
    data = bytes(64 * 2**20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def write() -> None:
            file.seek(0)
            file.write(data)
            os.fsync(file.fileno())

        disk = len(data) / best_seconds(write, 2)
    narrow, wide = (measured_flops(dtype, device, size) for dtype in (torch.bfloat16, torch.float32))
    return Ceiling(narrow, wide, disk)


def measured_flops(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Operations a second of products of `size` cubed, the best of several."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2.0 * size**3 / best_seconds(lambda: torch.mm(a, b), 5, device)


def best_seconds(work: Callable[[], object], times: int, device: torch.device = _CPU) -> float:
    """Seconds that work takes on a device, the best of several; a GPU is waited for."""
    least = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least
