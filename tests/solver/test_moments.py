# Shapes: M tokens, D and K columns.
"""The op that adds up products of BF16 tokens: every instruction set against exact ones, and what it refuses."""

import pytest
import torch
from torch import Tensor

from duotone.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable() or "")
#: The path that every processor has, and the widest that this one has.
PATHS = pytest.mark.parametrize("portable", [True, False], ids=["portable", "widest"])
#: (M, D, K): odd numbers of tokens, more than the 512 of a chunk, panels of 64 columns with and without a rest.
SHAPES = [(1, 1, 1), (2, 64, 64), (3, 63, 65), (7, 130, 5), (512, 64, 128), (513, 70, 64), (1027, 129, 66), (33, 200, 256)]
PANEL = 64


def moments(left_MD: Tensor, right_MK: Tensor | None, sum_DK: Tensor, portable: bool) -> Tensor:
    """The op, which writes in place."""
    torch.ops.duotone.moments(left_MD, right_MK, sum_DK, portable)
    return sum_DK


def zeros(*shape: int) -> Tensor:
    """Sums before the first call."""
    return torch.zeros(shape, dtype=torch.float64)


def drawn(tokens: int, columns: int, seed: int) -> Tensor:
    """Channels of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(tokens, columns, generator=generator) * torch.exp(torch.randn(columns, generator=generator))
    return x_MK.bfloat16()


def computed(columns: int) -> Tensor:
    """Which entries of a symmetric sum are: those on and above the diagonal's panels."""
    panel_K = torch.arange(columns) // PANEL
    return panel_K[:, None] <= panel_K


@PATHS
@pytest.mark.parametrize(("tokens", "left", "right"), SHAPES)
def test_products_of_two(portable: bool, tokens: int, left: int, right: int) -> None:
    """sum + left^T right within 1e-5 of the sizes that are added up, which float32 sums cannot do without."""
    left_MD, right_MK = drawn(tokens, left, 1), drawn(tokens, right, 2)
    before_DK = torch.randn(left, right, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = moments(left_MD, right_MK, before_DK.clone(), portable)
    exact = before_DK + left_MD.double().T @ right_MK.double()
    size = before_DK.abs() + left_MD.double().abs().T @ right_MK.double().abs()
    assert bool(((found - exact).abs() <= 1e-5 * size).all())


@PATHS
@pytest.mark.parametrize(("tokens", "columns"), [(tokens, columns) for tokens, columns, _ in SHAPES])
def test_products_with_itself(portable: bool, tokens: int, columns: int) -> None:
    """The same with one matrix, on and above the diagonal's panels; entries below keep what they held, NaN included."""
    x_MK, here = drawn(tokens, columns, 4), computed(columns)
    drawn_KK = torch.randn(columns, columns, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    before_KK = torch.where(here, drawn_KK, torch.nan)
    found = moments(x_MK, None, before_KK.clone(), portable)
    assert torch.equal(found.isnan(), ~here)
    exact = before_KK + x_MK.double().T @ x_MK.double()
    size = before_KK.abs() + x_MK.double().abs().T @ x_MK.double().abs()
    assert bool(((found - exact).abs() <= 1e-5 * size)[here].all())


@PATHS
@pytest.mark.parametrize(("tokens", "left", "right"), SHAPES)
def test_whole_numbers_are_exact(portable: bool, tokens: int, left: int, right: int) -> None:
    """Bit for bit, so that no token and no column counts twice or not at all; two calls add up."""
    generator = torch.Generator().manual_seed(6)
    left_MD, right_MK = (torch.randint(-9, 10, (tokens, n), generator=generator).double() for n in (left, right))
    found = zeros(left, right)
    for start, stop in ((0, tokens // 3), (tokens // 3, tokens)):
        moments(left_MD[start:stop].bfloat16(), right_MK[start:stop].bfloat16(), found, portable)
    assert torch.equal(found, left_MD.T @ right_MK)
    alone = moments(left_MD.bfloat16(), None, zeros(left, left), portable)
    assert torch.equal(alone, torch.where(computed(left), left_MD.T @ left_MD, 0))


@PATHS
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_matter(portable: bool, threads: int) -> None:
    """The same bits."""
    x_MK, y_MK = drawn(700, 200, 7), drawn(700, 130, 8)
    expected = [moments(x_MK, other, zeros(200, 130 if other is not None else 200), portable) for other in (None, y_MK)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [
            moments(x_MK, other, torch.zeros_like(like), portable) for other, like in zip((None, y_MK), expected, strict=True)
        ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@PATHS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_values_stay_in_their_column(portable: bool, bad: float) -> None:
    """An odd last token and a short last panel are filled with zeros, which must not meet what is infinite."""
    x_MK = torch.ones(5, 70).bfloat16()
    x_MK[4, 66] = bad
    found = moments(x_MK, None, zeros(70, 70), portable)
    mine = torch.zeros(70, 70, dtype=torch.bool)
    mine[66], mine[:, 66] = True, True
    assert torch.equal(~found.isfinite(), mine & computed(70))


@PATHS
def test_nothing_to_add(portable: bool) -> None:
    """No token, or no column: what was there is there."""
    ones = torch.ones(70, 3, dtype=torch.float64)
    assert torch.equal(moments(drawn(0, 70, 9), drawn(0, 3, 9), ones.clone(), portable), ones)
    assert torch.equal(moments(drawn(0, 70, 9), None, zeros(70, 70) + 1, portable), zeros(70, 70) + 1)
    assert moments(drawn(4, 0, 9), None, zeros(0, 0), portable).shape == (0, 0)


@PATHS
def test_what_it_cannot_read_is_refused(portable: bool) -> None:
    """Shapes, types and strides are checked before any pointer is followed; the sum is left as it was."""
    left_MD, right_MK, total = drawn(6, 5, 10), drawn(6, 4, 11), zeros(5, 4)
    moments(left_MD, right_MK, total.clone(), portable)
    for bad, sentence in (
        ((left_MD[0], None, zeros(5, 5)), "left: expected two dimensions"),
        ((left_MD, right_MK[0], total), "right: expected two dimensions"),
        ((left_MD, right_MK[:5], total), "right: found another shape"),
        ((left_MD, right_MK[..., None], total), "right: expected two dimensions"),
        ((left_MD, right_MK, total.T.contiguous()), "sum: found another shape"),
        ((left_MD, right_MK, zeros(5, 5)), "sum: found another shape"),
        ((left_MD, None, total), "sum: found another shape"),
        ((left_MD.float(), right_MK, total), "left: found another type"),
        ((left_MD.half(), None, zeros(5, 5)), "left: found another type"),
        ((left_MD, right_MK.float(), total), "right: found another type"),
        ((left_MD, right_MK, total.float()), "sum: found another type"),
        ((left_MD, right_MK, total.bfloat16()), "sum: found another type"),
        ((drawn(5, 6, 12).T, right_MK, total), "left: expected a contiguous"),
        ((left_MD, drawn(4, 6, 12).T, total), "right: expected a contiguous"),
        ((left_MD, right_MK, zeros(4, 5).T), "sum: expected a contiguous"),
    ):
        with pytest.raises((RuntimeError, IndexError), match=sentence):
            torch.ops.duotone.moments(*bad, portable)
    assert torch.equal(total, zeros(5, 4))
