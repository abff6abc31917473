"""Build the text corpus from pinned source distributions: download, verify, clean, deduplicate, split by file.

Nothing from a source distribution is executed or unpacked to disk: members are read in memory from the archive.
Usage: python train/corpus.py [--build train/build] [--relock]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cleaning import clean, drop_shared_paragraphs, wanted_kind
from index import fetch_sdist

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "calibration", "evaluation")
# A form feed never survives cleaning, so it can mark where one document ends and the next begins.
SEPARATOR = "\f\n"


@dataclass(frozen=True)
class Pin:
    """One pinned source distribution; `sha256` is that of the archive, `licence` its SPDX-like name."""

    name: str
    version: str
    sha256: str
    licence: str


@dataclass(frozen=True)
class Document:
    """One cleaned file; `path` is `<package>/<path inside the archive>`, without the version."""

    path: str
    text: str


class CorpusError(Exception):
    """A problem the user can act on, told in one sentence."""


def read_pins(path: Path) -> list[Pin]:
    """Read the pin list: one `name==version sha256 licence` per line, `#` starts a comment."""
    pins = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("#", 1)[0].split()
        if not fields:
            continue
        if len(fields) != 3 or fields[0].count("==") != 1 or len(fields[1]) != 64:
            raise CorpusError(f"{path.name} line {number} is not 'name==version sha256 licence'.")
        name, version = fields[0].split("==")
        pins.append(Pin(name, version, fields[1], fields[2]))
    return pins


def read_archive(pin: Pin, archive: Path) -> Iterator[Document]:
    """Yield the wanted, cleaned files of one archive, read member by member in memory."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if not member.isfile() or "/" not in member.name:
                continue
            path = f"{pin.name}/{member.name.split('/', 1)[1]}"
            if not wanted_kind(path, member.size):
                continue
            handle = tar.extractfile(member)
            text = clean(handle.read()) if handle else None
            if text is not None:
                yield Document(path, text)


def split_of(path: str) -> str:
    """Choose the split from a hash of the path, so that adding a package never moves another package's files."""
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100
    return "evaluation" if bucket >= 97 else "calibration" if bucket >= 94 else "train"


def load_documents(pins: list[Pin], build: Path) -> list[Document]:
    """Fetch every archive (cached under `build`) and return all documents, sorted by path, without duplicates."""
    documents: dict[str, Document] = {}
    seen: set[bytes] = set()
    for pin in pins:
        archive = fetch_sdist(pin.name, pin.version, pin.sha256, build / "sdists")
        for document in sorted(read_archive(pin, archive), key=lambda d: d.path):
            digest = hashlib.sha256(document.text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                documents[document.path] = document
    ordered = [documents[path] for path in sorted(documents)]
    texts = drop_shared_paragraphs([d.text for d in ordered])
    return [Document(d.path, text) for d, text in zip(ordered, texts, strict=True) if text is not None]


def write_splits(documents: list[Document], build: Path) -> dict[str, dict[str, int | str]]:
    """Write `<split>.txt` and `<split>.paths.json`; return files, bytes and sha256 per split."""
    lock: dict[str, dict[str, int | str]] = {}
    for split in SPLITS:
        chosen = [d for d in documents if split_of(d.path) == split]
        data = SEPARATOR.join(d.text for d in chosen).encode()
        (build / f"{split}.txt").write_bytes(data)
        (build / f"{split}.paths.json").write_text(json.dumps([d.path for d in chosen]), encoding="utf-8")
        lock[split] = {"files": len(chosen), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return lock


def read_split(build: Path, split: str) -> list[Document]:
    """Read one split back as documents; used by the training and export scripts."""
    source = build / f"{split}.txt"
    if not source.exists():
        raise CorpusError(f"{source} is missing: run 'python train/corpus.py' first.")
    texts = source.read_bytes().decode().split(SEPARATOR)
    paths = json.loads((build / f"{split}.paths.json").read_text(encoding="utf-8"))
    return [Document(path, text) for path, text in zip(paths, texts, strict=True)]


def main() -> int:
    """Build the three splits and check them against `corpus.lock.json`, or rewrite that file with --relock."""
    parser = argparse.ArgumentParser(description="Build the training corpus from pinned source distributions.")
    parser.add_argument("--build", type=Path, default=HERE / "build", help="output folder (default: train/build)")
    parser.add_argument("--relock", action="store_true", help="rewrite corpus.lock.json instead of checking it")
    arguments = parser.parse_args()
    arguments.build.mkdir(parents=True, exist_ok=True)
    lock_path = HERE / "corpus.lock.json"
    try:
        lock = write_splits(load_documents(read_pins(HERE / "corpus.txt"), arguments.build), arguments.build)
        for split, facts in lock.items():
            print(f"{split}: {facts['files']} files, {facts['bytes']} bytes")
        if arguments.relock or not lock_path.exists():
            lock_path.write_text(json.dumps(lock, indent=2) + "\n", encoding="utf-8")
        elif json.loads(lock_path.read_text(encoding="utf-8")) != lock:
            raise CorpusError("The splits differ from corpus.lock.json: the pins or the cleaning rules have changed.")
    except (CorpusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
