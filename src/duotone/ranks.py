"""The processes that share one run: which of them this is, and how they tell one another what they found.

`torchrun -m duotone quantize ...` starts them. All come to the same calls in the same order. A process alone is `ALONE`, for
which every call gives back what it was given. Small things travel in the CPU's memory, tensors from where they are.
"""

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import get_node_local_rank
from torch.distributed.rendezvous import rendezvous

from duotone.errors import DuotoneError, ToldError

#: How long one process may wait for another; a process that ends is noticed at once.
_PATIENCE = timedelta(hours=2)
#: Of a wait, in seconds; in between, signals are heard.
_GLANCE = 0.0005
_AGAIN = "run the same command again with --resume"


class Ranks:
    """One process, number `rank`, of the `size` that share a run."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self._store = rank, size, store

    @property
    def first(self) -> bool:
        """Is this the one that writes files and speaks?"""
        return self.rank == 0

    def shares(self, count: int) -> list[slice]:
        """`count` things in order, cut evenly: what each process has of them."""
        return [slice(count * rank // self.size, count * (rank + 1) // self.size) for rank in range(self.size)]

    def sum_(self, *tensors: Tensor) -> None:
        """Put in each tensor's place the sum of all processes' ones, the same bits in all of them."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def max_(self, *tensors: Tensor) -> None:
        """Put in each tensor's place the elementwise maximum of all processes' ones."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def whole(self, parts: Sequence[Tensor], shares: Sequence[Sequence[slice]]) -> list[Tensor]:
        """Tensors put together from the rows that each process has of them. shares: of each tensor, by process."""
        if self.size == 1:
            return list(parts)
        found = [part.new_empty(share[-1].stop, *part.shape[1:]) for part, share in zip(parts, shares, strict=True)]
        waiting: list[Any] = []
        with _others_at_work():
            for tensor, part, share in zip(found, parts, shares, strict=True):
                tensor[share[self.rank]] = part
                for rank, rows in enumerate(share):
                    if rows.start < rows.stop:
                        waiting.append(dist.broadcast(tensor[rows], src=rank, async_op=True))
            _wait(waiting)
        return found

    def from_first(self, value: int) -> int:
        """The first process's number, in all of them."""
        if self.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.int64)
        with _others_at_work():
            _wait([dist.broadcast(told, src=0, async_op=True)])
        return int(told)

    def texts(self, text: str) -> list[str]:
        """Every process's text, by rank."""
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        one_each = [slice(rank, rank + 1) for rank in range(self.size)]
        (lengths,) = self.whole([length], [one_each])
        ends = [0, *lengths.cumsum(0).tolist()]
        (together,) = self.whole([data], [[slice(*ends[rank : rank + 2]) for rank in range(self.size)]])
        return [bytes(together[ends[rank] : ends[rank + 1]].tolist()).decode() for rank in range(self.size)]

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the first process the tensors of all, each behind the number of its process; in the others nothing."""
        if self.size == 1:
            return dict(tensors)
        specs = {name: (str(tensors[name].dtype).removeprefix("torch."), list(tensors[name].shape)) for name in sorted(tensors)}
        texts = self.texts(json.dumps(specs))
        if not self.first:
            for name in specs:
                self._send(tensors[name], 0)
            return {}
        found = {f"0:{name}": tensor for name, tensor in tensors.items()}
        for rank, text in enumerate(texts[1:], 1):
            for name, (dtype, shape) in json.loads(text).items():
                found[f"{rank}:{name}"] = self._receive(torch.empty(shape, dtype=getattr(torch, dtype)), rank)
        return found

    def deal(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was collected, to each process its own. tensors: in the first one. like: by name, tensors of the same shapes."""
        if self.size == 1:
            return dict(tensors)
        if not self.first:
            return {name: self._receive(torch.empty_like(like[name], device="cpu"), 0) for name in sorted(like)}
        for rank in range(1, self.size):
            for name in sorted(name for name in tensors if name.startswith(f"{rank}:")):
                self._send(tensors[name], rank)
        return {name.removeprefix("0:"): tensor for name, tensor in tensors.items() if name.startswith("0:")}

    def place(self, device: torch.device, asked: str) -> torch.device:
        """The device of this process: each takes a GPU of its own. Raises DuotoneError when its machine has too few."""
        if self.size == 1 or device.type != "cuda":
            return device
        local = get_node_local_rank(self.rank)
        if device.index is not None:
            raise DuotoneError(f"--device: found {asked!r} for {self.size} processes, expected auto or cuda: a GPU for each")
        if local >= torch.cuda.device_count():
            raise DuotoneError(f"--nproc-per-node: found {torch.cuda.device_count()} GPUs, expected one for each process")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def may_speak(self) -> bool:
        """Whether no other process has told the user yet why the run ends."""
        try:
            return self._store is None or self._store.add("duotone told", 1) == 1
        except RuntimeError:  # what held the store has ended
            return True

    def wait_for_all(self) -> None:
        """Go on when all have come here."""
        self.sum_(torch.zeros(1))

    def _reduce(self, tensors: Sequence[Tensor], operation: Any) -> None:
        if self.size > 1:
            with _others_at_work():
                _wait([dist.all_reduce(tensor, operation, async_op=True) for tensor in tensors])

    def _send(self, tensor: Tensor, to: int) -> None:
        with _others_at_work():
            dist.send(tensor.detach().cpu().contiguous(), to)

    def _receive(self, tensor: Tensor, source: int) -> Tensor:
        with _others_at_work():
            dist.recv(tensor, source)
        return tensor


#: A process that has nobody to share with.
ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun has started, or this one alone. What ends one of them ends them all.

    Of the errors that follow from one another only the first is told: the others come out as ToldError.
    """
    ranks = _join() if dist.is_available() and dist.is_torchelastic_launched() else ALONE
    if ranks.size == 1:
        yield ranks
        return
    alone = threading.current_thread() is not threading.main_thread()  # where signals cannot be heard
    before = None if alone else signal.signal(signal.SIGTERM, _stopped)
    try:
        yield ranks
        ranks.wait_for_all()
    except DuotoneError as error:
        if not ranks.may_speak():
            raise ToldError(str(error)) from error
        before = signal.SIG_IGN  # torchrun ends what is left of a run; the sentence comes first
        raise
    finally:
        if not alone:
            signal.signal(signal.SIGTERM, before)


#: The processes this one has joined: torchrun's are the same for as long as it lives.
_JOINED: list[Ranks] = []


def _join() -> Ranks:
    if not _JOINED:
        with _others_at_work():
            store, rank, size = next(iter(rendezvous("env://", timeout=_PATIENCE)))
            if size > 1:
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        _JOINED.append(Ranks(rank, size, store))
    return _JOINED[0]


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        while not work.is_completed():
            time.sleep(_GLANCE)
        work.wait()


@contextmanager
def _others_at_work() -> Iterator[None]:
    """What torch raises when the connection to another process breaks, as a sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DuotoneError(
            f"the connection to another process of this run was lost, which has ended or cannot be reached ({reason}): {_AGAIN}"
        ) from error


def _stopped(signum: int, _: Any) -> None:
    signal.signal(signum, signal.SIG_IGN)
    raise DuotoneError(f"this run was ended from outside, as torchrun does when one of its processes has died: {_AGAIN}")
