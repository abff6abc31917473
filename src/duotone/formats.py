"""Number formats as frozen data; whatever can be derived (max, bias, smallest subnormal) is a property, never typed in.

Sources: OCP 8-bit floating point specification (E4M3FN), IEEE-style E4M3 as on Gaudi 2 (largest value 240).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format of at most 8 bits with a sign bit, gradual underflow and round-to-nearest-even."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    #: True: the all-ones exponent is reserved for infinities and NaN (IEEE). False: only its all-ones mantissa is NaN.
    has_infinity: bool

    @property
    def bias(self) -> int:
        """Exponent bias, 2^(e-1) - 1."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max(self) -> float:
        """Largest finite value: 448 for E4M3FN, 240 for the IEEE-style E4M3."""
        top = 2**self.exponent_bits - 1
        if self.has_infinity:
            return 2.0 ** (top - 1 - self.bias) * (2 - 2.0**-self.mantissa_bits)
        return 2.0 ** (top - self.bias) * (2 - 2.0 ** (1 - self.mantissa_bits))

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value, 2^-9 for both E4M3 kinds."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    def decode(self, codes: Tensor) -> Tensor:
        """Value of each 8-bit code (uint8, any shape), float32; infinities and NaN where the format has them."""
        code = codes.to(torch.int32)
        mantissa_span = 2**self.mantissa_bits
        top = 2**self.exponent_bits - 1
        sign = torch.where(code >= 128, -1.0, 1.0)
        exponent = (code & 127) // mantissa_span
        mantissa = code % mantissa_span
        subnormal = mantissa * self.smallest_subnormal
        normal = (1 + mantissa / mantissa_span) * torch.pow(2.0, exponent.float() - self.bias)
        value = torch.where(exponent == 0, subnormal, normal)
        if self.has_infinity:
            special = torch.where(mantissa == 0, torch.inf, torch.nan)
            value = torch.where(exponent == top, special, value)
        else:
            value = torch.where((exponent == top) & (mantissa == mantissa_span - 1), torch.nan, value)
        return (sign * value).float()

    def round(self, x: Tensor) -> Tensor:
        """Nearest representable value (ties to even), saturating at +-max, NaN kept; float32 of the same shape.

        Both E4M3 kinds share exponents and mantissas up to 240, so torch's E4M3FN cast serves the clamped input of either.
        """
        return x.float().clamp(-self.max, self.max).to(torch.float8_e4m3fn).float()

    def encode(self, x: Tensor) -> Tensor:
        """The 8-bit code (uint8) of the nearest representable value, saturating; NaN has no code and raises ValueError."""
        if bool(torch.isnan(x).any()):
            raise ValueError(f"{self.name}: NaN cannot be encoded with saturation")
        return x.float().clamp(-self.max, self.max).to(torch.float8_e4m3fn).view(torch.uint8)


E4M3FN = FloatFormat("E4M3FN", exponent_bits=4, mantissa_bits=3, has_infinity=False)
E4M3 = FloatFormat("E4M3", exponent_bits=4, mantissa_bits=3, has_infinity=True)

#: The 16 levels of two's-complement INT4, indexed by code (offset-binary: code = level + 8).
INT4_LEVELS = tuple(float(level) for level in range(-8, 8))
