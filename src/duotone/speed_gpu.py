# Shapes: M tokens, N out_features, K in_features.
"""How fast the linear runs on a GPU, once it is known to compute the contract there.

All candidates take turns on the stream of one process. A call is captured as a CUDA graph, as a serving runtime has it, and
timed by events, its weights and all else gone from the L2 cache before. The same run measures what memory and products give at
most.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duotone.bench import provenance
from duotone.contract import quantize_activations
from duotone.errors import DuotoneError
from duotone.kernels.gpu import backend
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.scheme import HOPPER, Scheme
from duotone.speed import figures, random_weight, ratios

#: Llama-3-8B as a runtime merges it: q, k and v; o; gate and up; down.
LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
#: Written over between two calls: more than any L2 cache.
_OUT_OF_CACHE = 256 * 2**20
#: Of the products that show the peak.
_PEAK_SIZE = 8192
#: Tokens of a call that are compared with the contract.
_COMPARED = 64
OURS, BF16, FP8 = "duotone triton", "cuBLAS BF16", "torch FP8, row-wise"


@dataclass(frozen=True)
class GpuBench:
    """Which linears to time: shapes (N, K), numbers of tokens, rounds, group size."""

    shapes: tuple[tuple[int, int], ...] = LLAMA_8B
    tokens: tuple[int, ...] = tuple(2**i for i in range(14))
    rounds: int = 20
    group_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or any(count < 1 for count in self.tokens):
            raise DuotoneError("bench gpu: expected at least one round and one token")
        for rows, columns in self.shapes:
            if rows < 1 or rows % 16 or columns < 1 or columns % self.group_size:
                raise DuotoneError(
                    f"--shape {rows}x{columns}: expected NxK, N a multiple of 16 and K of the group of {self.group_size}"
                )


def gpu_rows(bench: GpuBench, device: torch.device | None = None) -> Iterator[dict[str, Any]]:
    """A row for each shape, number of tokens and candidate.

    Raises DuotoneError where the kernels refuse the device, and where a product is not the contract's.
    """
    place = device or torch.device("cuda")
    if reason := backend.refuses(Scheme(HOPPER, bench.group_size), place):
        raise DuotoneError(f"bench gpu: {reason}")
    clock = _Clock(place)
    ceilings = _Ceilings(clock)
    for rows, columns in bench.shapes:
        prepared = _Prepared(bench, rows, columns, place)
        for count in bench.tokens:
            generator = torch.Generator().manual_seed(bench.seed)
            x = torch.randn(count, columns, generator=generator).to(place, torch.bfloat16)
            prepared.compare(x)
            yield from _measure(bench, prepared, x, clock, ceilings)


class _Clock:
    """Seconds of calls, nothing of them in a cache: by events around a CUDA graph; where there is no GPU, by the wall."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(_OUT_OF_CACHE, dtype=torch.uint8, device=device)

    def prepared(self, call: Callable[[], object]) -> Callable[[], object]:
        """A call to be timed: run once, so that all is compiled, and captured."""
        call()
        if self.device.type != "cuda":
            return call
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        self._memory.zero_()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def best(self, call: Callable[[], object]) -> float:
        """The shortest of several."""
        ready = self.prepared(call)
        return min(self.seconds(ready) for _ in range(10))


class _Ceilings:
    """What the device gives at most: bytes a second read, and GFLOP/s of FP8's and BF16's largest products."""

    def __init__(self, clock: _Clock) -> None:
        self.bandwidth = _bandwidth(clock)
        size, one = _PEAK_SIZE, torch.ones(_PEAK_SIZE, 1, device=clock.device)
        wide = [torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2)]
        narrow = [each.to(torch.float8_e4m3fn) for each in wide]
        flops = 2 * size**3 / 1e9
        self.bf16 = flops / clock.best(lambda: wide[0] @ wide[1].T)
        self.fp8 = flops / clock.best(lambda: _fp8_product(narrow[0], narrow[1], one, one))


