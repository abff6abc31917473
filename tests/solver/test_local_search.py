# Shapes: N out_features, K in_features, G groups along K.
"""The local search by its definition, and the compiled one against torch's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.solver import local_search as module
from duotone.solver.local_search import TENURE, local_search, local_search_torch
from duotone.solver.scales import fit_scales, round_to_nearest
from duotone.solver.sweep import Grid, Rule
from tests.oracles.descent import descent
from tests.oracles.obq import correlated_layer
from tests.solver.test_rows import BOTH_TARGETS, SYMMETRY, TARGETS, decoded, tables_of
from tests.solver.test_sweep import COMPILED

#: `local_search` takes the compiled path where there is one.
PATHS = pytest.mark.parametrize(
    "compiled", [pytest.param(True, marks=COMPILED, id="compiled"), pytest.param(False, id="torch")]
)


@dataclass
class Case:
    """Weights to search codes for, and those to start from."""

    w_NK: Tensor
    hessian_KK: Tensor
    damping_K: Tensor
    grid: Grid
    codes_NK: Tensor

    @property
    def group(self) -> Tensor:
        return torch.arange(self.w_NK.shape[1]) // self.grid.scheme.group_size

    @property
    def damped(self) -> np.ndarray:
        return (self.hessian_KK.double() + self.damping_K.double().diag()).numpy()

    @property
    def gradient(self) -> Tensor:
        error_NK = self.w_NK - decoded(self.codes_NK, self.grid, self.group).to(self.w_NK.dtype)
        return error_NK @ self.hessian_KK + error_NK * self.damping_K

    def losses(self, codes_NK: Tensor) -> np.ndarray:
        """Every row's loss [N] in float64."""
        error_NK = (self.w_NK - decoded(codes_NK, self.grid, self.group)).double().numpy()
        return ((error_NK @ self.damped) * error_NK).sum(1)

    def run(self, steps: int, compiled: bool = True) -> Tensor:
        """Codes after so many steps."""
        given = (self.gradient, self.hessian_KK, self.damping_K, self.grid, self.codes_NK)
        if not compiled:
            return local_search_torch(*given, steps)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "LEAST_VISITS", steps * self.w_NK.shape[1])
            patch.setattr(module, "VISITS_SHARE", 0)
            return local_search(*given)


def by_definition(case: Case, steps: int) -> tuple[Tensor, np.ndarray]:
    """Codes [N, K], and for each row the least loss met [N]: every step evaluates the loss of every move that can be made.

    Of moves that cost the same, that of the first column is taken, and down before up.
    """
    w_NK, h_KK, table_NK16 = case.w_NK.double().numpy(), case.damped, tables_of(case.grid, case.group)
    found_NK, least_N = case.codes_NK.clone(), np.empty(len(w_NK))
    columns = range(w_NK.shape[1])

    def loss(w_K: np.ndarray, value_K: np.ndarray) -> float:
        return float((w_K - value_K) @ h_KK @ (w_K - value_K))

    for n, (w_K, table_K16) in enumerate(zip(w_NK, table_NK16, strict=True)):
        code_K, moved_K = case.codes_NK[n].tolist(), [-TENURE - 1] * len(columns)
        value_K = table_K16[columns, code_K]
        least_N[n] = loss(w_K, value_K)
        for step in range(steps):
            moves = []
            for k in columns:
                for code in (code_K[k] - 1, code_K[k] + 1):
                    if step - moved_K[k] > TENURE and 0 <= code <= 15 and h_KK[k, k] > 0 and table_K16[k, code] != value_K[k]:
                        other_K = value_K.copy()
                        other_K[k] = table_K16[k, code]
                        moves.append((loss(w_K, other_K), k, code))
            if not moves:  # all rest: a step goes by
                continue
            found, k, code = min(moves, key=lambda move: move[0])
            code_K[k], value_K[k], moved_K[k] = code, table_K16[k, code], step
            if found < least_N[n]:
                least_N[n], found_NK[n] = found, torch.tensor(code_K)
    return found_NK, least_N


