"""The one exception a user meets: a sentence that names the file or layer, what was found and what was expected."""

import re


class DuotoneError(Exception):
    """Bad input or an impossible request. The command line prints the sentence and exits with 2."""


class UnfinishedError(DuotoneError):
    """An unfinished run that cannot go on as asked. It is left as it is."""


class ToldError(DuotoneError):
    """An error that follows from one that another process of the same run has told the user about."""


def gist(error: BaseException) -> str:
    """Another's error in a line: its kind and the first line of what it says.

    Of a compiler's that begins with a place in a program, as Triton's do, the last line of what caused it.
    """
    told: BaseException = error
    while told.__cause__ is not None and _is_place(told):
        told = told.__cause__
    lines = str(told).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[-1 if _is_place(told) else 0]}"


def _is_place(error: BaseException) -> bool:
    return re.match(r"at \d+:\d+:", str(error)) is not None
