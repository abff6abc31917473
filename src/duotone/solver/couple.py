# Shapes: N out_features (of all linears that are rounded together), K in_features, B columns of a block.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""`--effort high`: the linears that read one input are rounded once more, together, for what their errors do to the model.

The methods take a linear's outputs for equally important and unrelated. The model does not: with G the gradients of its loss
in these outputs and O = E[G G^T] (`calibrate/curvature.py`), the loss is tr(O E H E^T) to second order, and one output's error
can make up for another's. Targets and scales stay those of the method; codes are searched anew. docs/objective.md has the
argument.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from duotone.errors import DuotoneError
from duotone.qweight import QuantizedWeight
from duotone.scheme import Scheme
from duotone.solver.drift import corrected_target
from duotone.solver.methods import LayerReport, Problem, finish
from duotone.solver.rows import beam_rows, descend_rows
from duotone.solver.scales import Scales
from duotone.solver.solve import Factor
from duotone.solver.sweep import Grid, Rule

#: Rows whose curvature is kept in one matrix; more are cut into parts that know nothing of each other.
MAX_ROWS = 1024
#: Added to O, as a share of each linear's mean diagonal: its estimate has the noise of sampled gradients.
CURVATURE_DAMPING = 0.03
#: Added besides, to every linear: that share of the curvature of the one whose rounding costs most, in units of their own
#: rounding errors. A linear that the loss hardly feels would else take up all the others' errors, and leave the range in which
#: its curvature holds.
RESPONSE_DAMPING = 0.01
#: Paths of the beam search, and how often each row is searched again with all others known. docs/LOG.md has the trials.
BEAM_WIDTH, REVISITS = 128, 1
#: Sweeps of coordinate descent over all values at the end.
_DESCENT_PASSES, _BLOCK = 4, 128


