# Shapes: M tokens, K in_features.
"""What a layer's inputs say about the cost of an error in its weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.errors import DuotoneError


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moment of the inputs of one or several linears that read the same tensor.

    hessian: X^T X / tokens, float32 [K, K], X being the inputs that the already quantized prefix produces.
    """

    hessian: Tensor
    tokens: int


class StatisticsAccumulator:
    """Adds up X^T X over batches in float32; the sum does not depend on how tokens are cut into batches (to rounding)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum_KK = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Add inputs of shape [..., K]."""
        x_MK = x.reshape(-1, x.shape[-1]).float()
        self._sum_KK.addmm_(x_MK.T, x_MK)
        self._tokens += x_MK.shape[0]

    def finish(self, layer: str) -> Statistics:
        """The averaged statistics, in the accumulator's own memory: the end of it.

        Raises DuotoneError, naming the layer, when no token or a non-finite input was seen.
        """
        if not self._tokens:
            raise DuotoneError(f"{layer}: found no calibration token, expected at least one")
        if not bool(torch.isfinite(self._sum_KK.diagonal()).all()):
            raise DuotoneError(f"{layer}: calibration inputs are not finite, expected finite activations in every channel")
        return Statistics(self._sum_KK.div_(self._tokens), self._tokens)
