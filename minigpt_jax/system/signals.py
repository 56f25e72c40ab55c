"""Signals that ask the process to end."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def capture_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM in here are put on a list, for the loop to end well; the second one ends the process at once."""
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may say what becomes of signals
        return

    def note(number, frame):
        received.append(number)
        for name in before:
            signal.signal(name, signal.SIG_DFL)

    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    for name in before:
        signal.signal(name, note)
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
