"""Handling of the signals that ask a process to stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from minigpt_jax.system import notebook

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, `kill`, and a terminal that is closed; Windows lacks the last


@contextlib.contextmanager
def capture_signals() -> Iterator[list[int]]:
    """Appends the signals that ask a process to stop to the yielded list, so that a loop can finish its step.

    A signal that is ignored, as by `nohup`, stays ignored. After the first SIGINT or SIGTERM another one ends the process at
    once; in a notebook it raises KeyboardInterrupt, and the kernel survives. SIGHUP never ends it, since the shell and the
    system each send one when a terminal is closed.
    """
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may install signal handlers
        return

    def handle(number, frame):
        received.append(number)
        if number in (signal.SIGINT, signal.SIGTERM):
            for other in before.keys() & {signal.SIGINT, signal.SIGTERM}:
                signal.signal(other, before[other] if notebook.is_active() else signal.SIG_DFL)

    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    # None stands for a handler that was not installed from Python and cannot be installed again.
    handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
