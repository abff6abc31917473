"""The fences around what interpreted programs are given (conftest.py), without which the other tests would show less."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton (the dev extra brings it on Linux)")

import triton
import triton.language as tl

CASES = (0, False, "reads .* behind"), (-1, True, "reads"), (1, True, "reads 4 bytes")


@triton.jit
def add(x, y, count, BLOCK: tl.constexpr, SHIFT: tl.constexpr, IS_MASKED: tl.constexpr):
    k = tl.arange(0, BLOCK)
    inside = k < count if IS_MASKED else k < BLOCK
    tl.store(y + k, tl.load(x + SHIFT + k, mask=inside, other=0) + 1, mask=inside)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, found a GPU")
@pytest.mark.parametrize(("shift", "is_masked", "says"), CASES)
def test_an_access_beyond_a_tensor_is_an_error(shift: int, is_masked: bool, says: str) -> None:
    """Of one number too many, on either side, of whole memory and of a view at its end; else values are what they were."""
    x, y = torch.arange(9.0), torch.zeros(9)
    add[(1,)](x[3:], y, 6, BLOCK=8, SHIFT=-3, IS_MASKED=True)
    assert y.tolist() == [1, 2, 3, 4, 5, 6, 0, 0, 0]
    with pytest.raises(Exception, match=says):
        add[(1,)](x[:6].clone(), y, 6, BLOCK=8, SHIFT=shift, IS_MASKED=is_masked)
    with pytest.raises(Exception, match="writes 4 bytes"):
        add[(1,)](x, y[2:], 8, BLOCK=8, SHIFT=0, IS_MASKED=True)
