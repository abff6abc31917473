# Shapes: N out_features, K in_features, G groups along K.
"""The methods: one function each, Problem -> (QuantizedWeight, LayerReport)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from duotone.errors import DuotoneError
from duotone.qweight import QuantizedWeight, dequantize
from duotone.scheme import Scheme
from duotone.solver.drift import corrected_target
from duotone.solver.local_search import local_search
from duotone.solver.reorder import GROUPED_ORDERS, ORDERS
from duotone.solver.scales import (
    Scales,
    fit_paper_scales,
    fit_scales,
    fit_single_level,
    round_to_nearest,
    single_level,
    split_single_level,
)
from duotone.solver.search import refresh_scale, search_scales
from duotone.solver.solve import Factor, Rounded, factorize, output_loss, solve
from duotone.solver.statistics import Statistics
from duotone.solver.sweep import Grid, Rule


@dataclass(frozen=True)
class SolverOptions:
    """How to solve. order: one of ORDERS. damping_frac: of the Hessian's mean diagonal. block_size: of the column loop.

    refresh_scales: dpq searches each group's scale anew, on the error-updated weights, when the column loop reaches the group.
    """

    order: str = "gar"
    damping_frac: float = 0.01
    block_size: int = 128
    refresh_scales: bool = False

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise DuotoneError(f"--order: found {self.order!r}, expected one of {', '.join(ORDERS)}")
        if self.refresh_scales and self.order not in GROUPED_ORDERS:
            raise DuotoneError(
                f"--refresh-scales: found --order {self.order}, expected gar or none, which visit a group's columns together"
            )
        if self.block_size < 1:
            raise DuotoneError(f"block_size: found {self.block_size}, expected at least 1 column")
        if not 0 < self.damping_frac < 1:
            raise DuotoneError(f"--damping: found {self.damping_frac}, expected a share between 0 and 1 (0.01 is usual)")


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear: relative squared error of its weights and of its outputs, how it was solved and stored."""

    layer: str
    method: str
    weight_error: float
    output_error: float | None = None
    tokens: int = 0
    damping_frac: float | None = None
    dead_columns: int = 0
    condition_number: float | None = None
    scheme: str = "w4a8"


@dataclass(frozen=True, eq=False)
class Problem:
    """One weight to quantize, float32 [N, K]; statistics and factor are shared by the linears that read the same input.

    shards: ranks that will each rebuild scales from their share of the columns (`search_scales`). fp8: keep an FP8 value of
    each weight instead of a code (solver/fp8.py).
    """

    layer: str
    weight: Tensor
    statistics: Statistics | None
    factor: Factor | None
    scheme: Scheme
    options: SolverOptions
    shards: int = 1
    fp8: bool = False

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.weight).all()):
            raise DuotoneError(f"{self.layer}: the weight holds NaN or infinite values, expected finite ones")


#: How often scales are searched anew for what the columns really wish to be, pushed errors included.
REFITS = 1


@dataclass(frozen=True)
class Method:
    """How to solve one linear, and what the walk through the model has to bring for it.

    order: its default. sequential: a group of linears is observed after the groups before it in its block are quantized.
    drift: the original prefix runs beside the quantized one, and the solver aims at the original outputs.
    """

    solve: Callable[[Problem], tuple[QuantizedWeight, LayerReport]]
    order: str
    needs_statistics: bool = True
    sequential: bool = False
    drift: bool = False


def rtn(problem: Problem) -> tuple[QuantizedWeight, LayerReport]:
    """Round to nearest on the target's own scales; needs no calibration."""
    scales = fit_scales(problem.weight, problem.scheme)
    return finish("rtn", problem, round_to_nearest(problem.weight, scales, problem.scheme), scales)


def gptq(problem: Problem) -> tuple[QuantizedWeight, LayerReport]:
    """GPTQ on a single-level INT4 grid, then the runtime's rounding to FP8 on top: what other tools and vLLM do together.

    Where an order scatters a group's columns (act, min-pivot) the scales are those of the original weights (`static`);
    otherwise each group's scale is taken from the error-updated weights when it is reached, as in the original GPTQ.
    """
    scheme, factor = problem.scheme, _factor(problem)
    step_NG, zero_NG = fit_single_level(problem.weight, scheme)
    step_GN = step_NG.T.contiguous()
    zero_GN = None if zero_NG is None else zero_NG.T.contiguous()

    def refresh_group(group: int, updated_BN: Tensor) -> None:
        step_GN[group], zero_N = single_level(updated_BN.T, scheme)
        if zero_GN is not None and zero_N is not None:
            zero_GN[group] = zero_N

    refresh = refresh_group if problem.options.order in GROUPED_ORDERS else None
    grid = Grid(step_GN, zero_GN, torch.ones(1, device=step_GN.device), Rule.INT4_ONLY, scheme)
    codes_NK = solve(problem.weight, factor, grid, refresh, problem.options.block_size).codes_NK
    step_NG, zero_NG = step_GN.T.contiguous(), None if zero_GN is None else zero_GN.T.contiguous()
    return finish("gptq", problem, codes_NK, split_single_level(step_NG, zero_NG, scheme))


def dpq_paper(problem: Problem) -> tuple[QuantizedWeight, LayerReport]:
    """DPQ as published (arXiv 2505.14638): the propagated error is against the value after INT4 *and* FP8 rounding.

    Each column is rounded to INT4, then to FP8; scales are fitted once, on FP8-rounded weights, and frozen (DPQ.md section 2).
    """
    scales = fit_paper_scales(problem.weight, problem.scheme)
    return finish("dpq-paper", problem, compensate(problem, scales, nearest=False), scales)


