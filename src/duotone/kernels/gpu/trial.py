"""The kernels against the contract on the device that is to run them, before the first weight does: once for each group size.

What a compiler or a driver makes of them is theirs to decide: a wrong value is a reason to run plain torch, never an answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from duotone.contract import quantize_activations
from duotone.errors import gist
from duotone.kernels.gpu import layout
from duotone.qweight import AnyWeight, Fp8Weight, QuantizedWeight, fp8_values
from duotone.scheme import HOPPER, Fp8Scheme, Scheme

#: Of each path: one tile of tokens, a wide one, a prompt. Rows and columns leave part of a tile and of a chunk empty; chunks
#: are an even number, or an odd one, and so many that a GPU splits K.
_TOKENS = (3, 40, 70)
_ROWS, _COLUMNS, _ODD_COLUMNS = 144, 2000, 2100
#: Tokens that go to two of so many experts.
_EXPERTS, _SLOTS = 3, (3, 30, 100)
_FACTS = HOPPER.fp8.max, HOPPER.smallest_activation_scale


@cache
def fault(group_size: int, device: torch.device) -> str | None:
    """What the kernels do that the contract does not, as a sentence; None: they agree."""
    cases = ((is_signed, columns) for is_signed in (False, True) for columns in (_COLUMNS, _ODD_COLUMNS))
    return told(device, lambda: next(filter(None, (_difference(group_size, *case, device) for case in cases)), None))


@cache
def fp8_fault(device: torch.device) -> str | None:
    """The same of torch's product with FP8 weights, and of the activations it is given."""
    return told(device, lambda: _fp8_difference(device))


@cache
def grouped_fault(group_size: int, device: torch.device) -> str | None:
    """The same of the product with many experts' weights."""
    cases = ((False, _COLUMNS), (True, _ODD_COLUMNS))
    weights = ([_weight(group_size, is_signed, seed, columns) for seed in range(_EXPERTS)] for is_signed, columns in cases)
    return told(device, lambda: next(filter(None, (_grouped_difference(some, device) for some in weights)), None))


@cache
def grouped_fp8_fault(device: torch.device) -> str | None:
    """The same of the product with many experts' FP8 weights."""
    return told(device, lambda: _grouped_difference([_fp8_weight(_ROWS, seed) for seed in range(_EXPERTS)], device))


def told(device: torch.device, difference: Callable[[], str | None]) -> str | None:
    """What comes of a comparison on a device, as a sentence, of which it gives what differs; None: nothing does."""
    with torch.no_grad(), torch.cuda.device_of(torch.empty(0, device=device)):
        try:
            if wrong := difference():
                return f"a trial on {device} gave other {wrong} than plain torch does"
        except Exception as error:
            return f"a trial on {device} failed ({gist(error)})"
    return None


def _difference(group_size: int, is_signed: bool, columns: int, device: torch.device) -> str | None:
    from duotone.kernels.gpu import launch

    # Plain torch on a CPU has the say: on a GPU it divides by a number by multiplying with its inverse, which is not the same.
    weight = _weight(group_size, is_signed, 0, columns)
    there = {name: value.to(device) for name, value in vars(weight).items() if isinstance(value, Tensor)}
    packed, meant = layout.pack(replace(weight, **there)), layout.pack(weight)
    if packed[3:] != meant[3:] or not all(torch.equal(x.cpu(), its) for x, its in zip(packed[:3], meant[:3], strict=True)):
        return "packed codes"
    operand, outer = fp8_values(weight), weight.outer_scale
    w8 = launch.write_values(packed, group_size)
    if not torch.equal(w8[:_ROWS, :columns].float().cpu(), operand):
        return "FP8 weights"
    for tokens in _TOKENS:
        x, x8, scale = _activations(tokens, columns)
        if not _same_activations(x, x8, scale, device):
            return "FP8 activations"
        y = launch.linear(x.to(device), *packed[:3], outer.to(device), None, None, *packed[3:], group_size, *_FACTS)
        if not is_near(y.cpu(), x8, operand, outer * scale):
            return f"products of {tokens} tokens"
    return None


