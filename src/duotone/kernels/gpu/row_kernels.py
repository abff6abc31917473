# Shapes: M tokens, K columns; B sequences, H key heads, T tokens, D head size.
# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportReturnType=false, reportRedeclaration=false
"""The Triton programs that go once over rows: quantization, also after an RMS norm, and an FP8 cache's two ways.

Only `rows` calls them. What rounds is written in integers, as in `kernels`.
"""

import triton
import triton.language as tl

from duotone.kernels.gpu.kernels import narrow, to_e4m3, wide


@triton.jit
def forget(arrived, places):
    """int32 [places] become zero; the first program does it."""
    if tl.program_id(0) == 0:
        for start in range(0, places, 128):
            place = start + tl.arange(0, 128)
            tl.store(arrived + place, tl.zeros((128,), tl.int32), mask=place < places)


@triton.jit
def _without_sign(value):
    """The bits of float32 values without their signs: in the values' order, NaNs last."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def quantize_rows(
    x, x8, scales, static_scale, static_stride, arrived, places, K, padded,
    fp8_max, smallest_scale, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr, IS_BF16: tl.constexpr, IS_STATIC: tl.constexpr,
    COUNTS: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> x8 uint8 [M, padded], zeros after K, and s_x float32 [M]; one program a token. `quantize_activations`.

    static_scale: of all tokens, with a static_stride of 0, or one of each, with a stride of 1. IS_WHOLE: BLOCK >= padded, so
    that a row is read once and stays in registers. COUNTS: int32 [places] of `arrived` become zero, for `kernels.multiply`.
    """
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x += row * K
    if COUNTS:
        forget(arrived, places)
    if IS_WHOLE:
        value = wide(tl.load(x + k, mask=k < K, other=0), IS_BF16)
    if IS_STATIC:
        scale = tl.load(static_scale + row * static_stride)
    else:
        if IS_WHOLE:
            largest = tl.max(_without_sign(value), 0)
        else:
            each = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, K, BLOCK):
                value = wide(tl.load(x + start + k, mask=start + k < K, other=0), IS_BF16)
                each = tl.maximum(each, _without_sign(value))
            largest = tl.max(each, 0)
        scale = tl.div_rn(largest.to(tl.float32, bitcast=True), fp8_max)
        scale = tl.where(scale < smallest_scale, smallest_scale, scale)  # as torch's clamp: a NaN stays
    tl.store(scales + row, scale)
    for start in range(0, padded, BLOCK):
        if not IS_WHOLE:
            value = wide(tl.load(x + start + k, mask=start + k < K, other=0), IS_BF16)
        byte = to_e4m3(tl.div_rn(value, scale), fp8_max)
        tl.store(x8 + row * padded + start + k, tl.where(start + k < K, byte, 0), mask=start + k < padded)


@triton.jit
def norm_and_quantize_rows(
    x, weight, x8, scales, static_scale, arrived, places, K, padded, count, epsilon, fp8_max, smallest_scale,
    BLOCK: tl.constexpr, IS_BF16: tl.constexpr, IS_FP16: tl.constexpr, IS_STATIC: tl.constexpr,
    COUNTS: tl.constexpr,
):  # fmt: skip
    """x [M, K], weight [K] of its dtype -> x8 uint8 [M, padded], zeros after K, and s_x float32 [M]; a token is a program.

    LlamaRMSNorm, rounded where that rounds, then `quantize_activations`. A row stays in registers: BLOCK >= padded. count: K.
    COUNTS: as in `quantize_rows`.
    """
    if COUNTS:
        forget(arrived, places)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    value = wide(tl.load(x + row * K + k, mask=k < K, other=0), IS_BF16)
    by = wide(tl.load(weight + k, mask=k < K, other=0), IS_BF16)
    mean = tl.div_rn(tl.sum(value * value, 0), count)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon))
    normed = wide(narrow(value * inverse, IS_BF16, IS_FP16), IS_BF16)
    y = wide(narrow(by * normed, IS_BF16, IS_FP16), IS_BF16)
    if IS_STATIC:
        scale = tl.load(static_scale)
    else:
        # By bits, without the sign, so that a NaN is the largest; after K there may be one, of zero times the inverse of zero.
        largest = tl.max(tl.where(k < K, _without_sign(y), 0), 0)
        scale = tl.div_rn(largest.to(tl.float32, bitcast=True), fp8_max)
        scale = tl.where(scale < smallest_scale, smallest_scale, scale)
    tl.store(scales + row, scale)
    byte = to_e4m3(tl.div_rn(y, scale), fp8_max)
    tl.store(x8 + row * padded + k, tl.where(k < K, byte, 0), mask=k < padded)


