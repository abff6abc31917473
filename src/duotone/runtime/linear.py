# Shapes: N out_features, K in_features.
"""The module that stands where an nn.Linear stood."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from duotone.errors import DuotoneError
from duotone.kernels import cpu
from duotone.kernels.dispatch import choose
from duotone.qweight import QuantizedWeight
from duotone.scheme import Scheme


class QuantizedLinear(nn.Module):
    """A W4A8 linear: x [..., K] -> [..., N] in x's dtype, bias added after the rounding to it."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, device: torch.device | None = None) -> None:
        """device: where it is to run, the weight's own by default; its backend may not follow it to another kind."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme: Scheme = weight.scheme
        self.input_scale = weight.input_scale
        self.backend, self.refusals = choose(weight.scheme, device or weight.codes.device)
        self._packed = self.backend.prepack(weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The linear in the contract's arithmetic."""
        return self.backend.linear(x, self._packed, self.bias)

    def dequantize(self) -> Tensor:
        """The real weights, float32 [N, K]: those of `qweight.dequantize`, out of what this module holds."""
        return self.backend.values(self._packed) * self._packed.outer_scale[:, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the module, but never change dtype: scales are part of the contract."""
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self._packed):
            value = getattr(self._packed, field.name)
            if isinstance(value, Tensor):
                # The device fn leads to, asked with a tensor that costs nothing.
                device = fn(torch.empty(0, device=value.device)).device
                if self.backend is cpu and device.type != "cpu":
                    raise DuotoneError(
                        f"this model was loaded for a CPU; load it for {device.type}: duotone.load(..., device=...)"
                    )
                moved[field.name] = value.to(device)
        self._packed = dataclasses.replace(self._packed, **moved)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Sizes, scheme and backend, as `print(model)` shows them."""
        scheme = self.scheme
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"w4a8 {scheme.target.name} g{scheme.group_size}, backend={self.backend.NAME}"
        )
