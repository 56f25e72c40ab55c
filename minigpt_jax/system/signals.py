"""Handling of the signals that ask a process to stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from minigpt_jax.system import notebook


@contextlib.contextmanager
def capture_signals() -> Iterator[list[int]]:
    """Appends SIGINT (Ctrl-C) and SIGTERM to the yielded list, so that a loop can finish its step.

    A second signal ends the process at once. In a notebook it raises KeyboardInterrupt, and the kernel survives.
    """
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may install signal handlers
        return

    def handle(number, frame):
        received.append(number)
        for name, handler in before.items():
            signal.signal(name, handler if notebook.is_active() else signal.SIG_DFL)

    # None stands for a handler that was not installed from Python and cannot be installed again.
    before = {name: signal.getsignal(name) or signal.SIG_DFL for name in (signal.SIGINT, signal.SIGTERM)}
    for name in before:
        signal.signal(name, handle)
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
