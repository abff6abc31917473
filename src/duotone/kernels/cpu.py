# Shapes: M tokens, N out_features, K in_features, G groups along K, T rows of the table.
"""The W4A8 linear on a CPU, 4-bit codes all the way to the registers: csrc/linear.cpp, with a path for each instruction set.

Every FP8 weight of a group is one of 16 values, so a weight is its codes, a table of such sixteens, and for each group the
number of its row. The table is made by the contract; the compiled code knows nothing of FP8 products. It multiplies whole
numbers, 8 bits of a weight by 16 of an activation, exactly (csrc/linear_kernels.h): all paths give the same bits, for any
number of tokens and threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from duotone.contract import fp8_product
from duotone.formats import E4M3FN
from duotone.kernels import native
from duotone.qweight import QuantizedWeight, expand_groups, runnable_input_scale
from duotone.scheme import Scheme

NAME = "cpu"
#: In the order of csrc/linear.cpp's enum Path, the fastest last.
PATHS = ("portable", "avx2", "avx512", "avx512vnni")
_BLOCK_ROWS, _CHUNK = 8, 32
_NATIVE = (torch.bfloat16, torch.float32)
#: Added to the values of a group, in its units, so that they are whole numbers of a byte.
_BIAS = 128
#: E4M3FN bytes 0 to 126 are its values from 0 to 448.
_E4M3FN_POSITIVE = 127


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the op reads it: the only copy there is.

    codes: uint8 [N/8, K/32, 4, 2, 16], padded. index: uint8 or uint16 [N/8, G, 8], rows of `table`. table: uint8 [T, 32]: 16
    values in units of their own, the bias added to them, that unit as a float32 and that bias as an int32, and 8 bytes to
    spare; T at least 256 so that no byte leads out of it. bias: of every row, or -1 where they differ. outer_scale: float32
    [N]. input_scale: static activation scale or None.
    """

    codes: Tensor
    index: Tensor
    table: Tensor
    bias: int
    outer_scale: Tensor
    input_scale: Tensor | None
    in_features: int
    group_size: int
    fp8_max: float
    smallest_scale: float
    path: int
    parts: Tensor | None = None

    @cached_property
    def rows(self) -> list[int]:
        """Of each weight."""
        return [len(self.outer_scale)] if self.parts is None else self.parts.tolist()


def paths() -> list[str]:
    """The paths that this machine can run, the fastest last."""
    found = int(torch.ops.duotone.linear_paths())
    return [name for number, name in enumerate(PATHS) if found >> number & 1]


def refuses(scheme: Scheme, device: torch.device) -> str | None:
    """Why this backend cannot run weights of a scheme on a device, or None."""
    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    reason = native.unavailable()
    if reason is not None:
        return reason
    asked = native.asked_path()
    if asked is not None and asked not in paths():
        return f"DUOTONE_NATIVE={asked}, and this machine runs {', '.join(paths())}"
    size = scheme.group_size
    return None if size % _CHUNK == 0 else f"group_size: found {size}, expected a multiple of {_CHUNK}"


def describe() -> str:
    """What will run, for people."""
    return f"compiled for CPUs, {PATHS[_path()]}"


def path_refusals() -> list[str]:
    """Why no faster path than the one taken will run: a sentence each, the fastest first."""
    there, asked = paths(), native.asked_path()
    faster = reversed(PATHS[_path() + 1 :])
    return [f"{name}: " + (f"DUOTONE_NATIVE={asked}" if name in there else "this machine lacks it") for name in faster]


def _path() -> int:
    """The fastest, unless DUOTONE_NATIVE names another."""
    return PATHS.index(native.asked_path() or paths()[-1])


