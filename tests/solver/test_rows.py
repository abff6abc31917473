# Shapes: N out_features, K in_features, B columns of a block, G groups along K, P paths of a beam.
"""The two loops in which rows answer for one another, by their definitions, and the compiled ones against torch's."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.solver.rows import beam_rows, beam_rows_torch, descend_rows, descend_rows_torch
from duotone.solver.scales import fit_scales
from duotone.solver.solve import Factor, factorize, solve
from duotone.solver.statistics import Statistics
from duotone.solver.sweep import Grid, Rule
from tests.oracles.descent import descent
from tests.oracles.obq import correlated_layer
from tests.solver.test_sweep import COMPILED, groups_of, random_grid

#: `beam_rows` and `descend_rows` take the compiled path where there is one.
BEAMS = pytest.mark.parametrize(
    "beam", [pytest.param(beam_rows, marks=COMPILED, id="compiled"), pytest.param(beam_rows_torch, id="torch")]
)
DESCENTS = pytest.mark.parametrize(
    "visit", [pytest.param(descend_rows, marks=COMPILED, id="compiled"), pytest.param(descend_rows_torch, id="torch")]
)
BOTH_TARGETS = pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=["hopper", "gaudi"])
SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
TARGETS = st.sampled_from([HOPPER, GAUDI])

Found = tuple[Tensor, Tensor]


@dataclass
class Case:
    """What a beam is given, but for its width."""

    target_NK: Tensor
    coupling_NN: Tensor
    unit_KK: Tensor
    diagonal_K: Tensor
    grid: Grid
    group_K: Tensor

    def run(self, beam: Callable[..., Found], width: int, start: Found | None = None) -> Found:
        return beam(self.target_NK, self.coupling_NN, self.unit_KK, self.diagonal_K, self.grid, self.group_K, width, start)

    @property
    def root(self) -> np.ndarray:
        """R [K, K], upper triangular: the loss of a row is |x R|^2."""
        return self.unit_KK.double().numpy() * self.diagonal_K.double().numpy()

    def row_losses(self, value_NK: Tensor) -> np.ndarray:
        """Every row's loss [N] for itself, whatever the other rows do."""
        return np.square((self.target_NK - value_NK).double().numpy() @ self.root).sum(-1)


def tables_of(grid: Grid, group_K: Tensor) -> np.ndarray:
    """Float64 [N, K, 16]: the values of all codes, FP8 by ml_dtypes."""
    scale_NK = grid.group_scale_GN[group_K].T.numpy()
    zero_NK = np.zeros_like(scale_NK) if grid.zero_point_GN is None else grid.zero_point_GN[group_K].T.numpy()
    kind = ml_dtypes.float8_e4m3fn if grid.scheme.target is HOPPER else ml_dtypes.float8_e4m3
    limit = np.float32(grid.scheme.target.fp8.max)
    product = (np.arange(-8, 8, dtype=np.float32) - zero_NK[..., None]) * scale_NK[..., None]
    outer_N = grid.outer_scale.expand(len(scale_NK)).numpy()
    return (product.clip(-limit, limit).astype(kind).astype(np.float32) * outer_N[:, None, None]).astype(np.float64)


def decoded(codes_NK: Tensor, grid: Grid, group_K: Tensor) -> Tensor:
    """The values of codes, float32 [N, K]."""
    table_NK16 = tables_of(grid, group_K)
    return torch.from_numpy(np.take_along_axis(table_NK16, codes_NK.numpy()[..., None].astype(int), -1)[..., 0]).float()


