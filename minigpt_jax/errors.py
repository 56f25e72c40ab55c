"""Exceptions for user errors, and for stopping on a signal.

Every user error raises UsageError or DataError, with a one-line message that says what is wrong and what is allowed. The
scripts print that line and exit with `exit_status`; Python callers get an ordinary ValueError.
"""

import difflib
import os
import re
from collections.abc import Collection, Iterable


class OneLineError(Exception):
    """Notebooks show the message of such an exception without a traceback."""

    def _render_traceback_(self) -> list[str]:  # called by IPython
        return [f"{type(self).__name__}: {self}"]


class UsageError(OneLineError, ValueError):
    """The command or call itself is invalid, whatever the files contain: an unknown flag, an indivisible width."""

    exit_status = 2


class DataError(OneLineError, ValueError):
    """A file, folder, text or run cannot be used: it is missing, corrupt, too short or has the wrong shape."""

    exit_status = 1


class StoppedError(OneLineError):
    """Raised after SIGINT or SIGTERM, once the step is checkpointed."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_status = 128 + signal_number  # as in a shell


def require_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raises UsageError if `value` is not one of `allowed`."""
    if value not in allowed:
        raise UsageError(f"{name}={value!r}{did_you_mean(value, allowed)} must be one of: {', '.join(allowed)}")


def require_local(path: str | os.PathLike) -> None:
    """Raises UsageError for a remote address: `gs://bucket/run`, or what `Path` makes of it, `gs:/bucket/run`.

    One letter before the colon is a drive of Windows.
    """
    if match := re.match(r"([A-Za-z][\w+.-]+):[/\\]+", os.fspath(path)):
        address = f"{match[1]}:{'///' if match[1] == 'file' else '//'}{os.fspath(path)[match.end() :]}"
        raise UsageError(
            f"{address} is an address, not a path: use a folder or file of this machine, and copy it from or to there"
        )


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'rotary'?)` with the closest match in `allowed`, or an empty string if nothing is close."""
    matches = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
