"""Hidden states on a disk instead of in memory, mapped: read when they are needed, given up when memory is."""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from duotone.errors import DuotoneError


class Offload:
    """A folder for states between two blocks. Files have no name any more once they are mapped: a killed run leaves none."""

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