def exact_case(rows: int, columns: int, target: Target, symmetric: bool, seed: int) -> Case:
    """Small dyadic numbers: every product and sum is exact in float32; many moves cost the same."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    scheme = Scheme(target, 8, symmetric)
    groups = scheme.groups(columns)
    zero_GN = None if symmetric else whole(-8, 7, groups, rows)
    outer = torch.exp2(whole(-1, 0, rows if target.channel_outer_scale else 1))
    grid = Grid(torch.exp2(whole(-1, 0, groups, rows)), zero_GN, outer, Rule.NEAREST_VALUE, scheme)
    x_TK, codes_NK = whole(-1, 1, 6, columns), whole(0, 15, rows, columns).to(torch.uint8)
    group_K = torch.arange(columns) // 8
    w_NK = decoded(codes_NK, grid, group_K) + whole(-9, 9, rows, columns) / 4
    return Case(w_NK, x_TK.T @ x_TK, whole(1, 3, columns) / 2, grid, codes_NK)


def real_case(
    rows: int, columns: int, group_size: int, target: Target, symmetric: bool, seed: int, dead: tuple[int, ...] = ()
) -> Case:
    """A correlated layer on min-max scales, a fifth of its codes anywhere; dead columns have damping only."""
    w_NK, hessian_KK = correlated_layer(rows, columns, seed, torch.float32)
    scheme, generator = Scheme(target, group_size, symmetric), torch.Generator().manual_seed(seed)
    scales = fit_scales(w_NK, scheme)
    codes_NK = round_to_nearest(w_NK, scales, scheme)
    wild_NK = torch.randint(0, 16, codes_NK.shape, generator=generator).to(torch.uint8)
    codes_NK = torch.where(torch.rand(codes_NK.shape, generator=generator) < 0.2, wild_NK, codes_NK)
    damping_K = torch.full((columns,), 0.01 * float(hessian_KK.diagonal().mean()))
    for k in dead:
        hessian_KK[k], hessian_KK[:, k] = 0, 0
        damping_K[k] = 0.5
    return Case(w_NK, hessian_KK, damping_K, Grid.of(scales, Rule.NEAREST_VALUE, scheme), codes_NK)


def doubled(case: Case) -> Case:
    """The same in float64."""
    grid, zero_GN = case.grid, case.grid.zero_point_GN
    zero_GN = None if zero_GN is None else zero_GN.double()
    grid = Grid(grid.group_scale_GN.double(), zero_GN, grid.outer_scale.double(), grid.rule, grid.scheme)
    return Case(case.w_NK.double(), case.hessian_KK.double(), case.damping_K.double(), grid, case.codes_NK)


# ---- what is searched


@PATHS
@BOTH_TARGETS
@SYMMETRY
def test_by_definition_on_exact_numbers(compiled: bool, target: Target, symmetric: bool) -> None:
    """Bit for bit, equal costs included; the codes are those of least loss on the path, not those at its end."""
    moved = 0
    for seed, (rows, columns, steps) in enumerate([(3, 20, 0), (2, 20, 1), (2, 16, 40), (3, 21, 50), (1, 33, 60), (2, 24, 13)]):
        case = exact_case(rows, columns, target, symmetric, seed)
        start, found = case.losses(case.codes_NK), case.run(steps, compiled)
        expected, least = by_definition(case, steps)
        assert found.dtype == torch.uint8
        assert torch.equal(found, expected)
        assert np.array_equal(case.losses(found), least)
        assert bool((least <= start).all()) and (steps == 0) == torch.equal(found, case.codes_NK)
        moved += int((found != case.codes_NK).sum())
    assert moved > 40


@PATHS
@BOTH_TARGETS
@SYMMETRY
@pytest.mark.parametrize("columns", [1, 2, 5, TENURE, TENURE + 1])
def test_columns_too_few_to_rest(compiled: bool, target: Target, symmetric: bool, columns: int) -> None:
    """Where all columns rest, a row waits until the first may move again."""
    case = exact_case(3, columns, target, symmetric, columns)
    assert torch.equal(case.run(40, compiled), by_definition(case, 40)[0])


@PATHS
@BOTH_TARGETS
def test_columns_that_nothing_is_lost_by_stay(compiled: bool, target: Target) -> None:
    """No curvature and no damping: a move costs nothing and is not taken, though all others cost something."""
    case = exact_case(3, 20, target, True, 7)
    for k in (0, 9, 19):
        case.hessian_KK[k], case.hessian_KK[:, k], case.damping_K[k] = 0, 0, 0
    found = case.run(40, compiled)
    assert torch.equal(found[:, [0, 9, 19]], case.codes_NK[:, [0, 9, 19]])
    assert torch.equal(found, by_definition(case, 40)[0])
    assert not torch.equal(found, case.codes_NK)


@BOTH_TARGETS
@SYMMETRY
@pytest.mark.parametrize("group_size", [8, 24])
def test_by_definition_on_real_numbers(target: Target, symmetric: bool, group_size: int) -> None:
    """Float64, a group that does not divide K, dead columns with damping: codes and the least loss met."""
    case = doubled(real_case(3, 26, group_size, target, symmetric, 3, dead=(4, 25)))
    found = local_search_torch(case.gradient, case.hessian_KK, case.damping_K, case.grid, case.codes_NK, 60)
    expected, least = by_definition(case, 60)
    assert torch.equal(found, expected)
    assert np.allclose(case.losses(found), least, rtol=1e-6, atol=0)
    assert bool((least < 0.5 * case.losses(case.codes_NK)).all())


@COMPILED
@given(
    rows=st.integers(1, 6),
    columns=st.integers(30, 90),
    group_size=st.sampled_from([8, 16, 40, 128]),
    target=TARGETS,
    symmetric=st.booleans(),
    dead=st.sampled_from([(), (0,), (3, 17, 29)]),
    steps=st.sampled_from([0, 1, TENURE, TENURE + 1, 100, 250]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_compiled_search_is_torchs_bit_for_bit(
    rows: int,
    columns: int,
    group_size: int,
    target: Target,
    symmetric: bool,
    dead: tuple[int, ...],
    steps: int,
    seed: int,
) -> None:
    """Real numbers in float32: the same operations in the same order, K whole vectors or not, groups dividing it or not."""
    case = real_case(rows, columns, group_size, target, symmetric, seed, dead)
    found = case.run(steps)
    assert torch.equal(found, case.run(steps, compiled=False))
    assert torch.equal(found, case.codes_NK) == (steps == 0)


@COMPILED
@pytest.mark.parametrize("columns", [40, 64, 75])
@pytest.mark.parametrize("dead", [(), (3, 17)])
def test_a_hessian_in_bfloat16(columns: int, dead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide ones are read: torch's, bit for bit, on rounded rows with the diagonal as it was; the true loss falls."""
    case = real_case(5, columns, 16, HOPPER, True, columns, dead)
    monkeypatch.setattr(module, "product_dtype", lambda _: torch.bfloat16)
    found = case.run(150)
    narrow_KK = case.hessian_KK.bfloat16()
    damping_K = case.damping_K + (case.hessian_KK.diagonal() - narrow_KK.diagonal())
    assert torch.equal(found, local_search_torch(case.gradient, narrow_KK, damping_K, case.grid, case.codes_NK, 150))
    wide = case.run(150, compiled=False)
    assert not torch.equal(found, wide), "no code differs: nothing was tested"
    assert case.losses(found).sum() < 0.1 * case.losses(case.codes_NK).sum()