def _bandwidth(clock: _Clock) -> float:
    memory = torch.ones(_OUT_OF_CACHE, dtype=torch.int64, device=clock.device)
    return memory.nbytes / clock.best(memory.amax)


class _Prepared:
    """A weight of one shape in every candidate's form."""

    def __init__(self, bench: GpuBench, rows: int, columns: int, device: torch.device) -> None:
        made = random_weight(rows, columns, bench.group_size, bench.seed)
        moved = (made.codes.to(device), made.group_scale.to(device), made.outer_scale.to(device))
        self.weight = QuantizedWeight(*moved, made.scheme)
        self.packed = backend.prepack(self.weight)
        self.bf16 = torch.randn(rows, columns, device=device).bfloat16()
        self.fp8 = fp8_values(self.weight).to(torch.float8_e4m3fn)

    def candidates(self, x: Tensor) -> dict[str, Callable[[], object]]:
        """One call of each; FP8 quantizes its activations by the same program as ours does."""
        from duotone.kernels.gpu import launch

        def fp8() -> Tensor:
            x8, scales = launch.quantize(x, self.packed.codes.shape[1], None, HOPPER.fp8.max, HOPPER.smallest_activation_scale)
            x8 = x8[:, : x.shape[1]]
            return _fp8_product(x8, self.fp8, scales[:, None], self.weight.outer_scale[:, None])

        return {
            OURS: lambda: backend.linear(x, self.packed),
            BF16: lambda: torch.nn.functional.linear(x, self.bf16),
            FP8: fp8,
        }

    def nbytes(self, name: str) -> int:
        """What a call has to read of its weight."""
        rows, columns = self.weight.shape
        ours = rows * columns // 2 + self.weight.group_scale.numel() + 4 * rows
        return {OURS: ours, BF16: 2 * rows * columns, FP8: rows * columns + 4 * rows}[name]

    def compare(self, x: Tensor) -> None:
        """Raise DuotoneError where our product is not the contract's."""
        from duotone.kernels.gpu.trial import is_near

        y, (x8, scale) = backend.linear(x, self.packed)[:_COMPARED], quantize_activations(x[:_COMPARED].cpu(), HOPPER)
        if not is_near(y, x8.to(y.device), fp8_values(self.weight), self.weight.outer_scale * scale.to(y.device)):
            rows, columns = self.weight.shape
            raise DuotoneError(f"bench gpu: {rows}x{columns} with {len(x)} tokens: found other products than the contract's")


def _measure(bench: GpuBench, prepared: _Prepared, x: Tensor, clock: _Clock, ceilings: _Ceilings) -> Iterator[dict[str, Any]]:
    with torch.no_grad():
        calls = {name: clock.prepared(call) for name, call in prepared.candidates(x).items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(bench.rounds):
            for name, call in calls.items():
                seconds[name].append(clock.seconds(call))
    rows, columns = prepared.weight.shape
    for name, taken in seconds.items():
        yield provenance(bench.seed) | {
            "device": _device_name(clock.device),
            "kernel": name,
            "backend": backend.describe(prepared.weight.scheme),
            "refusals": [],
            "shape": [rows, columns],
            "tokens": len(x),
            "group_size": bench.group_size,
            **figures(taken, prepared.nbytes(name), 2 * len(x) * rows * columns, ceilings.bandwidth),
            "peak_gflops": ceilings.bf16 if name == BF16 else ceilings.fp8,
            "times_as_fast_as": ratios(name, seconds),
        }


def _fp8_product(x8: Tensor, w8: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """BF16 [M, N] of FP8 [M, K] and [N, K] with scales [M, 1] and [N, 1]."""
    product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] - row-wise scales have no other name yet
    return product(x8, w8.T, x_scale, w_scale.T.contiguous(), out_dtype=torch.bfloat16)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
