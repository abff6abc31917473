# Shapes: N out_features, K in_features.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Sizes of channels moved from a norm into the linears that read it, as SmoothQuant does (arXiv 2211.10438), for nothing.

Channel j of the inputs is divided by s_j, which the norm's weight takes up, and column j of every linear behind it multiplied
by it. The function stays; what moves is how much of a column survives the rounding it shares with its group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duotone.solver.statistics import Statistics

#: Largest s, and the inverse of the smallest. A channel that calibration hardly excites would else be rounded away.
LARGEST = 256.0


@dataclass(frozen=True, eq=False)
class Equalized:
    """What equalizing one norm gives: s [K], the statistics of the inputs X / s, and the tensors in the old ones' places."""

    s_K: Tensor
    statistics: Statistics
    tensors: dict[str, Tensor]


def equalize(
    originals: Mapping[str, Tensor],
    norm: str,
    readers: Sequence[str],
    group: Sequence[str],
    statistics: Statistics,
    alpha: float,
) -> Equalized:
    """Move channel sizes between a norm and all linears that read it, for the sake of a group of these that will be quantized.

    originals: weights by name, the norm's [K], the linears' [N, K]; the new ones are float32. statistics: of the norm's output.
    The norm's new weight is rounded to the BF16 in which it is stored, and s is what that leaves: the linears make up for it.
    Where a reader stays BF16 itself, s are powers of two, so that it loses no bit.
    """
    weights = [originals[f"{layer}.weight"].to(statistics.hessian.device) for layer in group]
    wanted_K = channel_scales(statistics.hessian.diagonal(), weights, alpha)
    if set(readers) != set(group):
        wanted_K = torch.exp2(wanted_K.log2().round())
    old_K = originals[f"{norm}.weight"].to(wanted_K.device, torch.float32)
    new_K = (old_K / wanted_K).to(torch.bfloat16).float()
    s_K = torch.where(new_K == 0, 1.0, old_K / new_K)
    read = {name: originals[name].float() for name in (f"{layer}.weight" for layer in readers)}
    tensors = {name: w_NK * s_K.to(w_NK.device) for name, w_NK in read.items()}
    tensors[f"{norm}.weight"] = torch.where(new_K == 0, old_K, new_K)
    return Equalized(s_K, rescaled(statistics, s_K), tensors)


def channel_scales(power_K: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Wanted s [K] with geometric mean 1: rms of the inputs^alpha / absmax of the weights^(1 - alpha), but for the bounds.

    power_K: mean squares of the inputs. weights: [N, K] of the linears that share them. A channel that is zero in either keeps
    its size. Not rounded to powers of two, which would spare the norm a rounding to BF16 but moves columns of one group apart
    again, by up to 2.
    """
    absmax_K = torch.stack([w_NK.float().abs().amax(0) for w_NK in weights]).amax(0)
    alive_K = (power_K > 0) & (absmax_K > 0)
    log_K = (alpha / 2) * power_K.log2() - (1 - alpha) * absmax_K.log2()
    s_K = torch.exp2(log_K - log_K[alive_K].mean()).clamp(1 / LARGEST, LARGEST)
    return torch.where(alive_K, s_K, 1.0)


def rescaled(statistics: Statistics, s_K: Tensor) -> Statistics:
    """The statistics of X / s, where they were those of X."""
    return replace(
        statistics,
        hessian=statistics.hessian / s_K / s_K[:, None],
        input_drift=None if statistics.input_drift is None else statistics.input_drift / s_K / s_K[:, None],
        stream_target=None if statistics.stream_target is None else statistics.stream_target / s_K,
        mean=None if statistics.mean is None else statistics.mean / s_K,
        input_drift_mean=None if statistics.input_drift_mean is None else statistics.input_drift_mean / s_K,
    )
