# Shapes: M tokens, N out_features, K in_features, D width of the residual stream (a writer's N).
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What a layer's inputs say about the cost of an error in its weights."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from duotone.errors import DuotoneError
from duotone.kernels import native
from duotone.ranks import Ranks

#: Products of a matrix with itself are symmetric to within panels of so many columns; what is below them is copied.
_PANEL = 64
#: Damping of H where drift is corrected, as a share of its mean diagonal. docs/LOG.md has the sweep.
DRIFT_DAMPING = 0.05
#: A covariance that is no more than this share of the second moments is what float32 left of their difference.
_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moments of the inputs X [M, K] of one or several linears that read the same tensor, each divided by M.

    hessian: X^T X, float32 [K, K], X being the inputs that the already quantized prefix produces.
    input_drift: (X0 - X)^T X [K, K], X0 being the same inputs behind the original prefix; None when it was not run.
    stream_target: T^T X [D, K], T = S0 + X0 W^T - S being what the linear has to write for the residual stream behind it to be
    the original's; only of a linear that writes to the stream, where it stands in the place of input_drift.
    mean, input_drift_mean [K], stream_target_mean [D]: means of X, X0 - X and T over the tokens.
    known_correction: the `input_correction`, where it has been worked out elsewhere.
    """

    hessian: Tensor
    tokens: int
    input_drift: Tensor | None = None
    stream_target: Tensor | None = None
    mean: Tensor | None = None
    input_drift_mean: Tensor | None = None
    stream_target_mean: Tensor | None = None
    known_correction: Tensor | None = None

    @cached_property
    def input_correction(self) -> Tensor:
        """What the input drift asks of every weight that reads these inputs, W* = W + W times this [K, K]: once for all."""
        if self.known_correction is not None:
            return self.known_correction
        assert self.input_drift is not None
        return self.explained(self.input_drift)

    def stream_weight(self, w_NK: Tensor) -> Tensor:
        """The weight [D, K] with which the inputs best explain the stream's target; the damping holds it at `w_NK`.

        T^T X (H + damping)^-1 + W damping (H + damping)^-1, which is W + R^T X (H + damping)^-1 with R = T - X W^T.
        """
        assert self.stream_target is not None
        found_NK = self.explained(torch.addcmul(self.stream_target, w_NK, self._damped[0]))
        return torch.where(self.hessian.diagonal() > 0, found_NK, w_NK)

    def explained(self, moment_DK: Tensor) -> Tensor:
        """R^T X H^-1 of a moment R^T X [D, K]: the weights with which the inputs best explain R. H is damped.

        The drift is small, and its estimate has the noise of a short calibration.
        """
        return torch.cholesky_solve(moment_DK.T, self._damped[1]).T

    @cached_property
    def _damped(self) -> tuple[Tensor, Tensor]:
        """What is added to the diagonal [K], and the lower factor of the sum [K, K].

        Ten times as much where the sum has no factor: inputs that hardly vary around a large mean have a covariance that is
        rounding for the most part, and may be negative in some direction.
        """
        diagonal = self.hessian.diagonal()
        mean = diagonal.mean().clamp(min=1e-30)
        # A channel that was never excited has no drift to undo; its unit diagonal only keeps the factor finite.
        damping_K = torch.where(diagonal > 0, DRIFT_DAMPING * mean, mean)
        while True:
            damped_KK = self.hessian.clone()
            damped_KK.diagonal().add_(damping_K)
            factor_KK, failed = torch.linalg.cholesky_ex(damped_KK)
            if not int(failed):
                return damping_K, factor_KK
            damping_K = 10 * damping_K

    def centered(self) -> "Statistics":
        """Covariances in the place of second moments: what is left to a linear whose bias takes up all means.

        Of inputs that never vary, such as a guidance that is the same in all samples, nothing is left but rounding: they stay
        as they are.
        """
        if self.mean is None:
            return self
        hessian = self.hessian.addr(self.mean, self.mean, alpha=-1)
        if hessian.trace() <= _ROUNDING * self.hessian.trace():
            return self
        return replace(
            self,
            hessian=hessian,
            input_drift=_less(self.input_drift, self.input_drift_mean, self.mean),
            stream_target=_less(self.stream_target, self.stream_target_mean, self.mean),
        )


def _less(moment: Tensor | None, left_mean: Tensor | None, mean: Tensor) -> Tensor | None:
    return None if moment is None or left_mean is None else moment.addr(left_mean, mean, alpha=-1)


class StatisticsAccumulator:
    """Adds up moments over batches: of each in float32, together in float64.

    Float64 has room for the last bits of all float32 numbers of like size, so the order of batches makes no difference: any
    number of processes finds the same sums, bit for bit.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._hessian_KK = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._sum_K = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._input: tuple[Tensor, Tensor] | None = None
        self._stream: tuple[Tensor, Tensor] | None = None
        self._tokens = 0

    def add(self, x: Tensor, original: Tensor | None = None, target: Tensor | None = None) -> None:
        """Add inputs [..., K], with what they are in the original model, and the stream's target [..., D], where known."""
        x_MK = x.reshape(-1, x.shape[-1])
        _add_moments(x_MK, None, self._hessian_KK)
        self._sum_K += x_MK.sum(0, dtype=torch.float32)
        self._tokens += x_MK.shape[0]
        if original is not None:
            self._input = _add(self._input, original.reshape(x_MK.shape) - x_MK, x_MK)
        if target is not None:
            self._stream = _add(self._stream, target.reshape(-1, target.shape[-1]), x_MK)

    def pool(self, ranks: Ranks) -> None:
        """Take in what the other processes have added up."""
        tokens = torch.tensor(self._tokens)
        ranks.sum_(tokens, self._hessian_KK, self._sum_K, *(self._input or ()), *(self._stream or ()))
        self._tokens = int(tokens)

    def finish(self, layer: str, of: str = "calibration inputs") -> Statistics:
        """The averaged statistics, float32: the end of the accumulator.

        Raises DuotoneError, naming the layer and what this was the statistics of, when no token or a non-finite value was seen.
        """
        if not self._tokens:
            raise DuotoneError(f"{layer}: found no calibration token, expected at least one")
        hessian, mean = self._averaged(self._hessian_KK), self._averaged(self._sum_K)
        if not bool(torch.isfinite(hessian.diagonal()).all()):
            raise DuotoneError(f"{layer}: {of} are not finite, expected finite values in every channel")
        del self._hessian_KK
        (input_drift, input_mean), (stream_target, stream_mean) = (
            (None, None) if sums is None else tuple(map(self._averaged, sums)) for sums in (self._input, self._stream)
        )
        for start in range(0, len(hessian), _PANEL):
            end = start + _PANEL
            hessian[end:, start:end] = hessian[start:end, end:].T
        return Statistics(hessian, self._tokens, input_drift, stream_target, mean, input_mean, stream_mean)

    def _averaged(self, total: Tensor) -> Tensor:
        return total.div_(self._tokens).float()


