# Shapes: M tokens, N out_features, K in_features, R rows padded to whole blocks, C chunks of 128 columns.
"""The linear on a GPU as one torch op, `duotone::gpu_linear`: which of the Triton programs run, and how they are laid out.

Up to DECODE_TOKENS tokens the 4-bit codes are multiplied as they are, since reading weights is what takes the time. Above, FP8
weights are written out once a call and torch's own FP8 product does the rest: its values are the same, decoding does not show.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports] - an optional dependency
from torch import Tensor

from duotone.kernels.gpu import kernels
from duotone.kernels.gpu.layout import Layout
from duotone.kernels.gpu.rows import norm_and_quantize, quantize, raw

#: More tokens than this are a prompt's.
DECODE_TOKENS = 64
#: Splits of K but the last are no shorter. In times of a chunk, a quarter of a microsecond: what one takes where a
#: multiprocessor has one program only, so that no other fills its waits; what it takes to wait for the last of the splits; and
#: for each program's sums of 16 tokens, which are written and read again in a cache twice as fast as memory.
_LEAST_CHUNKS, _ALONE, _ADDING, _SUMS = 4, 1.5, 4.0, 1.0
#: Tokens of a tile whose sums leave no registers for two chunks at a time.
_UNPAIRED = 64
_BLACKWELL = 10
_programs: Any = kernels
#: Kernels are compiled; otherwise Triton interprets them, slowly and on a CPU, and there is no PTX.
IS_COMPILED = isinstance(kernels.multiply, triton.JITFunction)


class Tile(NamedTuple):
    """How `multiply` is laid out: rows and tokens of a program, its warps, and stages of its loop.

    Half of the stages read the index, half what it leads to: 6 keep two pairs of chunks on their way.
    """

    rows: int
    tokens: int
    warps: int
    stages: int = 6


def tile_for(tokens: int) -> Tile:
    """By counting the loop's instructions a weight, not by measuring: nothing here has run on a GPU yet."""
    if tokens <= 32:
        return Tile(128, 16 if tokens <= 16 else 32, 4)
    return Tile(128, 64, 8)


