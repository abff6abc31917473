# Shapes: T tokens of a window, D hidden width.
"""Runs a model one block at a time on the hidden states of all calibration windows, and watches what its linears read.

Two prefixes are carried side by side: the one quantized so far, whose inputs a linear will really see, and, for methods that
aim at the original model's outputs, the original one.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duotone.calibrate.observer import Observer
from duotone.calibrate.offload import Keeper
from duotone.calibrate.walk import BlockWalk, Call, notebooks, with_own_notebooks
from duotone.errors import UnfinishedError
from duotone.models.skeleton import placed, text_config
from duotone.phases import Phases
from duotone.ranks import ALONE, Ranks

#: Activations of batches that wait inside a block, of each of the two prefixes. Beyond it batches walk anew to every stop.
WAITING_BYTES = 2 * 1024**3

#: What a block is called with beside its first argument, by position and by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _AllCaptured(Exception):
    """Ends the model's forward at its last block: what follows has no weights loaded."""


@dataclass
class BlockStream:
    """Hidden states at the entrance of the current block, batch by batch, and the other arguments each block is called with.

    ranks: the processes that the calibration's windows are shared by; this one holds its own.
    original: the hidden states that the original prefix gives, when it is carried along. offload: where hidden states are
    kept when memory is not to hold them. first: the number of the block that the first arguments are of, where other blocks
    come before this stream. after: of the original model, the stream of the blocks behind this one's. added: what the model
    adds to the hidden states before a block, by block, then by batch, as Qwen3-VL adds what it sees; added_original: the same
    of the original prefix, where that is something else.
    waiting_bytes: of activations that may wait inside a block, of each prefix.
    """

    hidden: list[Tensor]
    #: by block, then by batch: what follows the hidden states, by position and by name
    arguments: list[list[Arguments]]
    phases: Phases
    device: torch.device
    original: list[Tensor] | None = None
    ranks: Ranks = ALONE
    offload: Keeper | None = None
    first: int = 0
    after: "BlockStream | None" = None
    added: list[list[Tensor | None]] = field(default_factory=list)
    added_original: list[list[Tensor | None]] | None = None
    waiting_bytes: int | None = None
    #: what the original prefix's blocks write to, with what it is a copy of
    _books: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def kept(self, states: Iterable[Tensor]) -> list[Tensor]:
        """States as they stay until the next block: in memory, or offloaded."""
        return [state if self.offload is None else self.offload.keep(state) for state in states]

    def carry_original(self, other: "BlockStream | None" = None) -> None:
        """From here on, also pass hidden states through the original blocks: these, or those of another stream."""
        self.original = list(self.hidden if other is None else other.hidden)
        self.added_original = None if other is None else [list(batches) for batches in other.added]

    def is_last(self, index: int) -> bool:
        """Is this the stream's last block?"""
        return index - self.first == len(self.arguments) - 1

    def held(self) -> dict[str, Tensor]:
        """The hidden states, by name: all that a run has to remember between two blocks."""
        return {name: state.detach().cpu() for name, state in self._states()}

    def take_up(self, states: Mapping[str, Tensor]) -> None:
        """Go on from hidden states that were held before. Raises UnfinishedError when some are missing."""
        if any(notebooks(named) for batches in self.arguments for _, named in batches):
            raise UnfinishedError("found a model whose blocks leave notes for one another, which are not saved: begin anew")
        missing = [name for name, _ in self._states() if name not in states]
        if missing:
            raise UnfinishedError(f"found no {missing[0]!r} among what the unfinished run held, expected it: begin anew")
        taken = {name: states[name].to(state.device).clone() for name, state in self._states()}
        self.hidden = self.kept(taken[f"hidden.{i}"] for i in range(len(self.hidden)))
        if self.original is not None:
            self.original = self.kept(taken[f"original.{i}"] for i in range(len(self.original)))
        for block, batches in enumerate(self.added):
            self.added[block] = [taken.get(f"added.{block}.{i}") for i in range(len(batches))]

    def _states(self) -> Iterator[tuple[str, Tensor]]:
        added = ((f"added.{block}", batches) for block, batches in enumerate(self.added))
        for prefix, batches in (("hidden", self.hidden), ("original", self.original or ()), *added):
            for i, state in enumerate(batches):
                if state is not None:
                    yield f"{prefix}.{i}", state

    @contextmanager
    def enter(
        self,
        index: int,
        block: nn.Module,
        stops: Mapping[str, str],
        marks: Mapping[str, str],
        original: nn.Module | None = None,
        aside: bool = False,
    ) -> Iterator[Observer]:
        """All batches before the first linear of a block, ready to be observed.

        stops: the linears to observe, by name, with their paths in the block, in running order. marks: for some of them, the
        path of the module that reads the residual stream their output is added to. original: the block with its original
        weights. aside: the block is only looked at, and leaves nothing for those behind. The hidden states stay until `leave`.
        """
        with ExitStack() as stack:
            calls = self._calls(index, self.hidden)
            calls = [with_own_notebooks(call, {}) for call in calls] if aside else calls
            walk = stack.enter_context(self._walk(block, calls, stops, marks, behind=()))
            beside = None
            if original is not None and self.original is not None:
                calls = [with_own_notebooks(call, self._books) for call in self._calls(index, self.original)]
                beside = stack.enter_context(self._walk(original, calls, stops, marks, behind=marks))
            yield Observer(walk, beside, self.phases, self.ranks, index=index)

    def leave(self, observer: Observer) -> None:
        """Walk to the end of the block: its outputs, and what the model adds to them, are the hidden states before the next."""
        index = observer.index
        with self.phases("forward"):
            self.hidden = self.kept(self.entering(index + 1, observer.quantized.finish()))
            if observer.original is not None:
                original = self.added if self.added_original is None else self.added_original
                self.original = self.kept(self.entering(index + 1, observer.original.finish(), original))

    def entering(
        self, index: int, states: Iterable[Tensor], added: Sequence[Sequence[Tensor | None]] | None = None
    ) -> Iterator[Tensor]:
        """What enters a block, or leaves the last one, when the one before gave these states."""
        added, place = self.added if added is None else added, index - self.first
        for i, state in enumerate(states):
            more = added[place][i] if place < len(added) else None
            yield state if more is None else state + more.to(state.device)

    def calls(self, index: int, hidden: Sequence[Tensor]) -> Iterator[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
        """What a block is called with for each batch of hidden states: these, and what follows by position and by name."""
        for call in self._calls(index, hidden):
            yield call.hidden.to(self.device), call.positional, dict(call.named)

    def _calls(self, index: int, hidden: Sequence[Tensor]) -> list[Call]:
        """The same with hidden states left where they are kept."""
        arguments = self.arguments[index - self.first]
        return [Call(states, *more) for states, more in zip(hidden, arguments, strict=True)]

    def _walk(
        self, block: nn.Module, calls: list[Call], stops: Mapping[str, str], marks: Mapping[str, str], behind: Collection[str]
    ) -> BlockWalk:
        at, noted = ({name: block.get_submodule(path) for name, path in paths.items()} for paths in (stops, marks))
        waiting = _waiting([call.hidden for call in calls[:1]], at.values(), self.waiting_bytes)
        return BlockWalk(block, calls, at, noted, waiting, behind, self.device)


def _waiting(hidden: Sequence[Tensor], linears: Iterable[nn.Module], allowed_bytes: int | None) -> int:
    """How many batches may wait inside a block: each holds about six states of the hidden width and the widest input."""
    widest = max((linear.in_features for linear in linears if isinstance(linear, nn.Linear)), default=0)
    states = hidden[0]
    held_bytes = states.element_size() * states.numel() // states.shape[-1] * (6 * states.shape[-1] + widest)
    return int((WAITING_BYTES if allowed_bytes is None else allowed_bytes) // held_bytes)


@torch.no_grad()
def start_stream(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Any]],
    phases: Phases,
    ranks: Ranks = ALONE,
    offload: Keeper | None = None,
    gives: int | None = None,
    device: torch.device | None = None,
) -> BlockStream:
    """Run the model up to its first block for every batch, recording what each block would be called with.

    batches: this process's inputs of forward passes, by name. Blocks may lie on meta: none of them runs. gives: how many things
    a block gives, if it gives a tuple. A block that is the model itself is called with its first input by position. device: of
    the inputs, the model's own by default.
    """
    place = device or model.device
    stream = BlockStream([], [[] for _ in blocks], phases, place, ranks=ranks, offload=offload)
    stream.added = [[] for _ in blocks]
    entered: list[Tensor] = []

    def pretend(index: int) -> Callable[..., Any]:
        def forward(*positional: Any, **named: Any) -> Tensor | tuple[Tensor | None, ...]:
            hidden_states = positional[0] if positional else named.pop(next(iter(named)))
            if index == 0:
                entered.extend(stream.kept([hidden_states]))
            # The block before gave zeros: what is there now, the model has added.
            stream.added[index].append(hidden_states if index and bool(hidden_states.any()) else None)
            stream.arguments[index].append(_known((positional[1:], named), stream.arguments[index]))
            if index == len(blocks) - 1:
                raise _AllCaptured
            states = torch.zeros_like(hidden_states)
            return states if gives is None else (states, *(None,) * (gives - 1))

        return forward

    for index, block in enumerate(blocks):
        block.forward = pretend(index)
    try:
        options = {"use_cache": False} if hasattr(text_config(model), "use_cache") else {}
        for batch in batches:
            with suppress(_AllCaptured):
                model(**placed(batch, model.dtype, place), **options)
    finally:
        for block in blocks:
            del block.forward
    stream.hidden = entered
    return stream


def _known(arguments: Arguments, before: Sequence[Arguments]) -> Arguments:
    """The arguments of an earlier batch if they are the same, as masks and positions mostly are; else these."""
    return next((known for known in (*before[-1:], *before[:1]) if _same(known, arguments)), arguments)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    return one is other or (isinstance(one, bool | int | float | str) and one == other)