def _add(sums: tuple[Tensor, Tensor] | None, left_MD: Tensor, x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """left^T x and the sum of left over tokens, added to what there is."""
    if sums is None:
        rows, columns = left_MD.shape[1], x_MK.shape[1]
        sums = x_MK.new_zeros(rows, columns, dtype=torch.float64), x_MK.new_zeros(rows, dtype=torch.float64)
    _add_moments(x_MK, left_MD.to(x_MK.dtype), sums[0])
    return sums[0], sums[1].add_(left_MD.sum(0, dtype=torch.float32))


def _add_moments(x_MK: Tensor, left_MD: Tensor | None, sum_DK: Tensor) -> None:
    """Add left^T x, a product in float32; without `left`, x^T x, which is symmetric: on and above the diagonal's panels.

    On a CPU BF16 inputs are multiplied as they are, by an op of our own (torch would round the product to BF16); that is exact
    but for the additions. Elsewhere they are widened first.
    """
    if x_MK.dtype == torch.bfloat16 and x_MK.device.type == "cpu" and native.available():
        left, right = (x_MK, None) if left_MD is None else (left_MD, x_MK.contiguous())
        torch.ops.duotone.moments(left.contiguous(), right, sum_DK, False)
        return
    x_MK = x_MK.float()
    if left_MD is not None:
        sum_DK += left_MD.float().T @ x_MK
        return
    columns = x_MK.shape[1]
    width = max(4, -(-columns // (4 * _PANEL))) * _PANEL  # four products, none so narrow that it would be slow
    for start in range(0, columns, width):
        end = min(start + width, columns)
        sum_DK[start:end, start:] += x_MK[:, start:end].T @ x_MK[:, start:]
