# Shapes: N out_features, K in_features.
"""Coordinate descent by its definition: each column in turn goes to the value of least loss, all others as they are."""

import numpy as np


def descent(w_NK: np.ndarray, codes_NK: np.ndarray, table_NK16: np.ndarray, h_KK: np.ndarray) -> np.ndarray:
    """Values [N, K] in float64 after one pass over the columns as they stand; every code's whole loss is evaluated."""
    w_NK, h_KK = w_NK.astype(np.float64), h_KK.astype(np.float64)
    value_NK = np.take_along_axis(table_NK16, codes_NK[..., None].astype(int), -1)[..., 0]
    for row, (w_K, value_K) in enumerate(zip(w_NK, value_NK, strict=True)):
        for k, table_16 in enumerate(table_NK16[row]):
            error_16K = np.tile(w_K - value_K, (16, 1))
            error_16K[:, k] = w_K[k] - table_16
            value_K[k] = table_16[np.sum((error_16K @ h_KK) * error_16K, axis=1).argmin()]
    return value_NK
