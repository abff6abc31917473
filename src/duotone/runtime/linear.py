# Shapes: N out_features, K in_features.
"""The module that stands where an nn.Linear stood."""

import dataclasses
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor, nn

from duotone.errors import DuotoneError
from duotone.kernels import cpu
from duotone.kernels.dispatch import choose
from duotone.qweight import AnyWeight
from duotone.scheme import AnyScheme


class QuantizedLinear(nn.Module):
    """A W4A8 or W8A8 linear: x [..., K] -> [..., N] in x's dtype, bias added after the rounding to it."""

    #: Forwards that ask for a weight's dtype, as T5's does, take None for a linear that casts by itself.
    weight = None

    def __init__(self, weight: AnyWeight, bias: Tensor | None, device: torch.device | None = None) -> None:
        """device: where it is to run, the weight's own by default; its backend may not follow it to another kind."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme: AnyScheme = weight.scheme
        self.input_scale = weight.input_scale
        backend, self.refusals = choose(weight.scheme, device or weight.outer_scale.device)
        self._backend = backend.__name__  # a name, since modules of Python cannot be copied with the model
        self._packed = self.backend.prepack(weight)
        self._shared: tuple[_SharedCall, int] | None = None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def backend(self) -> ModuleType:
        """The module of `duotone.kernels` that multiplies."""
        return sys.modules[self._backend]

    def forward(self, x: Tensor) -> Tensor:
        """The linear in the contract's arithmetic."""
        if self._shared is None or torch.compiler.is_compiling():
            return self.backend.linear(x, self._packed, self.bias)
        call, number = self._shared
        y = call.part(x, number)
        return y if self.bias is None else y + self.bias

    def packed_tensors(self) -> list[Tensor]:
        """All tensors that hold the weight."""
        values = (getattr(self._packed, field.name) for field in dataclasses.fields(self._packed))
        return [value for value in values if isinstance(value, Tensor)]

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
        if any(tensor is not getattr(self._packed, name) for name, tensor in moved.items()):
            self._packed = dataclasses.replace(self._packed, **moved)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Sizes, scheme and backend, as `print(model)` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme.label}, backend={self.backend.NAME}"
        )


class _SharedCall:
    """Computes all of several linears when the first is called, and has the others' results ready for the same input."""

    def __init__(self, merged: cpu.Packed) -> None:
        self.merged = merged
        self._last = _Last()

    def part(self, x: Tensor, number: int) -> Tensor:
        """What linear `number` makes of x, its bias left out."""
        version = None if x.is_inference() else x._version  # tensors of inference mode do not count their changes
        last = self._last
        if last.x is not x or last.version != version or number not in last.parts:
            last.x, last.version, last.parts = x, version, dict(enumerate(cpu.linears(x, self.merged)))
        y = last.parts.pop(number)
        if not last.parts:
            last.x = None  # nobody else will ask: activations are not kept
        return y


class _Last(threading.local):
    """The newest input of a thread and what nobody has asked for yet of its results."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.version: int | None = None
        self.parts: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple[type["_Last"], tuple[()]]:
        """A copy begins with nothing."""
        return (_Last, ())


def share_call(linears: Sequence[nn.Module]) -> bool:
    """Have linears that read the same input share one call; whether their backend and their weights allow it.

    Activations are quantized once then, and threads are woken once. The merged weight is the only copy.
    """
    layers = [layer for layer in linears if isinstance(layer, QuantizedLinear)]
    if len(layers) < 2 or len(layers) != len(linears) or any(layer.backend is not cpu for layer in layers):
        return False
    packed = [layer._packed for layer in layers]
    if not cpu.can_merge(packed):
        return False
    merged = cpu.merge(packed)
    call = _SharedCall(merged)
    for number, (layer, part) in enumerate(zip(layers, cpu.split(merged), strict=True)):
        layer._packed, layer._shared = part, (call, number)
    return True


def merged_weight(linears: Sequence[QuantizedLinear]) -> cpu.Packed | None:
    """The one weight of linears that share a call, or of a single linear; None where several do not."""
    first = linears[0]
    if len(linears) == 1:
        return first._packed if first._shared is None else None
    calls = {None if layer._shared is None else layer._shared[0] for layer in linears}
    call = calls.pop()
    alike = not calls and call is not None and [len(layer._packed.outer_scale) for layer in linears] == call.merged.rows
    return call.merged if alike and call is not None else None
