"""A model's blocks read one ahead of the work, for a GPU: from the disk to pinned memory, and on by a stream of its own."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor

from duotone.checkpoint.source import Source, check_finite, load_finite
from duotone.device import free_bytes

#: Of a GPU's free memory, how much a block may take to be read ahead: with the one being solved, its originals and its copy
#: there are four at once. A larger one is read when it is asked for, and its originals stay in the host's memory.
AHEAD_SHARE = 1 / 8
#: Bytes of a piece of pinned memory. Blocks go through two of them, whatever their size: pinning takes long.
PIECE_BYTES = 64 * 2**20
Tensors = dict[str, Tensor]


class ReadAhead:
    """A context: the tensors of one block after the other, those of the next being read meanwhile where the device is a GPU.

    On a CPU, whose memory and processors the work wants for itself, a block is read when it is asked for. largest: bytes of
    the largest block.
    """

    def __init__(self, source: Source, blocks: Sequence[Iterable[str]], device: torch.device, largest: int = 0) -> None:
        self._source, self._blocks = source, blocks
        if device == torch.device("cuda"):  # any: each thread has a current one of its own
            device = torch.device("cuda", torch.cuda.current_device())
        fits = device.type == "cpu" or largest <= AHEAD_SHARE * free_bytes(device)
        self._device = device if fits else torch.device("cpu")
        self._reads: dict[int, Future[Tensors]] = {}
        self._reader: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._device.type != "cpu":
            self._reader = ThreadPoolExecutor(1, "duotone-read")
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        self._reads.clear()

    def block(self, index: int) -> Tensors:
        """A block's tensors by name, on the GPU where they are read ahead to it. Raises DuotoneError for what the file does not
        hold, and for NaN and infinity.
        """
        if self._reader is None:
            return load_finite(self._source, self._blocks[index])
        tensors = self._read(self._reader, index).result()
        del self._reads[index]
        if index + 1 < len(self._blocks):
            self._read(self._reader, index + 1)
        handed_over(tensors, self._device)
        return tensors

    def _read(self, reader: ThreadPoolExecutor, index: int) -> "Future[Tensors]":
        if index not in self._reads:
            self._reads[index] = reader.submit(read_beside, self._source, self._blocks[index], self._device)
        return self._reads[index]


def read_beside(source: Source, names: Iterable[str], device: torch.device) -> Tensors:
    """Tensors read to a GPU on a stream of their own, whole when this returns. Raises as `ReadAhead.block`."""
    lane = _lane(device)
    with lane.alone, torch.cuda.stream(lane.stream):
        tensors = {name: lane.moved(tensor) for name, tensor in source.load(names).items()}
        check_finite(source, tensors)
    lane.stream.synchronize()
    return tensors


class Lane:
    """The way of all blocks to a GPU: one stream, so that memory that one of them gives back is for the next, and two pieces of
    pinned memory, of which one is filled while the other is sent.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device)
        self.alone = Lock()  # of runs in several threads
        self._device, self._turn = device, 0
        self._pieces = [(torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor on its way to the GPU; the stream is to be the current one."""
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source, target = (x.reshape(-1).view(torch.uint8) for x in (tensor, there))
        for start in range(0, len(source), PIECE_BYTES):
            part, (piece, sent) = source[start : start + PIECE_BYTES], self._pieces[self._turn]
            sent.synchronize()
            target[start : start + PIECE_BYTES].copy_(piece[: len(part)].copy_(part), non_blocking=True)
            sent.record()
            self._turn = 1 - self._turn
        return there


@cache
def _lane(device: torch.device) -> Lane:
    return Lane(device)


def handed_over(tensors: Tensors, device: torch.device) -> None:
    """Their memory is not used anew before the work that is queued now, or later by whoever has them, is done with it."""
    for tensor in tensors.values():
        tensor.record_stream(torch.cuda.current_stream(device))
