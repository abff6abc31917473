# Shapes: N out_features, K in_features, G groups along K.
"""How a checkpoint uses its grid: which of the 16 codes, and which group scales."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.checkpoint.reader import WeightReader, packed_layers
from duotone.checkpoint.source import SourceFolder
from duotone.qweight import Fp8Weight

#: Of a float32, all but its sign, exponent and first three bits of mantissa: eight bins an octave, one for each E4M3 value.
_BIN_SHIFT = 20


@dataclass(frozen=True)
class Census:
    """Counts over all quantized linears.

    codes: of each of the 16, with `levels`, the numbers they stand for. scales: lower edge of a bin and how many group scales
    are in it, ascending; an E4M3 scale is the edge itself. code_bits: by linear, the entropy of its codes in bits, at most 4,
    or of its FP8 values, at most 8, which the other counts leave out.
    """

    levels: tuple[float, ...]
    codes: tuple[int, ...]
    scales: tuple[tuple[float, int], ...]
    code_bits: dict[str, float]


def take_census(source: SourceFolder, progress: Callable[[int, int, str], None]) -> Census:
    """Read every quantized linear of a checkpoint once. Raises DuotoneError for one that is damaged."""
    reader, layers = WeightReader(source), packed_layers(source)
    codes, scales, code_bits = [0] * 16, Counter[int](), dict[str, float]()
    for done, layer in enumerate(layers):
        progress(done, len(layers), layer)
        weight = reader.read(layer)
        if isinstance(weight, Fp8Weight):
            code_bits[layer] = entropy(torch.bincount(weight.values.view(torch.uint8).flatten(), minlength=256).tolist())
            continue
        counts = torch.bincount(weight.codes.flatten(), minlength=16).tolist()
        codes = [one + other for one, other in zip(codes, counts, strict=True)]
        code_bits[layer] = entropy(counts)
        scales.update(_binned(weight.group_scale))
    edges = torch.tensor(sorted(scales), dtype=torch.int32).bitwise_left_shift(_BIN_SHIFT).view(torch.float32).tolist()
    counted = tuple((edge, scales[key]) for edge, key in zip(edges, sorted(scales), strict=True))
    return Census(reader.scheme.levels, tuple(codes), counted, code_bits)


def entropy(counts: list[int]) -> float:
    """Of what was counted, in bits."""
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts if count)


def _binned(scale_NG: Tensor) -> dict[int, int]:
    keys, counts = scale_NG.contiguous().view(torch.int32).bitwise_right_shift(_BIN_SHIFT).unique(return_counts=True)
    return dict(zip(keys.tolist(), counts.tolist(), strict=True))