def exact_case(rows: int, columns: int, target: Target, symmetric: bool, generator: torch.Generator) -> Case:
    """Small dyadic numbers: every product and sum of the search is exact in float32, in any order, fused or not.

    Weights go a little beyond the outermost values. No two codes of a group have the same value.
    """

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    groups = 3
    scale_GN = whole(4, 8, groups, rows) / 8 if symmetric else torch.exp2(whole(-1, 0, groups, rows))
    zero_GN = None if symmetric else whole(-8, 7, groups, rows)
    outer = torch.ones(1) if target is GAUDI else torch.exp2(whole(-1, 0, rows))
    grid = Grid(scale_GN, zero_GN, outer, Rule.NEAREST_VALUE, Scheme(target, symmetric=symmetric))
    group_K = groups_of(columns, groups, generator)
    table_NK16 = torch.from_numpy(tables_of(grid, group_K)).float()
    low_NK, high_NK = table_NK16[..., 0], table_NK16[..., -1]
    share_NK = whole(-1, 33, rows, columns) / 32
    target_NK = torch.round(low_NK + share_NK * (high_NK - low_NK)) + whole(-255, 255, rows, columns) / 512
    unit_KK = torch.triu(whole(-1, 1, columns, columns) * (whole(0, 2, columns, columns) == 0), 1) + torch.eye(columns)
    coupling_NN = whole(-1, 1, rows, rows) * (whole(0, 1, rows, rows) == 0)
    return Case(target_NK, coupling_NN, unit_KK, torch.exp2(whole(0, 1, columns)), grid, group_K)


def random_case(rows: int, columns: int, target: Target, symmetric: bool, seed: int) -> Case:
    """A correlated layer, columns in the order of their curvature; rows coupled by a factor of a random curvature."""
    generator = torch.Generator().manual_seed(seed)
    w_NK, hessian_KK = correlated_layer(rows, columns, seed, torch.float32)
    order_K = torch.argsort(hessian_KK.diagonal(), descending=True)
    factor = factorize(Statistics(hessian_KK, 1), order_K, 0.01, "layer")
    root_NN = torch.linalg.cholesky(curvature_of(rows, generator).flip(0, 1)).flip(0, 1)
    grid = random_grid(rows, 3, target, symmetric, Rule.NEAREST_VALUE, generator)
    group_K = groups_of(columns, 3, generator)
    return Case(w_NK[:, order_K], root_NN / root_NN.diagonal(), factor.unit_KK, factor.diagonal_K, grid, group_K)