def row_parts(rows: Sequence[int]) -> list[list[Tensor]]:
    """The rows of linears that read one input, cut into parts of at most about MAX_ROWS; by part, then by linear.

    Each part has the same share of every linear: row n of a gate stays with row n of its up projection, a query's head with the
    key and value that it meets.
    """
    parts = -(-sum(rows) // MAX_ROWS)
    return [[torch.arange(n * part // parts, n * (part + 1) // parts) for n in rows] for part in range(parts)]


def couple(
    problems: Sequence[Problem], weights: Sequence[QuantizedWeight], curvature: Sequence[Tensor]
) -> list[tuple[QuantizedWeight, LayerReport]]:
    """The linears' weights with codes chosen together. curvature: O of every part of `row_parts`, float32.

    problems share statistics and factor; weights are the method's answers to them. Raises DuotoneError naming the first linear
    when a curvature is no positive definite matrix even with its damping.
    """
    first = problems[0]
    if first.statistics is None or first.factor is None:
        raise ValueError(f"{first.layer}: coupling needs calibration statistics")
    # One value after the other: this is work for a CPU, whatever the device of the rest.
    targets = [corrected_target(problem.weight, first.statistics).cpu() for problem in problems]
    codes = [weight.codes.clone() for weight in weights]
    parts = row_parts([len(target) for target in targets])
    factor = _on_cpu(first.factor)
    hessian_KK = first.statistics.hessian.cpu().clone()
    hessian_KK.diagonal().add_(factor.damping_frac * hessian_KK.diagonal().mean())

    def round_part(rows: list[Tensor], curvature_NN: Tensor) -> list[Tensor]:
        aims = [target[index] for target, index in zip(targets, rows, strict=True)]
        scales = _stack([_rows_of(weight, index) for weight, index in zip(weights, rows, strict=True)])
        damped_NN = damped(curvature_NN, aims)
        codes_NK = _round_together(torch.cat(aims), scales, damped_NN, hessian_KK, factor, first.scheme, first.layer)
        return list(codes_NK.split([len(index) for index in rows]))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # a part is one thread's work, whatever their number
        for rows, found in zip(parts, pool.map(round_part, parts, curvature), strict=True):
            for code, index, new in zip(codes, rows, found, strict=True):
                code[index.to(code.device)] = new.to(code.device)
    return [
        finish("dpq", problem, code, Scales(weight.group_scale, weight.zero_point, weight.outer_scale))
        for problem, weight, code in zip(problems, weights, codes, strict=True)
    ]


def _round_together(
    target_NK: Tensor, scales: Scales, curvature_NN: Tensor, hessian_KK: Tensor, factor: Factor, scheme: Scheme, layer: str
) -> Tensor:
    """Codes uint8 [N, K] in the original order: beam search row by row, then coordinate descent over everything."""
    order_K, order_N = factor.order_K, torch.argsort(curvature_NN.diagonal(), descending=True, stable=True)
    group_K = (order_K // scheme.group_size).to(torch.int32)
    grid = Grid.of(_take(scales, order_N), Rule.NEAREST_VALUE, scheme)
    w_NK, o_NN = target_NK[order_N][:, order_K].contiguous(), curvature_NN[order_N][:, order_N].contiguous()
    flipped_NN, failed = torch.linalg.cholesky_ex(o_NN.flip(0, 1))
    if int(failed) or not bool(torch.isfinite(o_NN).all()):
        raise DuotoneError(f"{layer}: the curvature of its outputs does not factorize, expected a positive definite matrix")
    root_NN = flipped_NN.flip(0, 1)
    earlier_NN, others_NN = root_NN / root_NN.diagonal(), o_NN / o_NN.diagonal()
    how = (factor.unit_KK, factor.diagonal_K, grid, group_K, BEAM_WIDTH)
    codes_NK, value_NK = beam_rows(w_NK, earlier_NN, *how)
    for _ in range(REVISITS):
        codes_NK, value_NK = beam_rows(w_NK, others_NN, *how, (codes_NK, value_NK))
    h_KK = hessian_KK[order_K][:, order_K]
    codes_KN = _descend(w_NK.T, codes_NK.T.contiguous(), value_NK.T.contiguous(), o_NN, h_KK, grid, group_K)
    found_NK = torch.empty_like(codes_NK)
    found_NK[order_N[:, None], order_K] = codes_KN.T
    return found_NK


def _descend(
    w_KN: Tensor, codes_KN: Tensor, value_KN: Tensor, o_NN: Tensor, h_KK: Tensor, grid: Grid, group_K: Tensor
) -> Tensor:
    """Codes [K, N] after sweeps of `descend_rows` over all columns; none can raise the loss."""
    weighed_KN = (w_KN - value_KN) @ o_NN  # (O E)^T, kept up with every move
    for _ in range(_DESCENT_PASSES):
        for start in range(0, len(codes_KN), _BLOCK):
            block = slice(start, start + _BLOCK)
            pull_BN = h_KK[block] @ weighed_KN
            found = descend_rows(pull_BN, o_NN, h_KK[block, block], grid, group_K[block], codes_KN[block], value_KN[block])
            codes_KN[block], value_KN[block] = found[:2]
            weighed_KN[block] -= found[2]
    return codes_KN


def damped(curvature_NN: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """O with its damping, linear by linear: a key's gradients may be far smaller than a value's. Without any: identity."""
    damped_NN = curvature_NN.clone()
    diagonals = damped_NN.diagonal().split([len(target) for target in targets])
    means = [float(diagonal.mean()) for diagonal in diagonals]
    powers = [float(target.square().mean()) for target in targets]  # rounding errors are in proportion to it
    dearest = max(mean * power for mean, power in zip(means, powers, strict=True))
    for diagonal, mean, power in zip(diagonals, means, powers, strict=True):
        response = RESPONSE_DAMPING * dearest / power if power > 0 else 0.0
        diagonal += CURVATURE_DAMPING * mean + response if mean > 0 else 1.0
    return damped_NN


def _on_cpu(factor: Factor) -> Factor:
    return replace(factor, unit_KK=factor.unit_KK.cpu(), diagonal_K=factor.diagonal_K.cpu(), order_K=factor.order_K.cpu())


def _rows_of(weight: QuantizedWeight, rows_N: Tensor) -> Scales:
    zero = None if weight.zero_point is None else weight.zero_point.cpu()
    return _take(Scales(weight.group_scale.cpu(), zero, weight.outer_scale.cpu().expand(len(weight.codes))), rows_N)


def _take(scales: Scales, rows_N: Tensor) -> Scales:
    zero = scales.zero_point
    return Scales(scales.group_scale[rows_N], None if zero is None else zero[rows_N], scales.outer_scale[rows_N])


def _stack(scales: list[Scales]) -> Scales:
    zeros = [part.zero_point for part in scales if part.zero_point is not None]
    group, outer = torch.cat([part.group_scale for part in scales]), torch.cat([part.outer_scale for part in scales])
    return Scales(group, torch.cat(zeros) if zeros else None, outer)
