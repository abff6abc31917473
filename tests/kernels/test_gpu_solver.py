"""The solver's Triton programs against their specification: through the interpreter where there is no GPU (conftest.py)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from duotone.kernels import native
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.solver import local_search as searching
from duotone.solver import loops
from duotone.solver.local_search import TENURE, local_search_torch
from duotone.solver.methods import Problem, SolverOptions, dpq, shared_factor
from duotone.solver.scales import Scales
from duotone.solver.statistics import Statistics
from duotone.solver.sweep import Grid, Rule, scale_error, scale_error_torch, sweep
from tests.oracles.obq import correlated_layer
from tests.solver.test_local_search import Case, exact_case, real_case
from tests.solver.test_sweep import by_definition, groups_of, random_grid

pytest.importorskip("triton", reason="needs the package triton (the dev extra brings it on Linux)")

from duotone.kernels.gpu import backend, solver
from duotone.solver import trial

#: The interpreter computes with numpy, which warns of infinite times zero.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The solver finds the Triton programs, whatever the device."""
    monkeypatch.setattr(loops, "compiled", lambda *_: solver)
    yield


def moved(grid: Grid) -> Grid:
    tensors = {name: value.to(DEVICE) for name, value in vars(grid).items() if isinstance(value, Tensor)}
    return dataclasses.replace(grid, **tensors)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.name.lower())
@pytest.mark.parametrize(
    ("rows", "columns", "target", "symmetric"),
    [(37, 21, HOPPER, True), (3, 33, HOPPER, False), (16, 5, GAUDI, True), (1, 1, GAUDI, False)],
)
def test_column_loop_bit_for_bit(rule: Rule, rows: int, columns: int, target: Target, symmetric: bool) -> None:
    """Rows and columns that fill no tile, columns in no order of groups: no code and no value differs from the definition.

    The coupling is a view whose other half is NaN.
    """
    generator = torch.Generator().manual_seed(rows)
    grid = random_grid(rows, 3, target, symmetric, rule, generator)
    base_BN, reference_BN = torch.randn(2, columns, rows, generator=generator) * 0.05
    wide = torch.randn(columns, columns + 3, generator=generator) * 0.2
    group_B = groups_of(columns, 3, generator)
    meant = by_definition(base_BN, reference_BN, wide[:, :columns], grid, group_B)
    coupling_BB = torch.where(torch.ones(columns, columns).triu(1) > 0, wide[:, :columns], torch.nan)
    view = torch.full_like(wide, torch.nan).to(DEVICE)
    view[:, :columns] = coupling_BB.to(DEVICE)
    given = (base_BN.to(DEVICE), reference_BN.to(DEVICE), view[:, :columns], moved(grid), group_B.to(DEVICE))
    codes_BN, value_BN = sweep(*given)
    assert codes_BN.dtype == torch.uint8
    assert torch.equal(codes_BN.cpu(), meant[0]) and torch.equal(value_BN.cpu(), meant[1])


