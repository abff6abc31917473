# Shapes: N out_features, K in_features. docs/objective.md derives this.
"""The weight to aim at when the inputs have already drifted away from the original model's.

With X the inputs behind the quantized prefix, X0 the original ones, and S, S0 the residual streams that the output is added to,

    |S0 + X0 W^T - S - X V^T|^2  =  tr (V - W*) H (V - W*)^T + const,    W* = W + (W (X0 - X)^T X + (S0 - S)^T X) H^-1,

so the solver rounds W* instead of W, under the same H = X^T X: nothing but the target changes, and a linear undoes what it can
of the error that came before it. The inverse is damped: the drift is small, and its estimate has the noise of a short calibration.
"""

import torch
from torch import Tensor

from duotone.solver.statistics import Statistics

#: Damping of H in the correction, as a share of its mean diagonal. docs/LOG.md has the sweep.
DRIFT_DAMPING = 0.05


def corrected_target(w_NK: Tensor, statistics: Statistics) -> Tensor:
    """W* [N, K] for the drift that the statistics hold; the weight itself when they hold none."""
    pull_NK = torch.zeros_like(w_NK)
    if statistics.input_drift is not None:
        pull_NK += w_NK @ statistics.input_drift
    if statistics.stream_drift is not None:
        pull_NK += statistics.stream_drift
    if not bool(pull_NK.any()):  # the first linears of a model: nothing has drifted yet
        return w_NK
    damped_KK = statistics.hessian.clone()
    diagonal = damped_KK.diagonal()
    mean = diagonal.mean()
    # A channel that was never excited has no drift to undo; its unit diagonal only keeps the factor finite.
    diagonal += torch.where(diagonal > 0, DRIFT_DAMPING * mean, mean.clamp(min=1e-30))
    factor_KK = torch.linalg.cholesky(damped_KK)
    return w_NK + torch.cholesky_solve(pull_NK.T, factor_KK).T
