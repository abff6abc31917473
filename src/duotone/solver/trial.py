# Shapes: N out_features, K in_features, G groups along K.
"""The Triton loops against their specification, on the GPU that is to run them: once, before a solver uses them.

Numbers are small dyadic ones, of which every product and sum is exact in float32, so that a GPU owes a CPU's bits. Most of the
time goes to compiling: no more variants are tried than a solver asks for, in shapes that Triton compiles like a model's.
"""

from typing import Any

import torch
from torch import Tensor

from duotone.kernels.gpu import solver
from duotone.kernels.gpu.trial import told
from duotone.scheme import HOPPER, Scheme
from duotone.solver.local_search import TENURE, local_search_torch
from duotone.solver.scales import Scales
from duotone.solver.sweep import Grid, Rule, scale_error_torch, sweep_torch

#: 16 divides rows and columns, as a model's; they fill no tile. Steps are enough for columns to rest and to move again.
_ROWS, _COLUMNS, _STEPS, _GROUP = 80, 112, 60, 32


def fault(device: torch.device) -> str | None:
    """What the loops do on a device that the specification does not, as a sentence; None: they agree."""
    return told(device, lambda: _difference(True, device) or _difference(False, device))


def _difference(symmetric: bool, device: torch.device) -> str | None:
    generator, scheme = torch.Generator().manual_seed(int(symmetric)), Scheme(HOPPER, _GROUP, symmetric)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    def there(*given: Tensor | None) -> list[Any]:
        return [None if tensor is None else tensor.to(device) for tensor in given]

    groups = scheme.groups(_COLUMNS)
    scale_GN, outer_N = torch.exp2(whole(-1, 1, groups, _ROWS)), torch.exp2(whole(-1, 0, _ROWS))
    zero_GN = None if symmetric else whole(-8, 7, groups, _ROWS)
    base_KN, reference_KN = whole(-400, 400, 2, _COLUMNS, _ROWS) / 64
    coupling_KK, group_K = whole(-1, 1, _COLUMNS, _COLUMNS) / 2, torch.randint(groups, (_COLUMNS,), generator=generator).int()
    lowest, fp8_max = int(scheme.levels[0]), scheme.target.fp8.max
    for rule in Rule if symmetric else (Rule.NEAREST_VALUE,):
        grid = Grid(scale_GN, zero_GN, outer_N, rule, scheme)
        meant = sweep_torch(base_KN, reference_KN, coupling_KK, grid, group_K)
        given = there(base_KN, reference_KN, coupling_KK, scale_GN, zero_GN, outer_N, group_K)
        found = solver.sweep(*given, lowest, fp8_max, rule)
        if not all(torch.equal(a.cpu(), b) for a, b in zip(found, meant, strict=True)):
            return f"values of the column loop ({rule.name})"
    grid = Grid(scale_GN, zero_GN, outer_N, Rule.NEAREST_VALUE, scheme)
    codes_NK, x_TK = whole(0, 15, _ROWS, _COLUMNS).to(torch.uint8), whole(-1, 1, 6, _COLUMNS)
    gradient_NK, hessian_KK, damping_K = whole(-99, 99, _ROWS, _COLUMNS) / 4, x_TK.T @ x_TK, whole(1, 3, _COLUMNS) / 2
    meant_NK = local_search_torch(gradient_NK, hessian_KK, damping_K, grid, codes_NK, _STEPS)
    in_order_K = torch.arange(_COLUMNS, dtype=torch.int32) // _GROUP
    for dtype in (torch.float32, torch.bfloat16) if symmetric else (torch.bfloat16,):  # which has all of these numbers
        given = there(gradient_NK, hessian_KK.to(dtype), damping_K, scale_GN, zero_GN, outer_N, in_order_K, codes_NK)
        if not torch.equal(solver.local_search(*given, lowest, fp8_max, _STEPS, TENURE).cpu(), meant_NK):
            return "codes of the local search"
    candidates_NGC, share_K = torch.exp2(whole(-2, 2, _ROWS, groups, 3)), whole(0, 3, _COLUMNS)
    zero_NG = None if zero_GN is None else zero_GN.T.contiguous()
    w_NK = base_KN.T.contiguous()
    meant_NGC = scale_error_torch(w_NK, candidates_NGC, Scales(scale_GN.T, zero_NG, outer_N), scheme, _GROUP, share_K)
    given = there(w_NK, candidates_NGC, zero_NG, outer_N, share_K)
    if not torch.allclose(solver.scale_error(*given, lowest, fp8_max, _GROUP).cpu(), meant_NGC, rtol=1e-5, atol=0):
        return "errors of scales"
    return None