def test_every_tie_of_fp8_and_of_levels() -> None:
    """All numbers halfway between two FP8 values or two levels, and their neighbors: half to even of a true division."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = torch.cat([(values[1:] + values[:-1]) / 2, values, torch.tensor([449.0, 1e6, 1e30])])
    near = torch.cat([torch.nextafter(middle, middle * 2), torch.nextafter(middle, middle * 0), middle])
    w_N = torch.cat([near, -near])
    halves = (torch.arange(-10, 10) + 0.5)[:, None] * torch.exp(torch.randn(20, generator=torch.Generator().manual_seed(0)))
    for w, rule in ((w_N, Rule.FP8_VALUE), (halves.flatten(), Rule.INT4_ONLY)):
        step = torch.ones_like(w) if rule is Rule.FP8_VALUE else (w / (torch.arange(-10, 10) + 0.5).repeat_interleave(20))
        grid = Grid(step[None], None, torch.ones(1), rule, Scheme(GAUDI))
        meant = by_definition(w[None], w[None], torch.zeros(1, 1), grid, torch.zeros(1, dtype=torch.int32))
        there = moved(grid)
        found = solver.sweep(
            w[None].to(DEVICE), w[None].to(DEVICE), torch.zeros(1, 1).to(DEVICE), there.group_scale_GN, None, there.outer_scale,
            torch.zeros(1, dtype=torch.int32, device=DEVICE), -8, 240.0, int(rule),
        )  # fmt: skip
        assert torch.equal(found[0].cpu(), meant[0]) and torch.equal(found[1].cpu(), meant[1])


def search(case: Case, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    grid = moved(case.grid)
    given = (case.gradient, case.hessian_KK.to(dtype), case.damping_K)
    group_K, codes_NK = case.group.to(torch.int32).to(DEVICE), case.codes_NK.to(DEVICE)
    scales = (grid.group_scale_GN, grid.zero_point_GN, grid.outer_scale)
    facts = (-8, grid.scheme.target.fp8.max, steps, TENURE)
    return solver.local_search(*(x.to(DEVICE) for x in given), *scales, group_K, codes_NK, *facts).cpu()


@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "target", "symmetric", "dead"),
    [
        (3, 45, 16, HOPPER, True, ()),
        (2, 30, 40, HOPPER, False, (3, 17)),
        (2, 64, 32, GAUDI, True, (0,)),
        (1, TENURE + 1, 8, GAUDI, False, ()),
    ],
)
def test_local_search_bit_for_bit(
    rows: int, columns: int, group_size: int, target: Target, symmetric: bool, dead: tuple[int, ...]
) -> None:
    """Real numbers, columns that no group and no lane divides: torch's codes, in float32 and with a Hessian in BF16."""
    case = real_case(rows, columns, group_size, target, symmetric, columns, dead)
    for dtype, steps in ((torch.float32, TENURE + 8), (torch.bfloat16, 6)):
        hessian_KK = case.hessian_KK.to(dtype)
        meant = local_search_torch(case.gradient, hessian_KK, case.damping_K, case.grid, case.codes_NK, steps)
        found = search(case, steps, dtype)
        assert torch.equal(found, meant) and not torch.equal(found, case.codes_NK)
    assert torch.equal(search(case, 0), case.codes_NK)