@triton.jit
def _keep(
    x, x8, scale, token, to, fits, size, from_stride, to_stride, fp8_max,
    BLOCK_D: tl.constexpr, IS_BF16: tl.constexpr,
):  # fmt: skip
    """Tokens of one head of keys, or of values: FP8(x / scale), to rows `to` of the cache if these fit."""
    d = tl.arange(0, BLOCK_D)
    inside = fits[:, None] & (d < size)[None, :]
    value = wide(tl.load(x + token.to(tl.int64)[:, None] * from_stride + d[None, :], mask=inside, other=0), IS_BF16)
    byte = to_e4m3(tl.div_rn(value, scale), fp8_max)
    tl.store(x8 + to.to(tl.int64)[:, None] * to_stride + d[None, :], byte, mask=inside)


@triton.jit
def write_cache(
    k, v, keys, values, k_scale, v_scale, positions, H, T, room, k_size, v_size,
    k_b, k_h, k_t, v_b, v_h, v_t, keys_b, keys_h, keys_t, values_b, values_h, values_t, fp8_max,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, HAS_POSITIONS: tl.constexpr, IS_BF16: tl.constexpr,
):  # fmt: skip
    """New k, v [B, H, T, D] -> rows `positions` (the first T without) of keys, values uint8 [B, H, room, D]: `quantize_kv`.

    A program has some tokens of a head, of its keys (the last axis is 0) or its values. Strides by tensor and axis; D's is 1.
    A position outside of the room ends the call with an error, as in torch's index_copy_, and nothing is written there.
    """
    batch, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    to, fits = token, token < T
    if HAS_POSITIONS:
        to = tl.load(positions + token, mask=fits, other=0)
        tl.device_assert((to >= 0) & (to < room), "FP8 KV cache: found a position outside of it")
        fits = fits & (to >= 0) & (to < room)
    if tl.program_id(2) == 0:
        scale, x, x8 = tl.load(k_scale + head), k + batch * k_b + head * k_h, keys + batch * keys_b + head * keys_h
        _keep(x, x8, scale, token, to, fits, k_size, k_t, keys_t, fp8_max, BLOCK_D, IS_BF16)
    else:
        scale, x, x8 = tl.load(v_scale + head), v + batch * v_b + head * v_h, values + batch * values_b + head * values_h
        _keep(x, x8, scale, token, to, fits, v_size, v_t, values_t, fp8_max, BLOCK_D, IS_BF16)


@triton.jit
def _widen(
    x8, x, scale, token, T, size, from_stride, BLOCK_D: tl.constexpr, IS_BF16: tl.constexpr, IS_FP16: tl.constexpr
):  # fmt: skip
    """Tokens of one head: x8 * scale, rounded."""
    d = tl.arange(0, BLOCK_D)
    inside = (token < T)[:, None] & (d < size)[None, :]
    byte = tl.load(x8 + token.to(tl.int64)[:, None] * from_stride + d[None, :], mask=inside, other=0)
    value = from_e4m3(byte) * scale
    tl.store(x + token.to(tl.int64)[:, None] * size + d[None, :], narrow(value, IS_BF16, IS_FP16), mask=inside)


@triton.jit
def from_e4m3(byte):
    """The float32 value of E4M3FN bytes."""
    bits = byte.to(tl.int32)
    size = bits & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)  # exponent bias 7 -> 127
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    signed = value.to(tl.int32, bitcast=True) | ((bits & 0x80) << 24)
    return tl.where(size == 0x7F, 0x7FC00000, signed).to(tl.float32, bitcast=True)


@triton.jit
def read_cache(
    keys, values, k, v, k_scale, v_scale, H, T, k_size, v_size, keys_b, keys_h, keys_t, values_b, values_h, values_t,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, IS_BF16: tl.constexpr, IS_FP16: tl.constexpr,
):  # fmt: skip
    """keys, values uint8 [B, H, T, D], strides as in `write_cache`, -> k, v of the same shapes, contiguous: `dequantize_kv`."""
    of = tl.program_id(0).to(tl.int64)
    batch, head = of // H, of % H
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(2) == 0:
        scale, x8, x = tl.load(k_scale + head), keys + batch * keys_b + head * keys_h, k + of * T * k_size
        _widen(x8, x, scale, token, T, k_size, keys_t, BLOCK_D, IS_BF16, IS_FP16)
    else:
        scale, x8, x = tl.load(v_scale + head), values + batch * values_b + head * values_h, v + of * T * v_size
        _widen(x8, x, scale, token, T, v_size, values_t, BLOCK_D, IS_BF16, IS_FP16)
