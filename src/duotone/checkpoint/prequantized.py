# Shapes: E experts, N out_features, K in_features, G blocks of 32 along K.
# JSON comes without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Models that are published in fewer bits than BF16, seen as the BF16 weights that these bits stand for.

GPT-OSS comes with its experts in MXFP4, DeepSeek-V3 and many after it in FP8 with a scale for every 128 x 128 weights: nobody
but their makers has anything wider. Tensors are widened when they are loaded, so that a block at a time is in memory.

MXFP4: OCP Microscaling Formats 1.0. FP8 blocks: `weight_dequant` of DeepSeek-V3's inference/kernel.py.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.source import Source
from duotone.errors import DuotoneError

#: E2M1: the eight magnitudes of a 4-bit float, then the same below zero.
_FP4 = tuple(sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
_EXPONENT_BIAS = 127
_MX_BLOCK = 32
_SCALES = {"F32", "BF16", "F16", "F8_E8M0"}


@dataclass(frozen=True)
class _Stored:
    """How a weight is stored: in two tensors of the folder. block: the rows and columns of FP8 that share a scale."""

    codes: str
    scales: str
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class WidenedSource:
    """A folder whose narrow weights are loaded as BF16. stored: these weights, by the names they have in a folder of BF16."""

    original: Source
    tensors: dict[str, TensorSpec]
    stored: dict[str, _Stored]

    @property
    def path(self) -> Path:
        """The folder."""
        return self.original.path

    @property
    def config(self) -> dict[str, Any]:
        """config.json, of a model in BF16."""
        return {key: value for key, value in self.original.config.items() if key != "quantization_config"}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self.original.weight_bytes

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, one at a time. Raises DuotoneError as the folder does."""
        return {name: self._load(name) for name in names}

    def _load(self, name: str) -> Tensor:
        stored = self.stored.get(name)
        if stored is None:
            return self.original.load((name,))[name]
        found = self.original.load((stored.codes, stored.scales))
        codes, scales = found[stored.codes], found[stored.scales]
        return from_mxfp4(codes, scales) if stored.block is None else from_fp8(codes, scales, stored.block)

    def written_as(self, name: str) -> str:
        """The same name."""
        return name

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG002 - the protocol's
        """The same tensor: it is written in BF16."""
        return tensor


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [E, N, G, 16], the even ones of two values in the lower half, and exponents [E, N, G] -> BF16 [E, K, N].

    Exact. transformers' banks of GPT-OSS lie as [E, in, out].
    """
    pairs = torch.tensor([(_FP4[byte & 15], _FP4[byte >> 4]) for byte in range(256)])
    experts, rows, groups, _ = blocks.shape
    out_EKN = torch.empty(experts, groups * _MX_BLOCK, rows, dtype=torch.bfloat16)
    for wide_KN, block_NGB, scale_NG in zip(out_EKN, blocks, scales, strict=True):
        values_NGK = pairs[block_NGB.int()].flatten(-2)
        wide_KN.copy_(torch.ldexp(values_NGK, scale_NG.int().sub_(_EXPONENT_BIAS)[..., None]).flatten(1).T)
    return out_EKN


def from_fp8(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """E4M3 [..., N, K] times a scale for every `block` of rows and columns, the last ones cut short -> BF16 [..., N, K]."""
    rows, columns = codes.shape[-2:]
    codes_XNK, scales_Xnk = codes.reshape(-1, rows, columns), scales.reshape(-1, *_grid(codes.shape, block)[-2:])
    wide_XNK = torch.empty(codes_XNK.shape, dtype=torch.bfloat16)
    for wide_NK, code_NK, scale_nk in zip(wide_XNK, codes_XNK, scales_Xnk, strict=True):
        scale_NK = scale_nk.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        wide_NK.copy_(scale_NK.mul_(code_NK.float()))
    return wide_XNK.view(codes.shape)


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """How many scales there are each way."""
    return *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def original_weights(source: Source) -> Source:
    """The weights to quantize. Raises DuotoneError for a folder that is quantized in another way than those of this file."""
    source = widened(source)
    found = source.config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise DuotoneError(f"{source.path}: is already quantized ({method}), expected original weights")
    return source


def widened(source: Source) -> Source:
    """A folder in MXFP4 or FP8 blocks as one in BF16; any other as it is.

    Raises DuotoneError where a weight and its scales do not belong together.
    """
    found: Any = source.config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    stored: dict[str, _Stored] = {}
    if method == "mxfp4":
        stored = _mxfp4_weights(source)
    elif method == "fp8":
        stored = _fp8_weights(source, found.get("weight_block_size"))
    if not stored:
        return source
    narrow = {name for weight in stored.values() for name in (weight.codes, weight.scales)}
    narrow.update(name for name in source.tensors if name.endswith("activation_scale"))  # what an FP8 kernel rounds inputs by
    tensors = {name: spec for name, spec in source.tensors.items() if name not in narrow}
    for name, weight in stored.items():
        shape = source.tensors[weight.codes].shape
        shape = shape if weight.block is not None else (shape[0], shape[2] * _MX_BLOCK, shape[1])
        tensors[name] = TensorSpec("BF16", shape, source.tensors[weight.codes].file)
    return WidenedSource(source, tensors, stored)


def _mxfp4_weights(source: Source) -> dict[str, _Stored]:
    """Banks of experts by their names, from `_blocks` and `_scales`."""
    found: dict[str, _Stored] = {}
    for blocks, spec in source.tensors.items():
        if not blocks.endswith("_blocks"):
            continue
        name = blocks.removesuffix("_blocks")
        scales = source.tensors.get(f"{name}_scales")
        if len(spec.shape) != 4 or spec.shape[-1] != _MX_BLOCK // 2 or spec.dtype != "U8":
            raise _unfit(source, blocks, f"is {_told(spec)}, expected U8 [experts, out, in / 32, 16]")
        if scales is None or scales.shape != spec.shape[:-1] or scales.dtype != "U8":
            there = "no such tensor" if scales is None else _told(scales)
            raise _unfit(source, blocks, f"has {there} as {name}_scales, expected U8 {list(spec.shape[:-1])}")
        found[name] = _Stored(blocks, f"{name}_scales")
    return found


def _fp8_weights(source: Source, block_size: Any) -> dict[str, _Stored]:
    """Weights that have a tensor `_scale_inv` beside them, with the blocks that share a scale: whole matrices for None."""
    sizes: list[Any] = block_size if isinstance(block_size, list) else []
    if block_size is not None and (len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes)):
        raise DuotoneError(f"{source.path / 'config.json'}: found weight_block_size {block_size!r}, expected two sizes")
    found: dict[str, _Stored] = {}
    for name, spec in source.tensors.items():
        scales = source.tensors.get(f"{name}_scale_inv")
        if scales is None:
            continue
        if len(spec.shape) < 2 or spec.dtype != "F8_E4M3":
            raise _unfit(source, name, f"is {_told(spec)}, expected a matrix in F8_E4M3 beside its _scale_inv")
        rows, columns = sizes or spec.shape[-2:]
        grid = _grid(spec.shape, (rows, columns))
        is_whole = not sizes and math.prod(scales.shape) == math.prod(grid)
        if scales.dtype not in _SCALES or not (scales.shape == grid or is_whole):
            raise _unfit(
                source, name, f"has scales {_told(scales)}, expected floats {list(grid)} for blocks of {[rows, columns]}"
            )
        found[name] = _Stored(name, f"{name}_scale_inv", (rows, columns))
    return found


def _told(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _unfit(source: Source, name: str, what: str) -> DuotoneError:
    return DuotoneError(f"{source.path / source.tensors[name].file}: {name} {what}")
