"""The one error that commands and the daemon show to people: a line, never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """`str()` is one line that says what is wrong and what to do."""


def one_line(error: BaseException) -> str:
    """Whatever an error has to say, on one line. Errors of the system name their file."""
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        text = f"{error.strerror}{place}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
