# Shapes: N out_features, K in_features, R rows padded to whole blocks, C chunks of 128 columns, T rows of the table.
"""How a weight lies in a GPU's memory: codes where one lookup finds the four that it decodes, and a table of FP8 bytes.

A chunk is 128 columns: 4 quarters of 32, each 8 quads of 4 neighbors. A word of 32 bits has the codes of two quarters' quads of
the same number, the first's in its lower half, so that the nibbles there are what one lookup takes; the words of the 4 quarters
lie side by side. Blocks of 64 rows of one chunk are one piece of 4 KiB.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from duotone.contract import fp8_product
from duotone.formats import E4M3FN
from duotone.qweight import QuantizedWeight, expand_groups

CHUNK = 128
#: Rows are padded to a multiple of the widest tile of the kernels.
BLOCK_ROWS = 128
PIECE_ROWS = 64
#: Where a word of 32 bits has the lower 3 bits of the places of an even quarter's quad, then of the odd one's, a nibble each.
#: And their fourth bits, in the nibbles' top bits: an even quarter's where a byte has its sign, an odd one's 4 lower.
_LOW = tuple(4 * i for i in range(8))
_FOURTH = tuple(8 * (i % 4) + 7 - 4 * (i // 4) for i in range(8))
#: E4M3FN bytes 0 to 126 are its values from 0 to 448.
_E4M3FN_POSITIVE = 127


class Layout(NamedTuple):
    """A weight's tensors as the kernels read them.

    codes: int32 [R/64, C, 64, 16]. entries: int32 [groups / to_a_word, R], each word the rows of `table` that some neighboring
    groups have, the first in its lowest bits. table: uint8 [T, 16], the FP8 bytes of each place. is_signed: 8 magnitudes and a
    sign instead of 16 values.
    """

    codes: Tensor
    entries: Tensor
    table: Tensor
    to_a_word: int
    is_signed: bool


def pack(weight: QuantizedWeight) -> Layout:
    """A weight in this layout. It is signed where no more than 8 magnitudes are in use and nothing shifts them."""
    scheme = weight.scheme
    level_16 = torch.tensor(scheme.levels)
    is_used = torch.bincount(weight.codes.flatten(), minlength=16).cpu() > 0
    size_P = level_16[is_used].abs().unique()
    is_signed = weight.zero_point is None and len(size_P) <= 8
    if is_signed:
        place_16 = torch.searchsorted(size_P, level_16.abs()).clamp(max=len(size_P) - 1) + 8 * (level_16 < 0)
        words = pack_words(_padded(place_16.to(torch.uint8).to(weight.codes.device)[weight.codes.long()]))
        values_of_table = torch.nn.functional.pad(size_P, (0, 16 - len(size_P)))
    else:
        words, values_of_table = pack_words(_padded(weight.codes)), level_16
    index_NG, table = _table(weight, values_of_table.to(weight.codes.device))
    to_a_word = 4 if len(table) <= 2**8 else 2 if len(table) <= 2**16 else 1
    return Layout(words, _index_words(index_NG, weight, to_a_word), table, to_a_word, is_signed)


def values(packed: Layout, group_size: int) -> Tensor:
    """The FP8 bytes uint8 [R, 128 C] that a weight stands for, in plain torch."""
    index, table, to_a_word = packed.entries, packed.table, packed.to_a_word
    place = _places(packed.codes).long()
    bits = 32 // to_a_word
    entry_NG = torch.stack([index.long() >> bits * i & 2**bits - 1 for i in range(to_a_word)], 1).flatten(0, 1).T
    entry = expand_groups(entry_NG, group_size, place.shape[1])
    if packed.is_signed:
        return table[entry, place & 7] | (place >> 3 << 7).to(torch.uint8)
    return table[entry, place]


def unsigned(packed: Layout) -> Layout:
    """A signed weight as one of 16 values: its 8 magnitudes, then their negatives."""
    table = torch.cat((packed.table[:, :8], packed.table[:, :8] | 0x80), 1)
    return packed._replace(table=table, is_signed=False)


def _places(codes: Tensor) -> Tensor:
    """Each weight's place in its row of the table, that of its magnitude and 8 for a sign, [R, 128 C]."""
    pieces, chunks, _, _ = codes.shape
    quads = codes.view(pieces, chunks, PIECE_ROWS, 8, 2)
    low, fourth = (torch.stack([quads >> shift for shift in shifts], -1) for shifts in (_LOW, _FOURTH))
    parts = low & 7 | (fourth & 1) << 3  # [piece, chunk, row, quad, pair of quarters, odd * 4 + byte]
    ordered = parts.unflatten(-1, (2, 4)).permute(0, 2, 1, 4, 5, 3, 6)
    return ordered.reshape(pieces * PIECE_ROWS, chunks * CHUNK)


