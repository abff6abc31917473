# Shapes: M rows, D width.
"""Rotations: orthogonal, Hadamard where they can be, and applied without being formed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.transforms import rotation as module
from duotone.transforms.rotation import Rotation, draw_rotation, turn


def drawn(size: int, seed: int = 0) -> Rotation:
    return draw_rotation(size, torch.Generator().manual_seed(seed))


def dense(rotation: Rotation) -> torch.Tensor:
    """Q, float64 [D, D], from its definition and not by `turn`."""
    q = torch.ones(1, 1, dtype=torch.float64)
    for factor in rotation.factors:
        q = torch.kron(q, factor.contiguous())
    return rotation.signs[:, None] * q


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_any_size_is_orthogonal(size: int, seed: int) -> None:
    """Q Q^T = I for every width, odd ones and primes too."""
    q = dense(drawn(size, seed))
    assert q.shape == (size, size)
    assert (q @ q.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("size", [2, 64, 128, 4096])
def test_powers_of_two_are_hadamard(size: int) -> None:
    """Every entry is +-1 / sqrt(D), its sign that of Sylvester's matrix: the parity of the bits two indices share."""
    rotation = drawn(size)
    index = torch.arange(min(size, 256))
    shared = index[:, None] & index
    parity = sum((shared >> bit) & 1 for bit in range(12)) % 2
    expected = (1 - 2 * parity).double() / size**0.5
    found = turn(torch.eye(size)[: len(index)] * rotation.signs[: len(index), None], rotation)[:, : len(index)]
    assert (found - expected).abs().max() < 1e-7
    assert rotation.describe() == f"a random Hadamard matrix of {size}"
    assert 0 < (rotation.signs < 0).sum() < size or size == 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(size=st.integers(1, 200), runs=st.integers(1, 3), rows=st.integers(1, 9), chunk=st.integers(1, 500))
def test_turning_is_a_product_with_q(size: int, runs: int, rows: int, chunk: int) -> None:
    """x Q for each run of D values, however many rows are turned at a time."""
    rotation = drawn(size)
    x_MD = torch.randn(rows, runs * size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = (x_MD.reshape(-1, size) @ dense(rotation)).reshape(rows, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        found = turn(x_MD.float(), rotation)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5


def test_large_values_spread() -> None:
    """What rotations are for: one large channel among 256 becomes sixteen times smaller in all of them."""
    x = torch.zeros(1, 256)
    x[0, 7] = 100.0
    assert torch.allclose(turn(x, drawn(256)).abs(), torch.full((1, 256), 100.0 / 16))


def test_the_seed_decides() -> None:
    """The same seed draws the same factors, another one others, odd rests included."""
    first, same, other = drawn(96), drawn(96), drawn(96, 1)
    assert torch.equal(first.signs, same.signs) and torch.equal(first.factors[-1], same.factors[-1])
    assert not torch.equal(first.signs, other.signs) and not torch.equal(first.factors[-1], other.factors[-1])
    assert first.describe() == "a random orthogonal matrix of 96 (Hadamard 32 x random 3)"


def test_a_width_that_does_not_fit_is_refused() -> None:
    """Runs of D values cannot be cut out of a row that D does not divide."""
    with pytest.raises(ValueError, match="found 100 values, expected a multiple of 64"):
        turn(torch.zeros(2, 100), drawn(64))
