# Shapes: B sequences, H key heads, T tokens, D head size.
"""The FP8 cache of keys and values on NVIDIA GPUs: both of a layer in one launch, written where they stay and read wide.

The bits are those of `contract.quantize_kv` and `dequantize_kv`. As in `backend`, Triton is imported where it runs only, and
a trial on the device comes first.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from duotone.contract import dequantize_kv, quantize_kv
from duotone.kernels.gpu import backend
from duotone.scheme import HOPPER


def refuses(device: torch.device) -> str | None:
    """Why these kernels do not serve a cache on a device, or None."""
    return backend.device_refuses(device) or _fault(device)


def write(
    new: Sequence[Tensor], kept: Sequence[Tensor], scales: Sequence[Tensor], largest: float, positions: Tensor | None = None
) -> None:
    """New keys and values [B, H, T, D] into those that are kept, FP8 [B, H, >= T, D]: into their first T rows, or `positions`.

    scales: float32 [H] of keys and of values. largest: the target's FP8 value. positions: int64 [T] on the device.
    """
    from duotone.kernels.gpu import rows

    rows.write_cache(*new, *(x8.view(torch.uint8) for x8 in kept), *scales, positions, largest)


def quantize(new: Sequence[Tensor], scales: Sequence[Tensor], largest: float) -> tuple[Tensor, Tensor]:
    """New keys and values as the cache keeps them."""
    keys, values = (torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device) for x in new)
    write(new, (keys, values), scales, largest)
    return keys, values


def read(kept: Sequence[Tensor], scales: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as attention sees them."""
    from duotone.kernels.gpu import rows

    return rows.read_cache(*(x8.view(torch.uint8) for x8 in kept), *scales, dtype)


@cache
def _fault(device: torch.device) -> str | None:
    from duotone.kernels.gpu import trial

    return trial.told(device, lambda: _difference(device))


def _difference(device: torch.device) -> str | None:
    """Every BF16 value, of whatever size, written at positions and read again."""
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).view(2, 2, 128, 128)
    new, scales, at = (every, every.transpose(1, 2).reshape(2, 2, 128, 128)), torch.tensor([[0.3, 2.0], [1e-3, 7.0]]), 3
    positions = torch.arange(128, device=device) + at
    kept = [torch.zeros(2, 2, 140, 128, dtype=torch.float8_e4m3fn, device=device) for _ in new]
    ours = [scale.to(device) for scale in scales]
    write([x.to(device) for x in new], kept, ours, HOPPER.fp8.max, positions)
    meant = [quantize_kv(x, scale, HOPPER) for x, scale in zip(new, scales, strict=True)]
    if not all(_same(x8[:, :, at : at + 128], its) for x8, its in zip(kept, meant, strict=True)):
        return "FP8 keys and values"
    wide = [dequantize_kv(x8, scale, torch.bfloat16) for x8, scale in zip(meant, scales, strict=True)]
    found = read([x8[:, :, at : at + 128] for x8 in kept], ours, torch.bfloat16)
    return None if all(map(_same, found, wide)) else "keys and values"


def _same(found: Tensor, meant: Tensor) -> bool:
    """Equal, NaN for NaN."""
    ours, theirs = found.float().cpu(), meant.float()
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())
