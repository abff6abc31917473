# Shapes: M tokens, N rows, K columns, C chunks of 128 columns, S splits of K, R rows padded to whole blocks.
# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportReturnType=false, reportRedeclaration=false
"""The Triton programs of the W4A8 linear: multiply 4-bit codes, write FP8 weights.

Only `launch` calls them. Whatever rounds is written in integers: what Triton's interpreter makes of a cast to FP8 or BF16 is
not what hardware makes of it, and one text has to serve as proof for both.
"""

import triton
import triton.language as tl

#: float32 bits of infinity: above them, without the sign, are NaNs.
_INFINITY = tl.constexpr(0x7F800000)


def table_text(quarter: int, signed: bool) -> str:
    """PTX: the FP8 bytes ($0) that 4 nibbles of a chunk's words ($1, $2) stand for; the table's 16 bytes are $3, $7, $11, $15.

    A prmt looks 4 bytes up among 8 by 4 nibbles, of which it wants the top bit clear: the low 3 bits of a place. The fourth is
    where a byte has its sign (`layout.pack_words`). With 8 values and their negatives it is that sign; with 16 another prmt
    makes masks of it, by which one of two lookups is taken.
    """
    word, odd = f"${1 + quarter // 2}", quarter % 2
    text = f"and.b32 s, {word}, 0x77777777; " + "shr.b32 s, s, 16; " * odd
    text += f"shl.b32 q, {word}, 4; " if odd else f"mov.b32 q, {word}; "
    if signed:
        text += "prmt.b32 lo, $3, $7, s; and.b32 q, q, 0x80808080; or.b32 $0, lo, q; "
    else:
        text += "prmt.b32 lo, $3, $7, s; prmt.b32 hi, $11, $15, s; prmt.b32 q, q, q, 0xba98; lop3.b32 $0, q, hi, lo, 0xca; "
    return "{ .reg .b32 s, q, lo, hi; " + text + "}"


#: One output, 4 int16 in two registers, 4 copies of each of the table's 4 words.
_CONSTRAINTS = tl.constexpr("=r" + ",r" * 18)
_TABLE_0, _TABLE_1, _TABLE_2, _TABLE_3 = (tl.constexpr(table_text(quarter, False)) for quarter in range(4))
_SIGNED_0, _SIGNED_1, _SIGNED_2, _SIGNED_3 = (tl.constexpr(table_text(quarter, True)) for quarter in range(4))


