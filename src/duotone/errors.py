"""The one exception a user meets: a sentence that names the file or layer, what was found and what was expected."""


class DuotoneError(Exception):
    """Bad input or an impossible request. The command line prints the sentence and exits with 2."""


class UnfinishedError(DuotoneError):
    """An unfinished run that cannot go on as asked. It is left as it is."""


class ToldError(DuotoneError):
    """An error that follows from one that another process of the same run has told the user about."""
