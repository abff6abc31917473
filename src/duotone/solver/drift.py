# Shapes: N out_features, K in_features. docs/objective.md derives this.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The weight to aim at when the inputs have already drifted away from the original model's.

With X the inputs behind the quantized prefix, X0 the original ones, and S, S0 the residual streams that the output is added to,

    |S0 + X0 W^T - S - X V^T|^2  =  tr (V - W*) H (V - W*)^T + const,    W* = W + R^T X H^-1,    R = S0 - S + (X0 - X) W^T,

so the solver rounds W* instead of W, under the same H = X^T X: nothing but the target changes, and a linear undoes what it
can of the error that came before it. The inverse is damped: the drift is small, and its estimate has the noise of a short
calibration.
"""

from torch import Tensor

from duotone.device import product, product_dtype
from duotone.solver.statistics import Statistics


def corrected_target(w_NK: Tensor, statistics: Statistics) -> Tensor:
    """W* [N, K] for the drift that the statistics hold; the weight itself when they hold none."""
    if statistics.stream_target is not None:
        return statistics.stream_weight(w_NK)
    if statistics.input_drift is None or not bool(statistics.input_drift.any()):
        return w_NK
    dtype = product_dtype(w_NK)
    return w_NK + product(w_NK.to(dtype), statistics.input_correction.to(dtype))


def bias_shift(w_NK: Tensor, v_NK: Tensor, statistics: Statistics) -> Tensor:
    """What to add to the bias [N] so that the mean output (or stream behind it) is the original's, with V in W's place.

    With a bias that does this, the objective above has covariances for second moments: the solver gets `statistics.centered()`.
    """
    if statistics.mean is None:
        raise ValueError("bias_shift: the statistics hold no means")
    if statistics.stream_target_mean is not None:
        return statistics.stream_target_mean - v_NK @ statistics.mean
    shift_N = (w_NK - v_NK) @ statistics.mean
    if statistics.input_drift_mean is not None:
        shift_N += w_NK @ statistics.input_drift_mean
    return shift_N
