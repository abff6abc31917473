# Shapes: N rows, K columns, B columns of a block, G groups along K, C candidates.
"""The solver's loops on a GPU: the ops of the same names in torch.ops.duotone, for tensors that lie there.

Codes are those ops' bit for bit; errors of scales are sums in another order. No speed of these has been measured.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports] - an optional dependency
from torch import Tensor

from duotone.kernels.gpu import solver_kernels

_programs: Any = solver_kernels
#: Rows of a program of the column loop, and the widest block that it takes at once.
_ROWS, _COLUMNS = 16, 128
#: Columns that a program of the local search looks at together, of a row of more than so many twice as many; and as many values
#: of a weight has a program that measures scales. One program of twice the width fills a multiprocessor's registers: its
#: twelve bytes a column then stay in the caches, where three programs' would not.
_LANES, _WIDE_ROW = 2048, 8192
#: What the interpreter can be told too; the compiler must not fuse what a CPU rounds twice.
_UNFUSED = {"enable_fp_fusion": False}


def sweep(
    base_BN: Tensor,
    reference_BN: Tensor,
    coupling_BB: Tensor,
    group_scale_GN: Tensor,
    zero_point_GN: Tensor | None,
    outer_scale: Tensor,
    group_B: Tensor,
    *facts: Any,
) -> tuple[Tensor, Tensor]:
    """Codes uint8 and values [B, N] of a block's columns. facts: lowest level, largest FP8 value, rule."""
    lowest, fp8_max, rule = facts
    columns, rows = base_BN.shape
    codes_BN = torch.empty(columns, rows, dtype=torch.uint8, device=base_BN.device)
    value_BN, left_BN = torch.empty_like(base_BN), torch.empty_like(base_BN)
    outer_N = outer_scale.expand(rows).contiguous()
    scale_BN = group_scale_GN.index_select(0, group_B)
    zero_BN = scale_BN if zero_point_GN is None else zero_point_GN.index_select(0, group_B)
    if not base_BN.numel():
        return codes_BN, value_BN
    with torch.cuda.device_of(base_BN):
        for start in range(0, columns, _COLUMNS):
            part = slice(start, start + _COLUMNS)
            wish_BN = base_BN[part] if not start else base_BN[part] + coupling_BB[:start, part].T @ left_BN[:start]
            _programs.sweep[(triton.cdiv(rows, _ROWS),)](
                wish_BN, reference_BN[part], coupling_BB[part, start:], scale_BN[part], zero_BN[part], outer_N,
                codes_BN[part], value_BN[part], rows, len(wish_BN), coupling_BB.stride(0), RULE=rule,
                HAS_ZERO=zero_point_GN is not None, LOWEST=float(lowest), FP8_MAX=fp8_max, ROWS=_ROWS,
                COLUMNS=max(16, triton.next_power_of_2(len(wish_BN))), num_warps=4, **_UNFUSED,
            )  # fmt: skip
            if part.stop < columns:
                torch.sub(reference_BN[part], value_BN[part], out=left_BN[part])
    return codes_BN, value_BN


def local_search(
    gradient_NK: Tensor,
    hessian_KK: Tensor,
    damping_K: Tensor,
    group_scale_GN: Tensor,
    zero_point_GN: Tensor | None,
    outer_scale: Tensor,
    group_K: Tensor,
    *rest: Any,
) -> Tensor:
    """Codes uint8 [N, K] no worse than those given. rest: those, lowest level, largest FP8 value, steps, tenure.

    hessian_KK: float32 or BF16. Its memory is four numbers a weight, and one for each row and step.
    """
    codes_NK, lowest, fp8_max, steps, tenure = rest
    rows, columns = codes_NK.shape
    codes_NK, gradient_NK = codes_NK.clone(), gradient_NK.clone()
    if not codes_NK.numel() or not steps:
        return codes_NK
    curvature_K, outer_N = hessian_KK.diagonal().float() + damping_K, outer_scale.expand(rows).contiguous()
    up_NK, down_NK = torch.empty_like(gradient_NK), torch.empty_like(gradient_NK)
    moves = torch.empty(rows, steps, dtype=torch.int32, device=codes_NK.device)
    zero_GN = group_scale_GN if zero_point_GN is None else zero_point_GN
    narrow = hessian_KK.dtype == torch.bfloat16
    lanes = lanes_for(columns)
    common = {"HAS_ZERO": zero_point_GN is not None, "LOWEST": float(lowest), "FP8_MAX": fp8_max, **_UNFUSED}
    common |= {"BLOCK": lanes, "num_warps": warps_for(lanes)}
    with torch.cuda.device_of(codes_NK):
        _programs.open_columns[(rows, triton.cdiv(columns, lanes))](
            codes_NK, group_scale_GN, zero_GN, outer_N, group_K, curvature_K, up_NK, down_NK, rows, columns, **common
        )
        _programs.local_search[(rows,)](
            gradient_NK, up_NK, down_NK, codes_NK, moves, hessian_KK.view(torch.int16) if narrow else hessian_KK, curvature_K,
            damping_K, group_scale_GN, zero_GN, outer_N, group_K, rows, columns, steps, TENURE=tenure, IS_BF16=narrow,
            **common,
        )  # fmt: skip
    return codes_NK


def lanes_for(columns: int) -> int:
    """Columns that a program of the local search looks at together."""
    return min(_LANES if columns <= _WIDE_ROW else 2 * _LANES, max(16, triton.next_power_of_2(columns)))


def warps_for(lanes: int) -> int:
    """Warps of a program of the local search: each thread has eight columns."""
    return max(1, lanes // 256)


def scale_error(
    w_NK: Tensor,
    candidates_NGC: Tensor,
    zero_point_NG: Tensor | None,
    outer_scale: Tensor,
    column_weight_K: Tensor | None,
    *facts: Any,
) -> Tensor:
    """Squared error [N, G, C] of every group under each candidate scale. facts: lowest level, largest FP8 value, group size."""
    lowest, fp8_max, group_size = facts
    (rows, columns), (_, groups, candidates) = w_NK.shape, candidates_NGC.shape
    error_NGC = torch.empty_like(candidates_NGC)
    if not error_NGC.numel():
        return error_NGC
    width = max(16, triton.next_power_of_2(group_size))
    each = max(1, _LANES // width)
    with torch.cuda.device_of(w_NK):
        _programs.scale_error[(triton.cdiv(rows, each), groups)](
            w_NK, candidates_NGC, w_NK if zero_point_NG is None else zero_point_NG, outer_scale.expand(rows).contiguous(),
            w_NK if column_weight_K is None else column_weight_K, error_NGC, rows, columns, groups, candidates, group_size,
            HAS_ZERO=zero_point_NG is not None, HAS_WEIGHT=column_weight_K is not None, LOWEST=float(lowest), FP8_MAX=fp8_max,
            ROWS=each, WIDTH=width, num_warps=4, **_UNFUSED,
        )  # fmt: skip
    return error_NGC
