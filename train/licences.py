"""Write LICENSES.md: whose text the model was trained on, whose text ships with it, and under which terms."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

from corpus import CorpusError, Pin

LICENCE_FILE = re.compile(r"[^/]+/((licen[sc]e|copying)(\.(txt|rst|md))?|licen[sc]e/licen[sc]e)$", re.IGNORECASE)
COPYRIGHT = re.compile(r"\W*((?:Copyright|COPYRIGHT)(?: ?\([cC]\)| ©| \d{4}).*)")


def licence_text(pin: Pin, build: Path) -> str:
    """Return the licence file of one package, read from its pinned archive."""
    archive = build / "sdists" / f"{pin.name}-{pin.version}.tar.gz"
    found: dict[str, str] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.isfile() and LICENCE_FILE.fullmatch(member.name):
                handle = tar.extractfile(member)
                if handle:
                    found[member.name] = handle.read().decode("utf-8", "replace").replace("\r\n", "\n").strip()
    # A file named LICENSE sorts after COPYING and is the full text where a package has both.
    if not found:
        raise CorpusError(f"{archive.name} holds no licence file, so its text may not be used.")
    return found[max(found)]


def copyright_lines(text: str) -> list[str]:
    """Return the copyright notices of a licence text, in order and without repeats."""
    lines = [m.group(1).strip() for m in map(COPYRIGHT.fullmatch, text.split("\n")) if m]
    return list(dict.fromkeys(lines))


def package_of(path: str) -> str:
    """Return the package a document path begins with."""
    return path.split("/", 1)[0]


def render_licences(pins: list[Pin], build: Path, shipped: dict[str, list[str]], trained: list[str]) -> str:
    """Return LICENSES.md; `shipped` maps each shipped text to its document paths, `trained` lists training paths."""
    used = {package_of(p) for p in trained} | {package_of(p) for paths in shipped.values() for p in paths}
    pins = [pin for pin in pins if pin.name in used]
    parts = [
        "# Licences of the texts\n",
        "Written by `train/licences.py`. The model was trained on text from the source distributions below. "
        "`calibration.txt` and `evaluation.txt` contain whole files from some of them, lightly cleaned (tables of "
        "numbers, very long lines and repeated paragraphs removed). Each text stays under its own package's licence; "
        "the licence texts follow.\n",
        "| Package | Version | Licence | Files: training | " + " | ".join(shipped) + " |",
        "|---|---|---|---|" + "---|" * len(shipped),
    ]
    for pin in pins:
        counts = [sum(package_of(p) == pin.name for p in paths) for paths in (trained, *shipped.values())]
        parts.append(f"| {pin.name} | {pin.version} | {pin.licence} | " + " | ".join(map(str, counts)) + " |")
    for text, paths in shipped.items():
        parts.append(f"\n## Files in {text}\n\nIn the order of the text.\n")
        parts.extend(f"- `{path}`" for path in paths)
    for pin in pins:
        text = licence_text(pin, build)
        parts.append(f"\n## {pin.name} {pin.version} ({pin.licence})\n")
        notices = copyright_lines(text) or ["Copyright as stated in the licence, else by the project's contributors"]
        parts.extend(f"- {line}" for line in notices)
        # Indented, so that no licence text is taken for Markdown.
        parts.append("\n" + "\n".join(f"    {line}".rstrip() for line in text.split("\n")))
    return "\n".join(parts) + "\n"
