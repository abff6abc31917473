# safetensors is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What an unfinished run has done, in the folder that it is making, so that a run that was killed goes on where it stood.

A save puts the tensors that the run is holding into a file of their own, then a record that names it in the place of the one
before: at any moment there is one whole record or none. What was put into shards before the record is as it says, by hash; what
was put there after it is written once more, with the same bytes. The last record says that all is done and names no tensors.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from duotone.checkpoint.headers import TORCH_NAMES, TensorSpec, encode_header
from duotone.checkpoint.source import read_json
from duotone.checkpoint.writer import content_hash, reporting_full_disk
from duotone.errors import DuotoneError, UnfinishedError

#: All files of this module begin with the record's name.
RECORD = ".journal"
_VERSION = 1
#: A save may take a tenth of the time.
_SHARE = 10.0
#: Of a file, for its digest: all of it, or so many bytes in so many places.
_WHOLE_BYTES, _SAMPLE_BYTES, _SAMPLES = 256 * 2**20, 2**20, 64
_PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Record:
    """One save. settings: what the run was asked to do, by topic and name. done: its steps behind it.

    written: of each tensor in the shards the hash of its bytes. facts: what else it knows. state, state_hash: the file of the
    tensors that it held, if it held any.
    """

    version: int
    settings: dict[str, Any]
    done: int
    written: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    state: str | None = None
    state_hash: str | None = None


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
        self._forget_all_but_the_record()
        self._since, self._took = time.monotonic(), 0.0

    def is_due(self) -> bool:
        """Whether so much work has been done since the last save that the next pays."""
        return not self._every or time.monotonic() - self._since >= max(self._every, _SHARE * self._took)

    def save(self, done: int, written: dict[str, str], facts: dict[str, Any], held: dict[str, Tensor] | None = None) -> None:
        """Make all that was done so far last. The shards' bytes must be on the disk already."""
        begin = time.monotonic()
        state, state_hash = (f"{RECORD}-{done}.safetensors", "") if held else (None, None)
        with reporting_full_disk(self._folder, sum(tensor.nbytes for tensor in held.values()) if held else None):
            if held and state is not None:
                state_hash = _write_tensors(self._folder / state, held)
            self.record = Record(_VERSION, self.settings, done, dict(written), facts, state, state_hash)
            text = json.dumps(asdict(self.record))
            write_whole(self._folder / RECORD, json.dumps({"hash": content_hash(text.encode()), "record": text}))
            self._forget_all_but_the_record()
        self._since = time.monotonic()
        self._took = self._since - begin

    def held(self) -> dict[str, Tensor]:
        """The tensors of the record. Raises UnfinishedError when they are not what they were."""
        if self.record is None or self.record.state is None:
            return {}
        path = self._folder / self.record.state
        try:
            if _hash_of_file(path) != self.record.state_hash:
                raise UnfinishedError(f"{path}: is not what the unfinished run wrote; remove {self._folder} to begin anew")
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except OSError as error:
            raise UnfinishedError(f"{path}: cannot be read ({error.strerror}); remove {self._folder} to begin anew") from None

    def _forget_all_but_the_record(self) -> None:
        keep = {RECORD, self.record.state if self.record else None}
        for file in journal_files(self._folder):
            if file.name not in keep:
                file.unlink()


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that can go on."""
    return (folder / RECORD).exists()


def journal_files(folder: Path) -> list[Path]:
    """All that this module has written in a folder, the record last."""
    return sorted(folder.glob(f"{RECORD}*"), key=lambda file: (file.name == RECORD, file.name))


def write_whole(path: Path, text: str) -> None:
    """A file that is there with all of its content, or as it was."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.rename(path)


def digest(path: Path) -> str:
    """Of a file: its size, and all of its content or, where it is large, a mebibyte in each of 64 places, both ends too."""
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


def model_digests(folder: Path, tensors: dict[str, TensorSpec], companions: Iterable[Path]) -> dict[str, str]:
    """The digests of a model's config, shards and what travels along, by file name."""
    files = {folder / "config.json", *(folder / spec.file for spec in tensors.values() if spec.file), *companions}
    return {str(file.relative_to(folder)): digest(file) for file in sorted(files)}


def _read(folder: Path) -> Record | None:
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        outer = read_json(path)
        text = str(outer["record"])
        if content_hash(text.encode()) != outer["hash"]:
            raise KeyError
        record = Record(**json.loads(text))
    except (DuotoneError, TypeError, ValueError, KeyError):
        raise UnfinishedError(f"{path}: is no record of a run; remove {folder} to begin anew") from None
    if record.version != _VERSION:
        raise UnfinishedError(f"{path}: found version {record.version}, expected {_VERSION}; remove {folder} to begin anew")
    return record


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UnfinishedError that names the first setting that is not what it was."""
    for what, old, new in differences(before, now):
        raise UnfinishedError(
            f"{folder}: the unfinished run had {what} {old!r}, found {new!r}, expected the same; begin anew by "
            "removing that folder"
        )


def differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The settings, by topic and name, that two runs do not have in common: what they are called, and both values."""
    for topic in dict.fromkeys((*one, *other)):
        old, new = one.get(topic, {}), other.get(topic, {})
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                yield f"{topic} {name}", old.get(name), new.get(name)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """A safetensors file, one tensor after the other; returns the hash of its bytes."""
    specs = {name: TensorSpec(TORCH_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, offsets = encode_header(specs)
    hashed, new = hashlib.blake2b(header, digest_size=16), path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(header)
        for name in sorted(offsets, key=lambda name: offsets[name]):
            data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            hashed.update(data)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    return hashed.hexdigest()


def _hash_of_file(path: Path) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            hashed.update(piece)
    return hashed.hexdigest()
