"""Where the time of a run went: compilations, the rate in the model, and the operations that took longest."""

import collections
import dataclasses
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from minigpt_jax.config import ModelConfig
from minigpt_jax.training.metrics import Clock

log = logging.getLogger(__name__)


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations of training on a token that no implementation can do without.

    Six for each weight that it is multiplied with, two forward and four backward (Kaplan et al. 2020, section 2.1), and as
    many for each pair of features in the scores and sums of causal attention, which looks at half of the context on average.
    """
    D, F, kv = config.embed_dim, config.ff_dim, config.kv_heads * config.head_size
    block = 2 * D * D + 2 * D * kv + (3 if config.activation == "swiglu" else 2) * D * F
    return 6.0 * (config.num_layers * (block + D * config.context_length) + D * config.vocab_size)


class Compilations:
    """What JAX compiles while this is open: the name of each program and the seconds that it took to get it.

    `num_found` of them came from the cache of an earlier process. JAX tells of it through listeners of the whole process.
    """

    def __init__(self):
        self.programs: list[tuple[str, float]] = []
        self.num_found = 0
        self._pending = collections.Counter()  # seconds by program, until it is compiled

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._note_duration)
        jax.monitoring.register_event_listener(self._note_event)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note_duration)
        jax.monitoring.unregister_event_listener(self._note_event)

    def _note_duration(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event.startswith("/jax/core/compile/"):  # tracing, lowering, and then compiling or finding
            name = fun_name.removeprefix("jit(").removesuffix(")")
            self._pending[name] += seconds
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
                    log.warning("%s was compiled anew: %s.", function.__name__, what_changed(compiled_for, types))
                compiled_for = types
            return result

        return watched


def what_changed(before: Any, now: Any) -> str:
    """The reason for which a program is compiled anew, as far as it lies in the types of its arguments (trees of them)."""
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


class Trace:
    """A profile of five steps, or of those that are left, in a folder: for Perfetto, TensorBoard and XProf."""

    def __init__(self, folder: Path, step_before: int, last_step: int):
        self.folder = folder
        first = min(step_before + 6, last_step)  # the first steps still warm up
        self.planned = range(first, min(first + 5, last_step + 1))
        self.num_steps = 0  # traced so far
        self.is_running = False

    def step_begins(self, step: int, clock: Clock, state: Any) -> None:
        """Begins or ends the trace before this step, once the steps up to `state` are done; not on the clock."""
        if step == self.planned.start:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a million calls of Python's would slow down the steps and the reading
            with clock.stopped(state):
                jax.profiler.start_trace(self.folder, profiler_options=options)
            self.is_running = True
        elif step == self.planned.stop:
            with clock.stopped(state):
                self.end()
        self.num_steps += self.is_running

    def end(self) -> None:
        """Writes the profile, unless that has been done. Where it cannot be written that is logged, and the run goes on."""
        if self.is_running:
            self.is_running = False
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:
                self.num_steps = 0
                log.warning("No profile could be written to %s: %s", self.folder, str(error).splitlines()[0])

    def report(self, compiled_text: str) -> None:
        """Logs the ten operations that took longest, from the text of the compiled step, if any step was traced."""
        if not self.num_steps:
            return
        found = operations(self.folder, compiled_text, self.num_steps)
        log.info("The ten operations that took longest, those of all layers together:\n    ms/step   share")
        for operation in found[:10]:
            log.info("%11.2f%8.1f%%   %s", operation.milliseconds, 100 * operation.share, operation.name)
        log.info("A trace for https://ui.perfetto.dev (*.trace.json.gz) and XProf is in %s.", self.folder)


@dataclasses.dataclass(frozen=True)
class Operation:
    """What the equal operations of all layers took together."""

    name: str
    milliseconds: float  # a step
    share: float  # of all operations


def operations(trace_dir: Path, compiled_text: str, num_steps: int) -> list[Operation]:
    """From a trace of `num_steps` runs of a compiled program: what it spent on each operation, the longest first.

    Names are the model's own, as the compiled program keeps them for each of its instructions.
    """
    [*_, path] = sorted(trace_dir.rglob("*.xplane.pb"))
    names = operation_names(compiled_text)
    module = re.match(r"HloModule ([\w.-]+)", compiled_text)[1]  # other programs have instructions of the same names
    nanoseconds = collections.Counter()
    with warnings.catch_warnings():
        # Python 3.13 warns of how the profile's types are made, which ends the process where warnings are errors.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    # On a CPU events are called as the instructions, on a device as its kernels.
                    if event.name not in names and not plane.name.startswith("/device:"):
                        continue
                    stats = dict(event.stats)
                    name = names.get(stats.get("hlo_op"))
                    if name is not None and stats.get("hlo_module") == module:
                        nanoseconds[name] += event.duration_ns
    total = sum(nanoseconds.values())
    return [Operation(name, spent / num_steps / 1e6, spent / total) for name, spent in nanoseconds.most_common()]


INSTRUCTION = re.compile(r'^ *(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\(.*\bop_name="([^"]*)"', re.MULTILINE)
CONTAINERS = {"while", "call", "conditional"}  # their time is that of the instructions in them


def operation_names(compiled_text: str) -> dict[str, str]:
    """For each instruction of a compiled program the operation that it comes from, without the number of its layer."""
    found = INSTRUCTION.findall(compiled_text)
    return {name: readable(op_name) for name, opcode, op_name in found if opcode not in CONTAINERS}


INSERTED = {"while", "body", "closed_call", "eval_jaxpr", "checkpoint"}  # by JAX, into the names


def readable(op_name: str) -> str:
    """`jit(train_step)/…/transpose(jvp(GPT))/transformer/block_3/feed_forward/up/dot_general` as
    `transformer/block/feed_forward/up/dot_general, backward`."""
    parts = [re.sub(r"^block_\d+$", "block", part) for part in op_name.split("/")]
    kept = [part for part in parts if "(" not in part and part not in INSERTED]
    return "/".join(kept) + (", backward" if "transpose(" in op_name else "")
