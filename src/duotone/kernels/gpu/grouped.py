# Shapes: T tokens, A experts a token goes to, S = T * A slots, E experts, P linears of one input, R padded rows of a linear.
"""The product with many experts' weights on a GPU, as torch ops: `gpu_routes` sorts what goes where, `gpu_grouped` multiplies
4-bit codes and `gpu_grouped_fp8` FP8 weights.

All experts are one launch, whose size depends on shapes alone: nothing waits for the device, so CUDA graphs can hold it. 4-bit
codes are multiplied as they are for any number of tokens. torch's own `_scaled_grouped_mm` waits for nothing either, but takes
row-wise scales on Hopper only, gives BF16 only, and wants its rows gathered before and put back after it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from duotone.kernels.gpu import fp8_bank, grouped_kernels, launch
from duotone.kernels.gpu.bank import Bank

_programs: Any = grouped_kernels


class Routes(NamedTuple):
    """Which slots are an expert's.

    expert: int32 [S], E for none. order: int32 [S], slots sorted by expert. starts, blocks: as in
    `grouped_kernels.find_blocks`. size: slots of a block.
    """

    expert: Tensor
    order: Tensor
    starts: Tensor
    blocks: Tensor
    size: int


def routes(chosen: Tensor, experts: int) -> Routes:
    """Of the experts [T, A] that tokens go to, slots in that order; a number that is no expert's stands for none."""
    size = launch.tile_for(-(-chosen.numel() // experts)).tokens
    expert, order, starts, blocks = torch.ops.duotone.gpu_routes.default(chosen, experts, size)
    return Routes(expert, order, starts, blocks, size)


def linear(x: Tensor, routed: Routes, bank: Bank | fp8_bank.Bank, bias: Tensor | None = None) -> Tensor:
    """x [T, K] or [S, K] in BF16, FP16 or float32 -> [S, P * R], each slot's own expert's; part p of it from column p * R on.

    bias: [E * P * R], in x's dtype. Of codes equal, bit for bit, to what `launch.linear` gives of each expert by itself where
    that splits K alike (`chunks_each`) and writes no FP8 weights.
    """
    if isinstance(bank, fp8_bank.Bank):
        return torch.ops.duotone.gpu_grouped_fp8.default(
            x, *routed[:4], bank.values, bank.outer_scale, bank.input_scale, bias, routed.size, bank.experts, bank.fp8_max,
            bank.smallest_scale,
        )  # fmt: skip
    facts = bank.to_a_word, bank.is_signed, bank.group_size, bank.fp8_max, bank.smallest_scale
    return torch.ops.duotone.gpu_grouped.default(
        x, *routed[:4], bank.codes, bank.index, bank.table, bank.outer_scale, bank.input_scale, bias,
        routed.size, bank.experts, bank.parts, bank.table_rows, *facts,
    )  # fmt: skip


def most_blocks(slots: int, experts: int, size: int) -> int:
    """Blocks there can be: each expert with slots, and those of none, may leave one part full."""
    return (slots + min(slots, experts + 1) * (size - 1)) // size


def chunks_each(rows: int, chunks: int, slots: int, blocks: int, processors: int, tile: launch.Tile) -> int:
    """Chunks of a split, for `rows` of each of `blocks`: as `launch.chunks_each`, of shapes alone.

    Unlike there, slots count: their blocks are programs too, and the sums of all splits are splits * slots * rows of float32
    to write and to read again. Just what is missing is split, so that these stay fewer than a few MiB, and prompts are not.
    """
    return launch.chunks_each(rows * blocks, chunks, tile, processors) if slots <= launch.DECODE_TOKENS else chunks


def _routes(chosen: Tensor, experts: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = chosen.reshape(-1)
    expert = torch.where((flat < 0) | (flat >= experts), experts, flat).int()
    held, order = torch.sort(expert, stable=True)
    starts = torch.searchsorted(held, torch.arange(experts + 2, dtype=torch.int32, device=held.device), out_int32=True)
    count = most_blocks(len(held), experts, size)
    blocks = torch.empty(count, 2, dtype=torch.int32, device=held.device)
    with torch.cuda.device_of(chosen):
        _programs.find_blocks[(experts + 1,)](
            starts,
            blocks,
            count,
            experts,
            EXPERTS=1 << experts.bit_length(),
            BLOCK_M=size,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return expert, order.int(), starts, blocks


def _grouped(x: Tensor, expert: Tensor, order: Tensor, starts: Tensor, blocks: Tensor, *rest: Any) -> Tensor:
    """rest: what else the schema has."""
    codes, index, table, outer_scale, input_scale, bias, size, experts, parts, table_rows, *facts = rest
    to_a_word, is_signed, group_size, *limits = facts
    decoding = {"IS_FP8": False, "GROUP": group_size, "TO_A_WORD": to_a_word, "SIGNED": is_signed}
    return _multiply(
        x, Routes(expert, order, starts, blocks, size), (codes, codes.view(torch.int16), index, launch.entries(table)),
        (outer_scale, input_scale, bias), (codes.shape[1], experts, index.shape[1] // experts // parts, table_rows), limits,
        decoding,
    )  # fmt: skip


def _grouped_fp8(x: Tensor, expert: Tensor, order: Tensor, starts: Tensor, blocks: Tensor, *rest: Any) -> Tensor:
    """rest: what else the schema has."""
    values, outer_scale, input_scale, bias, size, experts, *limits = rest
    weight = values.view(torch.float8_e4m3fn)
    decoding = {"IS_FP8": True, "GROUP": 0, "TO_A_WORD": 0, "SIGNED": False}
    return _multiply(
        x, Routes(expert, order, starts, blocks, size), (weight,) * 4, (outer_scale, input_scale, bias),
        (values.shape[1] // 128, experts, 0, 0), limits, decoding,
    )  # fmt: skip


def _multiply(
    x: Tensor,
    routed: Routes,
    weight: tuple[Tensor, ...],
    ends: tuple[Tensor, Tensor | None, Tensor | None],
    sizes: tuple[int, int, int, int],
    limits: list[float],
    decoding: dict[str, int],
) -> Tensor:
    """weight: codes, words, index, table as in `multiply_grouped`; ends: outer scales, static scales and bias; sizes: chunks,
    experts, part_rows, table_rows; limits: FP8's largest value and the smallest scale.
    """
    (outer_scale, input_scale, bias), (chunks, experts, *table_facts) = ends, sizes
    slots, rows = len(routed.expert), len(outer_scale) // experts
    y = torch.empty(slots, rows, dtype=x.dtype, device=x.device)
    if not slots:
        return y
    if input_scale is not None:  # each expert quantizes by itself
        x = x.repeat_interleave(slots // len(x), 0)
        input_scale = input_scale[routed.expert.clamp(max=experts - 1)]
    tile, bits, sharers = launch.tile_for(routed.size), launch.raw(y), slots // len(x)
    each = chunks_each(rows, chunks, slots, len(routed.blocks), launch.processors(x.device), tile)
    splits, added = -(-chunks // each), bits if bias is None else launch.raw(bias)
    stages = tile.stages // (2 if decoding["IS_FP8"] else 1)  # no index to read first, and codes of twice the size
    grid = rows // tile.rows, len(routed.blocks), splits
    with torch.cuda.device_of(x):
        arrived = launch.counters(splits, grid[0] * grid[1], y.device)
        partial = bits if arrived is None else torch.empty(splits, slots, rows, dtype=torch.float32, device=y.device)
        x8, scales = launch.quantize(x.contiguous(), chunks, input_scale, *limits, arrived=arrived)
        _programs.multiply_grouped[grid](
            x8, *weight, scales, outer_scale, added, bits, partial, scales if arrived is None else arrived,
            routed.order, routed.starts, routed.blocks,
            rows, len(outer_scale), chunks, each, slots, sharers, experts, *table_facts, **decoding,
            USES_PTX=launch.IS_COMPILED, BLOCK_N=tile.rows, BLOCK_M=routed.size,
            **launch.steps(chunks, routed.size, x.device), IS_SPLIT=arrived is not None, HAS_BIAS=bias is not None,
            IS_BF16=y.dtype == torch.bfloat16, IS_FP16=y.dtype == torch.float16,
            num_warps=tile.warps, num_stages=stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y


torch.library.define("duotone::gpu_routes", "(Tensor chosen, int experts, int size) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.impl("duotone::gpu_routes", "default", _routes)
_SLOTS = "Tensor x, Tensor expert, Tensor order, Tensor starts, Tensor blocks"
_ENDS = "Tensor outer_scale, Tensor? input_scale, Tensor? bias, int size, int experts"
torch.library.define(
    "duotone::gpu_grouped",
    f"({_SLOTS}, Tensor codes, Tensor index, Tensor table, {_ENDS}, int parts, int table_rows, int to_a_word, bool is_signed, "
    "int group_size, float fp8_max, float smallest_scale) -> Tensor",
)
torch.library.impl("duotone::gpu_grouped", "default", _grouped)
torch.library.define(
    "duotone::gpu_grouped_fp8", f"({_SLOTS}, Tensor values, {_ENDS}, float fp8_max, float smallest_scale) -> Tensor"
)
torch.library.impl("duotone::gpu_grouped_fp8", "default", _grouped_fp8)


@torch.library.register_fake("duotone::gpu_routes")
def _(chosen: Tensor, experts: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = chosen.numel()
    whole = chosen.new_empty(slots, dtype=torch.int32)
    blocks = whole.new_empty(most_blocks(slots, experts, size), 2)
    return whole, torch.empty_like(whole), whole.new_empty(experts + 2), blocks


@torch.library.register_fake("duotone::gpu_grouped")
def _(x: Tensor, expert: Tensor, *rest: Any) -> Tensor:
    index, experts = rest[4], rest[10]
    return x.new_empty(expert.shape[0], index.shape[1] // experts)


@torch.library.register_fake("duotone::gpu_grouped_fp8")
def _(x: Tensor, expert: Tensor, *rest: Any) -> Tensor:
    outer_scale, experts = rest[4], rest[8]
    return x.new_empty(expert.shape[0], outer_scale.shape[0] // experts)
