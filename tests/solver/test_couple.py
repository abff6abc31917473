# Shapes: N out_features (of all linears of a part), K in_features, M tokens.
"""Linears that read one input, rounded together: what is cut, what falls, what stays, and what is refused.

Much of it would take minutes without the extension; the two paths are compared here and in test_rows.py.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duotone.errors import DuotoneError
from duotone.kernels import native
from duotone.qweight import QuantizedWeight, dequantize
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.solver import couple as couple_module
from duotone.solver.couple import CURVATURE_DAMPING, RESPONSE_DAMPING, couple, row_parts
from duotone.solver.drift import corrected_target
from duotone.solver.methods import Problem, SolverOptions, dpq, shared_factor
from duotone.solver.scales import Scales
from duotone.solver.solve import output_loss
from duotone.solver.statistics import Statistics
from duotone.solver.sweep import Grid, Rule
from tests.oracles.obq import correlated_layer, damped, obq
from tests.solver.test_rows import curvature_of, tables_of, total_loss
from tests.solver.test_sweep import COMPILED

#: Rows of a query, a key and a value projection, and the input they share.
ROWS, COLUMNS = (24, 8, 8), 40
BOTH_TARGETS = pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=["hopper", "gaudi"])
SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


@pytest.fixture
def threads() -> Iterator[None]:
    """Put torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def solved(
    scheme: Scheme, rows: Sequence[int] = ROWS, seed: int = 0, drift: bool = False, options: SolverOptions | None = None
) -> tuple[list[Problem], list[QuantizedWeight]]:
    """Linears on one correlated input, and dpq's answers."""
    w_NK, hessian_KK = correlated_layer(sum(rows), COLUMNS, seed, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    moved_KK = 0.05 * torch.randn(COLUMNS, COLUMNS, generator=generator) if drift else None
    statistics = Statistics(hessian_KK, 8 * COLUMNS, moved_KK)
    options = options or SolverOptions("act")
    factor = shared_factor(statistics, scheme, options, "linear0")
    problems = [Problem(f"linear{i}", w, statistics, factor, scheme, options) for i, w in enumerate(w_NK.split(list(rows)))]
    return problems, [dpq(problem)[0] for problem in problems]


def joint_loss(problems: list[Problem], weights: Sequence[QuantizedWeight], curvature: list[Tensor]) -> float:
    """The sum over parts of tr(O E H E^T), O and H with their dampings, E against what the method aims at; float64."""
    first = problems[0]
    assert first.statistics is not None and first.factor is not None
    targets = [corrected_target(problem.weight, first.statistics) for problem in problems]
    errors = [target - dequantize(weight) for target, weight in zip(targets, weights, strict=True)]
    hessian_KK = first.statistics.hessian
    hessian_KK = hessian_KK + first.factor.damping_frac * hessian_KK.diagonal().mean() * torch.eye(COLUMNS)
    total = 0.0
    for rows, o_NN in zip(row_parts([len(error) for error in errors]), curvature, strict=True):
        e_NK = torch.cat([error[index] for error, index in zip(errors, rows, strict=True)])
        aims = [target[index] for target, index in zip(targets, rows, strict=True)]
        total += total_loss(e_NK, o_NN + damping(aims, o_NN), hessian_KK)
    return total


def damping(targets: Sequence[Tensor], o_NN: Tensor) -> Tensor:
    """What is added to O: a share of each linear's mean, and one of the dearest linear's, rounding error for rounding error."""
    rows = [len(target) for target in targets]
    means = [float(part.mean()) for part in o_NN.diagonal().split(rows)]
    power = [float(target.square().mean()) for target in targets]
    dearest = max(mean * size for mean, size in zip(means, power, strict=True))
    added = [CURVATURE_DAMPING * mean + RESPONSE_DAMPING * dearest / size for mean, size in zip(means, power, strict=True)]
    return torch.diag(torch.tensor(added).repeat_interleave(torch.tensor(rows)))


def curvature_for(rows: Sequence[int], seed: int = 0) -> list[Tensor]:
    """A random O for every part."""
    generator = torch.Generator().manual_seed(seed)
    return [curvature_of(sum(len(index) for index in part), generator) for part in row_parts(rows)]


@given(rows=st.lists(st.integers(1, 60), min_size=1, max_size=4), limit=st.integers(1, 50))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_parts_share_the_rows(rows: list[int], limit: int) -> None:
    """Every row of every linear once and in order; parts near the limit; of each linear the same share in all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(couple_module, "MAX_ROWS", limit)
        parts = row_parts(rows)
    assert all(len(part) == len(rows) for part in parts)
    for i, n in enumerate(rows):
        assert torch.cat([part[i] for part in parts]).tolist() == list(range(n))
        sizes = [len(part[i]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    assert all(sum(len(index) for index in part) <= limit + len(rows) for part in parts)
    assert len(parts) == -(-sum(rows) // limit)


def test_rows_that_meet_are_not_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row n of a gate is where row n of its up projection is; a head of the queries where its group's key and value are."""
    monkeypatch.setattr(couple_module, "MAX_ROWS", 64)
    for gate, up in row_parts([160, 160]):
        assert torch.equal(gate, up)
    for query, key, value in row_parts([96, 32, 32]):  # three parts: 12 heads of 8 rows, 4 of keys and values
        assert torch.equal(key, value)
        meant = {row // 3 for row in query.tolist()}
        assert len(meant ^ set(key.tolist())) <= 2


@COMPILED
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("drift", [False, True], ids=["still", "drifted"])
@BOTH_TARGETS
@SYMMETRY
def test_less_loss_at_the_same_scales(
    target: Target, symmetric: bool, drift: bool, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The joint loss falls well below the method's; only codes change, and the report is of the new ones."""
    monkeypatch.setattr(couple_module, "MAX_ROWS", -(-sum(ROWS) // parts))
    problems, weights = solved(Scheme(target, 16, symmetric), drift=drift)
    curvature = curvature_for(ROWS)
    kept = [weight.codes.clone() for weight in weights], [o_NN.clone() for o_NN in curvature]
    found = couple(problems, weights, curvature)
    assert len(curvature) == parts
    assert joint_loss(problems, [weight for weight, _ in found], curvature) < 0.8 * joint_loss(problems, weights, curvature)
    for (weight, report), before, problem in zip(found, weights, problems, strict=True):
        assert torch.equal(weight.group_scale, before.group_scale)
        assert torch.equal(weight.outer_scale, before.outer_scale)
        assert (weight.zero_point is None) == symmetric
        if weight.zero_point is not None and before.zero_point is not None:
            assert torch.equal(weight.zero_point, before.zero_point)
        assert weight.codes.dtype == torch.uint8 and weight.codes.shape == before.codes.shape
        assert (report.layer, report.method) == (problem.layer, "dpq")
        error = (dequantize(weight) - problem.weight).square().sum() / problem.weight.square().sum()
        assert report.weight_error == pytest.approx(float(error), rel=1e-4)
    assert all(torch.equal(weight.codes, codes) for weight, codes in zip(weights, kept[0], strict=True))
    assert all(torch.equal(o_NN, before) for o_NN, before in zip(curvature, kept[1], strict=True))


@COMPILED
def test_parts_know_nothing_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part's codes are those of its rows alone, in their places."""
    monkeypatch.setattr(couple_module, "MAX_ROWS", 14)
    problems, weights = solved(Scheme(HOPPER, 16, False))
    curvature, parts = curvature_for(ROWS), row_parts(ROWS)
    found = couple(problems, weights, curvature)
    monkeypatch.undo()
    assert len(parts) == 3
    for part, o_NN in zip(parts, curvature, strict=True):
        own = [replace(problem, weight=problem.weight[rows]) for problem, rows in zip(problems, part, strict=True)]
        answers = []
        for weight, rows in zip(weights, part, strict=True):
            assert weight.zero_point is not None
            answers.append(
                QuantizedWeight(
                    weight.codes[rows],
                    weight.group_scale[rows],
                    weight.outer_scale[rows],
                    weight.scheme,
                    weight.zero_point[rows],
                )
            )
        for (alone, _), (whole, _), rows in zip(couple(own, answers, [o_NN]), found, part, strict=True):
            assert torch.equal(alone.codes, whole.codes[rows])


@COMPILED
@pytest.mark.usefixtures("threads")
def test_threads_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five parts on one thread, or on several at once: the same codes."""
    monkeypatch.setattr(couple_module, "MAX_ROWS", 8)
    problems, weights = solved(Scheme(GAUDI, 16))
    curvature, codes, workers = curvature_for(ROWS), [], []
    solve_part = couple_module._round_together

    def note(*given: object) -> Tensor:
        workers[-1].add(threading.get_ident())
        return solve_part(*given)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(couple_module, "_round_together", note)
    for count in (1, 3):
        torch.set_num_threads(count)
        workers.append(set())
        codes.append([weight.codes for weight, _ in couple(problems, weights, curvature)])
    assert len(curvature) == 5 and len(workers[0]) == 1
    assert all(torch.equal(one, several) for one, several in zip(*codes, strict=True))


@BOTH_TARGETS
def test_without_the_extension(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch path lowers the loss too; to the compiled one's, but for a near tie."""
    monkeypatch.setattr(couple_module, "BEAM_WIDTH", 4)
    monkeypatch.setattr(couple_module, "_DESCENT_PASSES", 2)
    rows = (6, 2)
    problems, weights = solved(Scheme(target, 16), rows)
    curvature, losses = curvature_for(rows), []
    for available in (native.available(), False):
        monkeypatch.setattr(native, "available", lambda available=available: available)
        found = [weight for weight, _ in couple(problems, weights, curvature)]
        losses.append(joint_loss(problems, found, curvature))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] < 0.9 * joint_loss(problems, weights, curvature)


@pytest.mark.parametrize("order", ["act", "gar", "none"])
@BOTH_TARGETS
def test_a_single_path_is_obq_over_all_values(target: Target, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One path, nothing revisited: OBQ in float64 over the Kronecker product of O and H, all rows as one long row.

    Rows from the most curvature down, columns in the factor's order; codes come back in the original places.
    """
    for name, value in (("BEAM_WIDTH", 1), ("REVISITS", 0), ("_DESCENT_PASSES", 0)):
        monkeypatch.setattr(couple_module, name, value)
    rows = (3, 1, 2)
    problems, weights = solved(Scheme(target, 16), rows, options=SolverOptions(order))
    (o_NN,) = curvature_for(rows)
    first = problems[0]
    assert first.statistics is not None and first.factor is not None
    damped_NN = (o_NN + damping([problem.weight for problem in problems], o_NN)).double().numpy()
    hessian_KK = damped(first.statistics.hessian.double().numpy(), first.factor.damping_frac)
    visited = [n * COLUMNS + k for n in np.argsort(-damped_NN.diagonal(), kind="stable") for k in first.factor.order_K.tolist()]
    groups = torch.arange(COLUMNS) // 16
    table = np.concatenate(
        [tables_of(Grid.of(scales_of(weight), Rule.NEAREST_VALUE, first.scheme), groups) for weight in weights]
    )
    table = table.reshape(-1, 16)

    def nearest(w_N: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray]:
        code = np.abs(table[at] - w_N[0]).argmin()
        return code, table[at, code]

    w = torch.cat([problem.weight for problem in problems]).double().reshape(1, -1).numpy()
    expected, _ = obq(w, np.kron(damped_NN, hessian_KK), visited, nearest)
    found = torch.cat([weight.codes for weight, _ in couple(problems, weights, [o_NN])])
    assert np.array_equal(found.numpy(), expected.reshape(found.shape))


def scales_of(weight: QuantizedWeight) -> Scales:
    return Scales(weight.group_scale, weight.zero_point, weight.outer_scale)


@COMPILED
def test_it_ends_where_no_single_value_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """After many sweeps over blocks of columns, none of the 16 values of any weight is better than the one it has."""
    monkeypatch.setattr(couple_module, "_DESCENT_PASSES", 30)
    monkeypatch.setattr(couple_module, "_BLOCK", 16)
    monkeypatch.setattr(couple_module, "BEAM_WIDTH", 1)
    rows = (8, 4)
    problems, weights = solved(Scheme(HOPPER, 16), rows, options=SolverOptions("act", damping_frac=0.3))
    curvature = curvature_for(rows)
    found = [weight for weight, _ in couple(problems, weights, curvature)]
    least = joint_loss(problems, found, curvature)
    assert least < 0.9 * joint_loss(problems, weights, curvature)
    generator = torch.Generator().manual_seed(0)
    for i, weight in enumerate(found):
        for _ in range(150):
            n, k, code = (int(torch.randint(limit, (1,), generator=generator)) for limit in (rows[i], COLUMNS, 16))
            codes = weight.codes.clone()
            codes[n, k] = code
            moved = [*found[:i], replace(weight, codes=codes), *found[i + 1 :]]
            assert joint_loss(problems, moved, curvature) >= least * (1 - 1e-5)


@COMPILED
def test_every_step_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The joint loss of one path; of a wider beam; with each row searched again for all others; with sweeps at the end."""
    losses = np.zeros(4)
    for seed in (1, 3):
        (problems, weights), curvature = solved(Scheme(HOPPER, 16), seed=seed), curvature_for(ROWS, seed)
        for i, (width, revisits, passes) in enumerate(((1, 0, 0), (16, 0, 0), (16, 1, 0), (16, 1, 4))):
            monkeypatch.setattr(couple_module, "BEAM_WIDTH", width)
            monkeypatch.setattr(couple_module, "REVISITS", revisits)
            monkeypatch.setattr(couple_module, "_DESCENT_PASSES", passes)
            losses[i] += joint_loss(problems, [weight for weight, _ in couple(problems, weights, curvature)], curvature)
    assert losses[0] > 1.1 * losses[1] and losses[1] > 1.02 * losses[2] and losses[2] > losses[3], losses


@COMPILED
def test_a_linear_without_curvature() -> None:
    """A linear whose outputs the loss does not feel is rounded for itself, no worse than before; the others as without it."""
    problems, weights = solved(Scheme(HOPPER, 16), seed=1)
    (o_NN,) = curvature_for(ROWS)
    felt = torch.ones(sum(ROWS))
    felt[ROWS[0] : ROWS[0] + ROWS[1]] = 0
    found = [weight for weight, _ in couple(problems, weights, [o_NN * felt * felt[:, None]])]
    others = [0, 2]
    kept_NN = o_NN[felt > 0][:, felt > 0]
    without = couple([problems[i] for i in others], [weights[i] for i in others], [kept_NN])
    for i, (weight, _) in zip(others, without, strict=True):
        assert (weight.codes == found[i].codes).double().mean() > 0.99
    for i, better in ((1, 1.0), (0, 10.0)):  # alone with the identity; the query's own loss may grow for the joint one
        eye = torch.eye(ROWS[i])
        before, after = (joint_loss([problems[i]], [weight[i]], [eye]) for weight in (weights, found))
        assert after <= better * before


@COMPILED
def test_the_unit_of_the_loss_is_no_matter() -> None:
    """O times a power of two gives the same codes."""
    problems, weights = solved(Scheme(HOPPER, 16))
    (o_NN,) = curvature_for(ROWS)
    plain, scaled = (couple(problems, weights, [each_NN]) for each_NN in (o_NN, o_NN * 2.0**-40))
    assert all(torch.equal(one.codes, other.codes) for (one, _), (other, _) in zip(plain, scaled, strict=True))


@COMPILED
@pytest.mark.parametrize("felt", [1.0, 1e-1, 1e-3, 1e-6])
def test_a_linear_that_is_hardly_felt_answers_for_others_in_bounds(felt: float) -> None:
    """Its curvature says that it may take up any error of theirs; that holds for small errors, so they are kept small."""
    problems, weights = solved(Scheme(HOPPER, 16))
    (o_NN,) = curvature_for(ROWS)
    felt_N = torch.ones(sum(ROWS))
    felt_N[: ROWS[0]] = felt
    found = couple(problems, weights, [o_NN * felt_N * felt_N[:, None]])
    for (_, report), problem, weight in zip(found, problems, weights, strict=True):
        assert problem.statistics is not None and report.output_error is not None
        assert report.output_error < 10 * output_loss(problem.weight, dequantize(weight), problem.statistics)


def nan_at(*places: tuple[int, int]) -> Tensor:
    (o_NN,) = curvature_for(ROWS)
    for row, column in places:
        o_NN[row, column] = float("nan")
    return o_NN


@pytest.mark.parametrize(
    "curvature",
    [
        pytest.param(nan_at((3, 3)), id="NaN on the diagonal"),
        pytest.param(nan_at((3, 30), (30, 3)), id="NaN beside it"),
        pytest.param(-curvature_for(ROWS)[0] - 2 * torch.eye(sum(ROWS)), id="negative definite"),
        pytest.param(torch.ones(sum(ROWS), sum(ROWS)) - 0.5 * torch.eye(sum(ROWS)), id="indefinite"),
    ],
)
def test_no_curvature_at_all(curvature: Tensor) -> None:
    """What no second moments can be is refused by the name of the first linear."""
    problems, weights = solved(Scheme(HOPPER, 16))
    with pytest.raises(DuotoneError, match=r"^linear0: the curvature of its outputs .*expected a positive definite matrix"):
        couple(problems, weights, [curvature])


def test_a_bad_part_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several parts on their threads, one that fails fails them all."""
    monkeypatch.setattr(couple_module, "MAX_ROWS", 14)
    problems, weights = solved(Scheme(HOPPER, 16))
    curvature = curvature_for(ROWS)
    curvature[1] = torch.full_like(curvature[1], float("nan"))
    with pytest.raises(DuotoneError, match=r"^linear0: "):
        couple(problems, weights, curvature)


def test_statistics_are_needed() -> None:
    """A mistake of the caller's."""
    problems, weights = solved(Scheme(HOPPER, 16))
    with pytest.raises(ValueError, match=r"^linear0: coupling needs calibration statistics"):
        couple([replace(problem, statistics=None) for problem in problems], weights, curvature_for(ROWS))
