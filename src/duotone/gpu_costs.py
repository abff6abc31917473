# Shapes: N out_features, K in_features.
"""Where one GPU's time goes when it quantizes, counted: arithmetic, memory traffic and launches of each phase.

Whole products are those of floors.py. The solver's loops multiply no matrices and are counted by their instructions; bytes are
those that no cache holds; launches are those of the code as it is. With a data sheet's speeds this is a bound, on paper
(docs/scale.md); with measured ones it is what `--dry-run` foresees.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from duotone.calibrate.data import BATCH_POSITIONS
from duotone.device import WIDE
from duotone.floors import correcting, moments, solving
from duotone.solver.local_search import steps_of
from duotone.solver.methods import REFITS
from duotone.solver.search import SCALE_TRIALS

#: Bytes a second to and from a disk, and through the hash of what is written.
DISK, HASH = 5e9, 1e9
#: Instructions of a value in the column loop: of a column ahead of it (select and add it, product, sum, mask), and its own.
COLUMN_INSTRUCTIONS, OWN_INSTRUCTIONS = 5, 110
#: Instructions of a column in a step of the local search, and of a value under a trial of a scale.
VISIT_INSTRUCTIONS, TRIAL_INSTRUCTIONS = 16, 25
#: The local search's programs on a multiprocessor (by their registers), of rows up to NARROW columns and of wider ones; bytes a
#: column of each one's state, and of those that a step moves.
PROGRAMS, NARROW, STATE_BYTES, MOVED_BYTES = (3, 1), 8192, 12, 16
#: Launches: of a block's forward pass, of the moments of a batch, of a column block, and all others of a linear, by `dpq` and
#: by methods that do not search; counted on a pretended GPU (tests/test_gpu_pipeline.py holds their sum against that).
FORWARD_LAUNCHES, MOMENT_LAUNCHES, BLOCK_LAUNCHES, LINEAR_LAUNCHES, PLAIN_LAUNCHES = 40, 12, 10, 800, 200
#: Without compiled loops: launches of a column in the column loop and of a step of the local search, of all rows together,
#: counted in the same way, and about how many bytes a step moves of each weight.
COLUMN_LAUNCHES, STEP_LAUNCHES, STEP_BYTES = 32, 70, 300


@dataclass(frozen=True)
class Gpu:
    """Operations a second in BF16 and in float32 (a product and a sum each), bytes a second, bytes of L2 cache, how many
    multiprocessors; instructions a second of all lanes, and seconds of a launch where the GPU waits for it.
    """

    name: str
    narrow: float
    wide: float
    memory: float
    cache: float
    multiprocessors: int
    instructions: float
    launch: float = 5e-6


@dataclass(frozen=True)
class Group:
    """Linears that read one input of K columns. rows: N of each. writes: to the residual stream. share: of all tokens that come
    here. times: how many such groups there are.
    """

    columns: int
    rows: tuple[int, ...]
    writes: bool = False
    share: float = 1.0
    times: int = 1


@dataclass(frozen=True)
class Job:
    """Tokens in all and of a window, how many blocks there are, the width of the hidden states between them.

    narrow: calibrated in BF16. drift, statistics, search: what the method is made of; of `dpq` all. compiled: whether the
    solver's loops are.
    """

    tokens: int
    window: int
    blocks: int
    hidden: int
    narrow: bool = True
    drift: bool = True
    statistics: bool = True
    search: bool = True
    compiled: bool = True


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


def phases(groups: Iterable[Group], gpu: Gpu, job: Job) -> dict[str, Phase]:
    """Seconds of a run by phase, but for reading and writing."""
    found = {name: Phase() for name in ("forward", "moments", "factors, products", "column loops", "local search", "scales")}
    batches, prefixes = -(-job.tokens // BATCH_POSITIONS), 1 + job.drift
    forward, speed, nbytes = found["forward"], *((gpu.narrow, 2) if job.narrow else (gpu.wide, 4))
    forward.arithmetic += job.blocks * 2 * prefixes * job.tokens * job.window * job.hidden / speed
    forward.launches += prefixes * job.blocks * batches * FORWARD_LAUNCHES * gpu.launch
    for group in groups:
        n, k, times, here = sum(group.rows), group.columns, group.times, job.tokens * group.share
        forward.arithmetic += times * 2 * prefixes * here * n * k / speed
        forward.memory += times * prefixes * nbytes * 3 * here * (n + k) / gpu.memory  # read and written, three times over
        if not job.statistics:
            continue
        sums = found["moments"]
        sums.arithmetic += times * moments(group.rows[0], k, here, group.writes, job.drift) / speed
        entries = k * (k + (group.rows[0] if group.writes else k) * job.drift)
        sums.memory += times * batches * 24 * entries / gpu.memory  # a product written and read, its sum in float64 too
        sums.launches += times * batches * MOMENT_LAUNCHES * gpu.launch
        _solve(found, group, gpu, job)
    return found


def _solve(found: dict[str, Phase], group: Group, gpu: Gpu, job: Job) -> None:
    """Add what solving a group takes."""
    n, k, times, linears = sum(group.rows), group.columns, group.times, len(group.rows)
    parts = [solving(rows, k, job.search) for rows in group.rows]
    parts += [correcting(group.rows, k, group.writes)] if job.drift else []
    products = found["factors, products"]
    products.arithmetic += times * sum(whole for whole, _ in parts) / (gpu.narrow if k >= WIDE else gpu.wide)
    products.arithmetic += times * (k**3 / 3 + (parts[-1][1] if job.drift else 0.0)) / gpu.wide
    products.launches += times * linears * (LINEAR_LAUNCHES if job.search else PLAIN_LAUNCHES) * gpu.launch
    turns = 1 + REFITS * job.search
    loops = found["column loops"]
    loops.arithmetic += times * turns * n * k * (128 * COLUMN_INSTRUCTIONS + OWN_INSTRUCTIONS) / gpu.instructions
    each = -(-k // 128) * BLOCK_LAUNCHES if job.compiled else k * COLUMN_LAUNCHES
    loops.launches += times * turns * linears * each * gpu.launch
    if not job.search:
        return
    search, visits = found["local search"], n * k * steps_of(k)
    search.arithmetic += times * visits * VISIT_INSTRUCTIONS / gpu.instructions
    is_held = gpu.multiprocessors * PROGRAMS[k > NARROW] * STATE_BYTES * k <= gpu.cache
    moved = (2 if k >= WIDE else 4) + (0 if is_held else MOVED_BYTES)  # a row of H a step
    search.memory += times * visits * (moved if job.compiled else STEP_BYTES) / gpu.memory
    search.launches += 0.0 if job.compiled else times * linears * steps_of(k) * STEP_LAUNCHES * gpu.launch
    trials = turns * 2 * SCALE_TRIALS
    found["scales"].arithmetic += times * n * k * trials * TRIAL_INSTRUCTIONS / gpu.instructions
    found["scales"].memory += times * n * k * trials / SCALE_TRIALS * 4 / gpu.memory
