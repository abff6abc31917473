# Shapes: N out_features, K in_features.
"""What quantizing takes on paper: operations, bytes and network of `dpq` for models and numbers of accelerators.

Operations are those of duotone/floors.py, for shapes instead of a checkpoint; tests hold the sums against a plan's.
What a run takes beyond them, phase by phase, is taken from the newest timed run in bench/records/quantize_time.jsonl.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from duotone.checkpoint.ahead import AHEAD_SHARE
from duotone.device import WIDE
from duotone.floors import correcting, moments, solving


@dataclass(frozen=True)
class Group:
    """Linears that read one input. rows: N of each. writes: to the residual stream. share: of all tokens that come here.

    count: how many such groups a layer has (experts).
    """

    columns: int
    rows: tuple[int, ...]
    writes: bool = False
    share: float = 1.0
    count: int = 1

    @property
    def weights(self) -> int:
        """Values of its linears, all `count` groups of them."""
        return self.count * self.columns * sum(self.rows)


@dataclass(frozen=True)
class Shape:
    """A model: the groups of a layer, how many layers, the width of its residual stream, its vocabulary (untied)."""

    name: str
    groups: tuple[Group, ...]
    layers: int
    hidden: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Values of all linears that are quantized."""
        return self.layers * sum(group.weights for group in self.groups)

    @property
    def nbytes(self) -> float:
        """Of the BF16 checkpoint."""
        return 2.0 * (self.weights + 2 * self.vocabulary * self.hidden)

    @property
    def quantized_bytes(self) -> float:
        """Of what is written: four bits and a BF16 scale for 128 of them."""
        return self.weights * (0.5 + 2 / 128) + 4.0 * self.vocabulary * self.hidden


def dense(name: str, hidden: int, wide: int, layers: int, keys: int, vocabulary: int) -> Shape:
    """A Llama: q, k, v; o; gate, up; down."""
    groups = (
        Group(hidden, (hidden, keys, keys)), Group(hidden, (hidden,), writes=True),
        Group(hidden, (wide, wide)), Group(wide, (hidden,), writes=True),
    )  # fmt: skip
    return Shape(name, groups, layers, hidden, vocabulary)


def mixture(name: str, hidden: int, wide: int, layers: int, keys: int, vocabulary: int, experts: int, taken: int) -> Shape:
    """The same with experts in the place of the MLP, of which every token takes some."""
    share = taken / experts
    groups = (
        Group(hidden, (hidden, keys, keys)), Group(hidden, (hidden,), writes=True),
        Group(hidden, (wide, wide), share=share, count=experts), Group(wide, (hidden,), True, share, experts),
    )  # fmt: skip
    return Shape(name, groups, layers, hidden, vocabulary)


MODELS = (
    dense("8B", 4096, 14336, 32, 1024, 128256),
    dense("70B", 8192, 28672, 80, 1024, 128256),
    mixture("400B, 128 experts, 2 a token", 5120, 8192, 24, 1024, 202048, 128, 2),
)


@dataclass(frozen=True)
class Machine:
    """One accelerator among several, from data sheets: operations a second (BF16 and float32), bytes a second, bytes."""

    name: str
    narrow: float
    wide: float
    network: float
    disk: float
    memory: float


#: Dense BF16 and plain float32 of one H100 SXM; NVLink one way; a good NVMe disk.
H100 = Machine("H100", 989e12, 67e12, 450e9, 5e9, 80e9)


@dataclass(frozen=True)
class Cost:
    """Of a whole run on several ranks. Seconds by phase; bytes over the network of each rank; memory of each."""

    seconds: dict[str, float]
    network_bytes: float
    memory_bytes: float


def cost(shape: Shape, ranks: int, machine: Machine, tokens: int = 128 * 2048) -> Cost:
    """What `dpq` takes at least: windows and rows are shared by the ranks, factorizations are not, rank 0 reads and writes."""
    work = dict.fromkeys(("forward", "hessian", "factorize", "solve", "products"), 0.0)
    network = 0.0
    for group in shape.groups:
        here = tokens * group.share
        work["forward"] += 2 * 2 * here * group.weights
        work["hessian"] += group.count * moments(group.rows[0], group.columns, here, group.writes)
        work["factorize"] += group.count * group.columns**3 / 3
        parts = [solving(rows, group.columns) for rows in group.rows]
        for products, others in (*parts, correcting(group.rows, group.columns, group.writes)):
            work["products" if group.columns >= WIDE else "solve"] += group.count * products
            work["solve"] += group.count * others
        if ranks > 1:
            drift = group.rows[0] if group.writes else group.columns
            network += group.count * 2 * 8 * group.columns * (group.columns + drift)  # a ring sends everything twice
            network += group.weights * 1.07  # codes and scales, to everybody
    seconds = {
        "forward": shape.layers * work["forward"] / ranks / machine.narrow,
        "hessian": shape.layers * work["hessian"] / ranks / machine.narrow,
        "factorize": shape.layers * work["factorize"] / machine.wide,
        "solve": shape.layers * (work["solve"] / machine.wide + work["products"] / machine.narrow) / ranks,
        "network": shape.layers * network / machine.network,
        "read, write": (shape.nbytes + shape.quantized_bytes) / machine.disk,
    }
    block = sum(group.weights for group in shape.groups)
    hessians = max(
        8.0 * group.columns * (group.columns + (group.rows[0] if group.writes else group.columns)) for group in shape.groups
    )
    states = 2 * 2 * 2.0 * tokens / ranks * shape.hidden  # two prefixes, before and behind the block, in BF16
    held = 4 if 2.0 * block <= AHEAD_SHARE * machine.memory else 2
    return Cost(seconds, shape.layers * network, held * 2.0 * block + hessians + states)


def scale_lines(excess: dict[str, float], ranks: Sequence[int] = (1, 8, 64)) -> list[tuple[str, ...]]:
    """For each model and number of ranks: minutes at least, and as far above that as a timed run was; network; memory."""
    lines = []
    for shape in MODELS:
        for count in ranks:
            found = cost(shape, count, H100)
            least = sum(found.seconds.values())
            likely = sum(seconds * excess.get(phase, 1.0) for phase, seconds in found.seconds.items())
            longest = max(found.seconds, key=lambda phase: found.seconds[phase])
            share = f"{longest} ({100 * found.seconds[longest] / least:.0f} %)"
            sizes = (f"{found.network_bytes / 1e9:.0f} GB", f"{found.memory_bytes / 1e9:.0f} GB")
            lines.append((shape.name, str(count), f"{least / 60:.1f}", f"{likely / 60:.1f}", share, *sizes))
    return lines
