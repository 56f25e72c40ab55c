"""Counts and times what JAX compiles during a run."""

import collections
import logging
from collections.abc import Callable
from typing import Any

import jax

log = logging.getLogger(__name__)


class Compilations:
    """Records the programs that JAX compiles while this context is open: the name of each and the seconds it took.

    Programs loaded from the persistent compilation cache are included, and counted in `num_cached`. JAX reports both to
    listeners that are registered for the whole process.
    """

    def __init__(self):
        self.programs: list[tuple[str, float]] = []
        self.num_cached = 0
        self._pending = collections.defaultdict[str, float](float)  # seconds by program name, until it is compiled

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._note_duration)
        jax.monitoring.register_event_listener(self._note_event)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note_duration)
        jax.monitoring.unregister_event_listener(self._note_event)

    def _note_duration(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event.startswith("/jax/core/compile/"):  # tracing, lowering, then compiling or loading
            name = str(details.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
            self._pending[name] += duration_secs
            if event.endswith("/backend_compile_duration"):
                self.programs.append((name, self._pending[name]))
                self._pending.clear()  # functions traced inside this program are part of it

    def _note_event(self, event: str, **_) -> None:
        self.num_cached += event == "/jax/compilation_cache/cache_hits"

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.programs)

    def warn_on_recompilation(self, function: Callable) -> Callable:
        """Wraps a jitted function so that each recompilation logs a warning with the reason."""
        compiled_for = None

        def wrapper(*arguments, **static):
            nonlocal compiled_for
            before = len(self.programs)
            result = function(*arguments, **static)
            is_compiled = function.__name__ in {name for name, _ in self.programs[before:]}
            if is_compiled or compiled_for is None:
                types = jax.tree.map(jax.typeof, arguments)  # donated arguments still have theirs
                if compiled_for is not None:
                    log.warning("%s was recompiled: %s.", function.__name__, what_changed(compiled_for, types))
                compiled_for = types
            return result

        return wrapper


def what_changed(before: Any, now: Any) -> str:
    """Why a program was recompiled, as far as the types of its arguments show it. Both arguments are trees of types."""
    old_leaves, new_leaves = (jax.tree_util.tree_leaves_with_path(types) for types in (before, now))
    if [path for path, _ in old_leaves] != [path for path, _ in new_leaves]:
        return "the structure of its arguments changed"
    changes = [
        f"{jax.tree_util.keystr(path)} changed from {old} to {new}"
        for (path, old), (_, new) in zip(old_leaves, new_leaves, strict=True)
        if old != new
    ]
    more = f", and {len(changes) - 1} more" if len(changes) > 1 else ""
    return changes[0] + more if changes else "no argument type changed; set JAX_EXPLAIN_CACHE_MISSES=1 to see JAX's reason"
