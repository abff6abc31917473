# Shapes: N out_features, K in_features (padded to a multiple of 8 by the caller).
"""Storage packing of 4-bit codes: eight consecutive values in an int32, the first in the lowest four bits (FORMATS.md 1.3).

Storage packing and a kernel's prepacking are different things; this is the one on disk.
"""

import torch
from torch import Tensor

from duotone.kernels import native

_NIBBLES = 8


def pack_int4(codes_NK: Tensor) -> Tensor:
    """Codes uint8 0..15 [N, K] -> int32 [N, K / 8]. Raises ValueError when 8 does not divide K."""
    rows, columns = codes_NK.shape
    if columns % _NIBBLES:
        raise ValueError(f"codes: K={columns} is not a multiple of {_NIBBLES}")
    # The bytes of a word, lowest first, on every machine that torch runs on: two codes each.
    pairs = codes_NK[:, 0::2] | codes_NK[:, 1::2] << 4
    return pairs.contiguous().reshape(-1).view(torch.int32).view(rows, columns // _NIBBLES)


def unpack_int4(words: Tensor, columns: int) -> Tensor:
    """int32 [N, ceil(K / 8)] -> codes uint8 0..15 [N, K]."""
    pairs = words.contiguous().reshape(-1).view(torch.uint8)
    native_ops = pairs.device.type == "cpu" and native.available()
    codes = torch.ops.duotone.unpack_bytes(pairs) if native_ops else torch.stack((pairs & 15, pairs >> 4), -1)
    return codes.view(words.shape[0], words.shape[1] * _NIBBLES)[:, :columns].contiguous()
