"""The kernels against the contract on the device that is to run them, before the first weight does: once for each group size.

What a compiler or a driver makes of them is theirs to decide: a wrong value is a reason to run plain torch, never an answer.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from duotone.contract import quantize_activations
from duotone.kernels.gpu import layout
from duotone.qweight import QuantizedWeight, fp8_values
from duotone.scheme import HOPPER, Scheme

#: Of each path: one tile of tokens, a wide one, a prompt. Rows and columns leave part of a tile and of a chunk empty.
_TOKENS = (3, 40, 70)
_ROWS, _COLUMNS = 144, 1056


@cache
def fault(group_size: int, device: torch.device) -> str | None:
    """What the kernels do that the contract does not, as a sentence; None: they agree."""
    return told(device, lambda: _difference(group_size, False, device) or _difference(group_size, True, device))


def told(device: torch.device, difference: Callable[[], str | None]) -> str | None:
    """What comes of a comparison on a device, as a sentence, of which it gives what differs; None: nothing does."""
    with torch.no_grad(), torch.cuda.device_of(torch.empty(0, device=device)):
        try:
            if wrong := difference():
                return f"a trial on {device} gave other {wrong} than plain torch does"
        except Exception as error:
            first_line = (str(error).strip().splitlines() or ["no message"])[0]
            return f"a trial on {device} failed ({type(error).__name__}: {first_line})"
    return None


def _difference(group_size: int, is_signed: bool, device: torch.device) -> str | None:
    from duotone.kernels.gpu import launch

    # Plain torch on a CPU has the say: on a GPU it divides by a number by multiplying with its inverse, which is not the same.
    weight = _weight(group_size, is_signed)
    held = layout.pack(weight)
    packed = layout.Layout(held.codes.to(device), held.entries.to(device), held.table.to(device), *held[3:])
    operand, outer = fp8_values(weight), weight.outer_scale
    w8 = launch.write_values(packed, group_size)
    if not torch.equal(w8[:_ROWS, :_COLUMNS].float().cpu(), operand):
        return "FP8 weights"
    for tokens in _TOKENS:
        x = torch.randn(tokens, _COLUMNS, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        x8, scale = quantize_activations(x, HOPPER)
        there, facts = x.to(device), (HOPPER.fp8.max, HOPPER.smallest_activation_scale)
        ours, scales = launch.quantize(there, packed.codes.shape[1], None, *facts)
        if not (torch.equal(ours[:, :_COLUMNS].float().cpu(), x8) and torch.equal(scales.cpu()[:, None], scale)):
            return "FP8 activations"
        y = launch.linear(there, *packed[:3], outer.to(device), None, None, *packed[3:], group_size, *facts)
        if not is_near(y.cpu(), x8, operand, outer * scale):
            return f"products of {tokens} tokens"
    return None


def is_near(y: Tensor, x8: Tensor, w8: Tensor, scale: Tensor) -> bool:
    """Within the rounding to BF16 of the sum in float64, and what the units' own sums may lose: Hopper's keep 13 bits."""
    exact = x8.double() @ w8.double().T * scale
    lost = x8.double().abs() @ w8.double().abs().T * scale * 2.0**-12
    return bool(((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + lost).all())


def _weight(group_size: int, is_signed: bool) -> QuantizedWeight:
    """Random codes and scales in the canonical form."""
    generator, scheme = torch.Generator().manual_seed(group_size), Scheme(HOPPER, group_size)
    codes = torch.randint(int(is_signed), 16, (_ROWS, _COLUMNS), generator=generator, dtype=torch.uint8)
    group = HOPPER.fp8.round(torch.rand(_ROWS, scheme.groups(_COLUMNS), generator=generator) * 50 + 1)
    group[:, 0] = scheme.peak_group_scale
    largest = (torch.rand(_ROWS, generator=generator) + 0.1).bfloat16().float()
    return QuantizedWeight(codes, group, largest / scheme.peak_group_scale, scheme)
