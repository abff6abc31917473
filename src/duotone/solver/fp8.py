# Shapes: N out_features, K in_features.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Weights for which an FP8 value each is kept: scales, and the column loop on that grid."""

import torch
from torch import Tensor

from duotone.contract import divided, power_of_two_at_least
from duotone.qweight import Fp8Weight, dequantize
from duotone.scheme import Fp8Scheme, Scheme, Target
from duotone.solver.drift import corrected_target
from duotone.solver.methods import LayerReport, Problem, errors_of, report_on
from duotone.solver.solve import Factor, solve
from duotone.solver.sweep import Grid, Rule

#: Outer scales that are tried, from the smallest that holds the row to twice that: where a row's values fall between those
#: that FP8 has is all they decide, for it has 18 octaves.
_TRIALS = 8


def solve_fp8(method: str, problem: Problem) -> tuple[Fp8Weight, LayerReport]:
    """The FP8 weight of a problem: each column makes up for those before it where there are statistics, else to nearest."""
    scheme, factor = Fp8Scheme(problem.scheme.target), problem.factor
    if factor is None or problem.statistics is None:
        weight = round_fp8(problem.weight, scheme)
    else:
        target_NK = corrected_target(problem.weight, problem.statistics)
        outer = fp8_scale(target_NK, scheme.target)
        weight = Fp8Weight(_solve(target_NK, factor, outer, scheme.target), outer, scheme)
    return weight, report_on(method, problem, *errors_of(dequantize(weight), problem), "w8a8")


def round_fp8(w_NK: Tensor, scheme: Fp8Scheme) -> Fp8Weight:
    """Each weight to the nearest value."""
    outer = fp8_scale(w_NK, scheme.target)
    return Fp8Weight(_values(w_NK.float() / outer[:, None], scheme.target), outer, scheme)


def fp8_scale(w_NK: Tensor, target: Target) -> Tensor:
    """The outer scale: of each row the BF16 number with which it loses least, or a tensor's smallest power of two."""
    w_NK = w_NK.float()
    if not target.channel_outer_scale:
        return power_of_two_at_least(divided(w_NK.abs().amax(), target.fp8.max).clamp(min=2.0**-100).reshape(1))
    least_N = divided(w_NK.abs().amax(-1), target.fp8.max).clamp(min=2.0**-100)
    best_N, scale_N = torch.full_like(least_N, torch.inf), least_N
    for trial in range(_TRIALS):
        tried_N = (least_N * 2 ** (trial / _TRIALS)).to(torch.bfloat16).float()
        v_NK = target.fp8.round(w_NK / tried_N[:, None]) * tried_N[:, None]
        error_N = (w_NK - v_NK).square().sum(-1)
        scale_N = torch.where(error_N < best_N, tried_N, scale_N)
        best_N = torch.minimum(error_N, best_N)
    return scale_N


def _solve(w_NK: Tensor, factor: Factor, outer: Tensor, target: Target) -> Tensor:
    """FP8 values [N, K] of the column loop: one group of all columns, with a scale of one."""
    rows, columns = w_NK.shape
    scheme = Scheme(target, group_size=8 * -(-columns // 8))
    grid = Grid(torch.ones(1, rows, device=w_NK.device), None, outer.contiguous(), Rule.FP8_VALUE, scheme)
    value_NK = factor.original(solve(w_NK, factor, grid).value_KN)
    return _values(value_NK / outer[:, None], target)


def _values(scaled_NK: Tensor, target: Target) -> Tensor:
    return scaled_NK.clamp(-target.fp8.max, target.fp8.max).to(torch.float8_e4m3fn)
