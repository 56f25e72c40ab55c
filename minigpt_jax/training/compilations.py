"""What JAX compiles in a run."""

import collections
import logging
from collections.abc import Callable
from typing import Any

import jax

log = logging.getLogger(__name__)


class Compilations:
    """What JAX compiles while this is open: the name of each program and the seconds that it took to get it.

    `num_found` of them came from the cache of an earlier process. JAX tells of it through listeners of the whole process.
    """

    def __init__(self):
        self.programs: list[tuple[str, float]] = []
        self.num_found = 0
        self._pending = collections.defaultdict[str, float](float)  # seconds by program, until it is compiled

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._note_duration)
        jax.monitoring.register_event_listener(self._note_event)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note_duration)
        jax.monitoring.unregister_event_listener(self._note_event)

    def _note_duration(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event.startswith("/jax/core/compile/"):  # tracing, lowering, and then compiling or finding
            name = str(details.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
            self._pending[name] += duration_secs
            if event.endswith("/backend_compile_duration"):
                self.programs.append((name, self._pending[name]))
                self._pending.clear()  # what was traced inside of it is part of it

    def _note_event(self, event: str, **_) -> None:
        self.num_found += event == "/jax/compilation_cache/cache_hits"

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.programs)

    def expect_one(self, function: Callable) -> Callable:
        """The jitted function, which warns where it is compiled more than once, and says why."""
        compiled_for = None

        def watched(*arguments, **static):
            nonlocal compiled_for
            before = len(self.programs)
            result = function(*arguments, **static)
            is_compiled = function.__name__ in {name for name, _ in self.programs[before:]}
            if is_compiled or compiled_for is None:
                types = jax.tree.map(jax.typeof, arguments)  # which donated arguments still have
                if compiled_for is not None:
                    log.warning("%s was compiled again: %s.", function.__name__, what_changed(compiled_for, types))
                compiled_for = types
            return result

        return watched


def what_changed(before: Any, now: Any) -> str:
    """Why a program is compiled again, as far as the reason is in the types of its arguments (trees of them)."""
    leaves, others = (jax.tree_util.tree_leaves_with_path(types) for types in (before, now))
    if [path for path, _ in leaves] != [path for path, _ in others]:
        return "its arguments have other parts"
    changes = [
        f"{jax.tree_util.keystr(path)} was {was} and is {kind}"
        for (path, was), (_, kind) in zip(leaves, others, strict=True)
        if was != kind
    ]
    more = f", and {len(changes) - 1} more" if len(changes) > 1 else ""
    return changes[0] + more if changes else "no type has changed; JAX_EXPLAIN_CACHE_MISSES=1 lets JAX tell its reason"
