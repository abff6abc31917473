# Shapes: N out_features, K in_features (padded to a multiple of 8 by the caller).
"""Storage packing of 4-bit codes: eight consecutive values in an int32, the first in the lowest four bits (FORMATS.md 1.3).

Storage packing and a kernel's prepacking are different things; this is the one on disk.
"""

import torch
from torch import Tensor

_NIBBLES = 8


def pack_int4(codes_NK: Tensor) -> Tensor:
    """Codes uint8 0..15 [N, K] -> int32 [N, K / 8]. Raises ValueError when 8 does not divide K."""
    rows, columns = codes_NK.shape
    if columns % _NIBBLES:
        raise ValueError(f"codes: K={columns} is not a multiple of {_NIBBLES}")
    shifts = torch.arange(0, 32, 4, device=codes_NK.device)
    words = (codes_NK.view(rows, -1, _NIBBLES).to(torch.int64) << shifts).sum(-1)
    return words.to(torch.int32)  # wraps into the sign bit, as the word's bits demand


def unpack_int4(words: Tensor, columns: int) -> Tensor:
    """int32 [N, ceil(K / 8)] -> codes uint8 0..15 [N, K]."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & 15
    return codes.to(torch.uint8).reshape(words.shape[0], -1)[:, :columns].contiguous()