def test_local_search_on_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many moves cost the same, all columns rest at times, and columns are looked at in several turns: of equals the first."""
    monkeypatch.setattr(solver, "_LANES", 16)
    for columns in (5, 33):
        case = exact_case(1, columns, HOPPER, False, columns)
        given = (case.gradient, case.hessian_KK, case.damping_K, case.grid, case.codes_NK)
        assert torch.equal(search(case, 25), local_search_torch(*given, 25))


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("group_size", [24, 128])
@pytest.mark.parametrize(("target", "symmetric"), [(HOPPER, True), (GAUDI, False)])
def test_errors_of_scales(group_size: int, target: Target, symmetric: bool) -> None:
    """Torch's, to the rounding of sums: short last groups, rows that fill no tile, weighed columns or not."""
    generator = torch.Generator().manual_seed(group_size)
    rows, columns, candidates = 19, 150, 2
    groups = -(-columns // group_size)
    w_NK = torch.randn(rows, columns, generator=generator) * 0.05
    outer = torch.exp2(torch.rand(rows if target is HOPPER else 1, generator=generator) - 12)
    candidate_NGC = torch.exp2(torch.rand(rows, groups, candidates, generator=generator) * 8 - 1)
    zero_NG = None if symmetric else torch.randint(-8, 8, (rows, groups), generator=generator).float()
    scheme = Scheme(target, symmetric=symmetric)
    for weight_K in (None, torch.rand(columns, generator=generator)):
        given = Scales(candidate_NGC[..., 0], zero_NG, outer)
        meant = scale_error_torch(w_NK, candidate_NGC, given, scheme, group_size, weight_K)
        zero = None if zero_NG is None else zero_NG.to(DEVICE)
        start = Scales(candidate_NGC[..., 0].to(DEVICE), zero, outer.to(DEVICE))
        share = None if weight_K is None else weight_K.to(DEVICE)
        found = scale_error(w_NK.to(DEVICE), candidate_NGC.to(DEVICE), start, scheme, group_size, share)
        assert np.allclose(found.cpu().numpy(), meant.numpy(), rtol=2e-5, atol=0)


@pytest.mark.skipif(not native.available(), reason=native.unavailable() or "")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="for machines without a GPU: everything but the loops runs on the CPU")
@pytest.mark.slow
@pytest.mark.parametrize("order", ["act", "gar"])
def test_a_method_gives_a_cpus_codes(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dpq from scales to codes, K no multiple of 128, columns scattered over their groups or not: the extension's codes."""
    monkeypatch.setattr(searching, "LEAST_VISITS", 8 * 140)
    monkeypatch.setattr(searching, "VISITS_SHARE", 0)
    w_NK, hessian = correlated_layer(2, 140, seed=1, dtype=torch.float32)
    scheme, options, statistics = Scheme(HOPPER, 32), SolverOptions(order), Statistics(hessian, 1600)
    problem = Problem("layer", w_NK, statistics, shared_factor(statistics, scheme, options, "layer"), scheme, options)
    meant, _ = dpq(problem)
    with monkeypatch.context() as patch:
        patch.setattr(loops, "compiled", lambda *_: solver)
        found, _ = dpq(problem)
    assert torch.equal(found.group_scale, meant.group_scale) and torch.equal(found.codes, meant.codes)


def test_nothing_to_do() -> None:
    """No rows, or no columns: empty results."""
    grid, group = Grid(torch.ones(1, 0), None, torch.ones(1), Rule.NEAREST_VALUE, Scheme()), torch.zeros(0, dtype=torch.int32)
    nothing = torch.zeros(0, 0)
    codes, values = solver.sweep(nothing, nothing, nothing, grid.group_scale_GN, None, grid.outer_scale, group, -8, 448.0, 0)
    assert codes.shape == values.shape == (0, 0)
    codes = torch.zeros(0, 20, dtype=torch.uint8)
    given = (torch.zeros(0, 20), torch.eye(20), torch.ones(20), torch.ones(2, 0), None, torch.ones(1))
    assert solver.local_search(*given, torch.zeros(20, dtype=torch.int32), codes, -8, 448.0, 5, 12).shape == (0, 20)
    errors = solver.scale_error(torch.zeros(0, 20), torch.zeros(0, 2, 3), None, torch.ones(1), None, -8, 448.0, 16)
    assert errors.shape == (0, 2, 3)


def test_a_trial_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs as they are, and what fails is a reason too."""
    for name, size in (("_ROWS", 2), ("_COLUMNS", 20), ("_STEPS", 14)):
        monkeypatch.setattr(trial, name, size)
    assert trial.fault(DEVICE) is None
    monkeypatch.setattr(solver, "sweep", lambda *_: 1 / 0)
    assert trial.fault(DEVICE) == f"a trial on {DEVICE} failed (ZeroDivisionError: division by zero)"


@pytest.mark.skipif(not native.available(), reason=native.unavailable() or "")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sweep", "values of the column loop"),
        ("local_search", "codes of the local search"),
        ("local_search of a Hessian in BF16", "codes of the local search"),
        ("scale_error", "errors of scales"),
    ],
)
def test_a_trial_finds_what_differs(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension's ops in the place of the programs, one number of one op changed: told in a sentence."""

    op, _, where = name.partition(" ")

    def wrong(*given: Any) -> Any:
        found = getattr(torch.ops.duotone, op)(*given)
        if not where or given[1].dtype == torch.bfloat16:
            (found[0] if isinstance(found, tuple) else found)[0, 0] += 1
        return found

    for other in ("sweep", "local_search", "scale_error"):
        monkeypatch.setattr(solver, other, getattr(torch.ops.duotone, other))
    assert trial.fault(torch.device("cpu")) is None
    monkeypatch.setattr(solver, op, wrong)
    assert f"a trial on cpu gave other {told}" in str(trial.fault(torch.device("cpu")))


def test_who_has_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU the extension; a GPU the programs unless something speaks against them, which is said; float64 neither."""
    x, cuda = torch.zeros(1), torch.device("cuda", 0)
    there = torch.empty(1, device="meta")
    assert loops.refusal(torch.device("cpu")) is None
    assert (loops.compiled(HOPPER.fp8, x) is torch.ops.duotone) == native.available()
    assert loops.compiled(HOPPER.fp8, x.double()) is None and loops.compiled(HOPPER.fp8, there) is None
    loops._tried.cache_clear()
    monkeypatch.setattr(trial, "fault", lambda device: f"a trial on {device} failed")
    assert loops.refusal(cuda) == "a trial on cuda:0 failed"
    monkeypatch.setattr(trial, "fault", lambda _: pytest.fail("tried again"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert loops.refusal(torch.device("cuda")) == "a trial on cuda:0 failed"
    loops._tried.cache_clear()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: None)
    assert "triton is not installed" in str(loops.refusal(cuda))
    loops._tried.cache_clear()
