"""What a run writes, hashed and put on the disk behind the work, for a GPU: by one thread, in the order in which it came."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

#: Bytes of tensors that may wait in the host's memory to be written; a larger one waits alone.
BEHIND_BYTES = 2**30
Tensors = dict[str, Tensor]


class WriteBehind:
    """A context: tensors are written while the next ones are worked out, where the device is a GPU.

    At its end all are there; where the work fails, what waits is given up. A CPU, whose processors the work wants for itself,
    writes them at once. An error of the writing comes out of the next call; nothing that came after what it was about is
    written then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._bytes, self._failed = device, 0, False
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._device.type != "cpu":
            self._thread = ThreadPoolExecutor(1, "duotone-write")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            if self._thread is not None:
                self._thread.shutdown(cancel_futures=True)
            self._waiting.clear()

    def write(self, tensors: Tensors, write: Callable[[Tensors], None]) -> None:
        """Have tensors written by a function that takes them on the CPU. This comes back when they are in the host's memory."""
        if self._thread is None:
            write(tensors)
            return
        here = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        nbytes = sum(tensor.nbytes for tensor in here.values())
        while self._waiting and (self._waiting[0][0].done() or self._bytes + nbytes > BEHIND_BYTES):
            self._take()
        self._waiting.append((self._thread.submit(self._write, here, write), nbytes))
        self._bytes += nbytes

    def settle(self) -> None:
        """Wait until all is written."""
        while self._waiting:
            self._take()

    def _take(self) -> None:
        """Wait for what has waited longest. Raises what its writing raised."""
        done, nbytes = self._waiting.popleft()
        self._bytes -= nbytes
        done.result()

    def _write(self, tensors: Tensors, write: Callable[[Tensors], None]) -> None:
        """In the thread."""
        if self._failed:
            raise RuntimeError("what came before this was not written")
        self._failed = True
        write(tensors)
        self._failed = False
