# Shapes: M tokens, N out_features, K in_features, D width of the residual stream (a writer's N).
"""What a layer's inputs say about the cost of an error in its weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.errors import DuotoneError


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moments of the inputs X [M, K] of one or several linears that read the same tensor, each divided by M.

    hessian: X^T X, float32 [K, K], X being the inputs that the already quantized prefix produces.
    input_drift: (X0 - X)^T X [K, K], X0 being the same inputs behind the original prefix; None when it was not run.
    stream_drift: (S0 - S)^T X [D, K], S being the residual stream that the linear's output is added to; None when unknown.
    """

    hessian: Tensor
    tokens: int
    input_drift: Tensor | None = None
    stream_drift: Tensor | None = None


class StatisticsAccumulator:
    """Adds up second moments over batches in float32; sums do not depend on how tokens are cut into batches (to rounding)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._hessian_KK = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._input_KK: Tensor | None = None
        self._stream_DK: Tensor | None = None
        self._tokens = 0

    def add(self, x: Tensor, original: Tensor | None = None, stream_drift: Tensor | None = None) -> None:
        """Add inputs [..., K], with what they are in the original model, and the stream's drift [..., D], where known."""
        x_MK = x.reshape(-1, x.shape[-1]).float()
        self._hessian_KK.addmm_(x_MK.T, x_MK)
        self._tokens += x_MK.shape[0]
        if original is not None:
            drift_MK = original.reshape(x_MK.shape).float() - x_MK
            self._input_KK = _add(self._input_KK, drift_MK, x_MK)
        if stream_drift is not None:
            self._stream_DK = _add(self._stream_DK, stream_drift.reshape(len(x_MK), -1).float(), x_MK)

    def finish(self, layer: str) -> Statistics:
        """The averaged statistics, in the accumulator's own memory: the end of it.

        Raises DuotoneError, naming the layer, when no token or a non-finite input was seen.
        """
        if not self._tokens:
            raise DuotoneError(f"{layer}: found no calibration token, expected at least one")
        if not bool(torch.isfinite(self._hessian_KK.diagonal()).all()):
            raise DuotoneError(f"{layer}: calibration inputs are not finite, expected finite activations in every channel")
        means = [
            None if total is None else total.div_(self._tokens) for total in (self._hessian_KK, self._input_KK, self._stream_DK)
        ]
        assert means[0] is not None
        return Statistics(means[0], self._tokens, means[1], means[2])


def _add(total: Tensor | None, left_MD: Tensor, x_MK: Tensor) -> Tensor:
    """total + left^T x, starting from nothing."""
    if total is None:
        return left_MD.T @ x_MK
    return total.addmm_(left_MD.T, x_MK)
