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
        place = device or weight.outer_scale.device
        backend, self.refusals = choose(weight.scheme, place)
        self._backend = backend.__name__  # a name, since modules of Python cannot be copied with the model
        # Packed where it is to run: a CPU would take minutes for what a GPU does in seconds.
        self._packed = self.backend.prepack(_moved(weight, lambda tensor: tensor.to(place)))
        self._shared: tuple[_SharedCall, int] | None = None
        self.norms_input = False
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

    @property
    def packed(self) -> Any:
        """The weight as the backend has packed it."""
        return self._packed

    def hold(self, packed: Any) -> None:
        """Hold the same weight as a part of a larger one, and multiply alone."""
        self._packed, self._shared = packed, None

    def packed_tensors(self) -> list[Tensor]:
        """All tensors that hold the weight."""
        values = (getattr(self._packed, field.name) for field in dataclasses.fields(self._packed))
        return [value for value in values if isinstance(value, Tensor)]

    def dequantize(self) -> Tensor:
        """The real weights, float32 [N, K]: those of `qweight.dequantize`, out of what this module holds."""
        return self.backend.values(self._packed) * self._packed.outer_scale[:, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the module, but never change dtype: scales are part of the contract."""

        def follow(value: Tensor) -> Tensor:
            # The device fn leads to, asked with a tensor that costs nothing.
            device = fn(torch.empty(0, device=value.device)).device
            home = self.backend.DEVICE
            if device.type != value.device.type and home not in {None, device.type}:
                raise DuotoneError(
                    f"this model was loaded for {'a CPU' if home == 'cpu' else home}; load it for {device.type}: "
                    "duotone.load(..., device=...)"
                )
            return value.to(device)

        moved = _moved(self._packed, follow)
        if moved is not self._packed:
            self._packed, self._shared = moved, None  # what it shared stays where it was
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Sizes, scheme and backend, as `print(model)` shows them, and whether it is given what nobody has normed yet."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme.label}, backend={self.backend.NAME}" + ", norms its input" * self.norms_input
        )


def _moved(packed: Any, follow: Callable[[Tensor], Tensor]) -> Any:
    """A weight, packed or not, with each tensor where `follow` takes it; itself where that is where it was."""
    held = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    moved = {name: follow(value) for name, value in held.items() if isinstance(value, Tensor)}
    return dataclasses.replace(packed, **moved) if any(moved[name] is not held[name] for name in moved) else packed


class _SharedCall:
    """Computes all of several linears when the first is called, and has the others' results ready for the same input."""

    def __init__(self, merged: Any, backend: ModuleType) -> None:
        self.merged, self._backend = merged, backend.__name__
        self._last = _Last()

    def part(self, x: Tensor, number: int) -> Tensor:
        """What linear `number` makes of x, its bias left out."""
        version = None if x.is_inference() else x._version  # tensors of inference mode do not count their changes
        last = self._last
        if last.x is not x or last.version != version or number not in last.parts:
            last.x, last.version, last.parts = x, version, dict(enumerate(sys.modules[self._backend].linears(x, self.merged)))
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
    if len(layers) < 2 or len(layers) != len(linears) or any(layer.backend is not layers[0].backend for layer in layers):
        return False
    backend, packed = layers[0].backend, [layer._packed for layer in layers]
    if not backend.can_merge(packed):
        return False
    merged = backend.merge(packed)
    call = _SharedCall(merged, backend)
    for number, (layer, part) in enumerate(zip(layers, backend.split(merged), strict=True)):
        layer._packed, layer._shared = part, (call, number)
    return True


def take_norm(linears: Sequence[QuantizedLinear], weight: Tensor, epsilon: float) -> None:
    """Have linears norm their input, which they alone read: by a backend that does (`with_norm`). All of a shared call."""
    for layer in linears:
        layer._packed, layer.norms_input = layer.backend.with_norm(layer._packed, weight, epsilon), True
        if layer._shared is not None:
            call, _ = layer._shared
            call.merged = layer.backend.with_norm(call.merged, weight, epsilon)


def merged_weight(linears: Sequence[QuantizedLinear]) -> cpu.Packed | None:
    """The one weight of linears that share a call, or of a single linear; None where several do not."""
    first = linears[0]
    if len(linears) == 1:
        return first._packed if first._shared is None else None
    calls = {None if layer._shared is None else layer._shared[0] for layer in linears}
    call = calls.pop()
    alike = not calls and call is not None and [len(layer._packed.outer_scale) for layer in linears] == call.merged.rows
    return call.merged if alike and call is not None else None
