# Shapes: T tokens of a window, D hidden width.
"""Runs a model one block at a time on the hidden states of all calibration windows, and watches what its linears read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duotone.errors import DuotoneError
from duotone.phases import Phases
from duotone.solver.statistics import Statistics, StatisticsAccumulator

#: Tokens of one forward pass: enough to fill the machine, small beside the weights of a block.
_BATCH_TOKENS = 4096


class _AllCaptured(Exception):
    """Ends the model's forward at its last block: what follows has no weights loaded."""


@dataclass
class BlockStream:
    """Hidden states at the entrance of the current block, batch by batch, and the other arguments each block is called with."""

    hidden: list[Tensor]
    #: by block, then by batch size
    arguments: list[dict[int, dict[str, Any]]]
    phases: Phases

    @torch.no_grad()
    def observe(self, index: int, block: nn.Module, watched: dict[str, nn.Module]) -> dict[str, Statistics]:
        """Second moments of the inputs of the watched linears, by name, over all windows; hidden states stay."""
        sums: dict[str, StatisticsAccumulator] = {}

        def add(name: str, x: Tensor) -> None:
            if name not in sums:
                sums[name] = StatisticsAccumulator(x.shape[-1], x.device)
            with self.phases("hessian"):
                sums[name].add(x)

        with self.phases("forward"), _watching(watched, add):
            for hidden in self.hidden:
                self._run(index, block, hidden)
        return {name: sums[name].finish(name) if name in sums else _unreached(name) for name in watched}

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module, watched: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Pass all hidden states through the block; returns the largest input magnitude of each watched linear."""
        absmax: dict[str, Tensor] = {}

        def widen(name: str, x: Tensor) -> None:
            largest = x.abs().amax().float()
            absmax[name] = torch.maximum(absmax[name], largest) if name in absmax else largest

        with self.phases("forward"), _watching(watched, widen):
            for i, hidden in enumerate(self.hidden):
                self.hidden[i] = self._run(index, block, hidden)
        return absmax

    def _run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        output = block(hidden, **self.arguments[index][len(hidden)])
        return output[0] if isinstance(output, tuple) else output


def _unreached(name: str) -> Statistics:
    raise DuotoneError(f"{name}: the forward pass never reached it, expected an input to calibrate on")


@torch.no_grad()
def start_stream(model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor, phases: Phases) -> BlockStream:
    """Run the model up to its first block for every batch of windows, recording what each block would be called with.

    tokens: int64 [windows, T]. Blocks may lie on meta: none of them runs.
    """
    stream = BlockStream([], [{} for _ in blocks], phases)
    entered: list[Tensor] = []

    def pretend(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
            if index == 0:
                entered.append(hidden_states)
            stream.arguments[index][len(hidden_states)] = arguments
            if index == len(blocks) - 1:
                raise _AllCaptured
            return hidden_states

        return forward

    for index, block in enumerate(blocks):
        block.forward = pretend(index)
    try:
        for batch in tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])):
            try:
                model(input_ids=batch.to(model.device), use_cache=False)
            except _AllCaptured:
                continue
    finally:
        for block in blocks:
            del block.forward
    stream.hidden = entered
    return stream


@contextmanager
def _watching(watched: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see` with each watched module's input while it runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: see(name, inputs[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in watched.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
