# Shapes: T tokens, A experts a token goes to, H hidden width, E experts, P linears of one input, R padded rows of one.
"""A bank of experts as two products, where a GPU's kernels have their linears: without, each is multiplied by itself."""

import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor, nn

from duotone.kernels.gpu import backend, bank, fp8, fp8_bank
from duotone.models.experts import Experts, find_experts
from duotone.runtime.linear import QuantizedLinear

Bank = bank.Bank | fp8_bank.Bank
#: What makes one of the linears that a backend has.
_BANKS: dict[ModuleType, Any] = {backend: bank, fp8: fp8_bank}


class GroupedExperts(nn.Module):
    """Gate and up of all experts in one product, and down in another; nothing waits for the device."""

    def __init__(self, up: Bank, down: Bank, biases: Sequence[Tensor | None]) -> None:
        """biases: of up and of down, [E * P * R]."""
        super().__init__()
        self._banks: tuple[Bank, Bank] | None = (up, down)
        self._device = up.outer_scale.device
        for name, bias in zip(("up_bias", "down_bias"), biases, strict=True):
            self.register_buffer(name, bias, persistent=False)

    @property
    def is_ready(self) -> bool:
        """Not where the model was moved to another device: the linears have their weights there, these stayed."""
        return self._banks is not None

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor, between: Callable[..., Tensor]) -> Tensor:
        """hidden_states [T, H], chosen and weights [T, A] -> [T, H]. between: what down is given of what gate and up give.

        A token's answers are added up as transformers' own grouped product does it, in one sum.
        """
        weighted = self._answers(hidden_states, chosen, between) * weights[..., None]
        return weighted.sum(1).to(hidden_states.dtype)

    def dealt(self, states: Tensor, used: Tensor, top_k: int, between: Callable[..., Tensor]) -> Tensor:
        """Llama 4's way: states [E, T, H], and bool [E, T] whose a token is -> [E, T, H], zeros where it is not.

        It is no more than `top_k` experts'; only what is NaN looks like everyone's, and is NaN in as many answers.
        """
        is_used, expert = used.T.int().topk(top_k)  # those that are not used fill up, whose answers are zeros
        token = torch.arange(len(expert), device=expert.device)[:, None]
        answers = self._answers(states[expert, token].flatten(0, 1), torch.where(is_used > 0, expert, -1), between)
        given = torch.zeros_like(states)
        given[expert, token] = answers.to(states.dtype)
        return given

    def _answers(self, hidden_states: Tensor, chosen: Tensor, between: Callable[..., Tensor]) -> Tensor:
        """hidden_states [T, H], or [T * A, H] of each slot, chosen [T, A] -> [T, A, H]."""
        from duotone.kernels.gpu import grouped

        assert self._banks is not None
        up, down = self._banks
        x = hidden_states if hidden_states.dtype in backend.NATIVE else hidden_states.float()
        routed = grouped.routes(chosen, up.experts)
        parts = grouped.linear(x, routed, up, self._bias("up_bias", x.dtype)).split(up.part_rows, -1)
        inside = between(*(part[:, : up.rows] for part in parts)).to(x.dtype)
        answers = grouped.linear(inside, routed, down, self._bias("down_bias", x.dtype))[:, : down.rows]
        return answers.view(*chosen.shape, down.rows)

    def _bias(self, name: str, dtype: torch.dtype) -> Tensor | None:
        bias: Tensor | None = getattr(self, name)
        return None if bias is None else bias.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moved to another device it has nothing left to multiply with: its experts do, one after the other."""
        if self._banks is not None and fn(torch.empty(0, device=self._device)).device != self._device:
            warnings.warn(
                "experts that were moved are multiplied one after the other: load the model where it is to run", stacklevel=2
            )
            self._banks = None
        return super()._apply(fn, recurse)


def group(model: nn.Module) -> None:
    """Have banks of experts multiplied as one where the GPU's kernels run their linears. Warns where one cannot be, and why."""
    refused: dict[str, str] = {}
    for path, experts in find_experts(model):
        reason = _group(experts)
        if reason is not None:
            refused[path] = reason
    if refused:
        path, reason = next(iter(refused.items()))
        warnings.warn(
            f"{len(refused)} banks of experts are multiplied one expert after the other, first {path}: {reason}", stacklevel=2
        )


def _group(experts: Experts) -> str | None:
    """Why a bank on a GPU stays as it was, or None."""
    firsts = ("gate_proj", "up_proj") if experts.gated else ("up_proj",)
    found = [_linears(experts, names) for names in (firsts, ("down_proj",))]
    flat = [layer for linears in found for expert in linears for layer in expert]
    quantized = [layer for layer in flat if isinstance(layer, QuantizedLinear) and layer.backend in _BANKS]
    if not quantized:
        return None
    if len(quantized) < len(flat):
        return f"{len(flat) - len(quantized)} of {len(flat)} linears are neither 4-bit codes nor FP8 weights of these kernels"
    if experts.dealt and experts.top_k is None:
        return "tokens are dealt out to all of them, found no top_k that says to how many a token goes"
    if any(len({layer.backend for expert in linears for layer in expert}) > 1 for linears in found):
        return "weights: found 4-bit codes and FP8 ones for the same input, expected one kind"
    kinds = [_BANKS[linears[0][0].backend] for linears in found]
    weights = [[[layer.packed for layer in expert] for expert in linears] for linears in found]
    alike = (kind.why_not(held) for kind, held in zip(kinds, weights, strict=True))
    if reason := next(filter(None, chain(alike, (_trial(held[0][0]) for held in weights))), None):
        return reason
    banks, biases = [], []
    for kind, linears, held in zip(kinds, found, weights, strict=True):
        whole = kind.stack(held)
        for layers, parts in zip(linears, kind.split(whole), strict=True):
            for layer, part in zip(layers, parts, strict=True):
                layer.hold(part)
        held.clear()  # what else knew of the weights as they were
        banks.append(whole)
        biases.append(_biases([layer for layers in linears for layer in layers], whole.part_rows))
    experts.grouped = GroupedExperts(banks[0], banks[1], biases)
    return None


def _linears(experts: Experts, names: Sequence[str]) -> list[list[Any]]:
    return [[experts.get_submodule(f"{expert}.{name}") for name in names] for expert in range(experts.count)]


def _trial(weight: backend.Packed | fp8.Packed) -> str | None:
    from duotone.kernels.gpu import trial

    device = weight.outer_scale.device
    return trial.grouped_fp8_fault(device) if isinstance(weight, fp8.Packed) else trial.grouped_fault(weight.group_size, device)


def _biases(layers: Sequence[QuantizedLinear], part_rows: int) -> Tensor | None:
    if layers[0].bias is None:
        return None
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return torch.cat([torch.nn.functional.pad(bias.data, (0, part_rows - len(bias))) for bias in biases])