def fitted_case(rows: int, columns: int, target: Target, symmetric: bool, seed: int) -> Case:
    """`random_case` with min-max scales of its groups of 8, as a method would fit them, and no coupling."""
    case, scheme = random_case(rows, columns, target, symmetric, seed), Scheme(target, 8, symmetric)
    case.grid = Grid.of(fit_scales(case.target_NK, scheme), Rule.NEAREST_VALUE, scheme)
    case.group_K, case.coupling_NN = (torch.arange(columns) // 8).to(torch.int32), torch.zeros(rows, rows)
    return case


def curvature_of(rows: int, generator: torch.Generator) -> Tensor:
    """A well-conditioned O [N, N] of correlated gradients, uneven between rows."""
    mixing_NN = torch.eye(rows) + 0.4 * torch.randn(rows, rows, generator=generator)
    g_MN = torch.randn(8 * rows + 8, rows, generator=generator) @ mixing_NN
    g_MN *= torch.exp(0.5 * torch.randn(rows, generator=generator))
    return g_MN.T @ g_MN / len(g_MN)


def total_loss(e_NK: Tensor, curvature_NN: Tensor, hessian_KK: Tensor) -> float:
    """tr(O E H E^T) in float64."""
    e_NK = e_NK.double()
    return float(((curvature_NN.double() @ e_NK @ hessian_KK.double()) * e_NK).sum())


def beam_by_definition(case: Case, width: int, start: Found | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values [N, K], float64: paths in a plain list, each judged by its whole quadratic form every time."""
    target_NK, coupling_NN, root_KK = case.target_NK.double().numpy(), case.coupling_NN.double().numpy(), case.root
    table_NK16, step_NK = tables_of(case.grid, case.group_K), case.grid.group_scale_GN[case.group_K].T.double().numpy()
    step_NK = step_NK * case.grid.outer_scale.expand(len(step_NK)).double().numpy()[:, None]
    zero = case.grid.zero_point_GN
    zero_NK = np.zeros_like(step_NK) if zero is None else zero[case.group_K].T.double().numpy()
    codes_NK = np.zeros(target_NK.shape, dtype=int) if start is None else start[0].numpy().astype(int)
    value_NK = target_NK.copy() if start is None else start[1].double().numpy()
    for n, table_K16 in enumerate(table_NK16):
        others = [m for m in range(len(target_NK)) if m < n or (start is not None and m > n)]
        wish_K = target_NK[n] + sum(coupling_NN[m, n] * (target_NK[m] - value_NK[m]) for m in others)
        paths: list[tuple[float, list[int], list[float]]] = [(0.0, [], [])]
        for j, table_16 in enumerate(table_K16):
            grown = []
            for _, codes, left in paths:
                w = wish_K[j] + sum(x * unit for x, unit in zip(left, case.unit_KK[:j, j].tolist(), strict=True))
                code = int(np.clip(np.round(w / step_NK[n, j]) + zero_NK[n, j], -8, 7)) + 8
                beside = min(max(code + int(np.sign(w - table_16[code])), 0), 15)
                code = beside if abs(w - table_16[beside]) < abs(w - table_16[code]) else code
                second = code + (1 if w > table_16[code] else -1)
                second = second if 0 <= second <= 15 else 2 * code - second
                for entry in (code, second):
                    longer = [*left, wish_K[j] - table_16[entry]]
                    cost = float(np.square(np.array(longer) @ root_KK[: j + 1, : j + 1]).sum())
                    grown.append((cost, [*codes, entry], longer))
            paths = sorted(grown, key=lambda path: path[0])[:width]
        if start is not None and np.square((wish_K - value_NK[n]) @ root_KK).sum() <= paths[0][0]:
            continue
        codes_NK[n] = paths[0][1]
        value_NK[n] = table_K16[range(len(wish_K)), codes_NK[n]]
    return codes_NK, value_NK


@BEAMS
@BOTH_TARGETS
@SYMMETRY
@pytest.mark.parametrize("revisit", [False, True], ids=["first", "revisit"])
def test_beam_by_definition(beam: Callable[..., Found], target: Target, symmetric: bool, revisit: bool) -> None:
    """Bit for bit on exact numbers: odd shapes, groups in any order, beams from none to wider than there are paths."""
    shapes = [
        (1, 1, 1),
        (1, 1, 3),
        (3, 2, 16),
        (4, 7, 1),
        (3, 7, 3),
        (1, 16, 16),
        (2, 17, 3),
        (3, 19, 5),
        (2, 32, 16),
        (2, 33, 3),
        (1, 70, 9),
    ]
    moved = 0
    for seed, (rows, columns, width) in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed)
        case = exact_case(rows, columns, target, symmetric, generator)
        start = None
        if revisit:
            codes_NK = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
            near_NK = case.run(beam, 1)[0]
            codes_NK = torch.where(torch.rand(rows, 1, generator=generator) < 0.5, near_NK, codes_NK)
            start = codes_NK, decoded(codes_NK, case.grid, case.group_K)
        kept = None if start is None else (start[0].clone(), start[1].clone())
        codes_NK, value_NK = case.run(beam, width, start)
        expected = beam_by_definition(case, width, start)
        assert codes_NK.dtype == torch.uint8
        assert np.array_equal(codes_NK.numpy(), expected[0])
        assert np.array_equal(value_NK.double().numpy(), expected[1])
        if start is not None and kept is not None:
            assert torch.equal(start[0], kept[0]) and torch.equal(start[1], kept[1])
            moved += int((codes_NK != start[0]).any())
    assert moved > 0 or not revisit


@COMPILED
@BOTH_TARGETS
@SYMMETRY
def test_compiled_beam_is_torchs(target: Target, symmetric: bool) -> None:
    """Real numbers, with and without a start: float32 sums in another order let a near tie fall the other way, if anything.

    Values rather than codes, as two codes may share one. In all but few cases none differs; where one does, the loss hardly.
    """
    same, cases = 0, 0
    shapes = [(1, 1, 1), (5, 1, 3), (1, 15, 16), (6, 17, 1), (3, 33, 3), (1, 70, 16)]
    for seed, (rows, columns, width) in enumerate(shapes):
        case = random_case(rows, columns, target, symmetric, seed)
        first = case.run(beam_rows_torch, 1)
        for start in (None, first):
            codes_NK, value_NK = case.run(beam_rows, width, start)
            expected_NK = case.run(beam_rows_torch, width, start)[1]
            assert torch.equal(decoded(codes_NK, case.grid, case.group_K), value_NK)
            assert case.row_losses(value_NK).sum() == pytest.approx(case.row_losses(expected_NK).sum(), rel=0.05)
            same, cases = same + torch.equal(value_NK, expected_NK), cases + 1
    assert same >= 0.8 * cases


@BEAMS
@BOTH_TARGETS
@SYMMETRY
@pytest.mark.parametrize("block_size", [5, 128])
def test_a_single_path_is_the_column_loop(beam: Callable[..., Found], target: Target, symmetric: bool, block_size: int) -> None:
    """width 1, rows uncoupled: the codes of `solve`, on numbers that are exact in both."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 1), (12, 17), (3, 40)):
        case = exact_case(rows, columns, target, symmetric, generator)
        case.coupling_NN.zero_()
        # `solve` reads a column's group from its place: columns 0-7 are of group 0, and so on.
        group_size = 8 * -(-columns // 24)
        grid = Grid(
            case.grid.group_scale_GN,
            case.grid.zero_point_GN,
            case.grid.outer_scale,
            Rule.NEAREST_VALUE,
            Scheme(target, group_size, symmetric),
        )
        case.grid, case.group_K = grid, (torch.arange(columns) // group_size).to(torch.int32)
        factor = Factor(case.unit_KK, case.diagonal_K, torch.arange(columns), 0.01, torch.zeros(columns), 0)
        expected = solve(case.target_NK, factor, grid, None, block_size).codes_NK
        codes_NK, value_NK = case.run(beam, 1)
        assert torch.equal(codes_NK, expected)
        assert torch.equal(value_NK, decoded(expected, grid, case.group_K))


@BEAMS
@BOTH_TARGETS
@SYMMETRY
def test_three_columns_against_all_codes(beam: Callable[..., Found], target: Target, symmetric: bool) -> None:
    """All 16^3 codes of a row: the eight paths that there are hold the least loss of all, which a single one may miss."""
    best, single = [], []
    for seed in range(25):
        case = fitted_case(1, 3, target, symmetric, seed)
        case.unit_KK[0, 1:], case.unit_KK[1, 2] = torch.tensor([1.0, -0.5]), 0.75  # correlated enough to matter
        every_P3 = np.stack(np.meshgrid(*tables_of(case.grid, case.group_K)[0], indexing="ij"), -1).reshape(-1, 3)
        least = np.square((case.target_NK.double().numpy() - every_P3) @ case.root).sum(-1).min()
        found = [case.row_losses(case.run(beam, width)[1])[0] for width in (8, 1)]
        assert min(found) >= least * (1 - 1e-6)
        best.append(found[0] <= least * (1 + 1e-6))
        single.append(found[1] <= least * (1 + 1e-6))
    assert all(best)
    assert not all(single)


@COMPILED
@BOTH_TARGETS
@SYMMETRY
def test_wider_beams_find_less_loss(target: Target, symmetric: bool) -> None:
    """On average over many rows, not on each: 1, 4, 16 and 64 paths."""
    case = fitted_case(60, 32, target, symmetric, 3)
    means = [case.row_losses(case.run(beam_rows, width)[1]).mean() for width in (1, 4, 16, 64)]
    assert means[3] < means[2] < means[1] < 0.92 * means[0], means
    assert means[3] < 0.8 * means[0], means


@BEAMS
def test_a_start_is_left_for_something_cheaper_only(beam: Callable[..., Found]) -> None:
    """One row: of its start and what the beam finds, the one of less loss by definition, and the other one never."""
    kept = 0
    for seed in range(20):
        columns = 9 if seed % 5 else 70
        case = random_case(1, columns, (HOPPER, GAUDI)[seed % 2], seed % 4 < 2, seed)
        alone, start = case.run(beam, 2), case.run(beam, 128)[0].clone()
        start[0, seed % columns] ^= seed % 3 == 0  # at its best, or one code off it
        given = start, decoded(start, case.grid, case.group_K)
        losses = [case.row_losses(values)[0] for values in (given[1], alone[1])]
        found_NK = case.run(beam, 2, given)[1]
        assert case.row_losses(found_NK)[0] == pytest.approx(min(losses), rel=1e-5)
        kept += losses[0] < losses[1]
    assert 3 < kept < 17, "one of the two was always the better: nothing was tested"


@BEAMS
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 20),
    width=st.sampled_from([1, 2, 7]),
    target=TARGETS,
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_revisit_never_raises_the_loss(
    beam: Callable[..., Found], rows: int, columns: int, width: int, target: Target, symmetric: bool, seed: int
) -> None:
    """tr(O E H E^T), float64, from the codes of an uncoupled column loop: each row answers for all others."""
    case = random_case(rows, columns, target, symmetric, seed)
    curvature_NN = curvature_of(rows, torch.Generator().manual_seed(seed))
    hessian_KK = torch.from_numpy(case.root @ case.root.T)
    case.coupling_NN = torch.zeros(rows, rows)
    start = case.run(beam, 1)
    case.coupling_NN = curvature_NN / curvature_NN.diagonal()
    codes_NK, value_NK = case.run(beam, width, start)
    assert torch.equal(decoded(codes_NK, case.grid, case.group_K), value_NK)
    before, after = (total_loss(case.target_NK - values, curvature_NN, hessian_KK) for values in (start[1], value_NK))
    assert after <= before * (1 + 1e-5)


@COMPILED
def test_a_factor_of_the_curvature_couples_rows() -> None:
    """With a triangular factor of O, rows that make up for earlier ones lose a tenth less of tr(O E H E^T) in one go.

    A revisit with O itself, or a second one, brings more.
    """
    losses = np.zeros(4)
    for seed in range(3):
        case = random_case(16, 12, HOPPER, True, seed)
        curvature_NN = curvature_of(16, torch.Generator().manual_seed(seed))
        hessian_KK = torch.from_numpy(case.root @ case.root.T)
        root_NN = torch.linalg.cholesky(curvature_NN.flip(0, 1)).flip(0, 1)
        tries = []
        for coupling_NN in (torch.zeros(16, 16), root_NN / root_NN.diagonal()):
            case.coupling_NN = coupling_NN
            tries.append(case.run(beam_rows, 4))
        case.coupling_NN = curvature_NN / curvature_NN.diagonal()
        for _ in range(2):
            tries.append(case.run(beam_rows, 4, tries[-1]))
        losses += [total_loss(case.target_NK - values, curvature_NN, hessian_KK) for _, values in tries]
    assert losses[1] < 0.9 * losses[0]
    assert losses[3] < losses[2] < 0.98 * losses[1]


# ---- coordinate descent


@dataclass
class Descent:
    """A whole problem, of which columns `block` are visited. Everything lies [K, N], as the loop wants it."""

    w_KN: Tensor
    codes_KN: Tensor
    value_KN: Tensor
    curvature_NN: Tensor
    hessian_KK: Tensor
    grid: Grid
    group_K: Tensor
    block: slice

    def run(self, visit: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        block, weighed_KN = self.block, (self.w_KN - self.value_KN) @ self.curvature_NN
        return visit(
            self.hessian_KK[block] @ weighed_KN,
            self.curvature_NN,
            self.hessian_KK[block, block],
            self.grid,
            self.group_K[block],
            self.codes_KN[block],
            self.value_KN[block],
        )

    def loss(self, value_BN: Tensor) -> float:
        value_KN = self.value_KN.clone()
        value_KN[self.block] = value_BN
        return total_loss((self.w_KN - value_KN).T, self.curvature_NN, self.hessian_KK)


def descent_of(case: Case, curvature_NN: Tensor, hessian_KK: Tensor, codes_NK: Tensor, block: slice) -> Descent:
    values_NK = decoded(codes_NK, case.grid, case.group_K)
    codes_KN, values_KN = codes_NK.T.contiguous(), values_NK.T.contiguous()
    w_KN = case.target_NK.T.contiguous()
    return Descent(w_KN, codes_KN, values_KN, curvature_NN, hessian_KK, case.grid, case.group_K, block)


def some_codes(case: Case, generator: torch.Generator) -> Tensor:
    """Codes around the best: those of a column loop, a third of them changed."""
    codes_NK = case.run(beam_rows, 1)[0]
    other_NK = torch.randint(0, 16, codes_NK.shape, generator=generator).to(torch.uint8)
    return torch.where(torch.rand(codes_NK.shape, generator=generator) < 0.3, other_NK, codes_NK)


@DESCENTS
@BOTH_TARGETS
@SYMMETRY
def test_descent_by_definition(visit: Callable[..., tuple[Tensor, Tensor, Tensor]], target: Target, symmetric: bool) -> None:
    """Exact numbers: each value in turn, column by column, is the one of 16 that leaves the least of tr(O E H E^T).

    The block is all columns, or some in the middle. Curvatures are whole numbers, with powers of two on their diagonals.
    """

    def whole(size: int, generator: torch.Generator) -> Tensor:
        some = torch.randint(-1, 2, (size, size), generator=generator) * torch.randint(0, 2, (size, size), generator=generator)
        some = torch.triu(some, 1).float()
        return some + some.T + torch.diag(torch.exp2(torch.randint(1, 3, (size,), generator=generator)))

    moves = 0
    for seed, (rows, columns, block) in enumerate(
        [(1, 1, slice(0, 1)), (5, 17, slice(0, 17)), (4, 20, slice(5, 16)), (33, 3, slice(0, 2)), (1, 9, slice(0, 9))]
    ):
        generator = torch.Generator().manual_seed(seed)
        case = exact_case(rows, columns, target, symmetric, generator)
        problem = descent_of(case, whole(rows, generator), whole(columns, generator), some_codes(case, generator), block)
        before = problem.codes_KN.clone(), problem.value_KN.clone()
        codes_BN, value_BN, change_BN = problem.run(visit)
        assert torch.equal(problem.codes_KN, before[0]) and torch.equal(problem.value_KN, before[1])
        assert torch.equal(decoded(codes_BN.T, case.grid, case.group_K[block]), value_BN.T)
        assert torch.equal(change_BN, (value_BN - problem.value_KN[block]) @ problem.curvature_NN)
        table_NK16 = tables_of(case.grid, case.group_K)
        o_NN, h_KK = problem.curvature_NN.double().numpy(), problem.hessian_KK.double().numpy()
        error_KN = (problem.w_KN - problem.value_KN).double().numpy()
        for j, n in itertools.product(range(block.start, block.stop), range(rows)):
            pull, own = h_KK[j] @ error_KN @ o_NN[n], h_KK[j, j] * o_NN[n, n]
            old, new = float(problem.value_KN[j, n]), float(value_BN[j - block.start, n])
            step_16 = table_NK16[n, j] - old  # what each changes of the loss, when it alone moves:
            assert (new - old) * ((new - old) * own - 2 * pull) == (step_16 * (step_16 * own - 2 * pull)).min()
            error_KN[j, n] -= new - old
            moves += new != old
    assert moves > 50


@DESCENTS
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 24),
    target=TARGETS,
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_a_descent_never_raises_the_loss(
    visit: Callable[..., tuple[Tensor, Tensor, Tensor]], rows: int, columns: int, target: Target, symmetric: bool, seed: int
) -> None:
    """tr(O E H E^T), float64, from bad codes; what the values moved by comes back times O."""
    rows = rows if visit is descend_rows else min(rows, 6)
    generator = torch.Generator().manual_seed(seed)
    case, curvature_NN = random_case(rows, columns, target, symmetric, seed), curvature_of(rows, generator)
    hessian_KK = torch.from_numpy(case.root @ case.root.T).float()
    block = slice(columns // 4, columns)
    problem = descent_of(case, curvature_NN, hessian_KK, some_codes(case, generator), block)
    codes_BN, value_BN, change_BN = problem.run(visit)
    assert torch.equal(decoded(codes_BN.T, case.grid, case.group_K[block]), value_BN.T)
    old_BN = problem.value_KN[block]
    assert problem.loss(value_BN) <= problem.loss(old_BN) * (1 + 1e-5)
    expected_BN = (value_BN - old_BN).double() @ curvature_NN.double()
    torch.testing.assert_close(change_BN.double(), expected_BN, rtol=1e-4, atol=1e-5 * float(expected_BN.abs().max()))


@COMPILED
@BOTH_TARGETS
@SYMMETRY
def test_compiled_descent_is_torchs(target: Target, symmetric: bool) -> None:
    """Real numbers: values, codes, and what they moved by; a near tie may fall either way, hardly one does."""
    for seed, (rows, columns) in enumerate([(1, 1), (5, 17), (17, 4)]):
        generator = torch.Generator().manual_seed(seed)
        case, curvature_NN = random_case(rows, columns, target, symmetric, seed), curvature_of(rows, generator)
        hessian_KK = torch.from_numpy(case.root @ case.root.T).float()
        problem = descent_of(case, curvature_NN, hessian_KK, some_codes(case, generator), slice(0, columns))
        found, expected = problem.run(descend_rows), problem.run(descend_rows_torch)
        assert problem.loss(found[1]) == pytest.approx(problem.loss(expected[1]), rel=0.02)
        assert (found[1] == expected[1]).double().mean() > 0.9
        assert (found[1] != problem.value_KN).any() or columns == 1


@DESCENTS
@BOTH_TARGETS
@SYMMETRY
def test_without_coupling_it_is_the_one_sided_descent(
    visit: Callable[..., tuple[Tensor, Tensor, Tensor]], target: Target, symmetric: bool
) -> None:
    """O the identity: one pass over every row's columns for itself, from the same codes, in the same order."""
    rows, columns = 9, 40
    generator = torch.Generator().manual_seed(0)
    case = random_case(rows, columns, target, symmetric, 0)
    hessian_KK = torch.from_numpy(case.root @ case.root.T).float()
    codes_NK = some_codes(case, generator)
    problem = descent_of(case, torch.eye(rows), hessian_KK, codes_NK, slice(0, columns))
    _, value_KN, _ = problem.run(visit)
    expected_NK = descent(case.target_NK.numpy(), codes_NK.numpy(), tables_of(case.grid, case.group_K), hessian_KK.numpy())
    same_NK = torch.from_numpy(expected_NK) == value_KN.T
    assert same_NK.double().mean() > 0.99
    assert (value_KN != problem.value_KN).double().mean() > 0.2


# ---- what they are given


@COMPILED
def test_compiled_ops_refuse_what_they_cannot_read() -> None:
    """Shapes, types and group indices are checked before any pointer is followed."""
    grid = Grid(torch.ones(2, 4), None, torch.ones(4), Rule.NEAREST_VALUE, Scheme())
    target_NK, group_K = torch.zeros(4, 3), torch.zeros(3, dtype=torch.int32)
    how = (torch.eye(3), torch.ones(3), grid, group_K)
    start = beam_rows(target_NK, torch.eye(4), *how, 2)
    beam_rows(target_NK, torch.eye(4), *how, 2, start)
    for width in (0, -1, 65537):
        with pytest.raises(RuntimeError, match="width"):
            beam_rows(target_NK, torch.eye(4), *how, width)
    with pytest.raises(RuntimeError, match="coupling"):
        beam_rows(target_NK, torch.eye(3), *how, 2)
    with pytest.raises(RuntimeError, match="coupling"):
        beam_rows(target_NK, torch.eye(4).double(), *how, 2)
    with pytest.raises(RuntimeError, match="unit"):
        beam_rows(target_NK, torch.eye(4), torch.eye(4), torch.ones(3), grid, group_K, 2)
    with pytest.raises(RuntimeError, match="diagonal"):
        beam_rows(target_NK, torch.eye(4), torch.eye(3), torch.ones(4), grid, group_K, 2)
    with pytest.raises(RuntimeError, match="codes"):
        beam_rows(target_NK, torch.eye(4), *how, 2, (start[0].float(), start[1]))
    with pytest.raises(RuntimeError, match="values"):
        beam_rows(target_NK, torch.eye(4), *how, 2, (start[0], start[1][:2]))
    for bad in (2, -1):
        with pytest.raises(RuntimeError, match="no such group"):
            beam_rows(target_NK, torch.eye(4), *how[:3], torch.tensor([0, bad, 1], dtype=torch.int32), 2)
    levels = (grid.scheme.levels[0], 448.0, 2)
    with pytest.raises(RuntimeError, match="both or neither"):
        torch.ops.duotone.beam_rows(
            target_NK, torch.eye(4), *how[:2], torch.ones(2, 4), None, torch.ones(4), group_K, start[0], None, *levels
        )

    pull_BN, block = torch.zeros(3, 4), (start[0].T, start[1].T)
    descend_rows(pull_BN, torch.eye(4), torch.eye(3), grid, group_K, *block)
    with pytest.raises(RuntimeError, match="curvature"):
        descend_rows(pull_BN, torch.eye(3), torch.eye(3), grid, group_K, *block)
    with pytest.raises(RuntimeError, match="hessian"):
        descend_rows(pull_BN, torch.eye(4), torch.eye(3)[:2], grid, group_K, *block)
    with pytest.raises(RuntimeError, match="codes"):
        descend_rows(pull_BN, torch.eye(4), torch.eye(3), grid, group_K, start[0], block[1])
    with pytest.raises(RuntimeError, match="values"):
        descend_rows(pull_BN, torch.eye(4), torch.eye(3), grid, group_K, block[0], block[1].double())
    with pytest.raises(RuntimeError, match="no such group"):
        descend_rows(pull_BN, torch.eye(4), torch.eye(3), grid, group_K + 2, *block)
    with pytest.raises(RuntimeError, match="group_scale"):
        narrow = Grid(torch.ones(2, 3), None, torch.ones(4), Rule.NEAREST_VALUE, Scheme())
        descend_rows(pull_BN, torch.eye(4), torch.eye(3), narrow, group_K, *block)


@BEAMS
def test_no_rows(beam: Callable[..., Found]) -> None:
    """Empty results on either path."""
    grid = Grid(torch.ones(1, 0), None, torch.ones(1), Rule.NEAREST_VALUE, Scheme())
    nothing, group_K = torch.zeros(0, 3), torch.zeros(3, dtype=torch.int32)
    codes_NK, value_NK = beam(nothing, torch.zeros(0, 0), torch.eye(3), torch.ones(3), grid, group_K, 4)
    assert codes_NK.shape == value_NK.shape == (0, 3)


def test_other_numbers_take_the_torch_path() -> None:
    """float64 is not what the extension computes: the result is torch's, and the definition's for real numbers too."""
    case = random_case(3, 8, HOPPER, True, 1)
    grid = Grid(case.grid.group_scale_GN.double(), None, case.grid.outer_scale.double(), Rule.NEAREST_VALUE, case.grid.scheme)
    case = Case(
        case.target_NK.double(),
        case.coupling_NN.double(),
        case.unit_KK.double(),
        case.diagonal_K.double(),
        grid,
        case.group_K,
    )
    codes_NK, value_NK = case.run(beam_rows, 6)
    assert value_NK.dtype == torch.float64
    assert np.array_equal(codes_NK.numpy(), beam_by_definition(case, 6)[0])
    pull_BN, eye = torch.zeros(8, 3).double(), torch.eye(3).double()
    hessian_KK = torch.eye(8).double()
    found = descend_rows(pull_BN, eye, hessian_KK, grid, case.group_K, codes_NK.T, value_NK.T)
    assert found[1].dtype == torch.float64
    assert torch.equal(found[1], value_NK.T)
