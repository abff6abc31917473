"""The folder that a run works in, which becomes its output when it is whole.

It lies inside the output folder when that exists (it may be a mount point or a link), otherwise beside it, so that the last
step is a rename on one file system. It has one name for each output, so that a second run finds the first: at work, which it
may not disturb, or killed, whose work it may go on with. A run that is killed in the last step is put back to before it.
"""

import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from duotone.checkpoint.journal import RECORD, is_unfinished
from duotone.checkpoint.writer import reporting_full_disk
from duotone.errors import DuotoneError, UnfinishedError

_LOCK = ".lock"
#: Lists the files that are being moved into an output folder which was there before.
_MOVING = ".moving"


@contextmanager
def output_folder(out: Path, resume: bool = False) -> Generator[Path]:
    """A staging folder whose content becomes that of `out` when the work ends well.

    When it does not, the folder vanishes, unless the work has been saved (journal.py): then it stays, and the error says so.
    resume: take up such a folder. Raises DuotoneError when `out` is not an empty folder, cannot be made, or another process is
    at work on it, and for unfinished work that is not to be taken up.
    """
    check_output(out)
    staging, final = staging_of(out), out.resolve()
    with reporting_full_disk(out):
        if (final / RECORD).exists() and not staging.exists():
            final.rename(staging)
        staging.mkdir(parents=True, exist_ok=True)
    with _held(out, staging):
        if is_unfinished(staging) and not resume:
            raise UnfinishedError(
                f"{out}: found an unfinished run in {staging}, expected none: go on with it by --resume, or remove that folder"
            )
        with reporting_full_disk(out):
            _put_back(staging, final)
            if not is_unfinished(staging):
                _clear(staging)
        try:
            yield staging
        except UnfinishedError:
            raise
        except BaseException as error:
            if not is_unfinished(staging):
                shutil.rmtree(staging, ignore_errors=True)
            elif isinstance(error, DuotoneError):
                raise DuotoneError(f"{error} (what was done is kept in {staging}: --resume goes on with it)") from error
            raise
        with reporting_full_disk(out):
            _become(staging, final)


def staging_of(out: Path) -> Path:
    """Where the work on an output is done."""
    final = out.resolve()
    inside = final.is_dir() and not (final / RECORD).exists()
    return (final if inside else final.parent) / f".{final.name}.partial"


def check_output(out: Path) -> None:
    """Raise DuotoneError unless `out` is absent or a folder that holds nothing but unfinished work."""
    with reporting_full_disk(out):  # a name the file system refuses is found here too
        exists = out.exists()
        staging = staging_of(out)
        ours = {staging.name, *_moving(staging)}
        empty = not exists or (out.is_dir() and ((out / RECORD).exists() or all(file.name in ours for file in out.iterdir())))
    if exists and not out.is_dir():
        raise DuotoneError(f"{out}: is a file, expected a folder to write to, or none yet")
    if not empty:
        raise DuotoneError(f"{out}: the output folder is not empty, expected a new or empty one")


@contextmanager
def _held(out: Path, staging: Path) -> Generator[None]:
    """Nobody else works in the folder meanwhile; a process that is killed lets go of it."""
    with reporting_full_disk(out):
        lock = (staging / _LOCK).open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnfinishedError(f"{out}: another process is writing to it, in {staging}; expected to be alone") from None
        yield


def _clear(staging: Path) -> None:
    """Remove what a run left that was killed before it had saved anything."""
    for file in staging.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif file.name != _LOCK:
            file.unlink()


def _become(staging: Path, final: Path) -> None:
    """The content of one folder as that of another. The record goes last: until then this can be put back."""
    if not final.exists():
        os.rename(staging, final)  # noqa: PTH104 - one step
        for file in _hidden(final):
            file.unlink()
        return
    hidden = _hidden(staging)
    files = sorted(file for file in staging.iterdir() if file not in hidden)
    (staging / _MOVING).write_text("\n".join(file.name for file in files), encoding="utf-8")
    for file in files:
        file.rename(final / file.name)
    shutil.rmtree(staging)


def _put_back(staging: Path, final: Path) -> None:
    for name in _moving(staging):
        if (final / name).exists():
            (final / name).rename(staging / name)
    (staging / _MOVING).unlink(missing_ok=True)


def _moving(staging: Path) -> list[str]:
    path = staging / _MOVING
    return path.read_text(encoding="utf-8").split("\n") if path.exists() else []


def _hidden(folder: Path) -> list[Path]:
    """What is there for this module and the journal alone, the record last."""
    found = [file for file in folder.iterdir() if file.name in (_LOCK, RECORD) or file.name.startswith(".journal-")]
    return sorted(found, key=lambda file: file.name == RECORD)
