# safetensors is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Tensors that are made early and needed late in a run, kept on disk in between."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from duotone.checkpoint.writer import reporting_full_disk


class Scratch:
    """Lists of tensors by name, one file each, in a folder of their own."""

    def __init__(self, folder: Path, anew: bool = True) -> None:
        """Make the folder, or take up what is in it. Raises DuotoneError when it cannot be made."""
        with reporting_full_disk(folder.parent):
            if anew:
                folder.mkdir()
        self._folder = folder

    def write(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep tensors under a name. Raises DuotoneError when the disk is full."""
        with reporting_full_disk(self._folder, sum(tensor.nbytes for tensor in tensors)):
            self._path(name).write_bytes(save({str(i): tensor for i, tensor in enumerate(tensors)}))

    def read(self, name: str) -> list[Tensor]:
        """The tensors of a name, as they were written."""
        with safe_open(self._path(name), framework="pt") as file:
            return [file.get_tensor(str(i)) for i in range(len(file.keys()))]

    def remove(self) -> None:
        """Delete the folder and everything in it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
