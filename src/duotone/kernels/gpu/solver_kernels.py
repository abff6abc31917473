# Shapes: N rows, K columns, B columns of a block, G groups along K, C candidates.
# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportReturnType=false, reportRedeclaration=false
"""The Triton programs of the solver: its column loop, its local search, and the errors of candidate scales.

Only `solver` calls them. Line by line they are csrc/solver_kernels.h and csrc/local_search.h: the same float32 operations in
the same order, none fused (launches say so), so that codes are those of a CPU. They round by adding a large number, as there.
"""

import triton
import triton.language as tl

from duotone.kernels.gpu.kernels import wide

_NEAREST_LEVEL, _INT4_ONLY, _FP8_VALUE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _clamped(x, low, high):
    """Between two numbers; NaN passes through."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _fp8_round(x):
    """E4M3 of |x| <= 448: 1.5 * 2^20 times x's power of two, added and taken away, leaves three bits of mantissa."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.where(exponent < 1015021568, 1015021568, exponent)  # (127 - 6) << 23: the smallest normal one's
    shift = exponent.to(tl.float32, bitcast=True) * 1572864.0
    return (x + shift) - shift


@triton.jit
def _nearest_level(w, step, zero, LOWEST: tl.constexpr):
    """Half to even of w / step, plus zero, among the 16 levels."""
    level = (tl.div_rn(w, step) + 12582912.0) - 12582912.0
    return _clamped(level + zero, LOWEST, LOWEST + 15.0)


@triton.jit
def _product(level, zero, scale, FP8_MAX: tl.constexpr):
    """`contract.fp8_product`."""
    return _fp8_round(_clamped((level - zero) * scale, -FP8_MAX, FP8_MAX))


@triton.jit
def _rounded(w, scale, zero, outer, RULE: tl.constexpr, LOWEST: tl.constexpr, FP8_MAX: tl.constexpr):
    """Level and value that the rule gives: `Grid.round`."""
    if RULE == _FP8_VALUE:
        level = tl.zeros_like(w) + LOWEST
        value = _fp8_round(_clamped(tl.div_rn(w, outer), -FP8_MAX, FP8_MAX)) * outer
    else:
        level = _nearest_level(w, scale * outer, zero, LOWEST)
        if RULE == _INT4_ONLY:
            value = (level - zero) * (scale * outer)
        else:
            value = _product(level, zero, scale, FP8_MAX) * outer
            if RULE != _NEAREST_LEVEL:
                side = tl.where(w > value, 1.0, 0.0) - tl.where(w < value, 1.0, 0.0)
                other = _clamped(level + side, LOWEST, LOWEST + 15.0)
                other_value = _product(other, zero, scale, FP8_MAX) * outer
                is_nearer = tl.abs(w - other_value) < tl.abs(w - value)
                level = tl.where(is_nearer, other, level)
                value = tl.where(is_nearer, other_value, value)
    return level, value


