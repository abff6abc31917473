# Shapes: N out_features, K in_features, T tokens.
"""Optimal Brain Quantization by its definition: at every column, invert the Hessian of the columns that are left.

Nothing is shared with the solver: float64 numpy, no Cholesky factor, no blocks, no reordering (columns stay in place and
are visited in the given order).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

#: (current column w_N, its index) -> (codes_N, the values_N that stand in for it)
RoundColumn = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
#: (index of the column about to be rounded, all weights as updated so far [N, K])
BeforeColumn = Callable[[int, np.ndarray], None]


def damped(h_KK: np.ndarray, damping_frac: float) -> np.ndarray:
    """H plus a share of its mean diagonal on the diagonal."""
    return h_KK + damping_frac * np.trace(h_KK) / len(h_KK) * np.eye(len(h_KK))


def obq(
    w_NK: np.ndarray,
    h_KK: np.ndarray,
    order_K: Sequence[int],
    round_column: RoundColumn,
    before_column: BeforeColumn | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values [N, K] in original column order; `h_KK` is taken as it is (damp it before)."""
    updated_NK = np.array(w_NK, dtype=np.float64)
    codes_NK = np.zeros(updated_NK.shape, dtype=np.int64)
    value_NK = np.zeros_like(updated_NK)
    left = [int(k) for k in order_K]
    while left:
        k = left[0]
        if before_column is not None:
            before_column(k, updated_NK.copy())
        inverse = np.linalg.inv(np.asarray(h_KK, dtype=np.float64)[np.ix_(left, left)])
        codes_NK[:, k], value_NK[:, k] = round_column(updated_NK[:, k].copy(), k)
        error_N = (updated_NK[:, k] - value_NK[:, k]) / inverse[0, 0]
        updated_NK[:, left] -= np.outer(error_N, inverse[0])
        left = left[1:]
    return codes_NK, value_NK


def loss(w_NK: np.ndarray, v_NK: np.ndarray, h_KK: np.ndarray) -> float:
    """tr (W - V) H (W - V)^T in float64."""
    e_NK = np.asarray(w_NK, dtype=np.float64) - np.asarray(v_NK, dtype=np.float64)
    return float(np.sum((e_NK @ np.asarray(h_KK, dtype=np.float64)) * e_NK))


def correlated_layer(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Synthetic layer: weights [N, K] of float32 values and X^T X / T of correlated inputs with uneven channels."""
    rng = np.random.default_rng(seed)
    mixing_KK = rng.standard_normal((columns, columns)) * 0.2 + np.eye(columns)
    x_TK = rng.standard_normal((8 * columns, columns)) @ mixing_KK * np.exp(0.5 * rng.standard_normal(columns))
    w_NK = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
    hessian_KK = (x_TK.T @ x_TK / len(x_TK)).astype(np.float32)
    return torch.from_numpy(w_NK).to(dtype), torch.from_numpy(hessian_KK).to(dtype)
