"""Compares what layouts.py reads of a checkpoint with the weights as the tool itself dequantizes them.

    verify.py OUT_DIR WEIGHTS.safetensors [OUT_DIR WEIGHTS.safetensors ...]

WEIGHTS is what a peer's script wrote with `--weights`. A deviation is |read - tool| / |tool|, of one weight. The tools hold
weights in BF16, which is 2^-8 at most; where the weight is rounded to E4M3 after that, a rounding can fall to the other side,
which is one step of E4M3, 2^-3 at most. What is farther off is another level: tools break ties differently from one step to
the next, but not often. Exits with 1 when that is more than one weight in a thousand or a linear is missing on one side.
"""

import sys
from pathlib import Path

import torch
from layers import PeerLinear
from layouts import other_tensors, read_peer
from safetensors.torch import load_file
from torch import Tensor

BF16_ROUNDING = 2.0**-8
E4M3_STEP = 2.0**-3 + BF16_ROUNDING
TIES = 1e-3


def dequantize(linear: PeerLinear) -> Tensor:
    """The weight the tool means, float32 [N, K]: rounded to E4M3 in between where it has a second scale."""
    weight = linear.level * linear.scale.repeat_interleave(linear.group_size, dim=1)[:, : linear.level.shape[1]]
    if linear.outer_scale is None:
        return weight
    outer = linear.outer_scale.reshape(-1, 1)
    return outer * (weight / outer).clamp(-448, 448).to(torch.float8_e4m3fn).float()


def verify(folder: Path, weights: Path) -> bool:
    """Print a checkpoint's largest deviation; True when the reader and the tool agree as the module's docstring says."""
    linears, expected = read_peer(folder), load_file(weights)
    odd = sorted(linears.keys() ^ expected.keys())
    worst, over, far, count = 0.0, 0, 0, 0
    for name in linears.keys() & expected.keys():
        found, tool = dequantize(linears[name]), expected[name]
        deviation = torch.where(found == tool, 0.0, (found - tool).abs() / tool.abs())
        bound = BF16_ROUNDING if linears[name].outer_scale is None else E4M3_STEP
        worst, count = max(worst, float(deviation.max())), count + tool.numel()
        over, far = over + int((deviation > BF16_ROUNDING).sum()), far + int((deviation > bound).sum())
    print(f"{folder.name}: {len(linears)} linears, {len(other_tensors(folder))} others, max relative deviation {worst:.3g}")
    print(f"    of {count} weights {over} beyond BF16 rounding, {far} a level apart; on one side only: {odd or 'nothing'}")
    return far <= TIES * count and not odd


if __name__ == "__main__":
    paths = [Path(path) for path in sys.argv[1:]]
    results = [verify(folder, weights) for folder, weights in zip(paths[::2], paths[1::2], strict=True)]
    sys.exit(not all(results))