@triton.jit
def sweep(
    base, reference, coupling, scales, zeros, outer_scale, codes, values, N, B, coupling_row,
    RULE: tl.constexpr, HAS_ZERO: tl.constexpr, LOWEST: tl.constexpr, FP8_MAX: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes uint8 and values [B, N] of a block's columns, one program for some rows: what is to be rounded stays in registers.

    base, reference, scales and zeros [B, N], outer_scale [N]. coupling: rows of `coupling_row` numbers, right of its diagonal.
    """
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = row < N
    outer = tl.load(outer_scale + row, mask=inside, other=1.0)
    wish = tl.load(base + column[None, :] * N + row[:, None], mask=inside[:, None] & (column < B)[None, :], other=0.0)
    for j in range(B):
        at = j * N + row
        weight = tl.load(coupling + j * coupling_row + column, mask=(column > j) & (column < B), other=0.0)
        aim = tl.load(reference + at, mask=inside, other=0.0)
        scale = tl.load(scales + at, mask=inside, other=1.0)
        zero = tl.load(zeros + at, mask=inside, other=0.0) if HAS_ZERO else 0.0
        w = tl.sum(tl.where(column[None, :] == j, wish, 0.0), 1)
        level, value = _rounded(w, scale, zero, outer, RULE, LOWEST, FP8_MAX)
        tl.store(codes + at, (level - LOWEST).to(tl.uint8), mask=inside)
        tl.store(values + at, value, mask=inside)
        wish += weight[None, :] * (aim - value)[:, None]


@triton.jit
def _moves(code, scale, zero, outer, curvature, LOWEST: tl.constexpr, FP8_MAX: tl.constexpr):
    """To the next value of the table and to the one before; infinite where there is none, or where none counts."""
    level = code + LOWEST
    value = _product(level, zero, scale, FP8_MAX) * outer
    up = tl.where(level < LOWEST + 15.0, _product(level + 1.0, zero, scale, FP8_MAX) * outer - value, 0.0)
    down = tl.where(level > LOWEST, _product(level - 1.0, zero, scale, FP8_MAX) * outer - value, 0.0)
    up = tl.where((up == 0.0) | (curvature == 0.0), _INFINITY, up)
    return up, tl.where((down == 0.0) | (curvature == 0.0), _INFINITY, down)


@triton.jit
def _cost(change, curvature, gradient):
    """What a move costs: d (d h - 2 g)."""
    return change * (change * curvature - (gradient + gradient))


@triton.jit
def open_columns(
    codes, group_scale, zero_point, outer_scale, group, curvature, up, down, N, K,
    HAS_ZERO: tl.constexpr, LOWEST: tl.constexpr, FP8_MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """up and down [N, K] of all codes [N, K] before the first step; a program has one row and BLOCK columns."""
    row, k = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = k < K, row.to(tl.int64) * K + k
    place = tl.load(group + k, mask=inside, other=0) * N + row
    scale = tl.load(group_scale + place, mask=inside, other=1.0)
    zero = tl.load(zero_point + place, mask=inside, other=0.0) if HAS_ZERO else 0.0
    code = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
    h = tl.load(curvature + k, mask=inside, other=0.0)
    rise, fall = _moves(code, scale, zero, tl.load(outer_scale + row), h, LOWEST, FP8_MAX)
    tl.store(up + at, rise, mask=inside)
    tl.store(down + at, fall, mask=inside)


@triton.jit
def _scan(gradient, up, down, curvature, weights, change, K, IS_BF16: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient after a move, and in the same pass what the cheapest next one costs and its column: of equals the first."""
    lane = tl.arange(0, BLOCK)
    least, at = tl.full((BLOCK,), _INFINITY, tl.float32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        k = start + lane
        inside = k < K
        g = tl.load(gradient + k, mask=inside, other=0.0)
        g = g - change * wide(tl.load(weights + k, mask=inside, other=0), IS_BF16)
        tl.store(gradient + k, g, mask=inside)
        h = tl.load(curvature + k, mask=inside, other=0.0)
        rise = _cost(tl.load(up + k, mask=inside, other=_INFINITY), h, g)
        fall = _cost(tl.load(down + k, mask=inside, other=_INFINITY), h, g)
        cheaper = tl.where(rise < fall, rise, fall)
        is_better = cheaper < least
        least = tl.where(is_better, cheaper, least)
        at = tl.where(is_better, k, at)
    found = tl.min(least, 0)
    return found, tl.min(tl.where(least == found, at, 0x7FFFFFFF), 0)


@triton.jit
def local_search(
    gradient, up, down, codes, moves, hessian, curvature, damping, group_scale, zero_point, outer_scale, group, N, K, steps,
    TENURE: tl.constexpr, HAS_ZERO: tl.constexpr, IS_BF16: tl.constexpr, LOWEST: tl.constexpr, FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes [N, K] improved in place, one program a row. gradient, up, down [N, K] are its memory, moves int32 [N, steps] too.

    A move is noted as column * 16 + the code before it, none as -1. Barriers stand where one thread writes what others have
    read or will read.
    """
    row = tl.program_id(0)
    outer = tl.load(outer_scale + row)
    group_scale += row
    zero_point += row
    begin = row.to(tl.int64) * K
    gradient, up, down, codes = gradient + begin, up + begin, down + begin, codes + begin
    moves += row.to(tl.int64) * steps
    total, least = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    kept, column, change = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float32)
    for step in range(steps):
        # The column that has rested long enough: what it may do then is known already.
        rested = tl.load(moves + step - TENURE, mask=step >= TENURE, other=-1)
        back = tl.where(rested < 0, 0, rested >> 4)
        place = tl.load(group + back) * N
        zero = tl.load(zero_point + place) if HAS_ZERO else 0.0
        code = tl.load(codes + back).to(tl.float32)
        wake_up, wake_down = _moves(code, tl.load(group_scale + place), zero, outer, tl.load(curvature + back), LOWEST, FP8_MAX)
        found, column = _scan(gradient, up, down, curvature, hessian + column.to(tl.int64) * K, change, K, IS_BF16, BLOCK)
        goes = found < _INFINITY
        tl.debug_barrier()
        h, g = tl.load(curvature + column), tl.load(gradient + column)
        rise, fall, before = tl.load(up + column), tl.load(down + column), tl.load(codes + column).to(tl.int32)
        tl.debug_barrier()
        is_up = _cost(rise, h, g) < _cost(fall, h, g)
        change = tl.where(goes, tl.where(is_up, rise, fall), 0.0)
        paid = tl.where(is_up, _cost(rise, h, g), _cost(fall, h, g))
        total = tl.where(goes, total + paid.to(tl.float64), total)
        tl.store(codes + column, (before + tl.where(is_up, 1, -1)).to(tl.uint8), mask=goes)
        tl.store(moves + step, tl.where(goes, column * 16 + before, -1))
        tl.store(up + column, _INFINITY, mask=goes)
        tl.store(down + column, _INFINITY, mask=goes)
        tl.store(gradient + column, g - change * tl.load(damping + column), mask=goes)
        tl.store(up + back, wake_up, mask=rested >= 0)
        tl.store(down + back, wake_down, mask=rested >= 0)
        tl.debug_barrier()
        kept = tl.where(total < least, step + 1, kept)
        least = tl.where(total < least, total, least)
    for undone in range(kept, steps):  # back to the best codes met
        move = tl.load(moves + steps - 1 - (undone - kept))
        tl.store(codes + (move >> 4), (move & 15).to(tl.uint8), mask=move >= 0)


@triton.jit
def scale_error(
    weight, candidate, zero_point, outer_scale, column_weight, error, N, K, groups, candidates, group_size,
    HAS_ZERO: tl.constexpr, HAS_WEIGHT: tl.constexpr, LOWEST: tl.constexpr, FP8_MAX: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Squared error [N, G, C] of groups under candidate scales; a program has some rows of one group, read once."""
    row, lane, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.program_id(1)
    k = j * group_size + lane
    inside, counts = row < N, (lane < group_size) & (k < K)
    outer = tl.load(outer_scale + row, mask=inside, other=1.0)
    at = row.to(tl.int64)[:, None] * K + k[None, :]
    x = tl.div_rn(tl.load(weight + at, mask=inside[:, None] & counts[None, :], other=0.0), outer[:, None])
    share = tl.load(column_weight + k, mask=counts, other=0.0) if HAS_WEIGHT else tl.where(counts, 1.0, 0.0)
    place = row.to(tl.int64) * groups + j
    zero = tl.load(zero_point + place, mask=inside, other=0.0)[:, None] if HAS_ZERO else 0.0
    for c in range(candidates):
        scale = tl.load(candidate + place * candidates + c, mask=inside, other=1.0)[:, None]
        residual = _product(_nearest_level(x, scale, zero, LOWEST), zero, scale, FP8_MAX) - x
        total = tl.sum(residual * residual * share[None, :], 1)
        tl.store(error + place * candidates + c, total * (outer * outer), mask=inside)
