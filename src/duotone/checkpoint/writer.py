"""Writing a checkpoint as it is made: shards planned from shapes, filled in any order, and never seen half-written.

All tensors' shapes are known before any work is done, so each shard is laid out first, its bytes reserved on the disk
(a full disk is found before the first hour of work), and every tensor goes straight to its place.
"""

import errno
import hashlib
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
from duotone.errors import DuotoneError, UnfinishedError

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
    """Writes the planned tensors into a folder, each shard renamed to its real name once its last tensor is there.

    written: of each tensor that is in its place, the hash of its bytes.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, TensorSpec],
        max_bytes: int = _MAX_SHARD_BYTES,
        written: dict[str, str] | None = None,
    ) -> None:
        """Reserve the disk for all shards. written: what an earlier run that was killed here is known to have put there.

        Raises DuotoneError when the disk does not hold them, UnfinishedError where one of the tensors is not what it was.
        """
        self.written = dict(written or {})
        self._folder = folder
        self._shards = plan_shards(tensors, max_bytes)
        self._file_of = {name: file for file, members in self._shards.items() for name in members}
        self._pending: dict[str, dict[str, TensorSpec]] = {}
        self._offset_of: dict[str, int] = {}
        self._unsettled: set[str] = set()
        for file, members in self._shards.items():
            header, offsets = encode_header(members)
            self._offset_of.update(offsets)
            self._pending[file] = {name: spec for name, spec in members.items() if name not in self.written}
            total = len(header) + sum(spec.nbytes for spec in members.values())
            if len(self._pending[file]) < len(members):
                self._take_up(file)
                continue
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
            self._unsettled.add(file)
            with reporting_full_disk(self._folder), self._partial(file).open("r+b") as shard:
                for name in names:
                    spec, tensor = self._pending[file][name], tensors[name].detach().cpu().contiguous()
                    if (TORCH_NAMES.get(tensor.dtype), tuple(tensor.shape)) != (spec.dtype, spec.shape):
                        raise ValueError(
                            f"{name}: found {tensor.dtype} {tuple(tensor.shape)}, planned {spec.dtype} {spec.shape}"
                        )
                    del self._pending[file][name]
                    shard.seek(self._offset_of[name])
                    data = tensor.reshape(-1).view(torch.uint8).numpy().data
                    shard.write(data)
                    self.written[name] = content_hash(data)
            if not self._pending[file]:
                self._settle(file)
                self._partial(file).rename(self._folder / file)

    def settle(self) -> None:
        """Have all that was written on the disk, whatever happens next."""
        for file in sorted(self._unsettled):
            self._settle(file)

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

    def _take_up(self, file: str) -> None:
        """Go on with a shard that an earlier run began: what it is known to have written must still be there."""
        whole, partial = self._folder / file, self._partial(file)
        if whole.exists() and self._pending[file]:
            whole.rename(partial)  # it was finished after the record that this run goes on from
        place = partial if self._pending[file] else whole
        if partial.exists() and not self._pending[file]:
            partial.rename(whole)
        try:
            with place.open("rb") as shard:
                header, _ = encode_header(self._shards[file])
                if shard.read(len(header)) != header:
                    raise UnfinishedError(f"{place}: its header is not what the unfinished run wrote; remove {self._folder}")
                for name in self._shards[file].keys() - self._pending[file].keys():
                    shard.seek(self._offset_of[name])
                    if content_hash(shard.read(self._shards[file][name].nbytes)) != self.written[name]:
                        raise UnfinishedError(f"{place}: {name} is not what the unfinished run wrote; remove {self._folder}")
        except OSError as error:
            raise UnfinishedError(f"{place}: cannot be read ({error.strerror}); remove {self._folder}") from None

    def _settle(self, file: str) -> None:
        if file in self._unsettled:
            with reporting_full_disk(self._folder), self._partial(file).open("r+b") as shard:
                os.fsync(shard.fileno())
            self._unsettled.remove(file)

    def _partial(self, file: str) -> Path:
        return self._folder / f"{file}.partial"


def content_hash(data: Any) -> str:
    """Of the bytes of a tensor."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file, keys in the given order."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file."""
    with reporting_full_disk(path.parent):
        path.write_text(text, encoding="utf-8")


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
