# Shapes: M tokens, K columns, C chunks of 128 columns; B sequences, H key heads, T tokens, D head size.
"""How the programs of `row_kernels` are laid out: quantization, also after a norm, and an FP8 cache as two torch ops.

Keys and values of a layer are one launch. `duotone::gpu_write_cache` and `duotone::gpu_read_cache` have shapes for
torch.compile, and wait for nothing, so that CUDA graphs can hold them.
"""

from typing import Any

import torch
from torch import Tensor

from duotone.kernels.gpu import row_kernels

#: Tokens of a tile of the cache, in 4 warps; a single new token has a warp to itself.
_TILE_TOKENS = 16
#: Columns of a row that stays in registers while it is quantized, by 32 warps.
_WHOLE_ROW = 16384
_programs: Any = row_kernels


def quantize(
    x: Tensor, chunks: int, input_scale: Tensor | None, fp8_max: float, smallest: float, arrived: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> FP8 [M, 128 C] with zeros after K, and s_x float32 [M]: `contract.quantize_activations`, bit for bit.

    input_scale: static, of all tokens, or of each [M]; None: dynamic. arrived: becomes zero (`kernels.multiply`).
    """
    tokens, columns = x.shape
    padded = chunks * 128
    x8 = torch.empty(tokens, padded, dtype=torch.uint8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    static, stride = (scales, 0) if input_scale is None else (input_scale, input_scale.dim())
    block = min(_WHOLE_ROW, _power_of_two(padded))
    _programs.quantize_rows[(tokens,)](
        raw(x), x8, scales, static, stride, *counted(arrived, scales), columns, padded, fp8_max, smallest,
        BLOCK=block, IS_WHOLE=padded <= block, IS_BF16=x.dtype == torch.bfloat16, IS_STATIC=input_scale is not None,
        COUNTS=arrived is not None, num_warps=max(4, block // 512), enable_fp_fusion=False,
    )  # fmt: skip
    return x8.view(torch.float8_e4m3fn), scales


def norm_and_quantize(
    x: Tensor, weight: Tensor, epsilon: float, chunks: int, input_scale: Tensor | None, fp8_max: float, smallest: float,
    arrived: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [M, K] and a norm's weight [K] of its dtype -> FP8 [M, 128 C] with zeros after K, and s_x float32 [M].

    What `contract.quantize_activations` makes of an RMS norm as transformers' Llama has it, the mean of squares being a float32
    sum in an order of its own: exact, given the root that comes of it. arrived: becomes zero (`kernels.multiply`).
    """
    (tokens, columns), padded = x.shape, chunks * 128
    x8 = torch.empty(tokens, padded, dtype=torch.uint8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    static, block = scales if input_scale is None else input_scale, _power_of_two(padded)
    _programs.norm_and_quantize_rows[(tokens,)](
        raw(x), raw(weight), x8, scales, static, *counted(arrived, scales), columns, padded, float(columns), epsilon, fp8_max,
        smallest, BLOCK=block, IS_STATIC=input_scale is not None, COUNTS=arrived is not None, **_kind(x.dtype),
        num_warps=max(4, min(16, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return x8.view(torch.float8_e4m3fn), scales


def counted(arrived: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    """What a program is handed of counters that it is to make zero, if there are any."""
    return (other, 0) if arrived is None else (arrived, len(arrived))


def _write(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, k_scale: Tensor, v_scale: Tensor, *facts: Any) -> None:
    """New k, v [B, H, T, D], BF16, FP16 or float32, into rows `positions` int64 [T] of keys, values uint8 [B, H, >= T, D].

    facts: positions (None: the first T rows) and FP8's largest value. The bits of `contract.quantize_kv`, scales float32 [H].
    """
    positions, fp8_max = facts
    if not k.numel() + v.numel():
        return
    k, v = _in_rows(k), _in_rows(v)
    batch, heads, tokens, size = k.shape
    tile = 1 if tokens == 1 else _TILE_TOKENS
    at = k_scale if positions is None else positions
    strides = [stride for x in (k, v, keys, values) for stride in x.stride()[:3]]
    with torch.cuda.device_of(k):
        _programs.write_cache[(batch * heads, -(-tokens // tile), 2)](
            raw(k), raw(v), keys, values, k_scale, v_scale, at, heads, tokens, keys.shape[2], size, v.shape[-1], *strides,
            fp8_max, BLOCK_T=tile, BLOCK_D=_power_of_two(max(size, v.shape[-1])), HAS_POSITIONS=positions is not None,
            IS_BF16=k.dtype == torch.bfloat16, num_warps=1 if tile == 1 else 4, enable_fp_fusion=False,
            debug=positions is not None, sanitize_overflow=False,
        )  # fmt: skip


def _read(keys: Tensor, values: Tensor, k_scale: Tensor, v_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """keys, values uint8 [B, H, T, D] and scales float32 [H] -> both in BF16, FP16 or float32: `contract.dequantize_kv`."""
    keys, values = _in_rows(keys), _in_rows(values)
    batch, heads, tokens, size = keys.shape
    k, v = (torch.empty(x8.shape, dtype=dtype, device=x8.device) for x8 in (keys, values))
    if k.numel() + v.numel():
        strides = [stride for x8 in (keys, values) for stride in x8.stride()[:3]]
        with torch.cuda.device_of(keys):
            _programs.read_cache[(batch * heads, -(-tokens // _TILE_TOKENS), 2)](
                keys, values, raw(k), raw(v), k_scale, v_scale, heads, tokens, size, values.shape[-1], *strides,
                BLOCK_T=_TILE_TOKENS, BLOCK_D=_power_of_two(max(size, values.shape[-1])), **_kind(dtype), num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
    return k, v


def raw(x: Tensor) -> Tensor:
    """BF16 as the bits that the kernels read and write."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _kind(dtype: torch.dtype) -> dict[str, bool]:
    return {"IS_BF16": dtype == torch.bfloat16, "IS_FP16": dtype == torch.float16}


def _in_rows(x: Tensor) -> Tensor:
    """Any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _power_of_two(count: int) -> int:
    """The smallest that is no less."""
    return 1 << (count - 1).bit_length()


torch.library.define(
    "duotone::gpu_write_cache",
    "(Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor k_scale, Tensor v_scale, Tensor? positions, "
    "float fp8_max) -> ()",
)
torch.library.impl("duotone::gpu_write_cache", "default", _write)
torch.library.define(
    "duotone::gpu_read_cache",
    "(Tensor keys, Tensor values, Tensor k_scale, Tensor v_scale, ScalarType dtype) -> (Tensor, Tensor)",
)
torch.library.impl("duotone::gpu_read_cache", "default", _read)


@torch.library.register_fake("duotone::gpu_write_cache")
def _(*_: object) -> None:
    return None


@torch.library.register_fake("duotone::gpu_read_cache")
def _(keys: Tensor, values: Tensor, k_scale: Tensor, v_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    del k_scale, v_scale
    return keys.new_empty(keys.shape, dtype=dtype), values.new_empty(values.shape, dtype=dtype)


write_cache = torch.ops.duotone.gpu_write_cache.default
read_cache = torch.ops.duotone.gpu_read_cache.default
