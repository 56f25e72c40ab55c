"""Handling of the signals that ask a process to stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def capture_signals() -> Iterator[list[int]]:
    """Appends SIGINT (Ctrl-C) and SIGTERM to the yielded list, so that a loop can finish its step. A second signal
    ends the process at once."""
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may install signal handlers
        return

    def handle(number, frame):
        received.append(number)
        for name in before:
            signal.signal(name, signal.SIG_DFL)

    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    for name in before:
        signal.signal(name, handle)
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
