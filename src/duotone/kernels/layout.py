# Shapes: N out_features, K in_features, G groups along K, T rows of the table.
"""How a weight lies in memory for the compiled linear: codes, which values each group has, and a table of those.

Every FP8 weight of a group is one of 16 values, whole numbers of some unit, so a table of such sixteens is all that the kernels
need to know of FP8. It is made by the contract. There are two layouts: `blocks` (csrc/linear_kernels.h), of 8 rows and any
table, and `columns` (csrc/linear_avx512vbmi.cpp), of 16 rows, whose table is eight sixteens: those of FP8 scales, whose values
depend on three bits of mantissa but for a power of two.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from duotone.contract import fp8_product
from duotone.formats import E4M3FN
from duotone.qweight import QuantizedWeight, expand_groups
from duotone.scheme import Scheme

#: Rows of a block; the rows of a weight that is not the last of several that share a call are a multiple of it.
BLOCK_ROWS, COLUMN_ROWS = 8, 16
CHUNK = 32
#: Added to the values of a group, in its units, so that they are whole numbers of a byte.
_BIAS = 128
#: E4M3FN bytes 0 to 126 are its values from 0 to 448.
_E4M3FN_POSITIVE = 127
#: Of a scale's power of two, in the layout `columns`: subnormal scales, whose mantissas are shifted up, go down to it.
_LOWEST_EXPONENT = -2
#: Of exponent e: 2^(e - 10).
_UNIT_EXPONENT = -10


class Layout(NamedTuple):
    """A weight's tensors as the op reads them.

    blocks: codes uint8 [N/8, K/32, 4, 2, 16], padded; place uint8 or uint16 [N/8, G, 8], rows of `table`; table uint8 [T, 32]:
    16 values in units of their own, the bias added to them, that unit as a float32 and that bias as an int32, and 8 bytes to
    spare; T at least 256 so that no byte leads out of it. bias: of every row, or -1 where they differ.
    columns: codes uint8 [N/16, K/8, 16, 4], K padded to 32; place uint8 [N/16, G, 16]: a row of `table` times 16 and an
    exponent; table uint8 [8, 16]; bias: of every row.
    """

    codes: Tensor
    place: Tensor
    table: Tensor
    bias: int


def in_blocks(weight: QuantizedWeight) -> Layout:
    """The layout of any weight."""
    row_NG, table, bias = _table(weight)
    index_dtype = torch.uint8 if len(table) <= 256 else torch.uint16
    return Layout(_packed_codes(weight, BLOCK_ROWS), _blocked(row_NG.to(index_dtype), BLOCK_ROWS), table, bias)


def in_columns(weight: QuantizedWeight) -> Layout:
    """The layout of a weight whose scheme has `mantissa_table`."""
    table = mantissa_table(weight.scheme)
    assert table is not None
    row_NG = _mantissa_rows()[weight.group_scale.to(torch.float8_e4m3fn).view(torch.uint8).long()]
    return Layout(_packed_codes(weight, COLUMN_ROWS), _blocked(row_NG, COLUMN_ROWS), table, _BIAS)


def block_values(codes: Tensor, index: Tensor, table: Tensor, group_size: int, shape: tuple[int, int]) -> Tensor:
    """The FP8 operand, float32 [N, K], out of `blocks`."""
    rows, columns = shape
    # [N/8, 4, 2] are a block's rows i and i + 4; bytes 2j + p of a row hold columns 8p + j: see csrc/linear_kernels.h.
    bytes_ = codes.permute(0, 3, 2, 1, 4).flatten(0, 2)  # [8 ceil(N/8), K/32, 16]
    code_NK = torch.stack((bytes_ & 15, bytes_ >> 4), -2).unflatten(-1, (8, 2)).transpose(-1, -2).flatten(1)
    facts = table[:, 16:24].contiguous()
    unit, bias = facts[:, :4].contiguous().view(torch.float32), facts[:, 4:].contiguous().view(torch.int32)
    value_T16 = (table[:, :16].to(torch.int32) - bias) * unit
    row_NG = index.to(torch.int64).transpose(1, 2).flatten(0, 1)[:rows]
    return value_T16[expand_groups(row_NG, group_size, columns), code_NK[:rows, :columns].long()]


def column_values(codes: Tensor, index: Tensor, table: Tensor, group_size: int, shape: tuple[int, int]) -> Tensor:
    """The FP8 operand, float32 [N, K], out of `columns`."""
    rows, columns = shape
    halves = torch.stack((codes & 15, codes >> 4), -2)  # [N/16, K/8, 16, 2, 4]
    code_NK = halves.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :columns]
    row_NG = index.to(torch.int64).transpose(1, 2).flatten(0, 1)[:rows]
    row_NK, unit_NK = (expand_groups(of, group_size, columns) for of in (row_NG // 16, _unit(row_NG)))
    return (table.to(torch.int32) - _BIAS)[row_NK, code_NK.long()] * unit_NK


def merge_tables(tables: Sequence[Tensor], indices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One table for the blocks of several weights, and where in it their groups are."""
    if all(torch.equal(table, tables[0]) for table in tables):
        return tables[0], torch.cat(list(indices))
    begins = [sum(len(table) for table in tables[:i]) for i in range(len(tables))]
    table, row_T = torch.unique(torch.cat(list(tables)), dim=0, return_inverse=True)
    index = torch.cat([row_T[index.long() + begin] for index, begin in zip(indices, begins, strict=True)])
    padded = torch.nn.functional.pad(table, (0, 0, 0, max(0, 256 - len(table))))
    return padded, index.to(torch.uint8 if len(padded) <= 256 else torch.uint16)