def pack_words(place: Tensor) -> Tensor:
    """int32 [R/64, C, 64, 16] of places uint8 [R, 128 C], 0 to 15."""
    return _gathered(place & 7, _LOW) | _gathered(place >> 3, _FOURTH)


def _gathered(bits: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """Of each quad of an even quarter, then of the odd one after it: 4 numbers shifted to their place in a word of 32 bits."""
    rows, columns = bits.shape
    split = bits.view(rows // PIECE_ROWS, PIECE_ROWS, columns // CHUNK, 2, 2, 8, 4)
    # [piece, row, chunk, pair, odd, quad, byte] -> [piece, chunk, row, quad, pair, odd, byte]
    ordered = split.permute(0, 2, 1, 5, 3, 4, 6).flatten(-2)
    words = torch.zeros(ordered.shape[:-1], dtype=torch.int32, device=bits.device)
    for i, shift in enumerate(shifts):
        words |= ordered[..., i].to(torch.int32) << shift
    return words.flatten(-2).contiguous()


def _padded(values_NK: Tensor) -> Tensor:
    rows, columns = values_NK.shape
    return torch.nn.functional.pad(values_NK, (0, -columns % CHUNK, 0, -rows % BLOCK_ROWS))


def _index_words(index_NG: Tensor, weight: QuantizedWeight, to_a_word: int) -> Tensor:
    """What columns after K have does not matter, their activations are zero; but it must be in the table."""
    rows, columns = weight.shape
    groups = -(-(columns + -columns % CHUNK) // weight.scheme.group_size)
    groups += -groups % to_a_word
    padded = torch.nn.functional.pad(index_NG.int(), (0, groups - index_NG.shape[1], 0, -rows % BLOCK_ROWS))
    words = torch.zeros(len(padded), groups // to_a_word, dtype=torch.int32, device=padded.device)
    for i in range(to_a_word):
        words |= padded[:, i::to_a_word] << 32 // to_a_word * i
    return words.T.contiguous()


def _table(weight: QuantizedWeight, level_16: Tensor) -> tuple[Tensor, Tensor]:
    """Which row of the table each group [N, G] has, and the table, uint8 [T, 16], made by the contract."""
    scheme, scale_NG, zero_NG = weight.scheme, weight.group_scale, weight.zero_point
    fp8 = scheme.target.fp8
    if zero_NG is not None:
        pairs, entry = torch.unique(torch.stack((scale_NG, zero_NG), -1).flatten(0, 1), dim=0, return_inverse=True)
        product = fp8_product(level_16, pairs[:, 1:], pairs[:, :1], fp8)
    elif scheme.target.channel_outer_scale and fp8 is E4M3FN:  # scales are FP8 values: each is its byte's row
        entry = scale_NG.to(torch.float8_e4m3fn).view(torch.uint8)
        bytes_ = torch.arange(_E4M3FN_POSITIVE, dtype=torch.uint8, device=scale_NG.device)
        product = fp8_product(level_16, None, bytes_.view(torch.float8_e4m3fn).float()[:, None], fp8)
    else:
        scales, entry = torch.unique(scale_NG, return_inverse=True)
        product = fp8_product(level_16, None, scales[:, None], fp8)
    return entry.view(scale_NG.shape), fp8.encode(product).contiguous()
