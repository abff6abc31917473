"""Time on a GPU, and what the device gives at most."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from duotone.speed_gpu.sizes import Plan


class Clock:
    """Seconds of calls, nothing of them in a cache: by events around a CUDA graph; where there is no GPU, by the wall."""

    def __init__(self, device: torch.device, out_of_cache: int) -> None:
        self.device = device
        self._memory = torch.empty(out_of_cache, dtype=torch.uint8, device=device)

    def prepared(self, call: Callable[[], object]) -> Callable[[], object]:
        """A call to be timed: run once, so that all is compiled, and captured."""
        call()
        if self.device.type != "cuda":
            return call
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # The outer context is for a capture that fails: torch leaves its stream the current one then.
        with torch.cuda.stream(torch.cuda.current_stream(self.device)), torch.cuda.graph(graph):
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

    def best(self, call: Callable[[], object], rounds: int = 10) -> float:
        """The shortest of several."""
        ready = self.prepared(call)
        return min(self.seconds(ready) for _ in range(rounds))

    def median(self, call: Callable[[], object], rounds: int) -> tuple[float, float]:
        """The middle one of several, and the shortest."""
        ready = self.prepared(call)
        taken = sorted(self.seconds(ready) for _ in range(rounds))
        return taken[len(taken) // 2], taken[0]


class Ceilings:
    """What the device gives at most: bytes a second, and GFLOP/s of the largest FP8 and BF16 products."""

    def __init__(self, clock: Clock, plan: Plan) -> None:
        self.bandwidth = _bandwidth(clock, plan.read)
        size, one = plan.peak_size, torch.ones(plan.peak_size, 1, device=clock.device)
        wide = [torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2)]
        narrow = [each.to(torch.float8_e4m3fn) for each in wide]
        flops = 2 * size**3 / 1e9
        self.bf16 = flops / clock.best(lambda: wide[0] @ wide[1].T)
        self.fp8 = flops / clock.best(lambda: fp8_product(narrow[0], narrow[1], one, one, fast=True))


def _bandwidth(clock: Clock, nbytes: int) -> float:
    """Bytes a second of whichever way to go through memory is the fastest: two that read it, one that copies it."""
    whole = torch.ones(nbytes // 8, dtype=torch.int64, device=clock.device)
    single, target = whole.view(torch.float32), torch.empty_like(whole)
    return max(
        whole.nbytes / clock.best(whole.amax),
        whole.nbytes / clock.best(single.sum),
        2 * whole.nbytes / clock.best(lambda: target.copy_(whole)),
    )


def fp8_product(x8: Tensor, w8: Tensor, x_scale: Tensor, w_scale: Tensor, fast: bool = False) -> Tensor:
    """BF16 [M, N] of FP8 [M, K] and [N, K] with scales [M, 1] and [N, 1]. fast: sums as the units keep them."""
    product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] - row-wise scales have no other name yet
    return product(x8, w8.T, x_scale, w_scale.T.contiguous(), out_dtype=torch.bfloat16, use_fast_accum=fast)


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
