"""The run: parts in the order of what they are worth, each in its share of the time, each row as soon as it is measured."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from duotone.bench import provenance
from duotone.errors import DuotoneError
from duotone.kernels.gpu import backend
from duotone.scheme import HOPPER, Scheme
from duotone.speed_gpu.budget import Budget, Deadline, Row
from duotone.speed_gpu.clock import device_name
from duotone.speed_gpu.linears import Bench, Shapes, check_rows, linear_rows, peer_rows
from duotone.speed_gpu.quantizer import quantizer_rows
from duotone.speed_gpu.sizes import Plan
from duotone.speed_gpu.steps import Stage, end_to_end_rows
from duotone.speed_gpu.throughput import throughput_rows
from duotone.speed_gpu.tiles import tile_rows

#: What is measured unless asked otherwise, and where.
FULL, DEVICE = Plan(), torch.device("cuda")
#: Seconds of the 8 minutes, by part: peers last, since nobody knows how long their first calls take.
SHARES = {
    "correctness": 40.0, "linears-8b": 80.0, "linears-70b": 80.0, "end-to-end": 60.0, "throughput": 110.0, "quantizer": 50.0,
    "peers": 60.0,
}  # fmt: skip
#: All blocks of a model, other ways to multiply, linears of shapes that were asked for: only where asked for, and then without
#: limit.
QUANTIZER_FULL, TILES, SHAPES = "quantizer-full", "tiles", "shapes"
WITHOUT_LIMIT = (QUANTIZER_FULL, TILES, SHAPES)
ASKED_FOR = (*SHARES, QUANTIZER_FULL, TILES)
ENDLESS = Deadline(float("inf"), float("inf"), time.monotonic)


@dataclass(frozen=True)
class GpuBench:
    """What to measure: parts, all by default; minutes for all of them; shapes (N, K), for which `shapes` is the only part."""

    minutes: float = 8.0
    only: tuple[str, ...] = ()
    shapes: Shapes = ()
    seed: int = 0
    plan: Plan = field(default_factory=lambda: FULL)

    def __post_init__(self) -> None:
        if not 0 < self.minutes < 1e6:
            raise DuotoneError(f"--minutes: found {self.minutes:g}, expected more than 0")
        for part in self.only:
            if part not in ASKED_FOR:
                raise DuotoneError(f"--only: found {part!r}, expected one of {', '.join(ASKED_FOR)}")
        if self.shapes and self.only:
            raise DuotoneError("--shape: found --only beside it, which is for the parts of the whole; drop one")
        if self.plan.rounds < 1 or any(count < 1 for count in self.plan.tokens):
            raise DuotoneError("bench gpu: expected at least one round and one token")
        for rows, columns in self.shapes:
            if rows < 1 or rows % 16 or columns < 1 or columns % self.plan.group_size:
                raise DuotoneError(
                    f"--shape {rows}x{columns}: expected NxK, N a multiple of 16 and K of the group of {self.plan.group_size}"
                )

    @property
    def parts(self) -> dict[str, float]:
        """Those to run, in their order, with their shares."""
        if self.shapes:
            return {SHAPES: 1.0}
        return {part: SHARES.get(part, 1.0) for part in ASKED_FOR if part in (self.only or SHARES)}


def gpu_rows(bench: GpuBench, tell: Callable[[float, str], None] = lambda *_: None) -> Iterator[Row]:
    """Rows as they are measured; what could not be says so in `unmeasured`. tell: seconds since the beginning, what comes next.

    Raises DuotoneError where the kernels refuse the device, and where a product is not the contract's.
    """
    device, begin = DEVICE, time.monotonic()
    if reason := backend.refuses(Scheme(HOPPER, bench.plan.group_size), device):
        raise DuotoneError(f"bench gpu: {reason}")
    origin = provenance(bench.seed) | {"device": device_name(device)}
    tell(0.0, "ceilings")
    measured = Bench(bench.plan, bench.seed, device)
    run = _Run(bench, measured, Stage(measured))
    budget = Budget(60 * bench.minutes - (time.monotonic() - begin), bench.parts)
    peaks = {"read_gbytes_per_second": measured.ceilings.bandwidth / 1e9, "peak_gflops": measured.ceilings.fp8}
    ceilings = {"part": "ceilings", "kind": "ceilings", **peaks, "peak_gflops_bf16": measured.ceilings.bf16}
    yield origin | {"unmeasured": None} | ceilings | {"memory_bytes": run.stage.memory}
    for part in bench.parts:
        tell(time.monotonic() - begin, part)
        since = time.monotonic()
        deadline = ENDLESS if part in WITHOUT_LIMIT else budget.part(part)
        for row in run.rows(part, deadline):
            yield origin | {"part": part, "unmeasured": None} | row
            tell(time.monotonic() - begin, part)
        given = None if deadline is ENDLESS else deadline.seconds
        spent = {"kind": "time", "seconds": time.monotonic() - since, "seconds_given": given}
        yield origin | {"part": part, "unmeasured": None} | spent
    if list(bench.parts) == list(SHARES):
        whole = {"part": "whole", "kind": "whole", "seconds": time.monotonic() - begin, "seconds_given": 60 * bench.minutes}
        yield origin | {"unmeasured": None} | whole


@dataclass(frozen=True)
class _Run:
    """What the parts need."""

    asked: GpuBench
    bench: Bench
    stage: Stage

    def rows(self, part: str, deadline: Deadline) -> Iterator[Row]:
        """Of one part."""
        plan = self.bench.plan
        small, large = (tuple(sizes.linears().values()) for sizes in (plan.small, plan.large))
        rows: dict[str, Callable[[], Iterator[Row]]] = {
            SHAPES: lambda: linear_rows(self.bench, self.asked.shapes, deadline),
            "correctness": lambda: check_rows(self.bench, small, deadline),
            "linears-8b": lambda: linear_rows(self.bench, small, deadline),
            "linears-70b": lambda: linear_rows(self.bench, large, deadline),
            "end-to-end": lambda: end_to_end_rows(self.stage, deadline),
            "throughput": lambda: throughput_rows(self.stage, deadline),
            "quantizer": lambda: quantizer_rows(self.bench, plan.blocks, deadline),
            "peers": lambda: peer_rows(self.bench, (small, large), deadline),
            QUANTIZER_FULL: lambda: quantizer_rows(self.bench, plan.whole.layers, deadline),
            TILES: lambda: tile_rows(self.bench, small, deadline),
        }
        return rows[part]()
