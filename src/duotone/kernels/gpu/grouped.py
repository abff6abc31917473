# Shapes: T tokens, A experts a token goes to, S = T * A slots, E experts, P linears of one input, R padded rows of a linear.
"""The product with many experts' weights on a GPU, two torch ops: `gpu_routes` sorts what goes where, `gpu_grouped` multiplies.

All experts are one launch, whose size depends on shapes alone: nothing waits for the device, so CUDA graphs can hold it. 4-bit
codes are multiplied as they are for any number of tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from duotone.kernels.gpu import grouped_kernels, launch
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


def linear(x: Tensor, routed: Routes, bank: Bank, bias: Tensor | None = None) -> Tensor:
    """x [T, K] or [S, K] in BF16, FP16 or float32 -> [S, P * R], each slot's own expert's; part p of it from column p * R on.

    bias: [E * P * R], in x's dtype. Equal, bit for bit, to what `launch.linear` gives of each expert by itself where that
    neither splits K nor writes FP8 weights.
    """
    facts = bank.to_a_word, bank.is_signed, bank.group_size, bank.fp8_max, bank.smallest_scale
    return torch.ops.duotone.gpu_grouped.default(
        x, *routed[:4], bank.codes, bank.index, bank.table, bank.outer_scale, bank.input_scale, bias,
        routed.size, bank.experts, bank.parts, bank.table_rows, *facts,
    )  # fmt: skip


def most_blocks(slots: int, experts: int, size: int) -> int:
    """Blocks there can be: each expert with slots, and those of none, may leave one part full."""
    return (slots + min(slots, experts + 1) * (size - 1)) // size


def _routes(chosen: Tensor, experts: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = chosen.reshape(-1)
    expert = torch.where((flat < 0) | (flat >= experts), experts, flat).int()
    held, order = torch.sort(expert, stable=True)
    starts = torch.searchsorted(held, torch.arange(experts + 2, dtype=torch.int32, device=held.device), out_int32=True)
    count = most_blocks(len(held), experts, size)
    blocks = torch.empty(count, 2, dtype=torch.int32, device=held.device)
    with torch.cuda.device_of(chosen):
        _programs.find_blocks[(experts + 1,)](
            starts, blocks, count, experts, EXPERTS=1 << experts.bit_length(), BLOCK_M=size, num_warps=4
        )
    return expert, order.int(), starts, blocks


def _grouped(
    x: Tensor, expert: Tensor, order: Tensor, starts: Tensor, blocks: Tensor, codes: Tensor, index: Tensor, *rest: Any
) -> Tensor:
    """rest: what else the schema has."""
    table, outer_scale, input_scale, bias, size, experts, parts, table_rows, *facts = rest
    to_a_word, is_signed, group_size, fp8_max, smallest = facts
    slots, rows = len(expert), index.shape[1] // experts
    y = torch.empty(slots, rows, dtype=x.dtype, device=x.device)
    if not slots:
        return y
    if input_scale is not None:  # each expert quantizes by itself
        x = x.repeat_interleave(slots // len(x), 0)
        input_scale = input_scale[expert.clamp(max=experts - 1)]
    tile, bits = launch.tile_for(size), launch.raw(y)
    with torch.cuda.device_of(x):
        x8, scales = launch.quantize(x.contiguous(), codes.shape[1], input_scale, fp8_max, smallest)
        _programs.multiply_grouped[(rows // tile.rows, len(blocks))](
            x8, codes, codes.view(torch.int16), index, launch.entries(table), scales, outer_scale,
            bits if bias is None else launch.raw(bias), bits, order, starts, blocks,
            rows, index.shape[1], codes.shape[1], slots, slots // len(x), experts, rows // parts, table_rows,
            GROUP=group_size, TO_A_WORD=to_a_word, SIGNED=is_signed, USES_PTX=launch.IS_COMPILED, BLOCK_N=tile.rows,
            BLOCK_M=size, **launch.steps(codes.shape[1], size, x.device), HAS_BIAS=bias is not None,
            IS_BF16=y.dtype == torch.bfloat16, IS_FP16=y.dtype == torch.float16,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y


torch.library.define("duotone::gpu_routes", "(Tensor chosen, int experts, int size) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.impl("duotone::gpu_routes", "default", _routes)
torch.library.define(
    "duotone::gpu_grouped",
    "(Tensor x, Tensor expert, Tensor order, Tensor starts, Tensor blocks, Tensor codes, Tensor index, Tensor table, "
    "Tensor outer_scale, Tensor? input_scale, Tensor? bias, int size, int experts, int parts, int table_rows, int to_a_word, "
    "bool is_signed, int group_size, float fp8_max, float smallest_scale) -> Tensor",
)
torch.library.impl("duotone::gpu_grouped", "default", _grouped)


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
