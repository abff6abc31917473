"""The min-pivot order by its definition: at every step, the Schur complement of what is placed, formed anew in float64."""

import numpy as np


def min_pivot(h_KK: np.ndarray) -> list[int]:
    """perm[new] = old, built from its end: next comes the column of least variance given those already placed.

    `h_KK` is taken as it is (damp it before). Equal variances: the later column is placed first, and so stands behind.
    """
    h_KK = np.asarray(h_KK, dtype=np.float64)
    placed: list[int] = []
    left = list(range(len(h_KK)))
    while left:
        among, by = h_KK[np.ix_(left, left)], h_KK[np.ix_(left, placed)]
        variances = np.diag(among - by @ np.linalg.solve(h_KK[np.ix_(placed, placed)], by.T)) if placed else np.diag(among)
        best = len(left) - 1
        for i in range(len(left) - 1, -1, -1):
            if variances[i] < variances[best]:
                best = i
        placed.append(left.pop(best))
    return placed[::-1]
