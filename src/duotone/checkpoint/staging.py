"""The folder that a run works in, which becomes its output when it is whole.

It lies inside the output folder when that exists (it may be a mount point or a link), otherwise beside it, so that the last
step is a rename on one file system. It has one name for each output, so that a second run finds the first: at work, which it
may not disturb, or killed, whose work it may go on with. A run that is killed in the last step is put back to before it: what
is there for that goes last, the record behind all else but the lock.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from duotone.checkpoint.journal import is_unfinished, journal_files, write_whole
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
    staging, final = staging_of(out), _resolved(out)
    place = final if is_unfinished(final) else staging  # the former where the last step was cut short
    with reporting_full_disk(out):
        place.mkdir(parents=True, exist_ok=True)
    with _held(out, place):
        if is_unfinished(place) and not resume:
            raise UnfinishedError(
                f"{out}: found an unfinished run in {place}, expected none: go on with it by --resume, or remove that folder"
            )
        with reporting_full_disk(out):
            if place != staging:
                place.rename(staging)
            _put_back(staging, final)
            if not is_unfinished(staging):
                _clear(staging)
        try:
            yield staging
            with reporting_full_disk(out):
                _become(out, staging, final)
        except UnfinishedError:
            raise
        except BaseException as error:
            if not is_unfinished(staging):
                shutil.rmtree(staging, ignore_errors=True)
            elif isinstance(error, DuotoneError):
                raise DuotoneError(f"{error} (what was done is kept in {staging}: --resume goes on with it)") from error
            raise


def staging_of(out: Path) -> Path:
    """Where the work on an output is done."""
    final = _resolved(out)
    return (final if final.is_dir() and not is_unfinished(final) else final.parent) / _name(final)


def check_output(out: Path) -> None:
    """Raise DuotoneError unless `out` is absent or a folder that holds nothing but unfinished work."""
    with reporting_full_disk(out):  # a name the file system refuses is found here too
        exists, staging = out.exists(), staging_of(out)
        final = _resolved(out)
        if exists and not out.is_dir():
            raise DuotoneError(f"{out}: is a file, expected a folder to write to, or none yet")
        if exists and not is_unfinished(final):
            _forget_finished(final, staging)
            ours = {staging.name, *_moving(staging)}
            if any(file.name not in ours for file in final.iterdir()):
                raise DuotoneError(f"{out}: the output folder is not empty, expected a new or empty one")
            beside = final.parent / _name(final)
            if is_unfinished(beside):
                raise UnfinishedError(
                    f"{out}: found an unfinished run in {beside}, made for a folder that was not there: remove {out}"
                )
        if staging.is_symlink() or (staging.exists() and not _is_ours(staging)):
            raise DuotoneError(f"{staging}: is in the way, expected nothing there or an unfinished run")


def _name(final: Path) -> str:
    return f".{final.name}.partial"


def _resolved(out: Path) -> Path:
    try:
        return out.resolve()
    except RuntimeError:  # what Python 3.11 calls a link that leads to itself
        raise DuotoneError(f"{out}: is a link that leads nowhere, expected a folder to write to") from None


def _is_ours(staging: Path) -> bool:
    """Whether a folder in the staging's place is one: it has the lock, or nothing yet."""
    return staging.is_dir() and ((staging / _LOCK).exists() or not any(staging.iterdir()))


@contextmanager
def _held(out: Path, folder: Path) -> Generator[None]:
    """Nobody else works in the folder meanwhile; a process that is killed lets go of it."""
    path = folder / _LOCK
    try:
        with reporting_full_disk(out):
            lock = path.open("a")
    except DuotoneError:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnfinishedError(f"{out}: another process is writing to it, in {folder}; expected to be alone") from None
        except OSError as error:
            raise DuotoneError(f"{path}: this file system has no locks ({error.strerror}); write to another one") from None
        if not path.exists() or os.fstat(lock.fileno()).st_ino != path.stat().st_ino:
            raise UnfinishedError(f"{out}: another process has just ended its work on it; look at what is there and try again")
        yield


def _clear(staging: Path) -> None:
    """Remove what a run left that was killed before it had saved anything."""
    for file in staging.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif file.name != _LOCK:
            file.unlink()


def _become(out: Path, staging: Path, final: Path) -> None:
    """The content of one folder as that of another."""
    private = {*journal_files(staging), staging / _LOCK, staging / _MOVING}
    if staging.parent != final:
        staging.rename(final)  # refused where something has come to be there meanwhile
        staging = final
    else:
        strangers = sorted(file.name for file in final.iterdir() if file != staging)
        if strangers:
            raise DuotoneError(
                f"{out}: found {strangers[0]}, which was not there when the work began, expected an empty folder"
            )
        files = sorted(file.name for file in staging.iterdir() if file not in private)
        write_whole(staging / _MOVING, json.dumps(files))
        for name in files:
            (staging / name).rename(final / name)
    _forget(staging, keep_folder=staging == final)


def _forget(folder: Path, keep_folder: bool) -> None:
    """Remove what was there for this module and the journal; whenever this is cut short, it can be put back or done again."""
    for file in (*journal_files(folder), folder / _MOVING, folder / _LOCK):
        file.unlink(missing_ok=True)
    if not keep_folder:
        folder.rmdir()


def _forget_finished(final: Path, staging: Path) -> None:
    """What a run left that was killed when its work was done and only the lock or the list of moves was still there."""
    if (final / _LOCK).exists():
        with _held(final, final):
            _forget(final, keep_folder=True)
    left = {file.name for file in staging.iterdir()} if staging.is_dir() and staging.parent == final else None
    if left is not None and left <= {_LOCK, _MOVING} and any(file != staging for file in final.iterdir()):
        _forget(staging, keep_folder=False)


def _put_back(staging: Path, final: Path) -> None:
    for name in _moving(staging):
        if (final / name).exists():
            (final / name).rename(staging / name)
    (staging / _MOVING).unlink(missing_ok=True)


def _moving(staging: Path) -> list[str]:
    path = staging / _MOVING
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() and is_unfinished(staging) else []
