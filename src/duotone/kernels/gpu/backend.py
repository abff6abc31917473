# Shapes: M tokens, N out_features, K in_features.
"""The W4A8 linear on NVIDIA GPUs that multiply FP8: Ada, Hopper, Blackwell. A backend as `dispatch` knows them.

Nothing of Triton is imported before a weight is to run on such a GPU. Before the first one does, `trial` compares the kernels
with the contract there: no part of this has ever run on a GPU of ours.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch
from torch import Tensor

from duotone.kernels.gpu import layout
from duotone.qweight import QuantizedWeight, runnable_input_scale
from duotone.scheme import AnyScheme, Fp8Scheme, Scheme

NAME = "triton"
#: The kind of device that its weights stay on.
DEVICE: str | None = "cuda"
#: The first with FP8 products of this kind: Ada.
_CAPABILITY = (8, 9)
_OLDEST = (3, 6)
#: Columns that share a lookup: a group is some of these, and some chunks, or chunks some groups.
_QUARTER = 32
#: What `linear` reads as it is.
NATIVE = (torch.bfloat16, torch.float16, torch.float32)
#: Columns of a row that a program holds in registers, to norm it.
MOST_NORMED = 2**14


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the op reads it: the only copy there is.

    codes, index, table, to_a_word, is_signed: as in `layout.Layout`, whose entries are the index. outer_scale: float32 [N].
    input_scale: static activation scale or None. parts: the rows of each of several weights in one. norm: [K], of the RMS norm
    that inputs go through first, and its epsilon, where this weight does that too (`with_norm`).
    """

    codes: Tensor
    index: Tensor
    table: Tensor
    to_a_word: int
    is_signed: bool
    outer_scale: Tensor
    input_scale: Tensor | None
    in_features: int
    group_size: int
    fp8_max: float
    smallest_scale: float
    parts: tuple[int, ...] = ()
    norm: Tensor | None = None
    epsilon: float = 0.0


def refuses(scheme: AnyScheme, device: torch.device) -> str | None:
    """Why this backend cannot run weights of a scheme on a device, or None."""
    if isinstance(scheme, Fp8Scheme):
        return "multiplies 4-bit codes, not FP8 weights"
    return device_refuses(device) or _scheme_refuses(scheme) or _trial(scheme, device)


def device_refuses(device: torch.device) -> str | None:
    """Why none of these kernels runs on a device, or None."""
    if device.type != DEVICE:
        return f"runs on NVIDIA GPUs, not on {device.type}"
    if reason := missing_triton():
        return reason
    if torch.version.hip is not None:
        return "runs on NVIDIA GPUs; AMD's MI300 multiplies another FP8 (FNUZ), and these kernels would fall back to FP16 there"
    if not torch.cuda.is_available():
        return "found no NVIDIA GPU"
    if (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} does not multiply FP8: found compute capability {found[0]}.{found[1]}, expected 8.9 or higher"
    return None


def missing_triton() -> str | None:
    """Why there is no Triton to compile programs with, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'triton>=3.6' brings it"
    if tuple(int(part) for part in version("triton").split(".")[:2]) < _OLDEST:
        return f"found triton {version('triton')}, expected 3.6 or newer"
    return None


def _scheme_refuses(scheme: Scheme) -> str | None:
    size = scheme.group_size
    if size % _QUARTER or (layout.CHUNK % size and size % layout.CHUNK):
        return f"group_size: found {size}, expected 32, 64 or a multiple of 128"
    return None


def _trial(scheme: Scheme, device: torch.device) -> str | None:
    from duotone.kernels.gpu import trial

    return trial.fault(scheme.group_size, device)


def describe(scheme: Scheme) -> str:
    """What will run, for people."""
    del scheme
    return "compiled by Triton for this GPU; prompts through torch's FP8 product"


def path_refusals(scheme: Scheme) -> list[str]:
    """Why no faster path will run: there is one only."""
    del scheme
    return []


def prepack(weight: QuantizedWeight) -> Packed:
    """The form this backend multiplies, on the weight's device. Raises ValueError when a static activation scale is missing."""
    target, (rows, columns) = weight.scheme.target, weight.shape
    return Packed(
        *layout.pack(weight),
        weight.outer_scale.expand(rows).contiguous(),
        runnable_input_scale(weight),
        columns,
        weight.scheme.group_size,
        target.fp8.max,
        target.smallest_activation_scale,
    )