def chunks_each(rows: int, chunks: int, tile: Tile, processors: int) -> int:
    """Chunks of a split, pairs where all are: such that all multiprocessors end about together, whatever the number of tokens.

    By counting chunks that the busiest of them goes through, which it does slower while it has one program only, and what the
    sums of splits cost.
    """
    blocks, pair = rows // tile.rows, 2 - chunks % 2
    best, least = chunks, float("inf")
    for wanted in range(1, max(1, chunks // _LEAST_CHUNKS) + 1):
        each = -(-chunks // (wanted * pair)) * pair
        splits = -(-chunks // each)
        taken = each * max(_ALONE, -(-blocks * splits // processors))
        if splits > 1:
            taken += _ADDING + _SUMS * splits * blocks / processors
        if taken < least:
            best, least = each, taken
    return best


class Way(NamedTuple):
    """How codes are multiplied: a tile, and chunks of a split of K."""

    tile: Tile
    each: int

    def grid(self, tokens: int, weight: Layout) -> tuple[int, int, int]:
        """Programs by rows, splits and tokens."""
        rows, chunks = weight.entries.shape[1], weight.codes.shape[1]
        return rows // self.tile.rows, -(-chunks // self.each), -(-tokens // self.tile.tokens)

    def counters(self, tokens: int, weight: Layout) -> Tensor | None:
        """`counters` of its grid."""
        high, splits, wide = self.grid(tokens, weight)
        return counters(splits, high * wide, weight.codes.device)


def own_way(tokens: int, weight: Layout) -> Way:
    """For so many tokens; prompts are not split, they are programs enough."""
    tile, rows, chunks = tile_for(tokens), weight.entries.shape[1], weight.codes.shape[1]
    return Way(tile, chunks if tokens > DECODE_TOKENS else chunks_each(rows, chunks, tile, processors(weight.codes.device)))


def counters(splits: int, tiles: int, device: torch.device) -> Tensor | None:
    """What tells the splits of each tile which of them is the last, int32, not yet zero; None: there are none."""
    return torch.empty(tiles, dtype=torch.int32, device=device) if splits > 1 else None


@cache
def _generation(device: torch.device) -> int:
    """The first number of the compute capability."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; as if it had four where Triton interprets."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def steps(chunks: int, tokens: int, device: torch.device) -> dict[str, bool]:
    """How a program goes through K: by two chunks where registers allow it, sums outside of units that keep fewer bits.

    Blackwell's, those for data centers, add in float32.
    """
    return {"PAIRS": chunks % 2 == 0 and tokens < _UNPAIRED, "PROMOTES": IS_COMPILED and _generation(device) != _BLACKWELL}


def activations(
    x: Tensor, chunks: int, input_scale: Tensor | None, fp8_max: float, smallest: float, norm: Sequence[Any],
    arrived: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`quantize`, after a norm where its weight and its epsilon are given."""
    if not norm:
        return quantize(x, chunks, input_scale, fp8_max, smallest, arrived)
    weight, epsilon = norm
    return norm_and_quantize(x, weight, epsilon, chunks, input_scale, fp8_max, smallest, arrived)


def write_values(weight: Layout, group_size: int) -> Tensor:
    """The FP8 weights [R, 128 C]: `qweight.fp8_values`, bit for bit."""
    codes, index, table, to_a_word, is_signed = weight
    pieces, chunks, _, _ = codes.shape
    values = torch.empty(pieces * 64, chunks * 128, dtype=torch.float8_e4m3fn, device=codes.device)
    _programs.write_values[(pieces, chunks)](
        codes, codes.view(torch.int16), index, entries(table), values, index.shape[1], chunks,
        GROUP=group_size, TO_A_WORD=to_a_word, SIGNED=is_signed, USES_PTX=IS_COMPILED, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return values


def _linear(
    x: Tensor,
    codes: Tensor,
    index: Tensor,
    table: Tensor,
    outer_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    *facts: Any,
) -> Tensor:
    """x [..., K] in BF16, FP16 or float32 -> [..., N] in its dtype; bias in the same; facts: the rest of the schema."""
    to_a_word, is_signed, group_size, fp8_max, smallest, *norm = facts  # torch hands on no default
    flat, rows = x.reshape(-1, x.shape[-1]).contiguous(), len(outer_scale)
    y = torch.empty(len(flat), rows, dtype=x.dtype, device=x.device)
    weight = Layout(codes, index, table, to_a_word, is_signed)
    if not y.numel():
        return y.view(*x.shape[:-1], rows)
    is_written = len(flat) > DECODE_TOKENS and x.dtype == torch.bfloat16
    way = None if is_written else own_way(len(flat), weight)
    facts = codes.shape[1], input_scale, fp8_max, smallest, norm
    with torch.cuda.device_of(x):  # Triton launches on the current device
        arrived = None if way is None else way.counters(len(flat), weight)
        x8, scales = activations(flat, *facts, arrived=arrived)
        if way is None:
            y = multiply_written(x8, scales, weight, outer_scale, group_size)
            y = y if bias is None else y + bias
        else:
            multiply_codes(x8, scales, weight, (outer_scale, bias, y), group_size, way, arrived)
    return y.view(*x.shape[:-1], rows)


def multiply_written(x8: Tensor, scales: Tensor, weight: Layout, outer_scale: Tensor, group_size: int) -> Tensor:
    """BF16 [M, N] of a prompt, by way of FP8 weights."""
    return _scaled_product(x8, scales, write_values(weight, group_size), outer_scale, torch.bfloat16)


def _scaled_product(x8: Tensor, scales: Tensor, w8: Tensor, outer_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, N] by torch's own product with FP8 weights [N', 128 C], N' a multiple of 16.

    The product scales rows by itself where BF16 comes of it; for other types, which not every version of it gives with row-wise
    scales, it gives float32 sums.
    """
    product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] - row-wise scales have no other name yet
    rows, more = len(outer_scale), len(w8) - len(outer_scale)
    if dtype == torch.bfloat16:
        outer = torch.nn.functional.pad(outer_scale, (0, more)) if more else outer_scale
        return product(x8, w8.T, scales[:, None], outer[None], out_dtype=dtype)[:, :rows].contiguous()
    one = torch.ones((), device=x8.device)
    total = product(x8, w8.T, one, one, out_dtype=torch.float32)[:, :rows]
    return (total * outer_scale * scales[:, None]).to(dtype)


def _linear_fp8(
    x: Tensor, values: Tensor, outer_scale: Tensor, input_scale: Tensor | None, fp8_max: float, smallest: float, *norm: Any
) -> Tensor:
    """x [..., K] in BF16, FP16 or float32 -> [..., N] in its dtype; values: FP8 bytes [N', 128 C]; norm as in `activations`."""
    flat, rows = x.reshape(-1, x.shape[-1]).contiguous(), len(outer_scale)
    if not len(flat):
        return x.new_empty(*x.shape[:-1], rows)
    with torch.cuda.device_of(x):
        x8, scales = activations(flat, values.shape[1] // 128, input_scale, fp8_max, smallest, norm)
        y = _scaled_product(x8, scales, values.view(torch.float8_e4m3fn), outer_scale, x.dtype)
    return y.view(*x.shape[:-1], rows)


def multiply_codes(
    x8: Tensor, scales: Tensor, weight: Layout, ends: tuple[Tensor, Tensor | None, Tensor], group_size: int, way: Way,
    arrived: Tensor | None,
) -> None:  # fmt: skip
    """ends: outer_scale, bias, and y [M, N], which is written. arrived: `counters`, zero."""
    codes, index, table, to_a_word, is_signed = weight
    outer_scale, bias, y = ends
    (tokens, rows), chunks, padded_rows = y.shape, codes.shape[1], index.shape[1]
    tile, grid, bits = way.tile, way.grid(tokens, weight), raw(y)
    added = bits if bias is None else raw(bias)
    partial = scales if arrived is None else torch.empty(grid[1], tokens, rows, dtype=torch.float32, device=y.device)
    _programs.multiply[grid](
        x8, codes, codes.view(torch.int16), index, entries(table), scales, outer_scale, added, bits, partial,
        scales if arrived is None else arrived, tokens, rows, padded_rows, chunks, way.each,
        GROUP=group_size, TO_A_WORD=to_a_word, SIGNED=is_signed, USES_PTX=IS_COMPILED, BLOCK_N=tile.rows, BLOCK_M=tile.tokens,
        **steps(chunks, tile.tokens, y.device), IS_SPLIT=arrived is not None, HAS_BIAS=bias is not None,
        IS_BF16=y.dtype == torch.bfloat16, IS_FP16=y.dtype == torch.float16,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip


def entries(table: Tensor) -> Tensor:
    """The table as the way to decode reads it: PTX looks up in words of 4 bytes."""
    return table.view(torch.int32) if IS_COMPILED else table


torch.library.define(
    "duotone::gpu_linear",
    "(Tensor x, Tensor codes, Tensor index, Tensor table, Tensor outer_scale, Tensor? input_scale, Tensor? bias, "
    "int to_a_word, bool is_signed, int group_size, float fp8_max, float smallest_scale, Tensor? norm=None, "
    "float? epsilon=None) -> Tensor",
)
torch.library.impl("duotone::gpu_linear", "default", _linear)


@torch.library.register_fake("duotone::gpu_linear")
def _(
    x: Tensor, codes: Tensor, index: Tensor, table: Tensor, outer_scale: Tensor, input_scale: Tensor | None,
    *_: object,
) -> Tensor:  # fmt: skip
    del codes, index, table, input_scale
    return x.new_empty(*x.shape[:-1], outer_scale.shape[0])


torch.library.define(
    "duotone::gpu_linear_fp8",
    "(Tensor x, Tensor values, Tensor outer_scale, Tensor? input_scale, float fp8_max, float smallest_scale, "
    "Tensor? norm=None, float? epsilon=None) -> Tensor",
)
torch.library.impl("duotone::gpu_linear_fp8", "default", _linear_fp8)


@torch.library.register_fake("duotone::gpu_linear_fp8")
def _(x: Tensor, values: Tensor, outer_scale: Tensor, *_: object) -> Tensor:
    del values
    return x.new_empty(*x.shape[:-1], outer_scale.shape[0])


linear = torch.ops.duotone.gpu_linear.default
linear_fp8 = torch.ops.duotone.gpu_linear_fp8.default