# ---- what is promised


@PATHS
@BOTH_TARGETS
@SYMMETRY
def test_more_steps_are_no_worse(compiled: bool, target: Target, symmetric: bool) -> None:
    """Row by row, as a longer path goes on from where the shorter one ended; none is worse than the start."""
    case = real_case(8, 50, 16, target, symmetric, 5)
    before = case.losses(case.codes_NK)
    for steps in (1, 10, 40, 200, 400):
        after = case.losses(case.run(steps, compiled))
        assert bool((after <= before * (1 + 1e-6)).all())
        assert steps > 200 or after.sum() < 0.97 * before.sum()
        before = after


@PATHS
@BOTH_TARGETS
@SYMMETRY
def test_it_climbs_out_of_where_no_single_move_helps(compiled: bool, target: Target, symmetric: bool) -> None:
    """From where descent over single columns ends, a tenth more is gained in all; no row loses."""
    case = real_case(8, 40, 16, target, symmetric, 6)
    table_NK16, codes_NK = tables_of(case.grid, case.group), case.codes_NK
    for _ in range(30):
        value_NK = descent(case.w_NK.numpy(), codes_NK.numpy(), table_NK16, case.damped)
        codes_NK, before_NK = torch.from_numpy((table_NK16 == value_NK[..., None]).argmax(-1).astype(np.uint8)), codes_NK
    assert torch.equal(codes_NK, before_NK), "descent has not ended"
    settled = replace(case, codes_NK=codes_NK)
    assert torch.equal(settled.run(1, compiled), codes_NK)
    before, after = settled.losses(codes_NK), settled.losses(settled.run(300, compiled))
    assert bool((after <= before * (1 + 1e-6)).all())
    assert after.sum() < 0.9 * before.sum()


@PATHS
@BOTH_TARGETS
@SYMMETRY
@pytest.mark.parametrize("dead", [(), (2, 30)], ids=["alive", "dead"])
def test_a_diagonal_hessian_leaves_nothing_to_search(
    compiled: bool, target: Target, symmetric: bool, dead: tuple[int, ...]
) -> None:
    """Each weight has the nearest of its 16 values already, and keeps it."""
    case = real_case(5, 40, 16, target, symmetric, 8, dead)
    table_NK16 = tables_of(case.grid, case.group)
    case.codes_NK = torch.from_numpy(np.abs(table_NK16 - case.w_NK.numpy()[..., None]).argmin(-1).astype(np.uint8))
    case.hessian_KK = case.hessian_KK.diagonal().diag()
    assert torch.equal(case.run(300, compiled), case.codes_NK)


