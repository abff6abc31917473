# Shapes: D width that is turned, F width of one factor. Q [D, D] is orthogonal.
# torch is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Random orthogonal matrices of the Hadamard kind, kept as factors: a tensor is turned without Q ever being formed.

Q = diag(signs) (H x R): H a Hadamard matrix of the largest power of two that divides D, R a random orthogonal matrix of the odd
rest. An RMS norm without a weight commutes with Q, so a residual stream may be turned by it where all that writes the stream
and all that reads it turn along (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Widest factor of a Hadamard matrix: two products with 64 x 64 cost less than one with 4096 x 4096, and H(a b) is H(a) x H(b).
_WIDEST = 64
#: Values turned at a time, in float64: 128 MB.
_CHUNK = 2**24


@dataclass(frozen=True, eq=False)
class Rotation:
    """Q as factors. signs: +-1, float64 [D]. factors: orthogonal float64 [F, F] whose Kronecker product, in order, is H x R."""

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """D."""
        return len(self.signs)

    def describe(self) -> str:
        """What kind of matrix it is, in words."""
        odd = self.size // (self.size & -self.size)
        if odd == 1:
            return f"a random Hadamard matrix of {self.size}"
        return f"a random orthogonal matrix of {self.size} (Hadamard {self.size // odd} x random {odd})"


def draw_rotation(size: int, generator: torch.Generator) -> Rotation:
    """A rotation of any positive size; the same for the same generator state."""
    signs_D = 1.0 - 2.0 * torch.randint(2, (size,), generator=generator).double()
    power = size & -size
    factors: list[Tensor] = []
    while power > 1:
        width = min(power, _WIDEST)
        factors.append(_hadamard(width))
        power //= width
    odd = size // (size & -size)
    if odd > 1:
        q_FF, r_FF = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
        factors.append(q_FF * torch.where(r_FF.diagonal() < 0, -1.0, 1.0))  # the sign is LAPACK's choice otherwise
    return Rotation(signs_D, tuple(factors))


def turn(x: Tensor, rotation: Rotation) -> Tensor:
    """x Q along the last dimension, each run of D values by itself; x [..., a multiple of D] -> float32 of the same shape.

    Raises ValueError when D does not divide the last dimension.
    """
    if x.shape[-1] % rotation.size:
        raise ValueError(f"turn: found {x.shape[-1]} values, expected a multiple of {rotation.size}")
    rows_MD = x.reshape(-1, rotation.size)
    turned_MD = torch.empty(rows_MD.shape, dtype=torch.float32)
    step = max(1, _CHUNK // rotation.size)
    for start in range(0, len(rows_MD), step):
        turned_MD[start : start + step] = _turn_rows(rows_MD[start : start + step].double(), rotation)
    return turned_MD.reshape(x.shape)


def _turn_rows(x_MD: Tensor, rotation: Rotation) -> Tensor:
    turned, after = x_MD * rotation.signs, rotation.size
    for factor_FF in rotation.factors:
        after //= len(factor_FF)
        turned = factor_FF.T @ turned.reshape(-1, len(factor_FF), after)  # along the middle dimension
    return turned.reshape(x_MD.shape)


def _hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix of a power of two, orthonormal, float64."""
    h_FF = torch.ones(1, 1, dtype=torch.float64)
    while len(h_FF) < size:
        h_FF = torch.cat([torch.cat([h_FF, h_FF], 1), torch.cat([h_FF, -h_FF], 1)])
    return h_FF / size**0.5