def values(packed: Packed) -> Tensor:
    """The FP8 operand, float32 [N, K], out of what is packed."""
    kept = layout.Layout(packed.codes, packed.index, packed.table, packed.to_a_word, packed.is_signed)
    bytes_ = layout.values(kept, packed.group_size)
    return bytes_[: len(packed.outer_scale), : packed.in_features].view(torch.float8_e4m3fn).float()


def can_merge(weights: Sequence[Packed]) -> bool:
    """Whether weights may be one: alike but for codes and outer scales, and each but the last of whole blocks."""
    first = weights[0]
    facts = ("in_features", "group_size", "fp8_max", "smallest_scale", "to_a_word", "is_signed")
    scales = [None if weight.input_scale is None else float(weight.input_scale) for weight in weights]
    return (
        all(getattr(weight, fact) == getattr(first, fact) for weight in weights for fact in facts)
        and all(scale == scales[0] for scale in scales)
        and all(len(weight.outer_scale) % layout.BLOCK_ROWS == 0 for weight in weights[:-1])
        and all(torch.equal(weight.table, first.table) for weight in weights)
    )


def merge(weights: Sequence[Packed]) -> Packed:
    """Weights that read the same input as one, their rows one after the other (see `can_merge`)."""
    return replace(
        weights[0],
        codes=torch.cat([weight.codes for weight in weights]),
        index=torch.cat([weight.index for weight in weights], 1),
        outer_scale=torch.cat([weight.outer_scale for weight in weights]),
        parts=tuple(len(weight.outer_scale) for weight in weights),
    )


def split(merged: Packed) -> list[Packed]:
    """The weights that a merged one is made of: copies of the index, views of all else."""
    weights: list[Packed] = []
    row = 0
    for rows in merged.parts:
        blocks = -(-rows // layout.BLOCK_ROWS) * layout.BLOCK_ROWS
        codes = merged.codes[row // layout.PIECE_ROWS : (row + blocks) // layout.PIECE_ROWS]
        index, outer = merged.index[:, row : row + blocks].contiguous(), merged.outer_scale[row : row + rows]
        weights.append(replace(merged, codes=codes, index=index, outer_scale=outer, parts=()))
        row += rows
    return weights


def with_norm(packed: Packed, weight: Tensor, epsilon: float) -> Packed:
    """A weight whose inputs are normed as transformers' LlamaRMSNorm does, in the same launch that quantizes them.

    weight: the norm's, [K], no more than `MOST_NORMED` of them.
    """
    return replace(packed, norm=weight, epsilon=epsilon)


def norm_of(x: Tensor, norm: Tensor | None, epsilon: float) -> tuple[Tensor, float] | tuple[()]:
    """A norm in the dtype that its weight has in a model which gives such an x, for an op; nothing where there is none."""
    return () if norm is None else (norm.to(x.dtype), epsilon)


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """What `reference.linear` computes, but for the order of its sums; x [..., K] -> [..., N]."""
    from duotone.kernels.gpu import launch

    if x.dtype not in NATIVE:
        y = linear(x.float(), packed).to(x.dtype)
        return y if bias is None else y + bias
    fused = bias if bias is not None and bias.dtype == x.dtype else None
    y = launch.linear(
        x,
        packed.codes,
        packed.index,
        packed.table,
        packed.outer_scale,
        packed.input_scale,
        fused,
        packed.to_a_word,
        packed.is_signed,
        packed.group_size,
        packed.fp8_max,
        packed.smallest_scale,
        *norm_of(x, packed.norm, packed.epsilon),
    )
    return y if bias is None or fused is not None else y + bias


def linears(x: Tensor, merged: Packed) -> tuple[Tensor, ...]:
    """The products with each part of a merged weight: x [..., K] -> [..., rows], views of one tensor."""
    return linear(x, merged).split(merged.parts, -1)
