# Shapes: N out_features, K in_features, B columns of a block, G groups along K, C candidates.
"""The two inner loops by their definitions, and the compiled ones against torch's."""

import os
import subprocess
import sys
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duotone.kernels import native
from duotone.scheme import GAUDI, HOPPER, Scheme, Target
from duotone.solver.methods import Problem, SolverOptions, dpq, dpq_paper, gptq, shared_factor
from duotone.solver.scales import Scales, fit_scales
from duotone.solver.statistics import Statistics
from duotone.solver.sweep import Grid, Rule, scale_error, scale_error_torch, sweep, sweep_torch
from tests.oracles.obq import correlated_layer

COMPILED = pytest.mark.skipif(not native.available(), reason=native.unavailable() or "")
#: `sweep` and `scale_error` take the compiled path where there is one.
PATHS = pytest.mark.parametrize(
    "loop", [pytest.param(sweep, marks=COMPILED, id="compiled"), pytest.param(sweep_torch, id="torch")]
)
ERRORS = pytest.mark.parametrize(
    "measure", [pytest.param(scale_error, marks=COMPILED, id="compiled"), pytest.param(scale_error_torch, id="torch")]
)
ROWS = st.sampled_from([1, 2, 33, 63, 64, 65, 130])
TARGETS = st.sampled_from([HOPPER, GAUDI])
RULES = st.sampled_from(list(Rule))


def random_grid(rows: int, groups: int, target: Target, symmetric: bool, rule: Rule, generator: torch.Generator) -> Grid:
    """Scales over several octaves, up to where products are clamped, for weights of about 0.02."""
    scale_GN = torch.exp2(torch.rand(groups, rows, generator=generator) * 6)
    zero_GN = None if symmetric else torch.randint(-8, 8, (groups, rows), generator=generator).float()
    outer = torch.exp2(torch.rand(rows if target.channel_outer_scale else 1, generator=generator) - 12)
    return Grid(scale_GN, zero_GN, outer, rule, Scheme(target, symmetric=symmetric))


def groups_of(columns: int, groups: int, generator: torch.Generator) -> Tensor:
    """Columns in no order of groups, as act-order leaves them."""
    return torch.randint(groups, (columns,), generator=generator).to(torch.int32)


def by_definition(base_BN: Tensor, reference_BN: Tensor, coupling_BB: Tensor, grid: Grid, group_B: Tensor) -> list[Tensor]:
    """Column by column, term by term in the order of columns, each product and each sum rounded to float32."""
    codes_BN, value_BN = torch.empty_like(base_BN), torch.empty_like(base_BN)
    for j in range(len(base_BN)):
        wish_N = base_BN[j].numpy().copy()
        for i in range(j):
            wish_N += coupling_BB[i, j].numpy() * (reference_BN[i] - value_BN[i]).numpy()
        codes_BN[j], value_BN[j] = grid.round(torch.from_numpy(wish_N), grid.column(int(group_B[j])))
    return [codes_BN.to(torch.uint8), value_BN]


