"""Log lines on standard error."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from tqdm import tqdm

PROJECT_LOG = logging.getLogger("minigpt_jax")


class LogHandler(logging.Handler):
    """Writes plain lines to standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage(), file=sys.stderr)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Shows the project's log lines in here, unless the program has set up logging itself.

    A plain stream handler of warnings does not count: Orbax and Colab install one.
    """
    others = [handler for handler in logging.root.handlers if type(handler) is not logging.StreamHandler]
    if others or PROJECT_LOG.level != logging.NOTSET or PROJECT_LOG.isEnabledFor(logging.INFO):
        yield
        return
    handler = LogHandler()
    PROJECT_LOG.addHandler(handler)
    PROJECT_LOG.setLevel(logging.INFO)
    PROJECT_LOG.propagate = False
    try:
        yield
    finally:
        PROJECT_LOG.removeHandler(handler)
        PROJECT_LOG.setLevel(logging.NOTSET)
        PROJECT_LOG.propagate = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the project's log lines in here, but for errors: for work that has been logged before."""
    level = PROJECT_LOG.level
    PROJECT_LOG.setLevel(logging.ERROR)
    try:
        yield
    finally:
        PROJECT_LOG.setLevel(level)
