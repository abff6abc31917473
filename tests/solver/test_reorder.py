# Shapes: K in_features.
"""Orders: permutations that equal the obvious loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.solver.reorder import ORDERS, Order, act_order, group_aware_order, natural_order
from tests.oracles.gar_naive import gar

THOROUGH = settings(max_examples=150, deadline=None, derandomize=True)
#: small integers, so that ties are frequent inside groups and between them
diagonals = st.lists(st.integers(0, 6), min_size=1, max_size=70)
group_sizes = st.sampled_from([1, 4, 8, 16, 128])


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@THOROUGH
@given(diagonal=diagonals, group_size=group_sizes)
def test_every_order_is_a_permutation(order: Order, diagonal: list[int], group_size: int) -> None:
    """Each column once; the diagonal is not touched."""
    given_K = torch.tensor(diagonal, dtype=torch.float32)
    found = order(given_K, group_size)
    assert sorted(found.tolist()) == list(range(len(diagonal)))
    assert given_K.tolist() == diagonal


@THOROUGH
@given(diagonal=diagonals, group_size=group_sizes)
def test_gar_equals_the_naive_loop(diagonal: list[int], group_size: int) -> None:
    """Short last groups and ties included."""
    found = group_aware_order(torch.tensor(diagonal, dtype=torch.float32), group_size)
    assert found.tolist() == gar([float(d) for d in diagonal], group_size)


@THOROUGH
@given(diagonal=diagonals, group_size=group_sizes)
def test_gar_keeps_columns_in_their_group(diagonal: list[int], group_size: int) -> None:
    """p // g is constant while a group is visited: it changes once less than there are groups."""
    visited = group_aware_order(torch.tensor(diagonal, dtype=torch.float32), group_size) // group_size
    groups = -(-len(diagonal) // group_size)
    assert int((visited[1:] != visited[:-1]).sum()) == groups - 1


def test_gar_by_hand() -> None:
    """Groups by their maximum (6, 5, 4), columns inside by their own; the short last group takes its turn."""
    diagonal = torch.tensor([1.0, 4.0, 2.0, 0.0, 6.0, 3.0, 3.0, 6.0, 5.0, 1.0])
    assert group_aware_order(diagonal, 4).tolist() == [4, 7, 5, 6, 8, 9, 1, 2, 0, 3]


def test_ties_keep_the_natural_order() -> None:
    """All entries equal: nothing moves, at sizes where an unstable sort would show."""
    equal = torch.ones(4096)
    for order in ORDERS.values():
        assert torch.equal(order(equal, 128), torch.arange(4096))


@THOROUGH
@given(diagonal=diagonals, group_size=group_sizes)
def test_act_order_equals_a_stable_sort(diagonal: list[int], group_size: int) -> None:
    """All columns by falling diagonal, whatever the groups."""
    found = act_order(torch.tensor(diagonal, dtype=torch.float32), group_size)
    assert found.tolist() == sorted(range(len(diagonal)), key=lambda k: -diagonal[k])


def test_gar_of_one_group_is_act_order_and_of_single_columns_too() -> None:
    """Both limits of the group size sort all columns."""
    diagonal = torch.rand(60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(group_aware_order(diagonal, 64), act_order(diagonal, 64))
    assert torch.equal(group_aware_order(diagonal, 1), act_order(diagonal, 1))


def test_natural_order() -> None:
    """Columns as they stand."""
    assert natural_order(torch.tensor([3.0, 1.0, 2.0]), 8).tolist() == [0, 1, 2]
