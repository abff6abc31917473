# Shapes: M tokens, N out_features, K in_features, G groups along K, T rows of the table.
"""The W4A8 linear on a CPU, 4-bit codes all the way to the registers: csrc/linear.cpp, with a path for each instruction set.

Every FP8 weight of a group is one of 16 values, so a weight is its codes, a table of such sixteens, and for each group the
number of its row. The table is made by the contract; the compiled code knows nothing of FP8 products. All paths add up in one
order, the same for any number of tokens and threads, and give the same bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.contract import fp8_product
from duotone.kernels import native
from duotone.qweight import QuantizedWeight, expand_groups
from duotone.scheme import Scheme, Target

NAME = "cpu"
#: In the order of csrc/linear.cpp's enum Path, the fastest last.
PATHS = ("portable", "avx2", "avx512")
_BLOCK_ROWS, _CHUNK = 4, 32


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the op reads it: the only copy there is.

    codes: uint8 [N/4, K/32, 4, 16], padded. index: uint8 or uint16 [N/4, G, 4], rows of `table`. table: uint8 [T, 32], the low
    and then the high bytes of 16 BF16 values, T at least 256 so that no byte leads out of it. outer_scale: float32 [N].
    input_scale: static activation scale or None.
    """

    codes: Tensor
    index: Tensor
    table: Tensor
    outer_scale: Tensor
    input_scale: Tensor | None
    in_features: int
    group_size: int
    target: Target
    path: int


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


def _path() -> int:
    """The fastest, unless DUOTONE_NATIVE names another."""
    return PATHS.index(native.asked_path() or paths()[-1])


def prepack(weight: QuantizedWeight) -> Packed:
    """The form this backend multiplies."""
    scheme, (rows, columns) = weight.scheme, weight.shape
    row_NG, table = _table(weight)
    groups, blocks = row_NG.shape[1], -(-rows // _BLOCK_ROWS)
    index = torch.zeros(blocks * _BLOCK_ROWS, groups, dtype=torch.uint8 if len(table) <= 256 else torch.uint16)
    index[:rows] = row_NG.to(index.dtype)
    return Packed(
        torch.ops.duotone.pack_codes(weight.codes.contiguous()),
        index.view(blocks, _BLOCK_ROWS, groups).transpose(1, 2).contiguous(),
        table,
        weight.outer_scale.expand(rows).contiguous(),
        weight.input_scale,
        columns,
        scheme.group_size,
        scheme.target,
        _path(),
    )


def _table(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """The distinct sixteens of a weight, uint8 [T, 32], and which of them each group [N, G] has."""
    scheme, scale_NG, zero_NG = weight.scheme, weight.group_scale, weight.zero_point
    if zero_NG is None:
        scales, row = torch.unique(scale_NG, return_inverse=True)
        zeros = None
    else:
        pairs, row = torch.unique(torch.stack((scale_NG, zero_NG), -1).flatten(0, 1), dim=0, return_inverse=True)
        scales, zeros = pairs[:, 0], pairs[:, 1:]
    levels = torch.tensor(scheme.levels)
    values = fp8_product(levels, zeros, scales[:, None], scheme.target.fp8).to(torch.bfloat16).view(torch.int16)
    low, high = values & 255, values >> 8 & 255
    table = torch.cat((low, high), 1).to(torch.uint8)
    return row.view(scale_NG.shape), torch.nn.functional.pad(table, (0, 0, 0, max(0, 256 - len(table))))


def values(packed: Packed) -> Tensor:
    """The FP8 operand, float32 [N, K], out of what is packed."""
    rows, columns = len(packed.outer_scale), packed.in_features
    bytes_ = packed.codes.transpose(1, 2).flatten(0, 1)  # [4 ceil(N/4), K/32, 16]
    codes = torch.stack((bytes_ & 15, bytes_ >> 4), -2)
    # Byte 2j + p of eight holds column 4p + j: see csrc/linear_kernels.h.
    code_NK = codes.unflatten(-1, (2, 4, 2)).transpose(-1, -2).flatten(1)[:rows, :columns]
    low, high = packed.table.to(torch.int32).chunk(2, 1)
    table = (high << 24 | low << 16).view(torch.float32)
    row_NG = packed.index.to(torch.int64).transpose(1, 2).flatten(0, 1)[:rows]
    return table[expand_groups(row_NG, packed.group_size, columns), code_NK.long()]


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """What `reference.linear` computes, with sums in an order of its own; x [..., K] -> [..., N]."""
    native_type = x.dtype in (torch.bfloat16, torch.float32)
    fused = bias if native_type and bias is not None and bias.dtype == x.dtype else None
    rows = x.reshape(-1, packed.in_features).contiguous()
    y = torch.ops.duotone.linear(
        rows if native_type else rows.float(),
        packed.codes,
        packed.index,
        packed.table,
        packed.outer_scale,
        packed.input_scale,
        fused,
        packed.in_features,
        packed.group_size,
        packed.target.fp8.max,
        packed.target.smallest_activation_scale,
        packed.path,
    )
    y = y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)
    return y if bias is None or fused is not None else y + bias
