"""Blocks read while others are worked on: by a stand-in for the reading on a GPU's stream."""

import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from duotone.checkpoint import ahead
from duotone.checkpoint.ahead import ReadAhead
from duotone.checkpoint.source import MemorySource, Source, check_finite
from duotone.errors import DuotoneError
from tests.pretended import Pretended, pretended_gpu

CUDA = torch.device("cuda", 0)
BLOCKS = [["a", "b"], ["c"], ["d"]]


class Lane:
    """Reads in the place of `read_beside`, and tells what it has read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[list[str]] = []
        self.threads: set[int] = set()
        self.handed: list[str] = []
        self.done = threading.Semaphore(0)
        monkeypatch.setattr(ahead, "free_bytes", lambda _: 800)
        monkeypatch.setattr(ahead, "read_beside", self._read)
        monkeypatch.setattr(ahead, "handed_over", lambda tensors, _: self.handed.extend(tensors))

    def _read(self, source: Source, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        assert device == CUDA
        self.read.append(list(names))
        self.threads.add(threading.get_ident())
        self.done.release()
        tensors = source.load(names)
        check_finite(source, tensors)
        return tensors


def source(**changed: Tensor) -> MemorySource:
    tensors = {name: torch.full((2,), float(place)) for place, name in enumerate("abcd")}
    return MemorySource(Path("here"), tensors | changed)


def test_the_next_block_is_read_beside_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one other thread, once each, one ahead and no further; each is handed over when it is asked for."""
    lane = Lane(monkeypatch)
    with ReadAhead(source(), BLOCKS, CUDA) as blocks:
        assert lane.read == []
        assert blocks.block(0).keys() == {"a", "b"}
        assert all(lane.done.acquire(timeout=10) for _ in range(2))
        assert lane.read == BLOCKS[:2] and lane.handed == ["a", "b"]
        assert torch.equal(blocks.block(1)["c"], torch.full((2,), 2.0))
        assert blocks.block(2).keys() == {"d"}
    assert lane.read == BLOCKS and lane.handed == list("abcd")
    assert len(lane.threads) == 1 and threading.get_ident() not in lane.threads


def test_it_begins_anywhere_and_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run that was killed goes on; what was read ahead for nothing is let go."""
    lane = Lane(monkeypatch)
    with ReadAhead(source(), BLOCKS, CUDA) as blocks:
        assert blocks.block(1).keys() == {"c"}
    assert ["a", "b"] not in lane.read


def test_a_bad_block_is_told_when_it_is_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while the block before is worked on."""
    lane = Lane(monkeypatch)
    with ReadAhead(source(c=torch.tensor([1.0, torch.nan])), BLOCKS, CUDA) as blocks:
        blocks.block(0)
        assert all(lane.done.acquire(timeout=10) for _ in range(2))
        with pytest.raises(DuotoneError, match="c holds 1 NaN or infinite values"):
            blocks.block(1)


@pytest.mark.parametrize(("largest", "ahead_of_work"), [(100, True), (101, False)])
def test_a_block_that_is_too_large_stays_in_the_host_s_memory(
    monkeypatch: pytest.MonkeyPatch, largest: int, ahead_of_work: bool
) -> None:
    """More than an eighth of what is free, of which four blocks would be half: read when it is asked for, by no thread."""
    lane = Lane(monkeypatch)
    with ReadAhead(source(), BLOCKS, CUDA, largest) as blocks:
        assert blocks.block(0).keys() == {"a", "b"}
    assert bool(lane.read) == bool(lane.handed) == ahead_of_work


def test_a_cpu_reads_what_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread, nothing ahead; NaN is refused as well."""
    lane = Lane(monkeypatch)
    with ReadAhead(source(d=torch.tensor([torch.inf])), BLOCKS, torch.device("cpu")) as blocks:
        assert blocks.block(0).keys() == {"a", "b"}
        with pytest.raises(DuotoneError, match="d holds 1 NaN or infinite values"):
            blocks.block(2)
    assert lane.read == []


class Queue(TorchDispatchMode):
    """Of a pretended GPU: copies to it that nobody waits for are made when somebody does, and no sooner."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[Callable[[], object]] = []
        self.pinned: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            self.pinned.append(args[0][0])
        if func is torch.ops.aten.copy_.default and isinstance(args[0], Pretended) and args[2:] == (True,):
            self.copies.append(lambda: args[0].held.copy_(args[1]))
            return args[0]
        return func(*args, **kwargs)

    def Event(self) -> Any:  # noqa: N802 - torch's name
        """Of `torch.cuda`."""
        queue, places = self, list[int]()

        class Event:
            def record(self) -> None:
                places.append(len(queue.copies))

            def synchronize(self) -> None:
                queue.make(places[-1] if places else 0)

        return Event()

    def Stream(self, _: torch.device) -> Any:  # noqa: N802
        """Of `torch.cuda`."""
        return self

    def synchronize(self) -> None:
        """The stream's."""
        self.make(len(self.copies))

    def make(self, until: int) -> None:
        for place in range(until):
            self.copies[place]()
            self.copies[place] = lambda: None


def test_blocks_pass_through_two_pieces_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes; a piece is filled again once the GPU has what was in it; in the end tensors are whole."""
    tensors = {
        "long": torch.arange(1001.0), "turned": torch.randn(7, 9).T, "one": torch.tensor(3.5), "none": torch.ones(0, 4),
        "bytes": torch.arange(200).to(torch.uint8), "half": torch.randn(3, 50).bfloat16(),
    }  # fmt: skip
    monkeypatch.setattr(ahead, "PIECE_BYTES", 96)
    with pretended_gpu(monkeypatch), Queue() as queue:
        for name, stand_in in (("Event", queue.Event), ("Stream", queue.Stream), ("stream", nullcontext)):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        lane = ahead.Lane(CUDA)
        monkeypatch.setattr(ahead, "_lane", lambda _: lane)
        monkeypatch.setattr(ahead, "check_finite", lambda *_: None)  # reads values back: waits for the copies
        for names in (list(tensors), ["half", "long"]):
            found = ahead.read_beside(MemorySource(Path("here"), tensors), names, CUDA)
            assert list(found) == names
            for name, tensor in found.items():
                assert isinstance(tensor, Pretended) and tensor.dtype == tensors[name].dtype
                assert torch.equal(tensor.held, tensors[name])
        assert queue.pinned == [96, 96] and len(queue.copies) > 80
