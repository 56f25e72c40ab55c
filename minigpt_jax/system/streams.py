"""Standard input, output and error that may be missing, closed, full, or in an encoding that lacks some characters."""

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)


class Stream:
    """Wraps an output stream. Characters that its encoding lacks are escaped: `\\u6f22`.

    The first write that fails calls `on_error`. Later writes are tried too, since a full disk may be emptied, but their
    failures are ignored. A stream that is None, as in a program without a console, fails too.
    """

    def __init__(self, stream: Any, on_error: Callable[[OSError], None]):
        self.stream, self.on_error = stream, on_error
        self.error: OSError | None = None  # the first one

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.attempt("write", text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            self.attempt("flush")

    def attempt(self, method: str, *arguments: str) -> None:
        try:
            if self.stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            getattr(self.stream, method)(*arguments)
        except Exception as error:  # ValueError: closed by the program; a program's own stream may raise anything
            if self.error is None:
                self.error = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
                self.on_error(self.error)

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except (ValueError, AttributeError):  # closed, or an object that can only write
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def fail(error: OSError) -> None:
    raise error


def ignore(error: OSError) -> None:
    """For logs, whose loss cannot even be logged."""


def warn(error: OSError) -> None:
    log.warning("Continuing without samples, since standard output cannot be written: %s.", error.strerror or error)


@contextlib.contextmanager
def optional() -> Iterator[None]:
    """In here, standard output and standard error can be written to whatever happens to them: training must not stop when
    nobody listens any more."""
    with contextlib.redirect_stdout(Stream(sys.stdout, warn)), contextlib.redirect_stderr(Stream(sys.stderr, ignore)):  # pyright: ignore[reportArgumentType]
        yield


@contextlib.contextmanager
def of_command() -> Iterator[Stream]:
    """The standard streams of a process that runs a command; yields its output, whose first failure is raised.

    Lost logs are ignored. Input that is missing is empty, and bytes that are not text become unpaired surrogates, which
    tokenizers refuse, instead of an exception that loses the lines around them.
    """
    for descriptor in range(3):  # a file opened later must not get these numbers: C libraries write messages to 2
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    output, errors = Stream(sys.stdout, fail), Stream(sys.stderr, ignore)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):  # pyright: ignore[reportArgumentType]
            yield output
    finally:
        for stream in (output, errors):
            if stream.error is not None:
                discard_rest(stream.stream)


def discard_rest(stream: Any) -> None:
    """Makes Python's own attempt to write the rest at exit succeed. It would print an error and change the exit status."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
