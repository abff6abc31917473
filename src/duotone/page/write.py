"""A report in a file: html, md, png or json, there as a whole or not at all."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from duotone.checkpoint.writer import reporting_full_disk
from duotone.errors import DuotoneError
from duotone.page.facts import Facts
from duotone.page.html import write_html
from duotone.page.markdown import write_markdown
from duotone.page.png import check_png, write_png

FORMATS = ("html", "md", "png", "json")


def report_path(model: str, out: Path | None, kind: str) -> Path:
    """Where a report goes: `out`, else report.KIND in the checkpoint, or in the working folder for a hub id.

    Raises DuotoneError, before any work, for a format that is not known or cannot be drawn here, and for a folder that is not
    there.
    """
    if kind not in FORMATS:
        raise DuotoneError(f"--format: found {kind!r}, expected one of {', '.join(FORMATS)}")
    if kind == "png":
        check_png()
    path = out or (Path(model) if Path(model).is_dir() else Path()) / f"report.{kind}"
    check_place(path, "--out")
    return path


def check_place(path: Path, option: str) -> None:
    """Raise DuotoneError where a file cannot be written to: in a folder's place, or into one that is not there."""
    if path.is_dir():
        raise DuotoneError(f"{option}: {path} is a folder, expected a file to write")
    if not path.parent.is_dir():
        raise DuotoneError(f"{option}: found no folder {path.parent}, expected one to write {path.name} to")


def write_report(facts: Facts, path: Path, kind: str) -> None:
    """Write a report in the place of one before. Raises DuotoneError for a full disk."""
    write_whole_file(path, partial(write_png, facts) if kind == "png" else _text(facts, kind))


def write_whole_file(path: Path, content: str | Callable[[Path], None]) -> None:
    """A text, or what a function writes to the path it is given: there as a whole, or what was there before."""
    new = path.with_name(f"{path.name}.new")
    try:
        with reporting_full_disk(path.parent):
            if isinstance(content, str):
                new.write_text(content, encoding="utf-8")
            else:
                content(new)
            new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _text(facts: Facts, kind: str) -> str:
    if kind == "html":
        return write_html(facts)
    return write_markdown(facts) if kind == "md" else json.dumps(facts.to_json(), indent=1, allow_nan=False) + "\n"
