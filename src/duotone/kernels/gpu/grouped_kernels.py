# Shapes: T tokens, A experts a token goes to, S = T * A slots, E experts, N rows of an expert, C chunks of 128 columns.
# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportReturnType=false, reportRedeclaration=false
"""The Triton programs of the product with many experts' weights, 4-bit codes or FP8. Only `grouped` calls them.

A slot is one of the experts that a token goes to. Slots are sorted by expert, and the slots of one are cut into blocks; which
block is whose only the device knows, so there are as many programs as there could be blocks, and some have nothing to do.
"""

import triton
import triton.language as tl

from duotone.kernels.gpu.kernels import add_product, arrive, finished, sum_of_splits, sums


@triton.jit
def find_blocks(starts, blocks, count, experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each block the expert and the first of its places in the order: int32 [count, 2]; one program for an expert.

    starts int32 [E + 2]: the place where each expert's slots begin, then those of no expert, then all end. The last program
    is for the slots of no expert, and has all blocks that are left.
    """
    own, other = tl.program_id(0), tl.arange(0, EXPERTS)
    begin = tl.load(starts + other, mask=other < own, other=0)
    end = tl.load(starts + other + 1, mask=other < own, other=0)
    first = tl.sum((end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    begin, end = tl.load(starts + own), tl.load(starts + own + 1)
    many = tl.where(own == experts, count - first, (end - begin + BLOCK_M - 1) // BLOCK_M)
    blocks += first * 2
    for number in range(0, many, 128):
        block = number + tl.arange(0, 128)
        tl.store(blocks + block * 2, tl.zeros((128,), tl.int32) + own, mask=block < many)
        tl.store(blocks + block * 2 + 1, begin + block * BLOCK_M, mask=block < many)


@triton.jit
def sums_of_values(
    x8, values, first_row, chunks, first, last, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PROMOTES: tl.constexpr
):
    """`kernels.sums` of FP8 weights, fp8 [rows, 128 C]."""
    values += (first_row + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None] * (chunks * 128) + tl.arange(0, 128)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for chunk in range(first, last):
        total = add_product(total, tl.load(values + chunk * 128), tl.load(x8 + chunk * 128), PROMOTES)
    return total


@triton.jit
def multiply_grouped(
    x8, codes, words, index, table, scales, outer_scale, bias, y, partial, arrived, order, starts, blocks,
    N, rows, chunks, chunks_each, slots, sharers, experts, part_rows, table_rows, IS_FP8: tl.constexpr,
    GROUP: tl.constexpr, TO_A_WORD: tl.constexpr, SIGNED: tl.constexpr, USES_PTX: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, PAIRS: tl.constexpr, PROMOTES: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_BF16: tl.constexpr, IS_FP16: tl.constexpr,
):  # fmt: skip
    """y [S, N]; a program has BLOCK_N rows of an expert, one block of its slots and a split of K. Slots of no expert get zeros.

    x8 fp8 [S / sharers, 128 C] and scales as long: `sharers` slots in a row read the same token. codes, words and index as in
    `kernels.sums`, with the rows of all experts, `rows` of them; so are outer_scale and bias. Each `part_rows` of them begin
    `table_rows` further down the table. IS_FP8: codes are FP8 weights, all else that is about codes has no meaning. Splits are
    added up as in `kernels.multiply`, partial is float32 [splits, S, N].
    """
    expert, first = tl.load(blocks + tl.program_id(1) * 2), tl.load(blocks + tl.program_id(1) * 2 + 1)
    place, end = first + tl.arange(0, BLOCK_M), tl.load(starts + expert + 1)
    slot = tl.load(order + tl.minimum(place, slots - 1))
    token = slot // sharers
    first_row = tl.minimum(expert, experts - 1) * N + tl.program_id(0) * BLOCK_N
    x8 += token.to(tl.int64)[None, :] * (chunks * 128) + tl.arange(0, 128)[:, None]
    begin = tl.program_id(2) * chunks_each
    stop = tl.where(expert < experts, tl.minimum(begin + chunks_each, chunks), 0)
    if IS_FP8:
        total = sums_of_values(x8, codes, first_row, chunks, begin, stop, BLOCK_N, BLOCK_M, PROMOTES)
    else:
        table += first_row // part_rows * table_rows * (4 if USES_PTX else 16)
        total = sums(
            x8, codes, words, index, table, first_row, rows, chunks, begin, stop,
            GROUP, TO_A_WORD, SIGNED, USES_PTX, BLOCK_N, BLOCK_M, PAIRS, PROMOTES,
        )  # fmt: skip
    row, is_of_one = tl.arange(0, BLOCK_N), tl.zeros((BLOCK_N,), tl.int32) + expert < experts
    at, inside = slot.to(tl.int64)[None, :] * N + (tl.program_id(0) * BLOCK_N + row)[:, None], (place < end)[None, :]
    if IS_SPLIT:
        tl.store(partial + tl.program_id(2).to(tl.int64) * slots * N + at, total, mask=inside)
        splits, before = tl.num_programs(2), arrive(arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
        total = sum_of_splits(partial + at, inside, slots * N, tl.where(before == splits - 1, splits, 0))
        inside = inside & (tl.zeros(inside.shape, tl.int32) + before == splits - 1)
    outer = tl.load(outer_scale + first_row + row, mask=is_of_one, other=0)[:, None]
    scale = tl.load(scales + token, mask=tl.zeros((BLOCK_M,), tl.int32) + expert < experts, other=0)[None, :]
    added = tl.load(bias + first_row + row, mask=is_of_one, other=0)[:, None] if HAS_BIAS else 0
    tl.store(y + at, finished(total, outer, scale, added, HAS_BIAS, IS_BF16, IS_FP16), mask=inside)
