# safetensors is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What an unfinished run has done, in the folder that it is making, so that a run that was killed goes on where it stood.

A save puts the tensors that the run is holding into a file of their own, then a record that names it in the place of the one
before: at any moment there is one whole record or none. What was put into shards before the record is as it says, by hash; what
was put there after it is written once more, with the same bytes.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from duotone.checkpoint.headers import TensorSpec
from duotone.checkpoint.source import read_json
from duotone.checkpoint.writer import reporting_full_disk
from duotone.errors import DuotoneError, UnfinishedError

RECORD = ".journal.json"
_VERSION = 1
#: A save may take a tenth of the time.
_SHARE = 10.0
#: Of a shard, for its digest: all of it, or so many bytes in so many places.
_WHOLE_BYTES, _SAMPLE_BYTES, _SAMPLES = 256 * 2**20, 2**20, 64


@dataclass(frozen=True)
class Record:
    """One save. settings: what the run was asked to do, by topic and name. done: its steps behind it.

    written: of each tensor in the shards the hash of its bytes. facts: what else it knows. state: the file of the tensors that
    it held, if it held any.
    """

    version: int
    settings: dict[str, Any]
    done: int
    written: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    state: str | None = None


class Journal:
    """The records of one folder."""

    def __init__(self, folder: Path, settings: dict[str, Any], every: float) -> None:
        """Read the folder's record, if it has one. every: seconds of work between two saves, at least.

        Raises UnfinishedError, which names the difference, when that run was asked to do something else.
        """
        self._folder, self._every = folder, every
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.record = _read(folder)
        if self.record is not None:
            _check_same(folder, self.record.settings, self.settings)
        self._since, self._took = time.monotonic(), 0.0

    def is_due(self) -> bool:
        """Whether so much work has been done since the last save that the next pays."""
        return not self._every or time.monotonic() - self._since >= max(self._every, _SHARE * self._took)

    def save(self, done: int, written: dict[str, str], facts: dict[str, Any], held: dict[str, Tensor]) -> None:
        """Make all that was done so far last. The shards' bytes must be on the disk already."""
        begin = time.monotonic()
        before, state = self.record, f".journal-{done}.safetensors" if held else None
        with reporting_full_disk(self._folder, sum(tensor.nbytes for tensor in held.values())):
            if state is not None:
                save_file(held, self._folder / f"{state}.new")
                _settle(self._folder / f"{state}.new", self._folder / state)
            self.record = Record(_VERSION, self.settings, done, dict(written), facts, state)
            new = self._folder / f"{RECORD}.new"
            new.write_text(json.dumps(asdict(self.record)), encoding="utf-8")
            _settle(new, self._folder / RECORD)
        if before is not None and before.state not in (None, state):
            (self._folder / str(before.state)).unlink()
        self._since = time.monotonic()
        self._took = self._since - begin

    def held(self) -> dict[str, Tensor]:
        """The tensors of the record."""
        if self.record is None or self.record.state is None:
            return {}
        path = self._folder / self.record.state
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:
            raise UnfinishedError(f"{path}: cannot be read ({error}); remove {self._folder} to begin anew") from None

    def remove(self) -> None:
        """Forget all: the folder is whole, or is to be made anew."""
        for file in self._folder.glob(".journal*"):
            file.unlink()


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that can go on."""
    return (folder / RECORD).exists()


def digest(path: Path) -> str:
    """Of a file: its size, and all of its content or, where it is large, a mebibyte in each of 64 places and its header."""
    size = path.stat().st_size
    hashed = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            hashed.update(file.read())
        else:
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                hashed.update(file.read(_SAMPLE_BYTES))
    return hashed.hexdigest()


def model_digests(folder: Path, tensors: dict[str, TensorSpec]) -> dict[str, str]:
    """The digests of a model's config and shards, by file name."""
    return {
        file: digest(folder / file) for file in sorted({"config.json", *(spec.file for spec in tensors.values() if spec.file)})
    }


def _read(folder: Path) -> Record | None:
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        record = Record(**read_json(path))
    except (DuotoneError, TypeError):
        raise UnfinishedError(f"{path}: is no record of a run; remove {folder} to begin anew") from None
    if record.version != _VERSION:
        raise UnfinishedError(f"{path}: found version {record.version}, expected {_VERSION}; remove {folder} to begin anew")
    return record


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UnfinishedError that names the first setting that is not what it was."""
    for topic in dict.fromkeys((*before, *now)):
        old, new = before.get(topic, {}), now.get(topic, {})
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                raise UnfinishedError(
                    f"{folder}: the unfinished run had {topic} {name} {old.get(name)!r}, found {new.get(name)!r}, expected the "
                    f"same; begin anew by removing that folder"
                )


def _settle(new: Path, path: Path) -> None:
    """Give a file its name once its bytes are on the disk."""
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.rename(path)
