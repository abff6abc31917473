"""Launches every Triton program as `launch`, `rows`, `grouped` and `solver` do, on a Hopper GPU whose driver does nothing.

So Triton binds, specializes and compiles what it is really handed: sizes of 1 and multiples of 16, views, options by name. In a
process of its own, as compiled.py: run by test_gpu_compiled.py, prints what was launched as JSON.
"""

import json
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from duotone.kernels.gpu import backend, bank, cache, fp8, fp8_bank, grouped, launch, rows, solver
from duotone.kernels.gpu.layout import BLOCK_ROWS, CHUNK

LAUNCHED: list[dict[str, Any]] = []


class Launcher:
    """Takes a launch down."""

    def __init__(self, _: Any, metadata: Any) -> None:
        self.facts = {"name": metadata.name, "shared": metadata.shared}

    def __call__(self, *given: Any) -> None:
        LAUNCHED.append(self.facts | {"grid": [int(size) for size in given[:3]]})


class Utilities:
    """What a driver knows of a device, and does with a program."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 64, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}


class Hopper:
    """An H200 as far as a launch goes."""

    launcher_cls, utils = Launcher, Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def packed(rows: int, columns: int, static: Tensor | None = None) -> backend.Packed:
    """A weight of these sizes; its numbers are anything."""
    padded, chunks = rows + -rows % BLOCK_ROWS, -(-columns // CHUNK)
    codes = torch.empty(padded // 64, chunks, 64, 16, dtype=torch.int32)
    index = torch.empty(-(-chunks // 4), padded, dtype=torch.int32)
    table = torch.empty(127, 16, dtype=torch.uint8)
    return backend.Packed(codes, index, table, 4, False, torch.empty(rows), static, columns, 128, 448.0, 1e-12)


def linears() -> None:
    """One weight alone: tokens of each tile, rows and columns of one, biases, static scales, a norm, FP16."""
    bf16 = torch.bfloat16
    for rows_, columns, static in ((4096, 4096, None), (1, 1, torch.ones(())), (1000, 1056, None)):
        weight = packed(rows_, columns, static)
        for tokens in (1, 5, 16, 33, 64):
            backend.linear(torch.empty(tokens, columns, dtype=bf16), weight, torch.empty(rows_, dtype=bf16))
    backend.linear(torch.empty(130, 256, dtype=torch.float16), packed(128, 256))
    for columns in (1, 4096, 16384):
        weight = backend.with_norm(packed(128, columns), torch.empty(columns, dtype=bf16), 1e-5)
        backend.linear(torch.empty(3, columns, dtype=bf16), weight)
    launch.write_values(launch.Layout(weight.codes, weight.index, weight.table, 4, False), 128)


def caches() -> None:
    """Of one sequence, head and token, and of several, from where projections leave them."""
    for batch, heads, tokens, size in ((1, 1, 1, 1), (2, 8, 16, 128), (3, 2, 77, 96)):
        new = [torch.empty(batch, tokens, heads, size, dtype=torch.bfloat16).transpose(1, 2)] * 2
        kept = [torch.zeros(batch, heads, tokens + 4, size, dtype=torch.float8_e4m3fn) for _ in new]
        scales = [torch.empty(heads) for _ in new]
        for positions in (None, torch.arange(tokens)):
            cache.write(new, kept, scales, 448.0, positions)
        cache.read([x8[:, :, 1 : tokens + 1] for x8 in kept], scales, torch.bfloat16)


def experts() -> None:
    """Banks of one and of many, of codes and of FP8 weights, for one token and for many, in splits of K or not."""
    for count, parts, tokens, each, columns in ((1, 1, 1, 1, 2048), (8, 2, 100, 2, 256), (256, 2, 7, 8, 256)):
        codes = bank.stack([[packed(200, columns) for _ in range(parts)] for _ in range(count)])
        values = torch.empty(208, columns, dtype=torch.uint8)
        wide = fp8.Packed(values, torch.empty(200), None, columns, 448.0, 1e-12)
        routed = grouped.routes(torch.randint(0, count + 1, (tokens, each)), count)
        for held in (codes, fp8_bank.stack([[wide] * parts] * count)):
            for tokens_or_slots in (tokens, tokens * each):
                grouped.linear(torch.empty(tokens_or_slots, columns, dtype=torch.bfloat16), routed, held)


def solvers() -> None:
    """Sizes of one and of a model; each rule; one candidate and several."""
    facts = -8.0, 448.0
    for rows_, columns in ((1, 1), (4096, 256), (33, 300)):
        groups = -(-columns // 32)
        scale_GN, group_K = torch.empty(groups, rows_), torch.zeros(columns, dtype=torch.int32)
        for zero_GN in (None, torch.empty(groups, rows_)):
            scales = scale_GN, zero_GN, torch.empty(rows_)
            for rule in range(4):
                values = torch.empty(columns, rows_)
                solver.sweep(values, values, torch.empty(columns, columns), *scales, group_K, *facts, rule)
            given = torch.empty(rows_, columns), torch.empty(columns, columns), torch.empty(columns), *scales, group_K
            solver.local_search(*given, torch.zeros(rows_, columns, dtype=torch.uint8), *facts, 60, 12)
            for candidates in (1, 8):
                zero_NG = None if zero_GN is None else zero_GN.T.contiguous()
                given = torch.empty(rows_, columns), torch.empty(rows_, groups, candidates), zero_NG, torch.empty(1), None
                solver.scale_error(*given, *facts, 32)


def main() -> None:
    """Everything, told at the end."""
    driver.set_active(Hopper())
    launch.processors = lambda _: 132  # type: ignore[assignment]
    assert launch.IS_COMPILED and isinstance(rows._programs.read_cache, triton.JITFunction)
    for part in (linears, caches, experts, solvers):
        part()
    json.dump(LAUNCHED, sys.stdout)


if __name__ == "__main__":
    main()
