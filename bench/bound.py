# Shapes: N out_features of linears that are rounded together, K in_features.
# pyright: reportUnknownMemberType=false
"""How near `--effort high` comes to the least loss that any rounding on its scales can have.

    python bench/bound.py MODEL --calibration TEXT... [--group-size 128] [--samples 128] [--seq-len 256]

With steps s_nk the errors that rounding can leave form the cells of a lattice, one cell a choice of codes, of volume
prod(s) sqrt(det O)^K sqrt(det H)^N in the metric of the loss. No cell of that volume in d = N K dimensions has a smaller second
moment than a ball, and a ball's is at least d volume^(2/d) / (2 pi e). So the mean over targets of tr(O E H E^T) is at least

    N K / (2 pi e) * geometric_mean(s^2) * det(O)^(1/N) * det(H)^(1/K)

whatever the search, even if levels had no end. A column loop over all values leaves sum(s^2 o h) / 12 on average, o and h the
pivots of O and H in its order: pi e / 6 = 1.42 times the bound where all s^2 o h are equal, and more where they are not: a row
that matters more has no more bits. O and H are those that the search works with, damping included. Appends one row to
bench/records/bound.jsonl.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from duotone import pipeline, solving
from duotone.bench import append_records, provenance
from duotone.qweight import QuantizedWeight, dequantize
from duotone.settings import QuantizeConfig
from duotone.solver import couple as coupling
from duotone.solver.drift import corrected_target
from duotone.solver.methods import LayerReport, Problem
from duotone.solver.solve import Factor

RECORDS = Path(__file__).resolve().parent / "records" / "bound.jsonl"


def part_losses(
    targets: Sequence[Tensor], weights: Sequence[QuantizedWeight], curvature_NN: Tensor, hessian_KK: Tensor, factor: Factor
) -> tuple[float, float, float]:
    """Half of tr(O E H E^T) of linears rounded together, the least it can be on their scales, and what a column loop leaves."""
    o_NN = coupling.damped(curvature_NN, targets).double()
    read_K = hessian_KK.diagonal() > 0  # columns of padding cost nothing
    damping = factor.damping_frac * hessian_KK.diagonal().mean()
    h_KK = (hessian_KK + damping * torch.eye(len(hessian_KK))).double()[read_K][:, read_K]
    e_NK = torch.cat([target - dequantize(weight) for target, weight in zip(targets, weights, strict=True)])[:, read_K].double()
    step_NK = torch.cat([_steps(weight) for weight in weights])[:, read_K].double()
    rows, columns = e_NK.shape
    log_volume = 2 * float(step_NK.log().mean()) + _logdet(o_NN) / rows + _logdet(h_KK) / columns
    loss = float(((o_NN @ e_NK @ h_KK) * e_NK).sum())
    bound = rows * columns * math.exp(log_volume) / (2 * math.pi * math.e)
    order_K = (torch.cumsum(read_K, 0) - 1)[factor.order_K[read_K[factor.order_K]]]
    o_N, h_K = _pivots(o_NN, torch.argsort(o_NN.diagonal(), descending=True, stable=True)), _pivots(h_KK, order_K)
    loop = float(o_N @ step_NK.square() @ h_K) / 12
    return loss / 2, bound / 2, loop / 2


def _steps(weight: QuantizedWeight) -> Tensor:
    """Distance [N, K] of neighbouring levels, before their rounding to FP8."""
    group_NG = weight.group_scale.float() * weight.outer_scale.float().reshape(-1, 1)
    return group_NG.repeat_interleave(weight.scheme.group_size, 1)[:, : weight.codes.shape[1]]


def _pivots(matrix: Tensor, order: Tensor) -> Tensor:
    """What of each variable is left when all that come after it in the order have made up for what they can."""
    root = torch.linalg.cholesky(matrix[order][:, order].flip(0, 1))
    pivots = torch.empty_like(order, dtype=matrix.dtype)
    pivots[order] = root.diagonal().flip(0).square()
    return pivots


def _logdet(matrix: Tensor) -> float:
    return float(torch.linalg.cholesky(matrix).diagonal().log().sum()) * 2


def measure(model: str, config: QuantizeConfig) -> list[tuple[str, float, float, float]]:
    """(first linear, half loss, half bound, half of a column loop's) of each part that is rounded together."""
    found: list[tuple[str, float, float, float]] = []
    couple = coupling.couple

    def watch(problems: Sequence[Problem], weights: Sequence[QuantizedWeight], curvature: Sequence[Tensor]) -> Any:
        answers: list[tuple[QuantizedWeight, LayerReport]] = couple(problems, weights, curvature)
        statistics, factor = problems[0].statistics, problems[0].factor
        assert statistics is not None and factor is not None
        targets = [corrected_target(problem.weight, statistics) for problem in problems]
        for rows, o_NN in zip(coupling.row_parts([len(target) for target in targets]), curvature, strict=True):
            aims = [target[index] for target, index in zip(targets, rows, strict=True)]
            parts = [_rows(weight, index) for (weight, _), index in zip(answers, rows, strict=True)]
            found.append((problems[0].layer, *part_losses(aims, parts, o_NN, statistics.hessian, factor)))
        return answers

    with mock.patch.object(solving, "couple", watch), tempfile.TemporaryDirectory() as scratch:
        pipeline.quantize(model, Path(scratch) / "out", config)
    return found


def _rows(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    outer = weight.outer_scale.expand(len(weight.codes))[rows]
    zero = None if weight.zero_point is None else weight.zero_point[rows]
    return QuantizedWeight(weight.codes[rows], weight.group_scale[rows], outer, weight.scheme, zero)


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args()
    config = QuantizeConfig(
        effort="high", calibration=tuple(given.calibration), group_size=given.group_size, samples=given.samples,
        seq_len=given.seq_len, device="cpu",
    )  # fmt: skip
    found = measure(given.model, config)
    loss, bound, loop = (sum(values) for values in list(zip(*found, strict=True))[1:])
    row = provenance(config.seed) | {
        "model": Path(given.model).name, "group_size": given.group_size, "loss": loss, "bound": bound, "column_loop": loop,
        "parts": [[name, *(round(value, 9) for value in values)] for name, *values in found],
    }  # fmt: skip
    append_records(given.records, [row])
    print(f"{row['model']}: half the sum of tr(O E H E') {loss:.5f}, at least {bound:.5f}, in a column loop {loop:.5f}")


if __name__ == "__main__":
    main()
