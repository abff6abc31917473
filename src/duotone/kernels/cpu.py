# Shapes: M tokens, N out_features, K in_features, G groups along K.
"""The W4A8 linear on a CPU, 4-bit codes all the way to the registers: csrc/linear.cpp, with a path for each instruction set.

A weight is its codes, a table of the values that they stand for, and for each group its place there (`layout`). The compiled
code knows nothing of FP8 products. It multiplies whole numbers, 8 bits of a weight by 16 of an activation, exactly
(csrc/linear_kernels.h): all paths give the same bits, for any number of tokens and threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from duotone.kernels import layout, native
from duotone.qweight import QuantizedWeight, runnable_input_scale
from duotone.scheme import AnyScheme, Fp8Scheme, Scheme

NAME = "cpu"
#: The kind of device that its weights stay on.
DEVICE: str | None = "cpu"
#: In the order of csrc/linear.cpp's enum Path, the fastest last.
PATHS = ("portable", "avx2", "avx512", "avx512vnni", "avx512vbmi")
#: Has a layout of its own, for which weights must be of one kind.
_BY_COLUMNS = PATHS.index("avx512vbmi")
_NATIVE = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the op reads it: the only copy there is.

    codes, index, table, bias: as in `layout.Layout`, where the index is its place. outer_scale: float32 [N]. input_scale:
    static activation scale or None. path: the number of an instruction set, which also says the layout. parts: the rows of
    each of several weights in one.
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

    @property
    def block_rows(self) -> int:
        """Of its layout."""
        return layout.COLUMN_ROWS if self.path == _BY_COLUMNS else layout.BLOCK_ROWS


def paths() -> list[str]:
    """The paths that this machine can run, the fastest last."""
    found = int(torch.ops.duotone.linear_paths())
    return [name for number, name in enumerate(PATHS) if found >> number & 1]


def refuses(scheme: AnyScheme, device: torch.device) -> str | None:
    """Why this backend cannot run weights of a scheme on a device, or None."""
    if isinstance(scheme, Fp8Scheme):
        return "multiplies 4-bit codes, not FP8 weights"
    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    reason = native.unavailable()
    if reason is not None:
        return reason
    asked = native.asked_path()
    if asked is not None and asked not in paths():
        return f"DUOTONE_NATIVE={asked}, and this machine runs {', '.join(paths())}"
    if asked is not None and (reason := _path_refuses(asked, scheme)):
        return f"DUOTONE_NATIVE={asked}, which {reason}"
    size = scheme.group_size
    return None if size % layout.CHUNK == 0 else f"group_size: found {size}, expected a multiple of {layout.CHUNK}"


def describe(scheme: Scheme) -> str:
    """What will run, for people."""
    return f"compiled for CPUs, {PATHS[_path(scheme)]}"


def path_refusals(scheme: Scheme) -> list[str]:
    """Why no faster path than the one taken will run: a sentence each, the fastest first."""
    there, asked = paths(), native.asked_path()

    def reason(name: str) -> str:
        if name not in there:
            return "this machine lacks it"
        return f"DUOTONE_NATIVE={asked}" if asked else _path_refuses(name, scheme) or ""

    return [f"{name}: {reason(name)}" for name in reversed(PATHS[_path(scheme) + 1 :])]


def _path(scheme: Scheme) -> int:
    """The fastest that takes the scheme, unless DUOTONE_NATIVE names another."""
    able = [name for name in paths() if _path_refuses(name, scheme) is None]
    return PATHS.index(native.asked_path() or able[-1])


def _path_refuses(name: str, scheme: Scheme) -> str | None:
    """Why a path cannot multiply weights of a scheme, or None."""
    if PATHS.index(name) == _BY_COLUMNS and layout.mantissa_table(scheme) is None:
        return "needs INT4 codes without zero points and FP8 group scales (target hopper)"
    return None


def prepack(weight: QuantizedWeight, path: str | None = None) -> Packed:
    """The form this backend multiplies, for a path of its own choice or the one named.

    Raises ValueError when a static activation scale is missing or the path does not take such weights.
    """
    scheme, (rows, columns) = weight.scheme, weight.shape
    number = _path(scheme) if path is None else PATHS.index(path)
    if reason := _path_refuses(PATHS[number], scheme):
        raise ValueError(f"{PATHS[number]} {reason}")
    return Packed(
        *(layout.in_columns(weight) if number == _BY_COLUMNS else layout.in_blocks(weight)),
        weight.outer_scale.expand(rows).contiguous(),
        runnable_input_scale(weight),
        columns,
        scheme.group_size,
        scheme.target.fp8.max,
        scheme.target.smallest_activation_scale,
        number,
    )


def values(packed: Packed) -> Tensor:
    """The FP8 operand, float32 [N, K], out of what is packed."""
    read = layout.column_values if packed.path == _BY_COLUMNS else layout.block_values
    shape = (len(packed.outer_scale), packed.in_features)
    return read(packed.codes, packed.index, packed.table, packed.group_size, shape)


def can_merge(weights: Sequence[Packed]) -> bool:
    """Whether weights may be one: same groups and target, the same static scale, and each but the last of whole blocks."""
    first = weights[0]
    facts = ("in_features", "group_size", "fp8_max", "smallest_scale", "path")
    scales = [None if weight.input_scale is None else float(weight.input_scale) for weight in weights]
    return (
        all(getattr(weight, fact) == getattr(first, fact) for weight in weights for fact in facts)
        and all(scale == scales[0] for scale in scales)
        and all(len(weight.outer_scale) % weight.block_rows == 0 for weight in weights[:-1])
        and (first.path != _BY_COLUMNS or all(torch.equal(weight.table, first.table) for weight in weights))
    )


def merge(weights: Sequence[Packed]) -> Packed:
    """Weights that read the same input as one, their rows one after the other (see `can_merge`)."""
    table, index = layout.merge_tables([weight.table for weight in weights], [weight.index for weight in weights])
    biases = {weight.bias for weight in weights}
    return replace(
        weights[0],
        codes=torch.ops.duotone.join_codes([weight.codes for weight in weights]),
        index=index,
        table=table,
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
        blocks = slice(row // merged.block_rows, -(-(row + rows) // merged.block_rows))
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
    y = torch.ops.duotone.linear.default(
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