@PATHS
def test_rows_do_not_matter_to_each_other(compiled: bool) -> None:
    """One at a time, or in another sequence: the same codes; nothing that is given changes."""
    case = real_case(5, 37, 16, HOPPER, False, 9)
    kept = [tensor.clone() for tensor in (case.codes_NK, case.hessian_KK, case.damping_K, case.grid.group_scale_GN)]
    together = case.run(150, compiled)
    for rows in ([2], [4, 0, 3]):
        zero_GN = case.grid.zero_point_GN
        assert zero_GN is not None
        scales = (case.grid.group_scale_GN[:, rows].contiguous(), zero_GN[:, rows].contiguous(), case.grid.outer_scale[rows])
        grid = Grid(*scales, Rule.NEAREST_VALUE, case.grid.scheme)
        alone = Case(case.w_NK[rows], case.hessian_KK, case.damping_K, grid, case.codes_NK[rows])
        assert torch.equal(alone.run(150, compiled), together[rows])
    for before, after in zip(kept, (case.codes_NK, case.hessian_KK, case.damping_K, case.grid.group_scale_GN), strict=True):
        assert torch.equal(before, after)


# ---- what it is given


@pytest.mark.parametrize(("columns", "steps"), [(100, 2621), (1448, 181), (2048, 256)])
def test_number_of_steps(columns: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2^18 columns are looked at, and at least an eighth of K^2."""
    asked: list[int] = []

    def record(*given: Tensor | int) -> Tensor:
        asked.append(int(given[-1]))
        return torch.zeros(0)

    monkeypatch.setattr(module, "local_search_torch", record)
    grid = Grid(torch.ones(1, 1).double(), None, torch.ones(1).double(), Rule.NEAREST_VALUE, Scheme())
    codes_NK, zeros_K = torch.zeros(1, columns, dtype=torch.uint8), torch.zeros(columns).double()
    local_search(zeros_K[None], torch.zeros(1, 1).double(), zeros_K, grid, codes_NK)
    assert asked == [steps]


@pytest.mark.parametrize("search", [local_search, partial(local_search_torch, steps=5)], ids=["compiled", "torch"])
def test_no_rows(search: Callable[..., Tensor]) -> None:
    """Empty codes on either path."""
    grid = Grid(torch.ones(2, 0), None, torch.ones(1), Rule.NEAREST_VALUE, Scheme(group_size=16))
    codes_NK = torch.zeros(0, 20, dtype=torch.uint8)
    assert search(torch.zeros(0, 20), torch.eye(20), torch.ones(20), grid, codes_NK).shape == (0, 20)


def test_float64_takes_the_torch_path() -> None:
    """Which is not what the extension computes: the definition's codes."""
    case = doubled(real_case(2, 20, 8, GAUDI, True, 2))
    assert torch.equal(case.run(30), by_definition(case, 30)[0])


@COMPILED
def test_compiled_search_refuses_what_it_cannot_read() -> None:
    """Shapes, types and group indices are checked before any pointer is followed."""
    names = ("gradient", "hessian", "damping", "group_scale", "zero_point", "outer_scale", "group", "codes")
    good: dict[str, Tensor] = {
        "gradient": torch.zeros(4, 20),
        "hessian": torch.eye(20),
        "damping": torch.ones(20),
        "group_scale": torch.ones(3, 4),
        "zero_point": torch.zeros(3, 4),
        "outer_scale": torch.ones(4),
        "group": torch.arange(20, dtype=torch.int32) // 8,
        "codes": torch.full((4, 20), 8, dtype=torch.uint8),
    }

    def search(steps: int = 5, tenure: int = 12, **changed: Tensor) -> Tensor:
        return torch.ops.duotone.local_search(*((good | changed)[name] for name in names), -8, 448.0, steps, tenure)

    assert torch.equal(search(), good["codes"])
    for name, tensor in good.items():
        with pytest.raises(RuntimeError, match=f"{name}: found another type"):
            search(**{name: tensor.half()})
        with pytest.raises(RuntimeError, match=f"{name}: "):
            search(**{name: tensor[..., None]})
        if name != "codes":  # which are copied
            with pytest.raises(RuntimeError, match=f"{name}: expected a contiguous"):
                search(**{name: torch.stack([tensor, tensor], -1)[..., 0]})
    for name in ("hessian", "damping", "zero_point", "outer_scale", "group", "codes"):
        with pytest.raises(RuntimeError, match=f"{name}: "):
            search(**{name: good[name][:-1]})
    for group in (3, -1):
        with pytest.raises(RuntimeError, match="no such group"):
            search(group=torch.full((20,), group, dtype=torch.int32))
    for how in ({"steps": -1}, {"tenure": 0}):
        with pytest.raises(RuntimeError, match="steps, tenure"):
            search(**how)
