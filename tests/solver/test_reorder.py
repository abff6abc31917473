# Shapes: K in_features.
"""Orders: permutations that equal the obvious loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duotone.solver import reorder
from duotone.solver.reorder import GROUPED_ORDERS, ORDERS, Order, act_order, group_aware_order, min_pivot_order, natural_order
from tests.oracles.gar_naive import gar
from tests.oracles.min_pivot_naive import min_pivot
from tests.oracles.obq import correlated_layer, damped

THOROUGH = settings(max_examples=150, deadline=None, derandomize=True)
#: small integers, so that ties are frequent inside groups and between them
diagonals = st.lists(st.integers(0, 6), min_size=1, max_size=70)
group_sizes = st.sampled_from([1, 4, 8, 16, 128])
DAMPING = 0.01


def diagonal_matrix(diagonal: list[int]) -> Tensor:
    """A Hessian of uncorrelated inputs."""
    return torch.tensor(diagonal, dtype=torch.float32).diag()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@THOROUGH
@given(diagonal=diagonals, group_size=group_sizes)
def test_every_order_is_a_permutation(order: Order, diagonal: list[int], group_size: int) -> None:
    """Each column once; the Hessian is not touched."""
    given_KK = diagonal_matrix(diagonal)
    found = order(given_KK, group_size, DAMPING)
    assert sorted(found.tolist()) == list(range(len(diagonal)))
    assert torch.equal(given_KK, diagonal_matrix(diagonal))


@THOROUGH
@given(diagonal=diagonals, group_size=group_sizes)
def test_gar_equals_the_naive_loop(diagonal: list[int], group_size: int) -> None:
    """Short last groups and ties included."""
    found = group_aware_order(diagonal_matrix(diagonal), group_size, DAMPING)
    assert found.tolist() == gar([float(d) for d in diagonal], group_size)


@THOROUGH
@given(diagonal=diagonals, group_size=group_sizes)
def test_grouped_orders_keep_columns_in_their_group(diagonal: list[int], group_size: int) -> None:
    """p // g is constant while a group is visited: it changes once less than there are groups."""
    for name in GROUPED_ORDERS:
        visited = ORDERS[name](diagonal_matrix(diagonal), group_size, DAMPING) // group_size
        groups = -(-len(diagonal) // group_size)
        assert int((visited[1:] != visited[:-1]).sum()) == groups - 1


def test_grouped_orders_are_all_that_keep_groups_together() -> None:
    """On four groups whose columns interleave, the others scatter them."""
    h_KK = diagonal_matrix([1, 5, 2, 6, 3, 7, 4, 8])
    for name, order in ORDERS.items():
        visited = order(h_KK, 2, DAMPING) // 2
        assert (int((visited[1:] != visited[:-1]).sum()) == 3) == (name in GROUPED_ORDERS)


def test_gar_by_hand() -> None:
    """Groups by their maximum (6, 5, 4), columns inside by their own; the short last group takes its turn."""
    h_KK = diagonal_matrix([1, 4, 2, 0, 6, 3, 3, 6, 5, 1])
    assert group_aware_order(h_KK, 4, DAMPING).tolist() == [4, 7, 5, 6, 8, 9, 1, 2, 0, 3]


def test_ties_keep_the_natural_order() -> None:
    """All entries equal: nothing moves, at sizes where an unstable sort would show."""
    equal = torch.eye(1024)
    for order in ORDERS.values():
        assert torch.equal(order(equal, 128, DAMPING), torch.arange(1024))


@THOROUGH
@given(diagonal=diagonals, group_size=group_sizes)
def test_act_order_equals_a_stable_sort(diagonal: list[int], group_size: int) -> None:
    """All columns by falling diagonal, whatever the groups; so does min-pivot, where nothing is correlated."""
    for order in (act_order, min_pivot_order):
        found = order(diagonal_matrix(diagonal), group_size, DAMPING)
        assert found.tolist() == sorted(range(len(diagonal)), key=lambda k: -diagonal[k])


def test_gar_of_one_group_is_act_order_and_of_single_columns_too() -> None:
    """Both limits of the group size sort all columns."""
    h_KK = torch.rand(60, generator=torch.Generator().manual_seed(1)).diag()
    assert torch.equal(group_aware_order(h_KK, 64, DAMPING), act_order(h_KK, 64, DAMPING))
    assert torch.equal(group_aware_order(h_KK, 1, DAMPING), act_order(h_KK, 1, DAMPING))


def test_natural_order() -> None:
    """Columns as they stand."""
    assert natural_order(diagonal_matrix([3, 1, 2]), 8, DAMPING).tolist() == [0, 1, 2]


# ---- min-pivot


def pivots(h_KK: np.ndarray, order: list[int]) -> np.ndarray:
    """Squared pivots R_jj^2 of H = R R^T in this order, by their definition: det of the tail from j over that of the next."""
    tails = [np.linalg.slogdet(h_KK[np.ix_(order[j:], order[j:])])[1] for j in range(len(order))]
    return np.exp(np.array(tails) - np.array([*tails[1:], 0.0]))


@THOROUGH
@given(columns=st.integers(1, 12), block=st.sampled_from([1, 3, 128]), seed=st.integers(0, 1000))
def test_min_pivot_equals_the_greedy_choice(columns: int, block: int, seed: int) -> None:
    """Each column from the end is the one that the Schur complement, formed anew by an inverse, says; any block size."""
    _, hessian = correlated_layer(1, columns, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reorder, "_PIVOT_BLOCK", block)
        found = min_pivot_order(hessian, 8, DAMPING)
    assert found.tolist() == min_pivot(damped(hessian.numpy(), DAMPING))


def test_min_pivot_by_hand() -> None:
    """Column 0 is smallest and goes last. It leaves 5 - 4^2 / 4 = 1 of column 1, less than column 2 has."""
    h_KK = torch.tensor([[4.0, 4.0, 0.0], [4.0, 5.0, 0.0], [0.0, 0.0, 4.5]])
    assert min_pivot_order(h_KK, 8, 0.0).tolist() == [2, 1, 0]
    assert act_order(h_KK, 8, 0.0).tolist() == [1, 2, 0]
    assert pivots(h_KK.numpy(), [2, 1, 0]) == pytest.approx([4.5, 1, 4])


def test_min_pivot_lowers_the_sum_of_pivots() -> None:
    """What the column loop's loss goes with: below act-order's on correlated inputs, K beyond a block, float32 included."""
    sums = dict.fromkeys(ORDERS, 0.0)
    for seed in range(3):
        _, hessian = correlated_layer(1, 160, seed)
        h_KK = damped(hessian.numpy(), DAMPING)
        assert torch.equal(min_pivot_order(hessian, 8, DAMPING), torch.tensor(min_pivot(h_KK)))
        for name, order in ORDERS.items():
            sums[name] += pivots(h_KK, order(hessian.float(), 8, DAMPING).tolist()).sum()
    assert sums["min-pivot"] < sums["act"] < sums["none"]


def test_min_pivot_follows_relabeled_columns() -> None:
    """Columns that come in another sequence are visited in the same one."""
    _, hessian = correlated_layer(1, 150, 3)
    labels = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    found = min_pivot_order(hessian[labels][:, labels], 8, DAMPING)
    assert torch.equal(labels[found], min_pivot_order(hessian, 8, DAMPING))


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0])
def test_min_pivot_of_a_matrix_that_does_not_factorize(scale: float) -> None:
    """Zeros, rank one, negative: a permutation all the same, and `factorize` says what is wrong with the matrix."""
    x_K = torch.linspace(1, 2, 200)
    found = min_pivot_order(scale * torch.outer(x_K, x_K), 8, 1e-9)
    assert sorted(found.tolist()) == list(range(200))
