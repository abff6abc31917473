# Shapes: M tokens, N out_features, K in_features.
"""Other ways to multiply with one weight: tiles, stages and splits of the product with codes, and FP8 weights written first.

`launch` has its choice from counting instructions. Here all take turns, so that on a device it can be one of measurement: which
tile for how many tokens, and from how many tokens on FP8 weights are worth writing.
"""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from duotone.contract import quantize_activations
from duotone.errors import DuotoneError, gist
from duotone.kernels.gpu import backend
from duotone.kernels.gpu.layout import CHUNK, Layout
from duotone.qweight import fp8_values
from duotone.scheme import HOPPER
from duotone.speed import figures
from duotone.speed_gpu.budget import Deadline, Row
from duotone.speed_gpu.forms import OURS
from duotone.speed_gpu.linears import Bench, Shapes

#: Of a program: rows and warps (4 of which multiply 64 rows at least), stages of its loop; and splits of K, besides our own.
_ROWS_AND_WARPS, _STAGES, _SPLITS = ((128, 4), (128, 8), (64, 4)), (6, 4, 8), (1, 2, 4, 8)
#: The way by FP8 weights.
WRITTEN = "FP8 weights written"


#: One of `launch`; None: FP8 weights are written, and torch multiplies.
Way = Any


def name_of(way: Way) -> str:
    """In words."""
    if way is None:
        return WRITTEN
    rows, tokens, warps, stages = way.tile
    return f"{rows} rows x {tokens} tokens, {warps} warps, {stages} stages, splits of {way.each} chunks"


def ways(count: int, weight: Layout) -> list[Way]:
    """What is tried for so many tokens, what `launch` does with codes first; for more than a tile has, no other tiles."""
    from duotone.kernels.gpu import launch

    chunks, own = weight.codes.shape[1], launch.own_way(count, weight)
    pair = 2 - chunks % 2
    found = [
        launch.Way(launch.Tile(height, own.tile.tokens, warps, stages), each)
        for stages in _STAGES
        for each in {own.each, *(-(-chunks // (splits * pair)) * pair for splits in _SPLITS)}
        for height, warps in _ROWS_AND_WARPS
    ]
    return [own, None, *(way for way in found if way != own and count <= own.tile.tokens)]


def tile_rows(bench: Bench, shapes: Shapes, deadline: Deadline) -> Iterator[Row]:
    """A row for each number of tokens, shape and way. Raises DuotoneError for other products than the contract's."""
    for count in bench.plan.tile_tokens:
        for shape in shapes:
            facts = {"kind": "tile", "kernel": OURS.name, "shape": list(shape), "tokens": count}
            yield from deadline.attempt(facts, lambda shape=shape, count=count: _measured(bench, shape, count))


def _measured(bench: Bench, shape: tuple[int, int], count: int) -> Iterator[Row]:
    from duotone.kernels.gpu import trial

    weight, x = bench.weight(shape), bench.inputs(count, shape[1])
    packed = backend.prepack(weight)
    x8, scale = quantize_activations(x.cpu(), HOPPER)
    operand, outer = fp8_values(weight), weight.outer_scale * scale.to(x.device)
    calls: dict[Way, Callable[[], object]] = {}
    own, *_ = tried = ways(count, _layout(packed))
    with torch.no_grad():
        for way in tried:
            call = _call(packed, x, way)
            try:
                y = call()
                calls[way] = bench.clock.prepared(call)
            except Exception as error:  # a tile that does not fit the device
                yield {"way": name_of(way), "is_own": way == own, "unmeasured": gist(error)}
                continue
            if not trial.is_near(y, x8.to(x.device), operand, outer):
                raise DuotoneError(
                    f"bench gpu: {shape[0]}x{shape[1]}, {name_of(way)}: found other products than the contract's"
                )
        seconds: dict[Way, list[float]] = {way: [] for way in calls}
        for _ in range(bench.plan.rounds):
            for way, call in calls.items():
                seconds[way].append(bench.clock.seconds(call))
    nbytes = OURS.nbytes(shape, bench.plan.group_size)
    for way, taken in seconds.items():
        pairs = zip(seconds.get(own, []), taken, strict=False)
        yield {
            "way": name_of(way),
            "is_own": way == own,
            **figures(taken, nbytes, 2 * count * shape[0] * shape[1], bench.ceilings.bandwidth),
            "times_as_fast_as_own": median([ours / theirs for ours, theirs in pairs] or [float("nan")]),
        }


def _layout(packed: backend.Packed) -> Layout:
    return Layout(packed.codes, packed.index, packed.table, packed.to_a_word, packed.is_signed)


def _call(packed: backend.Packed, x: Tensor, way: Way) -> Callable[[], Tensor]:
    """A product all of whose parts are launched again with each call."""
    from duotone.kernels.gpu import launch

    weight = _layout(packed)
    chunks, facts = -(-x.shape[1] // CHUNK), (None, packed.fp8_max, packed.smallest_scale)

    def call() -> Tensor:
        if way is None:
            x8, scales = launch.quantize(x, chunks, *facts)
            return launch.multiply_written(x8, scales, weight, packed.outer_scale, packed.group_size)
        arrived = way.counters(len(x), weight)
        x8, scales = launch.quantize(x, chunks, *facts, arrived)
        y = torch.empty(len(x), len(packed.outer_scale), dtype=x.dtype, device=x.device)
        launch.multiply_codes(x8, scales, weight, (packed.outer_scale, None, y), packed.group_size, way, arrived)
        return y

    return call
