# Shapes: N out_features, K in_features, B columns of a block.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""After the column loop: coordinate descent over the codes, with scales fixed and the whole quadratic form.

The column loop never looks back: a column rounded early cannot answer for what later ones left. Here each column in turn is
put on the value nearest to what all the *others* leave for it, w_k + sum_{j != k} (w_j - v_j) H_jk / H_kk. No pass can
raise the loss tr((W - V) H (W - V)^T) of the H it is given.
"""

import torch
from torch import Tensor

from duotone.scheme import Scheme
from duotone.solver.scales import Scales, nearest_entry
from duotone.solver.statistics import Statistics

_BLOCK = 64


def descend(
    w_NK: Tensor,
    codes_NK: Tensor,
    scales: Scales,
    statistics: Statistics,
    scheme: Scheme,
    passes: int,
    damping_frac: float = 0.0,
) -> Tensor:
    """Codes uint8 [N, K] after `passes` sweeps over all columns, under H plus `damping_frac` of its mean diagonal.

    The damping is what the column loop had: without it, sweeps fit the noise of a short calibration.
    """
    h_KK = statistics.hessian
    damping = damping_frac * float(h_KK.diagonal().mean())
    curvature_K = (h_KK.diagonal() + damping).tolist()
    columns = scales.columns()
    w_KN, codes_KN = w_NK.T.contiguous(), codes_NK.T.float()
    value_KN = _values(codes_KN, scales, scheme)
    error_KN = w_KN - value_KN
    for _ in range(passes):
        for start in range(0, len(w_KN), _BLOCK):
            stop = min(start + _BLOCK, len(w_KN))
            pull_BN = h_KK[start:stop] @ error_KN + damping * error_KN[start:stop]
            for k in range(start, stop):
                if curvature_K[k] <= 0:  # never excited, and nothing to lose by it
                    continue
                wanted_N = value_KN[k] + pull_BN[k - start] / curvature_K[k]
                codes_KN[k], value_N = nearest_entry(wanted_N, columns[k // scheme.group_size], scheme)
                change_N = value_KN[k] - value_N
                value_KN[k] = value_N
                error_KN[k] += change_N
                pull_BN[k - start + 1 :].addr_(h_KK[k + 1 : stop, k], change_N)
    return codes_KN.T.to(torch.uint8).contiguous()


def _values(codes_KN: Tensor, scales: Scales, scheme: Scheme) -> Tensor:
    """Real values [K, N] of codes, group by group."""
    parts = codes_KN.split(scheme.group_size)
    return torch.cat([column.value(part, scheme) for part, column in zip(parts, scales.columns(), strict=True)])
