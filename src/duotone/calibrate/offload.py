"""Where hidden states are between two blocks: in the device's memory, in a GPU's host, or in files on a disk."""

import os
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from duotone.device import free_bytes
from duotone.errors import DuotoneError

#: Of a GPU's free memory, how much hidden states may take, and how much the activations of batches that wait inside a block, of
#: each prefix. The rest is for moments and the solver.
STATES_SHARE, WAITING_SHARE = 1 / 4, 1 / 4
#: Pinned memory is taken for so many states at once, but for no more bytes; states begin at multiples of so many.
_SLAB_STATES, _SLAB_BYTES, _ALIGNED = 16, 2**30, 512


class Keeper(Protocol):
    """What keeps states until the next block wants them."""

    def keep(self, state: Tensor) -> Tensor:
        """A copy of a tensor in another place."""
        ...


def choose_keeper(folder: str | Path | None, device: torch.device, nbytes: int | None) -> tuple[Keeper | None, str]:
    """What keeps so many bytes of states of a run on a device (None: they stay where they are), and where that is, for people.

    folder: where the user wants them. A GPU keeps them itself where they take no more than STATES_SHARE of its free memory, if
    it is known how much they take.
    """
    if folder is not None:
        return Offload(folder), "files on a disk"
    if device.type == "cpu":
        return None, "memory"
    if nbytes is not None and nbytes <= STATES_SHARE * free_bytes(device):
        return None, "the GPU's memory"
    return HostMemory(), "pinned host memory"


class HostMemory:
    """Memory of the host that no system pages out, so that a GPU reads it by itself.

    Many states share a slab: torch takes such memory in powers of two, for one state up to twice what it needs. A slab is free
    for the next states, pinned as it is, when none of its own is left.
    """

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def keep(self, state: Tensor) -> Tensor:
        """A copy there. The copying is waited for: what is saved to a disk reads it without asking the GPU."""
        like = torch.empty_like(state, device="meta")
        room = -(-like.nbytes // _ALIGNED) * _ALIGNED
        if len(self._rest) < room:
            self._rest = pinned(max(room, 2 ** (min(_SLAB_STATES * room, _SLAB_BYTES).bit_length() - 1)))
        place, self._rest = self._rest[: like.nbytes], self._rest[room:]
        return place.view(state.dtype).as_strided(like.shape, like.stride()).copy_(state)


def pinned(nbytes: int) -> Tensor:
    """So many bytes of the host that a GPU reads by itself."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


class Offload:
    """A folder for states between two blocks, mapped: read when they are needed, given up when memory is.

    Files have no name any more once they are mapped: a killed run leaves none.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DuotoneError(f"--offload {folder}: {error.strerror}, expected a folder that can be written") from None
        self._folder = folder

    def keep(self, state: Tensor) -> Tensor:
        """A copy of a tensor that lies in a file. Raises DuotoneError when the disk has no room for it."""
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix="duotone-") as file:
                os.posix_fallocate(file.fileno(), 0, state.nbytes)  # a mapping that finds the disk full would be a signal
                mapped = torch.from_file(file.name, shared=True, size=state.numel(), dtype=state.dtype)
        except OSError as error:
            raise DuotoneError(
                f"--offload {self._folder}: {error.strerror}, expected room for {state.nbytes} bytes of hidden states"
            ) from None
        return mapped.view(state.shape).copy_(state)
