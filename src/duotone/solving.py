# Shapes: N out_features, K in_features, G groups along K.
"""The linears that read one input, solved: by this process, or by all that share the run.

Rows do not know of one another once the factor is there. Where each has an outer scale of its own every process solves its
share of every linear's rows; where a linear has one for all, whole linears are dealt out. Then all of them get all that was
found.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from duotone.device import StreamClock
from duotone.qweight import AnyWeight, Fp8Weight, QuantizedWeight
from duotone.ranks import Ranks
from duotone.run import Run
from duotone.scheme import Fp8Scheme, Scheme
from duotone.solver.couple import couple
from duotone.solver.fp8 import solve_fp8
from duotone.solver.loops import refusal
from duotone.solver.methods import METHODS, LayerReport, Problem, report_on, shared_factor
from duotone.solver.solve import output_energy
from duotone.solver.statistics import Statistics


def use_solver(run: Run) -> None:
    """Have phases timed by the device that works, and say so where a GPU's solver is not compiled."""
    if run.device.type != "cuda":
        return
    run.phases.time_by(StreamClock(run.device))
    with run.phases("solve"):
        reason = refusal(run.device) if run.plan.config.needs_statistics else None
    if reason is not None:
        run.report.notes.append(f"the solver runs in plain torch on this GPU, which takes long: {reason}")


def solve_group(
    run: Run, group: tuple[str, ...], originals: Mapping[str, Tensor], statistics: Statistics | None
) -> dict[str, AnyWeight]:
    """Quantize the linears that read one input: one Hessian, one factorization."""
    config, ranks = run.plan.config, run.ranks
    factor = None
    if statistics is not None:
        with run.phases("factorize"):
            factor = shared_factor(statistics, config.scheme, config.solver, group[0])
    weights = [originals[f"{layer}.weight"] for layer in group]
    shares = row_shares([len(weight) for weight in weights], config.scheme, ranks)
    with run.phases("solve"):
        statistics = _with_correction(statistics, ranks)
        values = (
            weight[share[ranks.rank]].to(run.device, torch.float32) for weight, share in zip(weights, shares, strict=True)
        )
        problems = [
            Problem(
                layer,
                w_NK,
                _of_rows(statistics, share[ranks.rank]),
                factor,
                config.scheme,
                config.solver,
                run.plan.shards(layer),
                isinstance(run.plan.schemes[layer], Fp8Scheme),
            )
            for layer, w_NK, share in zip(group, values, shares, strict=True)
        ]
        solved = [_solved(config.method, problem) if len(problem.weight) else None for problem in problems]
    if ranks.size > 1:
        with run.phases("exchange"):
            solved = _exchanged(config.method, problems, solved, shares, ranks)
    whole = [answer for answer in solved if answer is not None]
    coded = [weight for weight, _ in whole if isinstance(weight, QuantizedWeight)]
    if run.curvatures is not None and len(coded) == len(whole):  # rows answer for one another's codes, of which FP8 has none
        with run.phases("couple"):
            whole = couple(problems, coded, run.curvatures.read(group[0]))
    run.report.layers.extend(report for _, report in whole)
    return dict(zip(group, (weight for weight, _ in whole), strict=True))


def _solved(method: str, problem: Problem) -> tuple[AnyWeight, LayerReport]:
    return solve_fp8(method, problem) if problem.fp8 else METHODS[method].solve(problem)


def round_unseen(run: Run, layer: str, w_NK: Tensor) -> AnyWeight:
    """A linear that calibration does not pass, each weight to the nearest FP8 value."""
    config = run.plan.config
    weight, report = solve_fp8("rtn", Problem(layer, w_NK.float(), None, None, config.scheme, config.solver, fp8=True))
    run.report.layers.append(report)
    return weight


def row_shares(rows: Sequence[int], scheme: Scheme, ranks: Ranks) -> list[list[slice]]:
    """By linear and process, the rows that the process solves."""
    if scheme.target.channel_outer_scale or ranks.size == 1:
        return [ranks.shares(count) for count in rows]
    busy, owner = [0] * ranks.size, [0] * len(rows)
    for index in sorted(range(len(rows)), key=lambda index: -rows[index]):  # the largest first, to the least busy
        owner[index] = busy.index(min(busy))
        busy[owner[index]] += rows[index]
    return [_all_to(owner[index], count, ranks) for index, count in enumerate(rows)]


def _all_to(owner: int, count: int, ranks: Ranks) -> list[slice]:
    return [slice(0 if rank <= owner else count, count if rank >= owner else 0) for rank in range(ranks.size)]


