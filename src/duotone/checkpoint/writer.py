"""Writing a checkpoint as it is made: shards planned from shapes, filled in any order, and never seen half-written.

All tensors' shapes are known before any work is done, so each shard is laid out first, its bytes reserved on the disk
(a full disk is found before the first hour of work), and every tensor goes straight to its place.
"""

import errno
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotone.checkpoint.headers import TORCH_NAMES, TensorSpec, encode_header
from duotone.errors import DuotoneError

_MAX_SHARD_BYTES = 5_000_000_000


def plan_shards(tensors: dict[str, TensorSpec], max_bytes: int = _MAX_SHARD_BYTES) -> dict[str, dict[str, TensorSpec]]:
    """Cut tensors, in their given order, into shards of at most `max_bytes` (a larger tensor gets a shard of its own)."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in tensors.items():
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


class CheckpointWriter:
    """Writes the planned tensors into a folder, each shard renamed to its real name once its last tensor is there."""

    def __init__(self, folder: Path, tensors: dict[str, TensorSpec], max_bytes: int = _MAX_SHARD_BYTES) -> None:
        """Reserve the disk for all shards. Raises DuotoneError when it does not hold them."""
        self._folder = folder
        self._shards = plan_shards(tensors, max_bytes)
        self._file_of = {name: file for file, members in self._shards.items() for name in members}
        self._pending = {file: dict(members) for file, members in self._shards.items()}
        self._offset_of: dict[str, int] = {}
        for file, members in self._shards.items():
            header, offsets = encode_header(members)
            self._offset_of.update(offsets)
            total = len(header) + sum(spec.nbytes for spec in members.values())
            with reporting_full_disk(folder, total), self._partial(file).open("wb") as shard:
                os.posix_fallocate(shard.fileno(), 0, total)
                shard.write(header)

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors in their places. Raises ValueError for one that was not planned or differs from its plan."""
        by_file: dict[str, list[str]] = {}
        for name in tensors:
            if name not in self._pending.get(self._file_of.get(name, ""), {}):
                raise ValueError(f"{name}: was not planned, or is written already")
            by_file.setdefault(self._file_of[name], []).append(name)
        for file, names in by_file.items():
            with reporting_full_disk(self._folder), self._partial(file).open("r+b") as shard:
                for name in names:
                    spec, tensor = self._pending[file][name], tensors[name].detach().cpu().contiguous()
                    if (TORCH_NAMES.get(tensor.dtype), tuple(tensor.shape)) != (spec.dtype, spec.shape):
                        raise ValueError(
                            f"{name}: found {tensor.dtype} {tuple(tensor.shape)}, planned {spec.dtype} {spec.shape}"
                        )
                    del self._pending[file][name]
                    shard.seek(self._offset_of[name])
                    shard.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                if not self._pending[file]:
                    shard.flush()
                    os.fsync(shard.fileno())
            if not self._pending[file]:
                self._partial(file).rename(self._folder / file)

    def finish(self) -> int:
        """Write the index of a sharded checkpoint; returns the bytes of all tensors. Raises ValueError if any is missing."""
        missing = [name for pending in self._pending.values() for name in pending]
        if missing:
            raise ValueError(f"{missing[0]}: planned but never written ({len(missing)} in all)")
        total = sum(spec.nbytes for members in self._shards.values() for spec in members.values())
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            write_json(self._folder / "model.safetensors.index.json", index)
        return total

    def _partial(self, file: str) -> Path:
        return self._folder / f"{file}.partial"


@contextmanager
def output_folder(out: Path) -> Generator[Path]:
    """A staging folder whose content becomes that of `out` when the work ends well, and vanishes when it does not.

    It lies inside `out` when that exists (it may be a mount point or a link), otherwise beside it, so that the last step is
    a rename on one file system. Raises DuotoneError when `out` is not an empty folder, or cannot be made.
    """
    check_output(out)
    inside = out.is_dir()
    final = out.resolve()
    staging = (final if inside else final.parent) / f".{final.name}.partial-{os.getpid()}"
    with reporting_full_disk(out):
        staging.mkdir(parents=True)
    try:
        yield staging
        with reporting_full_disk(out):
            if inside:
                for file in sorted(staging.iterdir()):
                    file.rename(final / file.name)
            else:
                staging.rename(final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output(out: Path) -> None:
    """Raise DuotoneError unless `out` is absent or an empty folder."""
    with reporting_full_disk(out):  # a name the file system refuses is found here too
        exists = out.exists()
        empty = not exists or (out.is_dir() and not any(out.iterdir()))
    if exists and not out.is_dir():
        raise DuotoneError(f"{out}: is a file, expected a folder to write to, or none yet")
    if not empty:
        raise DuotoneError(f"{out}: the output folder is not empty, expected a new or empty one")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file, keys in the given order."""
    with reporting_full_disk(path.parent):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def reporting_full_disk(path: Path, needed: int | None = None) -> Generator[None]:
    """Turn a full disk, a quota or a read-only folder into one sentence that says how much is needed and how much is free."""
    try:
        yield
    except OSError as error:
        wanted = f"{needed / 1e6:.1f} MB" if needed else "more"
        if error.errno == errno.EFBIG:
            raise DuotoneError(f"{path}: needs {wanted} in one file, found a lower file size limit (ulimit -f)") from None
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            existing = next(place for place in (path, *path.parents) if place.exists())
            free = shutil.disk_usage(existing).free / 1e6
            raise DuotoneError(f"{path}: the disk is full: needs {wanted}, found {free:.1f} MB free") from None
        raise DuotoneError(f"{error.filename or path}: cannot be written ({error.strerror})") from None