def prepack(weight: QuantizedWeight) -> Packed:
    """The form this backend multiplies. Raises ValueError when a static activation scale is missing."""
    scheme, (rows, columns) = weight.scheme, weight.shape
    row_NG, table, bias = _table(weight)
    groups, blocks = row_NG.shape[1], -(-rows // _BLOCK_ROWS)
    index = torch.zeros(blocks * _BLOCK_ROWS, groups, dtype=torch.uint8 if len(table) <= 256 else torch.uint16)
    index[:rows] = row_NG.to(index.dtype)
    return Packed(
        torch.ops.duotone.pack_codes(weight.codes.contiguous()),
        index.view(blocks, _BLOCK_ROWS, groups).transpose(1, 2).contiguous(),
        table,
        bias,
        weight.outer_scale.expand(rows).contiguous(),
        runnable_input_scale(weight),
        columns,
        scheme.group_size,
        scheme.target.fp8.max,
        scheme.target.smallest_activation_scale,
        _path(),
    )


def _table(weight: QuantizedWeight) -> tuple[Tensor, Tensor, int]:
    """Which of some sixteens each group [N, G] of a weight has; those, uint8 [T, 32]; their bias, -1 if they differ."""
    scheme, scale_NG, zero_NG = weight.scheme, weight.group_scale, weight.zero_point
    zeros, unit = None, None
    if zero_NG is not None:
        pairs, row = torch.unique(torch.stack((scale_NG, zero_NG), -1).flatten(0, 1), dim=0, return_inverse=True)
        scales, zeros = pairs[:, 0], pairs[:, 1:]
    elif scheme.target.channel_outer_scale and scheme.target.fp8 is E4M3FN:  # scales are FP8 values: each is its byte's row
        row = scale_NG.to(torch.float8_e4m3fn).view(torch.uint8)
        scales = torch.arange(_E4M3FN_POSITIVE, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        unit = _byte_units()
    else:
        scales, row = torch.unique(scale_NG, return_inverse=True)
    values = fp8_product(torch.tensor(scheme.levels), zeros, scales[:, None], scheme.target.fp8)
    if unit is None:
        unit = _largest_units(values, scheme.target.fp8.smallest_subnormal)
    table, bias = _sixteens(values, unit)
    table = torch.nn.functional.pad(table, (0, 0, 0, max(0, 256 - len(table))))
    return row.view(scale_NG.shape), table, int(bias[0]) if bool((bias == bias[0]).all()) else -1


def _byte_units() -> Tensor:
    """Of the rows that FP8 bytes have: one for each exponent, which the kernel reads from the byte (csrc/linear_kernels.h).

    A scale is at most 15 such units and a level at most 8, so no value is more than 120.
    """
    return torch.ldexp(torch.ones(_E4M3FN_POSITIVE), torch.arange(_E4M3FN_POSITIVE) // 8 - 10)


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


def values(packed: Packed) -> Tensor:
    """The FP8 operand, float32 [N, K], out of what is packed."""
    rows, columns = len(packed.outer_scale), packed.in_features
    # [N/8, 4, 2] are a block's rows i and i + 4; bytes 2j + p of a row hold columns 8p + j: see csrc/linear_kernels.h.
    bytes_ = packed.codes.permute(0, 3, 2, 1, 4).flatten(0, 2)  # [8 ceil(N/8), K/32, 16]
    codes = torch.stack((bytes_ & 15, bytes_ >> 4), -2)
    code_NK = codes.unflatten(-1, (8, 2)).transpose(-1, -2).flatten(1)[:rows, :columns]
    facts = packed.table[:, 16:24].contiguous()
    unit, bias = facts[:, :4].contiguous().view(torch.float32), facts[:, 4:].contiguous().view(torch.int32)
    table = (packed.table[:, :16].to(torch.int32) - bias) * unit
    row_NG = packed.index.to(torch.int64).transpose(1, 2).flatten(0, 1)[:rows]
    return table[expand_groups(row_NG, packed.group_size, columns), code_NK.long()]


def can_merge(weights: Sequence[Packed]) -> bool:
    """Whether weights may be one: same groups and target, the same static scale, and each but the last of whole blocks."""
    first = weights[0]
    facts = ("in_features", "group_size", "fp8_max", "smallest_scale", "path")
    scales = [None if weight.input_scale is None else float(weight.input_scale) for weight in weights]
    return (
        all(getattr(weight, fact) == getattr(first, fact) for weight in weights for fact in facts)
        and all(scale == scales[0] for scale in scales)
        and all(len(weight.outer_scale) % _BLOCK_ROWS == 0 for weight in weights[:-1])
    )


def merge(weights: Sequence[Packed]) -> Packed:
    """Weights that read the same input as one, their rows one after the other (see `can_merge`)."""
    table, index = weights[0].table, [weight.index for weight in weights]
    if any(not torch.equal(weight.table, table) for weight in weights):
        begins = [sum(len(weight.table) for weight in weights[:i]) for i in range(len(weights))]
        table, row_T = torch.unique(torch.cat([weight.table for weight in weights]), dim=0, return_inverse=True)
        index = [row_T[weight.index.long() + begin] for weight, begin in zip(weights, begins, strict=True)]
    wide = len(table) > 256
    biases = {weight.bias for weight in weights}
    return replace(
        weights[0],
        codes=torch.cat([weight.codes for weight in weights]),
        index=torch.cat(index).to(torch.uint16 if wide else torch.uint8),
        table=torch.nn.functional.pad(table, (0, 0, 0, max(0, 256 - len(table)))),
        bias=biases.pop() if len(biases) == 1 else -1,
        outer_scale=torch.cat([weight.outer_scale for weight in weights]),
        parts=torch.tensor([len(weight.outer_scale) for weight in weights]),
    )


def split(merged: Packed) -> list[Packed]:
    """The weights that a merged one is made of: views, no copies."""
    assert merged.parts is not None
    weights: list[Packed] = []
    row = 0
    for rows in merged.rows:
        blocks = slice(row // _BLOCK_ROWS, -(-(row + rows) // _BLOCK_ROWS))
        outer = merged.outer_scale[row : row + rows]
        weights.append(replace(merged, codes=merged.codes[blocks], index=merged.index[blocks], outer_scale=outer, parts=None))
        row += rows
    return weights


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """What `reference.linear` computes, with exact sums of segments; x [..., K] -> [..., N]."""
    fused = bias if bias is not None and bias.dtype == x.dtype else None
    if x.dtype not in _NATIVE:
        y = linear(x.float(), packed).to(x.dtype)
        return y if bias is None else y + bias
    y = torch.ops.duotone.linear(
        x if x.is_contiguous() else x.contiguous(),
        packed.codes,
        packed.index,
        packed.table,
        packed.outer_scale,
        packed.input_scale,
        fused,
        packed.parts,
        packed.in_features,
        packed.group_size,
        packed.bias,
        packed.fp8_max,
        packed.smallest_scale,
        packed.path,
    )
    return y if bias is None or fused is not None else y + bias


def linears(x: Tensor, merged: Packed) -> tuple[Tensor, ...]:
    """The products with each part of a merged weight: x [..., K] -> [..., rows]."""
    assert merged.parts is not None
    flat, tokens = linear(x, merged), x.numel() // merged.in_features
    if tokens == 1:  # the same bytes, in fewer steps
        return flat.view(*x.shape[:-1], -1).split(merged.rows, -1)
    parts = flat.split([tokens * rows for rows in merged.rows])
    return tuple(part.view(*x.shape[:-1], rows) for part, rows in zip(parts, merged.rows, strict=True))
