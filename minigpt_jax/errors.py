"""The two ways in which what a user asks for can be wrong, and the way in which a signal ends it.

Everything that a user can get wrong ends in one of the first two, with a message of one line that says what was wrong and
what is allowed. The scripts print that line and exit with `exit_status`; Python callers get an ordinary ValueError.
"""

import difflib
from collections.abc import Collection, Iterable


class UsageError(ValueError):
    """The command or the call itself is wrong, whatever lies on the disk: an unknown flag, a width that does not divide."""

    exit_status = 2


class DataError(ValueError):
    """A file, a folder, a text or a run is not what the command needs: missing, damaged, too short, of another shape."""

    exit_status = 1


class StoppedError(Exception):
    """A signal asked for the end, and what was under way has been brought to a good one."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_status = 128 + signal_number  # as a shell has it


def require_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raises UsageError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UsageError(f"{name}={value!r}{did_you_mean(value, allowed)} must be one of: {', '.join(allowed)}")


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'rotary'?)` for the nearest of `allowed`, or nothing where none is near."""
    nearest = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