def _fp8_difference(device: torch.device) -> str | None:
    """Rows that have to be padded; the way to BF16, where torch scales the rows, and the other."""
    from duotone.kernels.gpu import fp8, launch

    weight = _fp8_weight(_ROWS - 3, 8)
    held, values, outer = fp8.prepack(weight), weight.values, weight.outer_scale
    for tokens in (1, *_TOKENS):
        x, x8, scale = _activations(tokens)
        if not _same_activations(x, x8, scale, device):
            return "FP8 activations"
        for dtype in (torch.bfloat16, torch.float32):
            y = launch.linear_fp8(x.to(device, dtype), held.values.to(device), outer.to(device), None, *_FACTS)
            if y.dtype != dtype or not is_near(y.cpu(), x8, values.float(), outer * scale):
                return f"products of {tokens} tokens with FP8 weights"
    return None


def _grouped_difference(weights: Sequence[AnyWeight], device: torch.device) -> str | None:
    """Blocks of each size, an expert with no tokens and slots of no expert; K split and not."""
    from duotone.kernels.gpu import backend, bank, fp8, fp8_bank, grouped

    kind, banks = (fp8, fp8_bank) if isinstance(weights[0], Fp8Weight) else (backend, bank)
    held: Any = banks.stack([[kind.prepack(weight)] for weight in weights])
    moved = {name: value.to(device) for name, value in vars(held).items() if isinstance(value, Tensor)}
    for tokens in _SLOTS:
        x, x8, scale = _activations(tokens, weights[0].shape[1])
        chosen = torch.randint(1, _EXPERTS + 1, (tokens, 2), generator=torch.Generator().manual_seed(tokens))
        y = grouped.linear(x.to(device), grouped.routes(chosen.to(device), _EXPERTS), replace(held, **moved)).cpu()
        for number in range(1, _EXPERTS + 1):
            slot = (chosen.flatten() == number).nonzero()[:, 0]
            meant = weights[number % _EXPERTS]
            outer = meant.outer_scale * scale[slot // 2] * (number < _EXPERTS)
            if not is_near(y[slot, :_ROWS], x8[slot // 2], fp8_values(meant), outer):
                return f"products of {tokens} tokens with experts" + " of FP8 weights" * (kind is fp8)
    return None


def _activations(tokens: int, columns: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """BF16 [M, K], and what plain torch quantizes them to."""
    x = torch.randn(tokens, columns or _COLUMNS, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    return x, *quantize_activations(x, HOPPER)


def _same_activations(x: Tensor, x8: Tensor, scale: Tensor, device: torch.device) -> bool:
    from duotone.kernels.gpu import launch

    columns = x.shape[1]
    ours, scales = launch.quantize(x.to(device), -(-columns // layout.CHUNK), None, *_FACTS)
    return torch.equal(ours[:, :columns].float().cpu(), x8) and torch.equal(scales.cpu()[:, None], scale)


def is_near(y: Tensor, x8: Tensor, w8: Tensor, scale: Tensor) -> bool:
    """Within the rounding to BF16 of the sum in float64, and what the units' own sums may lose: Hopper's keep 13 bits."""
    exact = x8.double() @ w8.double().T * scale
    lost = x8.double().abs() @ w8.double().abs().T * scale * 2.0**-12
    return bool(((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + lost).all())


def _weight(group_size: int, is_signed: bool, seed: int = 0, columns: int = 0) -> QuantizedWeight:
    """Random codes and scales in the canonical form."""
    columns = columns or _COLUMNS
    generator, scheme = torch.Generator().manual_seed(group_size + seed), Scheme(HOPPER, group_size)
    codes = torch.randint(int(is_signed), 16, (_ROWS, columns), generator=generator, dtype=torch.uint8)
    group = HOPPER.fp8.round(torch.rand(_ROWS, scheme.groups(columns), generator=generator) * 50 + 1)
    group[:, 0] = scheme.peak_group_scale
    largest = (torch.rand(_ROWS, generator=generator) + 0.1).bfloat16().float()
    return QuantizedWeight(codes, group, largest / scheme.peak_group_scale, scheme)


def _fp8_weight(rows: int, seed: int) -> Fp8Weight:
    """Random values and scales."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, _COLUMNS, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Fp8Weight(values, (torch.rand(rows, generator=generator) + 0.1).bfloat16().float(), Fp8Scheme(HOPPER))