def mantissa_table(scheme: Scheme) -> Tensor | None:
    """uint8 [8, 16]: the values of each mantissa of an FP8 scale in the unit of its exponent, plus 128.

    None where values are not of this kind: other scales, zero points, or levels whose products are cut off or rounded where FP8
    ends.
    """
    values = _mantissa_values(scheme)
    return None if values is None else torch.tensor(values, dtype=torch.uint8, device="cpu").view(8, 16)


@lru_cache(maxsize=64)
def _mantissa_values(scheme: Scheme) -> tuple[int, ...] | None:
    """The table as numbers, which nobody can change, whatever mode or device they were first asked for in."""
    if not (scheme.symmetric and scheme.target.channel_outer_scale and scheme.target.fp8 == E4M3FN):
        return None
    with torch.inference_mode(False), torch.device("cpu"):
        row = _mantissa_rows()
        whole = _scale_values(scheme) / _unit(row)[:, None]
        table = whole[8:16]  # scales of exponent 1: each mantissa once
        used = slice(1, int(torch.tensor(scheme.peak_group_scale).to(torch.float8_e4m3fn).view(torch.uint8)) + 1)
        alike = torch.equal(whole[used], table[row.long() // 16][used]) and torch.equal(table, table.round())
        fits = float(table.min()) >= -_BIAS and float(table.max()) < 256 - _BIAS
        return tuple((table + _BIAS).int().flatten().tolist()) if alike and fits else None


def _mantissa_rows() -> Tensor:
    """uint8 [127]: of each positive E4M3FN byte its mantissa times 16 and its exponent above the lowest."""
    byte = torch.arange(_E4M3FN_POSITIVE)
    mantissa, exponent = torch.where(byte < 8, byte, 8 + byte % 8), (byte // 8).clamp(min=1)
    for _ in range(3):  # a subnormal one is shifted up until it is normal
        is_small = (mantissa < 8) & (byte > 0)
        mantissa, exponent = torch.where(is_small, mantissa * 2, mantissa), torch.where(is_small, exponent - 1, exponent)
    above = (exponent - _LOWEST_EXPONENT).clamp(max=15)  # no scale is above the peak of 56, whose exponent is 12
    return (mantissa % 8 * 16 + above).to(torch.uint8)


def _unit(row: Tensor) -> Tensor:
    """What the exponent of a row of the index stands for, float32."""
    return torch.exp2((row % 16).float() + _LOWEST_EXPONENT + _UNIT_EXPONENT)


def _scale_values(scheme: Scheme) -> Tensor:
    """The 16 FP8 values of each positive E4M3FN scale, float32 [127, 16]."""
    scales = torch.arange(_E4M3FN_POSITIVE, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return fp8_product(torch.tensor(scheme.levels, dtype=torch.float32), None, scales[:, None], scheme.target.fp8)


def _packed_codes(weight: QuantizedWeight, block_rows: int) -> Tensor:
    return torch.ops.duotone.pack_codes(weight.codes.contiguous(), block_rows)


def _blocked(row_NG: Tensor, block_rows: int) -> Tensor:
    """[N, G] -> [N / block_rows, G, block_rows], padded."""
    rows, groups = row_NG.shape
    blocks = -(-rows // block_rows)
    index = torch.zeros(blocks * block_rows, groups, dtype=row_NG.dtype)
    index[:rows] = row_NG
    return index.view(blocks, block_rows, groups).transpose(1, 2).contiguous()


def _table(weight: QuantizedWeight) -> tuple[Tensor, Tensor, int]:
    """Which of some sixteens each group [N, G] of a weight has; those, uint8 [T, 32]; their bias, -1 if they differ."""
    scheme, scale_NG, zero_NG = weight.scheme, weight.group_scale, weight.zero_point
    unit = None
    if zero_NG is not None:
        pairs, row = torch.unique(torch.stack((scale_NG, zero_NG), -1).flatten(0, 1), dim=0, return_inverse=True)
        values = fp8_product(torch.tensor(scheme.levels, dtype=torch.float32), pairs[:, 1:], pairs[:, :1], scheme.target.fp8)
    elif scheme.target.channel_outer_scale and scheme.target.fp8 == E4M3FN:  # scales are FP8 values: each is its byte's row
        row = scale_NG.to(torch.float8_e4m3fn).view(torch.uint8)
        values, unit = _scale_values(scheme), _byte_units()
    else:
        scales, row = torch.unique(scale_NG, return_inverse=True)
        values = fp8_product(torch.tensor(scheme.levels, dtype=torch.float32), None, scales[:, None], scheme.target.fp8)
    if unit is None:
        unit = _largest_units(values, scheme.target.fp8.smallest_subnormal)
    table, bias = _sixteens(values, unit)
    table = torch.nn.functional.pad(table, (0, 0, 0, max(0, 256 - len(table))))
    return row.view(scale_NG.shape), table, int(bias[0]) if bool((bias == bias[0]).all()) else -1


def _byte_units() -> Tensor:
    """Of the rows that FP8 bytes have: one for each exponent, which the kernel reads from the byte (csrc/linear_kernels.h).

    A scale is at most 15 such units and a level at most 8, so no value is more than 120.
    """
    return torch.ldexp(torch.ones(_E4M3FN_POSITIVE, dtype=torch.float32), torch.arange(_E4M3FN_POSITIVE) // 8 + _UNIT_EXPONENT)


def _largest_units(values: Tensor, step: float) -> Tensor:
    """Of each row [T, 16] of FP8 values, multiples of `step`: the largest power of two that divides all of them."""
    steps = (values / step).to(torch.int32)
    bits = steps[:, 0]
    for i in range(1, steps.shape[1]):
        bits = bits | steps[:, i]
    return torch.where(bits == 0, 1, bits & -bits).float() * step


def _sixteens(values: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the table for FP8 values [T, 16] that are whole numbers of a unit [T], and their biases.

    FP8 has four significant bits and no level is more than 15 times another, so they span at most 240 units and what the
    rounding of both ends adds, which a byte holds.
    """
    value = (values / unit[:, None]).to(torch.int32)
    lowest, highest = value.amin(1), value.amax(1)
    bias = torch.where((lowest >= -_BIAS) & (highest < 256 - _BIAS), _BIAS, -lowest)
    biased = value + bias[:, None]
    if int(biased.max()) > 255:
        raise AssertionError("a group's FP8 values span more than 255 of their units")
    facts = torch.stack((unit.view(torch.int32), bias.to(torch.int32)), 1)
    spare = torch.zeros(len(values), 8, dtype=torch.uint8)
    return torch.cat((biased.to(torch.uint8), facts.view(torch.uint8), spare), 1), bias