@triton.jit
def wide(raw, IS_BF16: tl.constexpr):
    """Raw values as float32: BF16 comes as int16."""
    if IS_BF16:
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def to_bf16(value):
    """The bits of float32 values rounded to BF16, to the nearest, ties to even: int16."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > _INFINITY, (bits >> 16) | 0x40, rounded).to(tl.int16)


@triton.jit
def narrow(value, IS_BF16: tl.constexpr, IS_FP16: tl.constexpr):
    """The inverse of `wide`."""
    if IS_BF16:
        narrowed = to_bf16(value)
    elif IS_FP16:
        narrowed = value.to(tl.float16)
    else:
        narrowed = value
    return narrowed


@triton.jit
def to_e4m3(value, largest):
    """The E4M3FN byte of float32 values, to the nearest, ties to even, saturating at `largest`; NaN is 0x7f."""
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    size = tl.where(size > largest, largest, size)
    magnitude = size.to(tl.int32, bitcast=True)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960  # 960 = 120 << 3: exponent bias 127 -> 7
    # One unit of the last place of 2^14 is FP8's smallest subnormal, so the sum's low bits count those.
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) & 0xF
    byte = tl.where(size < 0.015625, subnormal, normal)
    return (sign | tl.where(magnitude > _INFINITY, 0x7F, byte)).to(tl.uint8)


@triton.jit
def _entries(index, row, rows, group, TO_A_WORD: tl.constexpr):
    """Which row of the table the weights of a group have, int32; index int32 [groups / TO_A_WORD, R].

    A word is what the loop can read ahead; one of its entries would be too short for that.
    """
    word = tl.load(index + group // TO_A_WORD * rows + row)
    if TO_A_WORD > 1:
        word = (word >> (group % TO_A_WORD * (32 // TO_A_WORD))) & ((1 << (32 // TO_A_WORD)) - 1)
    return word


@triton.jit
def _decode_plainly(
    codes, index, table, row, rows, chunk, chunks,
    GROUP: tl.constexpr, TO_A_WORD: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """`decode` without PTX, weight by weight: what is interpreted, and the text that says what the PTX does."""
    row, k = row[:, None], tl.arange(0, 128)[None, :]
    quarter, within = k // 32, k % 32
    word = tl.load(codes + ((row // 64 * chunks + chunk) * 64 + row % 64) * 16 + within // 4 * 2 + quarter // 2)
    odd = quarter % 2
    place = (word >> (4 * (k % 4 + 4 * odd))) & 7
    fourth = (word >> (8 * (k % 4) + 7 - 4 * odd)) & 1
    entry = _entries(index, row, rows, (chunk * 128 + k) // GROUP, TO_A_WORD)
    if SIGNED:
        byte = tl.load(table + entry * 16 + place) | (fourth << 7).to(tl.uint8)
    else:
        byte = tl.load(table + entry * 16 + place + 8 * fourth)
    return byte.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _row_of_table(table, index, row, rows, group, TO_A_WORD: tl.constexpr, SIGNED: tl.constexpr):
    """The table's words for the weights of a group, int32 [rows] each: 4, or 2 twice. A row's are read and copied as one."""
    start = table + _entries(index, row, rows, group, TO_A_WORD)[:, None] * 4
    if SIGNED:
        t0, t1 = tl.split(tl.load(start + tl.arange(0, 2)[None, :]))
        t2, t3 = t0, t1
    else:
        even, odd = tl.split(tl.load(start + tl.arange(0, 4)[None, :]).reshape(row.shape[0], 2, 2))
        t0, t2 = tl.split(even)
        t1, t3 = tl.split(odd)
    return t0, t1, t2, t3


@triton.jit
def _look_up(words, t0, t1, t2, t3, QUARTER: tl.constexpr, SIGNED: tl.constexpr):
    """The FP8 weights [rows, 32] of a quarter of a chunk.

    4 neighbors are the 4 bytes that one instance looks up, out of a quad's 4 words, one for each quarter. So Triton has to
    give an instance 4 neighbors of a row; `trial` finds out on the device whether it does.
    """
    t0, t1 = tl.broadcast_to(t0[:, None], words.shape), tl.broadcast_to(t1[:, None], words.shape)
    t2, t3 = tl.broadcast_to(t2[:, None], words.shape), tl.broadcast_to(t3[:, None], words.shape)
    if SIGNED:
        text: tl.constexpr = (_SIGNED_0, _SIGNED_1, _SIGNED_2, _SIGNED_3)[QUARTER]
    else:
        text: tl.constexpr = (_TABLE_0, _TABLE_1, _TABLE_2, _TABLE_3)[QUARTER]
    return tl.inline_asm_elementwise(text, _CONSTRAINTS, [words, t0, t1, t2, t3], dtype=tl.float8e4nv, is_pure=True, pack=4)


@triton.jit
def decode(
    codes, words, index, table, row, rows, chunk, chunks,
    GROUP: tl.constexpr, TO_A_WORD: tl.constexpr, SIGNED: tl.constexpr, USES_PTX: tl.constexpr,
):  # fmt: skip
    """The FP8 weights [rows, 128] of a chunk. codes int32: all; words: pointers [rows, 32] to the same, int16, of chunk 0."""
    if USES_PTX:
        packed, group = tl.load(words + chunk * 2048), chunk * 128 // GROUP
        t0, t1, t2, t3 = _row_of_table(table, index, row, rows, group, TO_A_WORD, SIGNED)
        q0 = _look_up(packed, t0, t1, t2, t3, 0, SIGNED)
        if GROUP < 64:
            t0, t1, t2, t3 = _row_of_table(table, index, row, rows, group + 1, TO_A_WORD, SIGNED)
        q1 = _look_up(packed, t0, t1, t2, t3, 1, SIGNED)
        if GROUP < 128:
            t0, t1, t2, t3 = _row_of_table(table, index, row, rows, group + 64 // GROUP, TO_A_WORD, SIGNED)
        q2 = _look_up(packed, t0, t1, t2, t3, 2, SIGNED)
        if GROUP < 64:
            t0, t1, t2, t3 = _row_of_table(table, index, row, rows, group + 3, TO_A_WORD, SIGNED)
        q3 = _look_up(packed, t0, t1, t2, t3, 3, SIGNED)
        # One after the other, which moves nothing: quarters are other registers, and the product wants them so.
        w8 = tl.join(tl.join(q0, q1), tl.join(q2, q3)).permute(0, 3, 2, 1).reshape(row.shape[0], 128)
    else:
        w8 = _decode_plainly(codes, index, table, row, rows, chunk, chunks, GROUP, TO_A_WORD, SIGNED)
    return w8


@triton.jit
def finished(total, outer_scale, scale, bias, HAS_BIAS: tl.constexpr, IS_BF16: tl.constexpr, IS_FP16: tl.constexpr):
    """The contract's end: (total * outer_scale) * s_x, rounded, then the bias."""
    y = narrow(total * outer_scale * scale, IS_BF16, IS_FP16)
    if HAS_BIAS:
        y = narrow(wide(y, IS_BF16) + wide(bias, IS_BF16), IS_BF16, IS_FP16)
    return y


@triton.jit
def add_product(total, w8, x8, PROMOTES: tl.constexpr):
    """total + w8 @ x8. PROMOTES: the unit's own sums keep fewer bits than float32, so that only the product is left to it.

    A compiler that sees no more than a sum and a product may leave both to it; what it does not see into keeps them apart.
    """
    part = tl.dot(w8, x8)
    if PROMOTES:
        part = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [part], dtype=tl.float32, is_pure=True, pack=1)
    return total + part


