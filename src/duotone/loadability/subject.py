# Shapes: N out_features, K in_features.
"""What is judged: a checkpoint that exists, or the one that a plan would write, as far as runtimes care."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Linear:
    """A quantized linear [rows, columns] and how tensor parallelism divides it.

    cut: `rows` (each rank has some outputs), `columns` (some inputs) or `none`. units: what its rows consist of and no rank
    gets a part of, such as heads; fewer of them than ranks are repeated. 0: single rows. bank: of an expert's linear, the path
    of the experts.
    """

    name: str
    rows: int
    columns: int
    cut: str = "none"
    units: int = 0
    bank: str = ""

    def on_one_rank(self, ranks: int) -> tuple[float, float]:
        """[N, K] of a rank's share; not whole where it cannot be divided."""
        if self.cut == "columns":
            return self.rows, self.columns / ranks
        if self.cut == "rows":
            return (self.rows / self.units * max(1.0, self.units / ranks) if self.units else self.rows / ranks), self.columns
        return self.rows, self.columns


@dataclass(frozen=True)
class Subject:
    """A checkpoint.

    layout: how it is stored, see `layout_of`. dtype: of config.json. fused: the linears in 4 bits, those that runtimes put into
    one matrix together; fp8: likewise those in FP8. split: linears left in BF16, or in FP8 beside others in 4 bits, each with
    those that runtimes fuse with it. heads: of
    queries and of keys; 0 where there are none. biased: banks of experts with biases. made_for: ranks whose
    shares of columns rebuild the same scales. kv_cache: what shares a scale of its FP8 cache, if it has one
    (`scheme.KV_CACHE_STRATEGIES`). library: whose model it is, transformers' or diffusers'.
    """

    layout: str
    group_size: int
    symmetric: bool
    dtype: str
    fused: tuple[tuple[Linear, ...], ...]
    split: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    heads: tuple[int, int] = (0, 0)
    made_for: int = 1
    kv_cache: str | None = None
    fp8: tuple[tuple[Linear, ...], ...] = ()
    biased: frozenset[str] = frozenset()
    library: str = "transformers"

    @property
    def experts(self) -> bool:
        """Are all linears in 4 bits a mixture's experts?"""
        return all(linear.bank for fused in self.fused for linear in fused)