def _with_correction(statistics: Statistics | None, ranks: Ranks) -> Statistics | None:
    """The statistics with what the input drift asks of weights worked out, each process having done a share of its rows."""
    if ranks.size == 1 or statistics is None or statistics.input_drift is None:
        return statistics
    shares = ranks.shares(len(statistics.input_drift))
    part_KK = statistics.explained(statistics.input_drift[shares[ranks.rank]])
    return replace(statistics, known_correction=ranks.whole([part_KK], [shares])[0])


def _of_rows(statistics: Statistics | None, rows: slice) -> Statistics | None:
    """What the statistics say of some of a linear's rows: the drift of the stream it writes to has one of its own for each."""
    if statistics is None or statistics.stream_target is None:
        return statistics
    mean = statistics.stream_target_mean
    return replace(
        statistics,
        stream_target=statistics.stream_target[rows],
        stream_target_mean=None if mean is None else mean[rows],
    )


def _exchanged(
    method: str,
    problems: Sequence[Problem],
    solved: Sequence[tuple[AnyWeight, LayerReport] | None],
    shares: Sequence[Sequence[slice]],
    ranks: Ranks,
) -> list[tuple[AnyWeight, LayerReport]]:
    """Every linear's answer put together from the processes' rows, the errors weighed by what they are relative to."""
    parts: list[Tensor] = []
    cuts: list[Sequence[slice]] = []
    sums = torch.zeros(len(problems), 4, dtype=torch.float64)
    for problem, answer, share, sum_4 in zip(problems, solved, shares, sums, strict=True):
        parts += _fields(problem) if answer is None else _fields_of(answer[0])
        outer = share if problem.scheme.target.channel_outer_scale else [slice(min(s.start, 1), min(s.stop, 1)) for s in share]
        cuts += [share] * (len(parts) - len(cuts) - 1) + [outer]
        if answer is not None:
            sum_4 += torch.tensor(_energies(problem, answer[1]), dtype=torch.float64)
    ranks.sum_(sums)
    found = iter(ranks.whole(parts, cuts))
    answers: list[tuple[AnyWeight, LayerReport]] = []
    for problem, (weight_loss, weight_energy, output_loss, energy) in zip(problems, sums.tolist(), strict=True):
        weight = _of_fields(problem, found)
        output_error = None if problem.statistics is None else output_loss / max(energy, 1e-30)
        weight_error = weight_loss / max(weight_energy, 1e-30)
        answers.append((weight, report_on(method, problem, weight_error, output_error, "w8a8" if problem.fp8 else "w4a8")))
    return answers


def _of_fields(problem: Problem, found: Iterator[Tensor]) -> AnyWeight:
    """A weight of the tensors that `_fields_of` gives."""
    if problem.fp8:
        return Fp8Weight(next(found).view(torch.float8_e4m3fn), next(found), Fp8Scheme(problem.scheme.target))
    codes, group_scale = next(found), next(found)
    zero_point = None if problem.scheme.symmetric else next(found)
    return QuantizedWeight(codes, group_scale, next(found), problem.scheme, zero_point)


def _fields_of(weight: AnyWeight) -> list[Tensor]:
    """The tensors of a weight, the outer scale last; bytes for FP8, which not every backend sends."""
    if isinstance(weight, Fp8Weight):
        return [weight.values.view(torch.uint8), weight.outer_scale]
    zero = [] if weight.zero_point is None else [weight.zero_point]
    return [weight.codes, weight.group_scale, *zero, weight.outer_scale]


def _fields(problem: Problem) -> list[Tensor]:
    """The same of a weight without rows."""
    scheme, (_, columns) = problem.scheme, problem.weight.shape
    if problem.fp8:
        return [problem.weight.new_empty(0, columns, dtype=torch.uint8), problem.weight.new_empty(0)]
    scale = problem.weight.new_empty(0, scheme.groups(columns))
    return [
        problem.weight.new_empty(0, columns, dtype=torch.uint8), scale, *([] if scheme.symmetric else [scale]), scale[:, 0]
    ]  # fmt: skip


def _energies(problem: Problem, report: LayerReport) -> tuple[float, float, float, float]:
    """Of weights and of outputs, the squared error and what the report has it relative to."""
    weight = float(problem.weight.square().sum())
    output = 0.0 if problem.statistics is None else output_energy(problem.weight, problem.statistics)
    return report.weight_error * weight, weight, (report.output_error or 0.0) * output, output