@triton.jit
def sums(
    x8, codes, words, index, table, first_row, rows, chunks, first, last,
    GROUP: tl.constexpr, TO_A_WORD: tl.constexpr, SIGNED: tl.constexpr, USES_PTX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr, PROMOTES: tl.constexpr,
):  # fmt: skip
    """What the chunks from `first` to before `last` add up to, float32 [BLOCK_N, BLOCK_M], of BLOCK_N rows.

    x8: pointers [128, BLOCK_M] to where each token begins. codes int32 and words int16: the same bytes. index as in `_entries`.
    PAIRS: chunks are an even number.
    """
    row = first_row + tl.arange(0, BLOCK_N)
    within = tl.arange(0, BLOCK_N) // 64 * (chunks * 2048) + tl.arange(0, BLOCK_N) % 64 * 32
    words += (first_row // 64 * chunks).to(tl.int64) * 2048 + within[:, None] + tl.arange(0, 32)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for begin in range(first, last, 1 + PAIRS):
        for more in tl.static_range(1 + PAIRS):
            chunk = begin + more
            w8 = decode(codes, words, index, table, row, rows, chunk, chunks, GROUP, TO_A_WORD, SIGNED, USES_PTX)
            total = add_product(total, w8, tl.load(x8 + chunk * 128), PROMOTES)
    return total


@triton.jit
def arrive(arrived):
    """How many programs have been here before, all of whose stores this one sees from now on."""
    tl.debug_barrier()  # so that those of all its own threads come before
    return tl.atomic_add(arrived, 1)


@triton.jit
def sum_of_splits(partial, inside, size, splits):
    """Float32 sums of each split, `size` apart, added up from the first to the last; read where other programs wrote them."""
    total = tl.zeros(partial.shape, tl.float32)
    for _ in range(splits):
        total += tl.load(partial, mask=inside, other=0, cache_modifier=".cg")
        partial += size
    return total


@triton.jit
def multiply(
    x8, codes, words, index, table, scales, outer_scale, bias, y, partial, arrived, M, N, rows, chunks, chunks_each,
    GROUP: tl.constexpr, TO_A_WORD: tl.constexpr, SIGNED: tl.constexpr, USES_PTX: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, PAIRS: tl.constexpr, PROMOTES: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_BF16: tl.constexpr, IS_FP16: tl.constexpr,
):  # fmt: skip
    """y [M, N]; a program has BLOCK_N rows (the instruction's long side), BLOCK_M tokens and one of the splits of K.

    x8 fp8 [M, 128 C], outer_scale [N], scales [M]; codes, words and index as in `sums`. Splits leave their sums in partial,
    float32 [S, M, N]; which is the last of them, `arrived` int32 tells, and that adds all up, always in the same order.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    x8 += tl.minimum(token, M - 1).to(tl.int64)[None, :] * (chunks * 128) + tl.arange(0, 128)[:, None]
    first = tl.program_id(1) * chunks_each
    last = tl.minimum(first + chunks_each, chunks)
    total = sums(
        x8, codes, words, index, table, tl.program_id(0) * BLOCK_N, rows, chunks, first, last,
        GROUP, TO_A_WORD, SIGNED, USES_PTX, BLOCK_N, BLOCK_M, PAIRS, PROMOTES,
    )  # fmt: skip
    inside = (row < N)[:, None] & (token < M)[None, :]
    place, splits = token.to(tl.int64)[None, :] * N + row[:, None], tl.num_programs(1)
    if IS_SPLIT:
        tl.store(partial + tl.program_id(1).to(tl.int64) * M * N + place, total, mask=inside)
        before = arrive(arrived + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0))
        total = sum_of_splits(partial + place, inside, M * N, tl.where(before == splits - 1, splits, 0))
        inside = inside & (tl.zeros(inside.shape, tl.int32) + before == splits - 1)
    outer = tl.load(outer_scale + row, mask=row < N, other=0)[:, None]
    scale = tl.load(scales + token, mask=token < M, other=0)[None, :]
    added = tl.load(bias + row, mask=row < N, other=0)[:, None] if HAS_BIAS else 0
    tl.store(y + place, finished(total, outer, scale, added, HAS_BIAS, IS_BF16, IS_FP16), mask=inside)


@triton.jit
def write_values(
    codes, words, index, table, values, rows, chunks,
    GROUP: tl.constexpr, TO_A_WORD: tl.constexpr, SIGNED: tl.constexpr, USES_PTX: tl.constexpr,
):  # fmt: skip
    """FP8 weights [R, 128 C], one program for 64 rows of a chunk: the operand of the contract, for a large product."""
    block, chunk, within, k = tl.program_id(0), tl.program_id(1), tl.arange(0, 64), tl.arange(0, 128)
    row = block * 64 + within
    words += (block * chunks).to(tl.int64) * 2048 + within[:, None] * 32 + tl.arange(0, 32)[None, :]
    values += row.to(tl.int64)[:, None] * (chunks * 128) + chunk * 128 + k[None, :]
    w8 = decode(codes, words, index, table, row, rows, chunk, chunks, GROUP, TO_A_WORD, SIGNED, USES_PTX)
    tl.store(values, w8)
