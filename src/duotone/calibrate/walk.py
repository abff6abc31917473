# Shapes: T tokens of a window, K in_features, D hidden width.
"""Batches on their way through one block, held before each linear that is to be solved next.

True sequential calibration wants the inputs of a block's second group of linears *after* its first group has been quantized.
Running the block again for each group would cost several forward passes. Here every batch is a coroutine (a greenlet: the
forward is not ours, so it cannot yield) that stops inside the module's own forward, and goes on once the weights before it have
been replaced.
"""

import copy
from collections import UserDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from duotone.errors import DuotoneError


@dataclass(frozen=True, eq=False)
class Call:
    """What a block is called with for one batch: hidden states [windows, T, D], and what follows by position and name."""

    hidden: Tensor
    positional: tuple[Any, ...]
    named: Mapping[str, Any]


def notebooks(named: Mapping[str, Any]) -> list[str]:
    """Arguments that blocks write to: Gemma 4's leave keys and values there for those behind them."""
    return [name for name, value in named.items() if isinstance(value, UserDict)]


def with_own_notebooks(call: Call, books: dict[int, tuple[Any, Any]]) -> Call:
    """A call that writes to copies. books: of a prefix, each notebook with its copy, which is made when there is none."""
    own = {
        name: books.setdefault(id(call.named[name]), (call.named[name], copy.copy(call.named[name])))[1]
        for name in notebooks(call.named)
    }
    return replace(call, named={**call.named, **own})


@dataclass(frozen=True, eq=False)
class Arrival:
    """One batch at a linear: its input [..., K], the residual stream its output will be added to, if one is known, and that
    output [..., N], if the walk stops behind this linear.
    """

    x: Tensor
    stream: Tensor | None
    output: Tensor | None


@dataclass
class _Batch:
    """A batch's coroutine, where it waits, and the inputs of marked modules it has passed."""

    #: False: enough others wait. It is unwound after each stop, and walks anew through the weights replaced since to the next.
    waits: bool
    index: int
    task: greenlet | None = None
    waiting_at: str | None = None
    x: Tensor | None = None
    linear_output: Tensor | None = None
    output: Any = None
    passed: dict[str, Tensor] = field(default_factory=dict)


class BlockWalk:
    """A context: all batches walk one block together, from stop to stop.

    stops: modules to stop before, in the order the block runs them; those of an expert no token of a batch may come to. marks:
    for some stops, the module whose input is the residual stream that the linear's output is added to. behind: the stops to
    make once the linear has run. waiting: how many batches may wait inside the block, holding their activations; the others
    walk from its start to every stop again, which takes time and gives the same numbers. None: all. device: the block's, to
    which hidden states are brought when their batch sets out; by default they are there.
    """

    def __init__(
        self,
        block: nn.Module,
        calls: Sequence[Call],
        stops: Mapping[str, nn.Module],
        marks: Mapping[str, nn.Module],
        waiting: int | None = None,
        behind: Collection[str] = (),
        device: torch.device | None = None,
    ) -> None:
        self._block, self.stops, self._marks, self._behind, self._device = block, stops, marks, behind, device
        self._place = {name: place for place, name in enumerate(stops)}
        allowed = len(calls) if waiting is None else waiting
        self._batches = [_Batch(i < allowed, i) for i in range(len(calls))]
        self._calls = list(calls)
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self.stops.items():
            register = module.register_forward_hook if name in self._behind else module.register_forward_pre_hook
            self._handles.append(register(self._stop_at(name)))
        for name, module in self._marks.items():
            # Before the stops' hooks: a mark may be the very linear that another group stops at.
            self._handles.append(module.register_forward_pre_hook(self._note(name), prepend=True))
        return self

    @torch.no_grad()  # as in every step: a forward that is unwound restores the grad mode that it found
    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for batch in self._batches:
            self._unwind(batch)

    @torch.no_grad()
    def until(self, name: str) -> Iterator[Arrival]:
        """Let every batch walk on to the stop `name`.

        Raises DuotoneError naming the stop when another's forward never comes there.
        """
        for arrival in self.past(name):
            if arrival is None:
                raise DuotoneError(f"{name}: the forward pass never reached it, expected an input to calibrate on")
            yield arrival

    @torch.no_grad()
    def past(self, name: str) -> Iterator[Arrival | None]:
        """Let every batch walk on to the stop `name`, or beyond it; None for one that passes by without coming there."""
        for batch, call in zip(self._batches, self._calls, strict=True):
            while batch.waiting_at != name and not self._is_past(batch, name):
                self._go(batch, call)
            if batch.waiting_at == name:
                assert batch.x is not None
                yield Arrival(batch.x, batch.passed.get(name), batch.linear_output)
            else:
                yield None
            if not batch.waits:
                self._unwind(batch)

    def _is_past(self, batch: _Batch, name: str) -> bool:
        """Does a batch wait behind a stop, or has it come to the end?"""
        if batch.waiting_at is None:
            return batch.task is not None and batch.task.dead
        return self._place[batch.waiting_at] > self._place[name]

    @torch.no_grad()
    def finish(self) -> Iterator[Tensor]:
        """Let every batch walk to the end; the hidden states behind the block, which are the caller's to keep."""
        for batch, call in zip(self._batches, self._calls, strict=True):
            while batch.task is None or not batch.task.dead:
                self._go(batch, call)
            output, batch.output = batch.output, None
            yield output[0] if isinstance(output, tuple) else output

    def _unwind(self, batch: _Batch) -> None:
        """Give up a batch's forward where it stands; its activations are free, and it can start anew."""
        if batch.task is not None and not batch.task.dead:
            batch.task.throw()
        batch.task = batch.waiting_at = batch.x = batch.linear_output = None
        batch.passed.clear()

    def _go(self, batch: _Batch, call: Call) -> None:
        """One step: to the next stop, or to the end."""
        batch.waiting_at = batch.x = batch.linear_output = None
        if batch.task is None:
            batch.task = greenlet(self._run)
            result = batch.task.switch(batch, call)
        else:
            result = batch.task.switch()
        if batch.task.dead:
            batch.output = result

    def _run(self, batch: _Batch, call: Call) -> Any:
        task: Any = getcurrent()
        task.batch = batch
        try:
            hidden = call.hidden if self._device is None else call.hidden.to(self._device, non_blocking=True)
            return self._block(hidden, *call.positional, **call.named)
        finally:
            del task.batch  # a cycle would keep the activations until the collector comes by

    def _stop_at(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            batch = _walking()
            if batch is not None:
                batch.waiting_at, batch.x, batch.linear_output = name, inputs[0], output
                assert batch.task is not None and batch.task.parent is not None
                batch.task.parent.switch()

        return hook

    def _note(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            batch = _walking()
            if batch is not None:
                batch.passed[name] = inputs[0]

        return hook


def walking_batch() -> int:
    """The number of the batch whose coroutine is running. Raises ValueError when none is."""
    batch = _walking()
    if batch is None:
        raise ValueError("walking_batch: no batch is on its way through a block")
    return batch.index


def _walking() -> _Batch | None:
    """The batch whose coroutine is running; None when somebody else calls the module."""
    return getattr(getcurrent(), "batch", None)