def dpq(problem: Problem) -> tuple[QuantizedWeight, LayerReport]:
    """DPQ carried further: the target makes up for earlier error, and all is chosen for the values that will be multiplied.

    Scales are searched for the error after both roundings, and again for what the columns wished to be when it was their
    turn; each row keeps what serves it better. Each column goes straight to the nearest of its 16 FP8 values; a local search
    then lets early columns answer for late ones. With `refresh_scales` a group's scale is searched once more when it is
    reached. docs/objective.md has the argument, docs/LOG.md what each step is worth.
    """
    scheme, factor = problem.scheme, _factor(problem)
    target = replace(problem, weight=corrected_target(problem.weight, _statistics(problem)))
    scales = search_scales(target.weight, scheme, shards=problem.shards)
    rounded, scales = _round(target, scales)
    for _ in range(REFITS):
        outer = None if scheme.target.channel_outer_scale else scales.outer_scale
        refitted = search_scales(rounded.wish(factor), scheme, factor.pivots(), outer, problem.shards)
        again, refitted = _round(target, refitted)
        better_N = again.row_loss(factor) < rounded.row_loss(factor)
        rounded, scales = rounded.where(better_N, again), scales.where(better_N, refitted)
    grid = Grid.of(scales, Rule.NEAREST_VALUE, scheme)
    hessian_KK = _statistics(problem).hessian
    codes_NK = local_search(rounded.gradient(factor), hessian_KK, factor.damping_K, grid, rounded.codes_NK)
    return finish("dpq", problem, codes_NK, scales)


def _round(problem: Problem, scales: Scales) -> tuple[Rounded, Scales]:
    """The column loop to the nearest FP8 value, and the scales its codes belong to: refreshed, if so asked."""
    factor, scheme = _factor(problem), problem.scheme
    grid = Grid.of(scales, Rule.NEAREST_VALUE, scheme)
    if not problem.options.refresh_scales:
        return solve(problem.weight, factor, grid, None, problem.options.block_size), scales
    rounded = solve(problem.weight, factor, grid, partial(refresh_scale, grid), problem.options.block_size)
    zero_NG = None if grid.zero_point_GN is None else grid.zero_point_GN.T.contiguous()
    return rounded, Scales(grid.group_scale_GN.T.contiguous(), zero_NG, scales.outer_scale)


def compensate(problem: Problem, scales: Scales, nearest: bool) -> Tensor:
    """Codes uint8 [N, K] of the column loop against the value after both roundings.

    nearest: each column goes to the nearest of its 16 FP8 values; otherwise to the FP8 value of the nearest INT4 level.
    """
    grid = Grid.of(scales, Rule.NEAREST_VALUE if nearest else Rule.NEAREST_LEVEL, problem.scheme)
    return solve(problem.weight, _factor(problem), grid, None, problem.options.block_size).codes_NK


#: Default orders: act is llm-compressor's for gptq, gar the paper's. The published code observes a block as a whole.
METHODS: dict[str, Method] = {
    "rtn": Method(rtn, "none", needs_statistics=False),
    "gptq": Method(gptq, "act"),
    "dpq-paper": Method(dpq_paper, "gar"),
    "dpq": Method(dpq, "act", sequential=True, drift=True),
}


def shared_factor(statistics: Statistics, scheme: Scheme, options: SolverOptions, layer: str) -> Factor:
    """Order and factorize one Hessian for all linears that read the same input."""
    order_K = ORDERS[options.order](statistics.hessian, scheme.group_size, options.damping_frac)
    return factorize(statistics, order_K, options.damping_frac, layer)


def _statistics(problem: Problem) -> Statistics:
    if problem.statistics is None:
        raise ValueError(f"{problem.layer}: this method needs calibration statistics")
    return problem.statistics


def _factor(problem: Problem) -> Factor:
    if problem.factor is None:
        raise ValueError(f"{problem.layer}: this method needs calibration statistics")
    return problem.factor


def weight_of(codes_NK: Tensor, scales: Scales, scheme: Scheme) -> QuantizedWeight:
    """Codes and scales put together."""
    return QuantizedWeight(codes_NK, scales.group_scale, scales.outer_scale, scheme, scales.zero_point)


def finish(method: str, problem: Problem, codes_NK: Tensor, scales: Scales) -> tuple[QuantizedWeight, LayerReport]:
    """The quantized weight of codes and scales, with its errors measured on what will really run."""
    weight = weight_of(codes_NK, scales, problem.scheme)
    return weight, report_on(method, problem, *errors_of(dequantize(weight), problem))


def errors_of(v_NK: Tensor, problem: Problem) -> tuple[float, float | None]:
    """Relative squared error of the weights that came of a problem, and of their outputs if calibration knows them."""
    w_NK, statistics = problem.weight, problem.statistics
    weight_error = float((w_NK - v_NK).square().sum() / w_NK.square().sum().clamp(min=1e-30))
    return weight_error, None if statistics is None else output_loss(w_NK, v_NK, statistics)


def report_on(
    method: str, problem: Problem, weight_error: float, output_error: float | None, scheme: str = "w4a8"
) -> LayerReport:
    """The errors of a problem's answer, with how it was found."""
    statistics, factor = problem.statistics, problem.factor
    return LayerReport(
        layer=problem.layer,
        method=method,
        weight_error=weight_error,
        output_error=output_error,
        tokens=0 if statistics is None else statistics.tokens,
        damping_frac=None if factor is None else factor.damping_frac,
        dead_columns=0 if factor is None else factor.dead_columns,
        condition_number=None if factor is None else factor.condition_number,
        scheme=scheme,
    )
