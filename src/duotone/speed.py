# Shapes: M tokens, N out_features, K in_features.
# pyright: reportUnknownMemberType=false
"""How fast a linear runs, beside torch's own and beside what this machine can do at all.

All candidates take turns in one process, on weights that are in no cache when they are asked for. A turn is a few calls, one
after the other, as a model's layers follow each other: what is in the caches before the first is not the candidate's doing. A
ratio is the median of the ratios of each round: what a neighbour takes from the machine, it takes from all of a round.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duotone.bench import provenance
from duotone.errors import DuotoneError
from duotone.kernels.dispatch import choose
from duotone.qweight import QuantizedWeight
from duotone.scheme import HOPPER, Scheme

#: Llama-3-8B: q and o; gate and up; down.
LLAMA_8B = ((4096, 4096), (14336, 4096), (4096, 14336))
#: More than the last level of cache of any machine this is meant for.
_OUT_OF_CACHE = 256 * 2**20
#: Of a turn.
_CALLS = 4
#: name -> one call with the i-th of several weights
Candidates = dict[str, Callable[[int], object]]


@dataclass(frozen=True)
class SpeedBench:
    """Which linears to time: shapes (N, K), numbers of tokens, rounds, group size."""

    shapes: tuple[tuple[int, int], ...] = LLAMA_8B
    tokens: tuple[int, ...] = (1, 4, 16, 64, 256)
    rounds: int = 15
    group_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or any(count < 1 for count in self.tokens):
            raise DuotoneError("bench linear: expected at least one round and one token")
        for rows, columns in self.shapes:
            if rows < 1 or rows % 16 or columns < 1 or columns % self.group_size:
                raise DuotoneError(
                    f"--shape {rows}x{columns}: expected NxK, N a multiple of 16 and K of the group of {self.group_size}"
                )


def linear_rows(bench: SpeedBench) -> Iterator[dict[str, Any]]:
    """A row for each shape, number of tokens and candidate."""
    ceiling = _peak_gflops()
    for rows, columns in bench.shapes:
        prepared = _Prepared(bench, rows, columns)
        for count in bench.tokens:
            x = torch.randn(count, columns, generator=_generator(bench.seed)).bfloat16()
            yield from _measure(bench, prepared, x, ceiling)


class _Prepared:
    """Weights of one shape in every candidate's form, so many of each that none stays in a cache."""

    def __init__(self, bench: SpeedBench, rows: int, columns: int) -> None:
        self.shape, self.group_size = (rows, columns), bench.group_size
        weight = random_weight(rows, columns, bench.group_size, bench.seed)
        self.backend, self.refusals = choose(weight.scheme, torch.device("cpu"))
        self.runs = self.backend.describe(weight.scheme)
        count = lambda size: max(2 * _CALLS, -(-_OUT_OF_CACHE // size))  # noqa: E731
        self.packed = [self.backend.prepack(weight) for _ in range(count(rows * columns // 2))]
        self.bf16 = [torch.randn(rows, columns).bfloat16() for _ in range(count(rows * columns * 2))]
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.int4 = [packed.clone() for _ in self.packed]
        self.int4_scale = torch.rand(columns // bench.group_size, rows, 2).bfloat16()

    def candidates(self, x: Tensor) -> Candidates:
        """One call of each."""
        return {
            f"duotone {self.backend.NAME}": lambda i: self.backend.linear(x, self.packed[i % len(self.packed)]),
            "torch BF16": lambda i: torch.nn.functional.linear(x, self.bf16[i % len(self.bf16)]),
            "torch int4pack (W4A16)": lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, self.int4[i % len(self.int4)], self.group_size, self.int4_scale
            ),
        }

    def nbytes(self, name: str) -> int:
        """What a call has to read of its weight."""
        rows, columns = self.shape
        groups = rows * columns // self.group_size
        return {"torch BF16": 2 * rows * columns, "torch int4pack (W4A16)": rows * columns // 2 + 4 * groups}.get(
            name, rows * columns // 2 + groups + 4 * rows
        )


def random_weight(rows: int, columns: int, group_size: int, seed: int) -> QuantizedWeight:
    """A weight of random codes and scales, in the canonical form."""
    generator, scheme = _generator(seed), Scheme(HOPPER, group_size)
    group = scheme.target.fp8.round(torch.rand(rows, scheme.groups(columns), generator=generator) * 40 + 8)
    group[:, 0] = scheme.peak_group_scale
    largest = (torch.rand(rows, generator=generator) * 0.01 + 0.01).bfloat16().float()
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, group, largest / scheme.peak_group_scale, scheme)


def _measure(bench: SpeedBench, prepared: _Prepared, x: Tensor, ceiling: float) -> Iterator[dict[str, Any]]:
    candidates = prepared.candidates(x)
    memory = torch.ones(_OUT_OF_CACHE // 8, dtype=torch.int64)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    reading: list[float] = []
    with torch.no_grad():
        for name, call in candidates.items():
            call(0)
            seconds[name].clear()
        for turn in range(bench.rounds):
            reading.append(_seconds(memory.sum))
            for name, call in candidates.items():
                seconds[name].append(_seconds(lambda call=call, turn=turn: _each(call, turn * _CALLS)) / _CALLS)
    bandwidth = memory.nbytes / statistics.median(reading)
    rows, columns = prepared.shape
    for name, taken in seconds.items():
        yield provenance(bench.seed) | {
            "kernel": name,
            "backend": prepared.runs,
            "refusals": prepared.refusals,
            "shape": [rows, columns],
            "tokens": len(x),
            "group_size": bench.group_size,
            **figures(taken, prepared.nbytes(name), 2 * len(x) * rows * columns, bandwidth),
            "peak_gflops": ceiling,
            "times_as_fast_as": ratios(name, seconds),
        }


def figures(taken: list[float], nbytes: int, flops: int, bandwidth: float) -> dict[str, float]:
    """Columns of a record: of a call that took these seconds, reads so many bytes and makes so many operations.

    bandwidth: bytes a second that memory gives.
    """
    median = statistics.median(taken)
    return {
        "ms": 1e3 * median,
        "ms_min": 1e3 * min(taken),
        "gbytes_per_second": nbytes / median / 1e9,
        "read_gbytes_per_second": bandwidth / 1e9,
        "roofline_share": nbytes / median / bandwidth,
        "gflops": flops / median / 1e9,
    }


def ratios(name: str, seconds: dict[str, list[float]]) -> dict[str, float]:
    """How many times as fast a candidate is as each other: the median of the ratios of each round."""
    mine = seconds[name]
    return {
        other: statistics.median(theirs / own for theirs, own in zip(taken, mine, strict=True))
        for other, taken in seconds.items()
        if other != name
    }


def _each(call: Callable[[int], object], first: int) -> None:
    for i in range(first, first + _CALLS):
        call(i)


def measured_bandwidth() -> float:
    """Bytes a second that torch reads here from memory that is in no cache."""
    memory = torch.ones(_OUT_OF_CACHE // 8, dtype=torch.int64)
    return memory.nbytes / min(_seconds(memory.sum) for _ in range(3))


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _peak_gflops() -> float:
    """What torch's largest products reach here, in float32 or BF16, whichever is faster."""
    dtype = max((torch.float32, torch.bfloat16), key=lambda dtype: _gflops(192, dtype))
    return _gflops(1536, dtype)


def _gflops(size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return max(2 * size**3 / _seconds(lambda: a @ b) / 1e9 for _ in range(4))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