@COMPILED
@given(
    rows=ROWS,
    columns=st.integers(1, 40),
    groups=st.integers(1, 4),
    target=TARGETS,
    symmetric=st.booleans(),
    rule=RULES,
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_compiled_sweep_is_its_definition_bit_for_bit(
    rows: int, columns: int, groups: int, target: Target, symmetric: bool, rule: Rule, seed: int
) -> None:
    """Any weights, scales and tile widths: no code and no value differs, as nothing is fused or summed in another order."""
    generator = torch.Generator().manual_seed(seed)
    grid = random_grid(rows, groups, target, symmetric, rule, generator)
    base_BN, reference_BN = torch.randn(2, columns, rows, generator=generator) * 0.05
    coupling_BB = torch.randn(columns, columns, generator=generator) * 0.2
    group_B = groups_of(columns, groups, generator)
    expected = by_definition(base_BN, reference_BN, coupling_BB, grid, group_B)
    found = sweep(base_BN, reference_BN, coupling_BB, grid, group_B)
    assert found[0].dtype == torch.uint8
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@PATHS
@given(
    rows=ROWS,
    columns=st.integers(1, 100),
    groups=st.integers(1, 4),
    target=TARGETS,
    symmetric=st.booleans(),
    rule=RULES,
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_sweep_on_exact_sums(
    loop: Callable[..., tuple[Tensor, Tensor]],
    rows: int,
    columns: int,
    groups: int,
    target: Target,
    symmetric: bool,
    rule: Rule,
    seed: int,
) -> None:
    """Small dyadic numbers: every sum is exact in any order, fused or not, so both paths owe the definition's bits.

    Nothing at or below the diagonal of the coupling is read: it is NaN here, and the matrix a strided view.
    """
    generator = torch.Generator().manual_seed(seed)
    zero_GN = None if symmetric else torch.randint(-8, 8, (groups, rows), generator=generator).float()
    scale_GN = torch.randint(4, 33, (groups, rows), generator=generator) / 8
    outer = torch.ones(1) if target is GAUDI else torch.exp2(torch.randint(-1, 1, (rows,), generator=generator).float())
    grid = Grid(scale_GN, zero_GN, outer, rule, Scheme(target, symmetric=symmetric))
    base_BN, reference_BN = torch.randint(-2000, 2001, (2, columns, rows), generator=generator) / 64
    wide = torch.full((columns, columns + 3), torch.nan)
    coupling_BB = wide[:, :columns]
    values = torch.randint(-4, 5, (columns, columns), generator=generator) / 4
    if loop is sweep:
        coupling_BB.copy_(torch.where(torch.ones(columns, columns).triu(1) > 0, values, torch.nan))
    else:
        coupling_BB.copy_(values)
    group_B = groups_of(columns, groups, generator)
    expected = by_definition(base_BN, reference_BN, values, grid, group_B)
    found = loop(base_BN, reference_BN, coupling_BB, grid, group_B)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@PATHS
@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=["hopper", "gaudi"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_rules_against_all_sixteen_values(loop: Callable[..., tuple[Tensor, Tensor]], target: Target, symmetric: bool) -> None:
    """Each rule by brute force over the table of a group, weights all over it and beyond."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = 200, 50
    uncoupled = torch.zeros(columns, columns)
    group_B = groups_of(columns, 3, generator)
    for rule in (Rule.NEAREST_VALUE, Rule.NEAREST_LEVEL, Rule.INT4_ONLY):
        grid = random_grid(rows, 3, target, symmetric, rule, generator)
        scale_BN, outer = grid.group_scale_GN[group_B].numpy(), grid.outer_scale.numpy()
        zero_BN = np.zeros_like(scale_BN) if grid.zero_point_GN is None else grid.zero_point_GN[group_B].numpy()
        w_BN = torch.randn(columns, rows, generator=generator) * torch.from_numpy(scale_BN * outer) * 8
        level_16 = np.arange(-8, 8, dtype=np.float32).reshape(16, 1, 1)
        kind = ml_dtypes.float8_e4m3fn if target is HOPPER else ml_dtypes.float8_e4m3
        product = np.clip((level_16 - zero_BN) * scale_BN, -target.fp8.max, target.fp8.max).astype(kind).astype(np.float32)
        plain, table = (level_16 - zero_BN) * (scale_BN * outer), product * outer
        codes_BN, value_BN = (t.numpy() for t in loop(w_BN, w_BN, uncoupled, grid, group_B))
        if rule is Rule.NEAREST_VALUE:
            assert np.array_equal(np.abs(w_BN.numpy() - value_BN), np.abs(w_BN.numpy() - table).min(0))
        else:
            # Nearest level of w / step + zero, not nearest value: equal here but for ties, which random weights do not hit.
            assert np.array_equal(codes_BN, np.abs(w_BN.numpy() - plain).argmin(0))
        of_code = np.take_along_axis(plain if rule is Rule.INT4_ONLY else table, codes_BN[None].astype(int), 0)[0]
        assert np.array_equal(value_BN, of_code)


@PATHS
def test_ties_are_those_of_a_division(loop: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Weights halfway between levels, as float32 has them, and far beyond: half to even of w / step, not of w * (1 / step)."""
    generator = torch.Generator().manual_seed(7)
    step_N = torch.exp(torch.randn(20000, generator=generator))
    half_B1 = torch.cat([torch.arange(-10, 10) + 0.5, torch.tensor([3e5, -3e5, 2.0**22 + 1, -(2.0**22) - 1, 1e9, -1e30])])[
        :, None
    ]
    w_BN = half_B1 * step_N
    grid = Grid(step_N[None], None, torch.ones(1), Rule.INT4_ONLY, Scheme())
    zeros = torch.zeros(len(w_BN), len(w_BN))
    codes_BN, _ = loop(w_BN, w_BN, zeros, grid, torch.zeros(len(w_BN), dtype=torch.int32))
    expected = np.clip(np.round(w_BN.numpy() / step_N.numpy()), -8, 7) + 8
    assert np.array_equal(codes_BN.numpy(), expected)


@PATHS
@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=["hopper", "gaudi"])
def test_fp8_rounding_exhaustively(loop: Callable[..., tuple[Tensor, Tensor]], target: Target) -> None:
    """Every FP8 value, every midpoint between two, floats on either side of both, a million others: torch's own cast.

    A weight at infinity picks the outermost level, 7 + 1 or -8, whose product with a scale of x / 8 is x exactly.
    """
    finite = target.fp8.decode(torch.arange(128, dtype=torch.uint8))
    finite = finite[torch.isfinite(finite)]
    points = torch.cat([finite, (finite[1:] + finite[:-1]) / 2])
    near = torch.cat([(points.view(torch.int32) + shift).clamp(min=0).view(torch.float32) for shift in range(-3, 4)])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.exp2(torch.rand(10**6, generator=generator) * 60 - 50)
    x_N = torch.cat([near, drawn, torch.tensor([0.0, 447.99, 1e3, 1e30])])
    far = torch.full((2, len(x_N)), 1e38)
    far[1] *= -1
    zero_GN = torch.tensor([-1.0, 0.0])[:, None].expand(2, len(x_N)).contiguous()
    grid = Grid((x_N / 8).expand(2, -1).contiguous(), zero_GN, torch.ones(1), Rule.NEAREST_LEVEL, Scheme(target))
    _, value_2N = loop(far, far, torch.zeros(2, 2), grid, torch.arange(2, dtype=torch.int32))
    limit = target.fp8.max
    expected = (8 * (x_N / 8)).clamp(max=limit).to(torch.float8_e4m3fn).float()
    assert len(finite) == (127 if target is HOPPER else 120)
    assert torch.equal(value_2N, torch.stack([expected, -expected]))


@ERRORS
@given(
    rows=ROWS,
    columns=st.integers(1, 150),
    candidates=st.integers(1, 9),
    group_size=st.sampled_from([5, 8, 32, 43]),
    target=TARGETS,
    symmetric=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_scale_error_by_definition(
    measure: Callable[..., Tensor],
    rows: int,
    columns: int,
    candidates: int,
    group_size: int,
    target: Target,
    symmetric: bool,
    weighted: bool,
    seed: int,
) -> None:
    """Float64 over the real columns of each group, a short last one included; zero weights and clipped ones are in."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    w_NK = torch.randn(rows, columns, generator=generator) * 0.05
    w_NK[0] = 0
    outer = torch.exp2(torch.rand(rows if target.channel_outer_scale else 1, generator=generator) - 12)
    candidate_NGC = torch.exp2(torch.rand(rows, groups, candidates, generator=generator) * 8 - 1)
    zero_NG = None if symmetric else torch.randint(-8, 8, (rows, groups), generator=generator).float()
    column_weight_K = torch.rand(columns, generator=generator) * 3 if weighted else None
    given = Scales(candidate_NGC[..., 0], zero_NG, outer)
    found = measure(w_NK, candidate_NGC, given, Scheme(target, symmetric=symmetric), group_size, column_weight_K)

    kind = ml_dtypes.float8_e4m3fn if target is HOPPER else ml_dtypes.float8_e4m3
    limit = np.float32(target.fp8.max)
    expected = np.zeros((rows, groups, candidates))
    scaled_NK = (w_NK / outer[:, None]).numpy()
    for k in range(columns):
        scale_NC = candidate_NGC[:, k // group_size].numpy()
        zero_N1 = np.float32(0) if zero_NG is None else zero_NG[:, k // group_size, None].numpy()
        level_NC = np.clip(np.round(scaled_NK[:, k, None] / scale_NC) + zero_N1, -8, 7)
        value_NC = np.clip((level_NC - zero_N1) * scale_NC, -limit, limit).astype(kind).astype(np.float64)
        squared_NC = np.square(value_NC - scaled_NK[:, k, None]) * np.square(outer.double().numpy())[:, None]
        expected[:, k // group_size] += squared_NC * (1 if column_weight_K is None else float(column_weight_K[k]))
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), expected, rtol=2e-5, atol=0)


@COMPILED
@pytest.mark.parametrize("target", [HOPPER, GAUDI], ids=["hopper", "gaudi"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("solve", [dpq, dpq_paper, gptq])
def test_methods_agree_on_both_paths(
    solve: Callable[..., tuple], target: Target, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole methods, compiled and not: torch may fuse or sum in blocks, so a near-tie may fall either way; hardly one does."""
    w_NK, hessian = correlated_layer(96, 200, seed=1, dtype=torch.float32)
    scheme, options = Scheme(target, 32, symmetric), SolverOptions()
    statistics = Statistics(hessian, 1600)
    problem = Problem("layer", w_NK, statistics, shared_factor(statistics, scheme, options, "layer"), scheme, options)
    compiled, report = solve(problem)
    monkeypatch.setattr(native, "available", lambda: False)
    plain, expected = solve(problem)
    assert (compiled.codes != plain.codes).double().mean() < 1e-3
    assert report.output_error == pytest.approx(expected.output_error, rel=1e-3)


@COMPILED
def test_compiled_ops_refuse_what_they_cannot_read() -> None:
    """Shapes, types and group indices are checked before any pointer is followed."""
    grid = Grid(torch.ones(2, 4), None, torch.ones(4), Rule.NEAREST_VALUE, Scheme())
    base_BN, coupling_BB, group_B = torch.zeros(3, 4), torch.zeros(3, 3), torch.zeros(3, dtype=torch.int32)
    sweep(base_BN, base_BN, coupling_BB, grid, group_B)
    with pytest.raises(RuntimeError, match="reference"):
        sweep(base_BN, base_BN[:2], coupling_BB, grid, group_B)
    with pytest.raises(RuntimeError, match="coupling"):
        sweep(base_BN, base_BN, coupling_BB.double(), grid, group_B)
    for bad in (2, -1):
        with pytest.raises(RuntimeError, match="no such group"):
            sweep(base_BN, base_BN, coupling_BB, grid, torch.tensor([0, bad, 1], dtype=torch.int32))
    scales = Scales(torch.ones(3, 1), None, torch.ones(1))
    with pytest.raises(RuntimeError, match="candidates"):
        scale_error(base_BN, torch.ones(3, 2, 1), scales, Scheme(), 8)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_do(rows: int) -> None:
    """No rows, or no columns: empty results on either path."""
    grid = Grid(torch.ones(1, rows), None, torch.ones(1), Rule.NEAREST_VALUE, Scheme())
    for loop in (sweep, sweep_torch):
        codes, value = loop(
            torch.zeros(0, rows), torch.zeros(0, rows), torch.zeros(0, 0), grid, torch.zeros(0, dtype=torch.int32)
        )
        assert codes.shape == value.shape == (0, rows)


@pytest.mark.parametrize("switch", ["0", ""])
def test_environment_switch(switch: str) -> None:
    """DUOTONE_NATIVE=0 leaves the extension unloaded and says so; anything else does not."""
    code = "from duotone.kernels import native; print(native.unavailable())"
    environment = {**os.environ, "DUOTONE_NATIVE": switch}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (found.stdout.strip() == "DUOTONE_NATIVE=0") == (switch == "0")


def test_unknown_formats_take_the_torch_path() -> None:
    """float64, or another FP8 format, is not what the extension computes: the result is torch's."""
    w_NK, _ = correlated_layer(5, 16, seed=2)
    scheme = Scheme(group_size=16)
    grid = Grid.of(fit_scales(w_NK.float(), scheme), Rule.INT4_ONLY, scheme)
    grid = Grid(grid.group_scale_GN.double(), None, grid.outer_scale.double(), grid.rule, scheme)
    base_BN, group_B = w_NK.T.contiguous(), torch.zeros(16, dtype=torch.int32)
    codes, value = sweep(base_BN, base_BN, torch.zeros(16, 16).double(), grid, group_B)
    assert value.dtype == torch.float64
    assert torch.equal(value, (codes.double() - 8) * grid.group_scale_GN * grid.outer_scale)
