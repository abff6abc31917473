# Shapes: N out_features, K in_features.
"""Where one GPU's time goes when it quantizes, on paper: arithmetic, memory and launches of each phase, at data-sheet speed.

Operations are those of tools/scale.py but for the solver's loops, which multiply no matrices and are counted by their
instructions; bytes are those that no cache holds; launches are those of the code as it is. Nothing here is measured.
"""

from dataclasses import dataclass

from scale import Shape, dense

from duotone.calibrate.data import BATCH_POSITIONS
from duotone.floors import correcting, moments
from duotone.solver.local_search import steps_of
from duotone.solver.methods import REFITS
from duotone.solver.search import SCALE_TRIALS


@dataclass(frozen=True)
class Gpu:
    """Data sheet: operations a second in BF16 and in float32 (a product and a sum each), bytes a second, bytes of L2 cache."""

    name: str
    narrow: float
    wide: float
    memory: float
    cache: float
    multiprocessors: int


H200 = Gpu("H200", 989e12, 67e12, 4.8e12, 50e6, 132)
#: Seconds of a launch where the GPU waits for it; bytes a second to a disk, and through the hash of what is written.
LAUNCH_SECONDS, DISK, HASH = 5e-6, 5e9, 1e9
#: Instructions of a value in the column loop: of a column ahead of it (select and add it, product, sum, mask), and its own.
COLUMN_INSTRUCTIONS, OWN_INSTRUCTIONS = 5, 110
#: Instructions of a column in a step of the local search, and of a value under a trial of a scale.
VISIT_INSTRUCTIONS, TRIAL_INSTRUCTIONS = 16, 25
#: The local search's programs on a multiprocessor (by their registers), of rows up to WIDE columns and of wider ones; bytes a
#: column of each one's state, and of those that a step moves.
PROGRAMS, WIDE, STATE_BYTES, MOVED_BYTES = (3, 1), 8192, 12, 16
#: Launches: of a block's forward pass, of the moments of a batch, of a column block, and all others of a linear; counted on a
#: pretended GPU (tests/test_gpu_pipeline.py holds their sum against what is counted).
FORWARD_LAUNCHES, MOMENT_LAUNCHES, BLOCK_LAUNCHES, LINEAR_LAUNCHES = 40, 12, 10, 800


@dataclass
class Phase:
    """Seconds that a phase's arithmetic, its memory traffic and its launches take, each alone."""

    arithmetic: float = 0.0
    memory: float = 0.0
    launches: float = 0.0

    @property
    def seconds(self) -> float:
        """One after the other, as if none hid another."""
        return self.arithmetic + self.memory + self.launches


def phases(shape: Shape, gpu: Gpu, tokens: int = 128 * 2048, window: int = 2048) -> dict[str, Phase]:
    """Of a run of `dpq` with those calibration tokens. Reading is not here: blocks are read beside the work."""
    found = {name: Phase() for name in ("forward", "moments", "factors, products", "column loops", "local search", "scales")}
    instructions = gpu.wide / 2  # a lane does one at a time, and none of these are fused
    batches = -(-tokens // BATCH_POSITIONS)
    attention = 2 * 2 * tokens * window * shape.hidden
    forward = found["forward"]
    forward.arithmetic += shape.layers * attention / gpu.narrow
    forward.launches += 2 * shape.layers * batches * FORWARD_LAUNCHES * LAUNCH_SECONDS
    for group in shape.groups:
        n, k, times = sum(group.rows), group.columns, shape.layers * group.count
        here, linears = tokens * group.share, len(group.rows)
        forward.arithmetic += times * 4 * here * n * k / gpu.narrow
        forward.memory += times * 2 * 2 * 3 * here * (n + k) / gpu.memory  # what linears read and write, three times over
        sums = found["moments"]
        sums.arithmetic += times * moments(group.rows[0], k, here, group.writes) / gpu.narrow
        entries = k * (k + (group.rows[0] if group.writes else k))
        sums.memory += times * batches * 24 * entries / gpu.memory  # a product written and read, its sum in float64 too
        sums.launches += times * batches * MOMENT_LAUNCHES * LAUNCH_SECONDS
        products = found["factors, products"]
        solved = (4 + REFITS) * n * k**2 + sum(correcting(group.rows, k, group.writes)) + k**3 / 3
        products.arithmetic += times * solved / gpu.wide
        products.launches += times * linears * LINEAR_LAUNCHES * LAUNCH_SECONDS
        loops = found["column loops"]
        each = 128 * COLUMN_INSTRUCTIONS + OWN_INSTRUCTIONS
        loops.arithmetic += times * (1 + REFITS) * n * k * each / instructions
        loops.launches += times * (1 + REFITS) * linears * -(-k // 128) * BLOCK_LAUNCHES * LAUNCH_SECONDS
        search, visits = found["local search"], n * k * steps_of(k)
        search.arithmetic += times * visits * VISIT_INSTRUCTIONS / instructions
        is_held = gpu.multiprocessors * PROGRAMS[k > WIDE] * STATE_BYTES * k <= gpu.cache
        search.memory += times * visits * (4 + (0 if is_held else MOVED_BYTES)) / gpu.memory  # a row of H a step
        trials = (1 + REFITS) * 2 * SCALE_TRIALS
        found["scales"].arithmetic += times * n * k * trials * TRIAL_INSTRUCTIONS / instructions
        found["scales"].memory += times * n * k * trials / SCALE_TRIALS * 4 / gpu.memory
    return found | {"write": Phase(memory=shape.quantized_bytes / DISK + shape.quantized_bytes / HASH)}


def gpu_lines() -> list[tuple[str, ...]]:
    """By phase, seconds of Llama-3-8B's shapes on one H200, and their sum."""
    found = phases(dense("8B", 4096, 14336, 32, 1024, 128256), H200)
    parts = ("arithmetic", "memory", "launches")
    found["all"] = Phase(*(sum(getattr(phase, part) for phase in found.values()) for part in parts))
    return [
        (name, f"{phase.arithmetic:.1f}", f"{phase.memory:.1f}", f"{phase.launches:.1f}", f"{phase.seconds:.1f}")
        for name, phase in found.items()
    ]
