"""Ten traps for newcomers to JAX from PyTorch, each as a small wrong function and its corrected version.

    python -m minigpt_jax.compare.traps

shows them one by one and runs both functions.
"""

import inspect
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from minigpt_jax import cli


class Trap:
    """What both functions should do, and why the wrong one does not."""

    expectation: str
    why: str
    error: type[Exception] | None = None  # raised by the wrong function; None if it is silently wrong

    wrong: Callable[[], Any]
    right: Callable[[], Any]
    holds: Callable[[Any], bool]  # whether a result meets the expectation


class KeyUsedTwice(Trap):
    expectation = "the two draws differ"
    why = """A key is not a generator whose state advances. It is a value, and a draw is a pure function of it. Derive a new
    key for each draw with split or fold_in."""

    @staticmethod
    def wrong():
        key = jax.random.key(0)
        return jax.random.normal(key), jax.random.normal(key)

    @staticmethod
    def right():
        first, second = jax.random.split(jax.random.key(0))
        return jax.random.normal(first), jax.random.normal(second)

    @staticmethod
    def holds(draws):
        return draws[0] != draws[1]


class SideEffectUnderJit(Trap):
    expectation = "three calls are counted"
    why = """Under jit the Python function runs only once, to be traced. Later calls run the compiled program, which maps
    arguments to results. Prints, appends and assignments to outer variables happen only during tracing. Pass state in as an
    argument and return it as a result."""

    @staticmethod
    def wrong():
        calls = 0

        @jax.jit
        def double(x):
            nonlocal calls
            calls += 1
            return 2 * x

        for x in (1.0, 2.0, 3.0):
            double(x)
        return calls

    @staticmethod
    def right():
        @jax.jit
        def double(x, calls):
            return 2 * x, calls + 1

        calls = 0
        for x in (1.0, 2.0, 3.0):
            _, calls = double(x, calls)
        return int(calls)

    @staticmethod
    def holds(calls):
        return calls == 3


class BranchOnTracedValue(Trap):
    expectation = "|-3| is 3"
    error = jax.errors.TracerBoolConversionError
    why = """During tracing, arguments have shapes and types but no values, and `if` needs a value. Compute both branches and
    select one (jnp.where), or branch on the device (jax.lax.cond)."""

    @staticmethod
    def wrong():
        @jax.jit
        def absolute(x):
            if x < 0:
                return -x
            return x

        return float(absolute(-3.0))

    @staticmethod
    def right():
        @jax.jit
        def absolute(x):
            return jnp.where(x < 0, -x, x)

        return float(absolute(-3.0))

    @staticmethod
    def holds(value):
        return value == 3.0


class StaticArgumentThatChanges(Trap):
    expectation = "four steps compile once"
    why = """A static argument is part of the program: each new value is traced and compiled again. Pass what changes between
    calls as an array. Make only what decides shapes or structure static."""

    @staticmethod
    def wrong():
        compilations = []

        def scale(x, step):
            compilations.append(step)
            return x / (step + 1)

        scale = jax.jit(scale, static_argnames="step")
        for step in range(4):
            scale(jnp.ones(2), step=step)
        return len(compilations)

    @staticmethod
    def right():
        compilations = []

        def scale(x, step):
            compilations.append(step)
            return x / (step + 1)

        scale = jax.jit(scale)
        for step in range(4):
            scale(jnp.ones(2), step=step)
        return len(compilations)

    @staticmethod
    def holds(num_compilations):
        return num_compilations == 1


class IndexBeyondTheEnd(Trap):
    expectation = "an index of 5 into three elements is an error"
    why = """Code on a device cannot raise. Out of range, x[5] silently reads the last element, jnp.take returns NaN, and a
    write is dropped. Check indices on the host, before they go to the device."""

    @staticmethod
    def wrong():
        table, index = jnp.array([10.0, 20.0, 30.0]), 5
        return float(table[index]), float(jnp.take(table, index)), table.at[index].set(99.0).tolist()

    @staticmethod
    def right():
        table, index = jnp.array([10.0, 20.0, 30.0]), 5
        try:
            if not 0 <= index < len(table):
                raise IndexError(f"index {index} is out of range for {len(table)} elements")
            return float(table[index])
        except IndexError as error:
            return error

    @staticmethod
    def holds(result):
        return isinstance(result, IndexError)


class InPlaceUpdate(Trap):
    expectation = "the first element becomes 1"
    error = TypeError
    why = """Arrays are immutable. x.at[0].set(1) returns a new array, so assign its result. Under jit the compiler updates
    in place if the old array is not used again."""

    @staticmethod
    def wrong():
        x = jnp.zeros(3)
        x[0] = 1
        return x.tolist()

    @staticmethod
    def right():
        x = jnp.zeros(3)
        x = x.at[0].set(1)
        return x.tolist()

    @staticmethod
    def holds(values):
        return values == [1.0, 0.0, 0.0]


class DonatedBufferUsedAgain(Trap):
    expectation = "the parameters change by (0.3, 0.4)"
    error = RuntimeError
    why = """donate_argnums reuses the argument's memory for the result, which saves a copy of the state at each step. The
    argument is deleted. Copy what you need from it before the call, and assign the result to the same name."""

    @staticmethod
    def wrong():
        step = jax.jit(lambda params: 0.9 * params, donate_argnums=0)
        params = jnp.array([3.0, 4.0])
        new_params = step(params)
        return np.array(params) - np.array(new_params)

    @staticmethod
    def right():
        step = jax.jit(lambda params: 0.9 * params, donate_argnums=0)
        params = jnp.array([3.0, 4.0])
        before = np.array(params)
        params = step(params)
        return before - np.array(params)

    @staticmethod
    def holds(moved):
        return np.allclose(moved, [0.3, 0.4])


class StateThatIsNotAPytree(Trap):
    expectation = "the count in the state increases"
    error = TypeError
    why = """jit, grad and scan accept pytrees: arrays in tuples, lists, dictionaries and registered classes. JAX cannot know
    which fields of other classes are arrays. Register them with flax.struct.dataclass or
    jax.tree_util.register_dataclass."""

    @staticmethod
    def wrong():
        class State:
            def __init__(self, count):
                self.count = count

        step = jax.jit(lambda state: State(state.count + 1))
        return int(step(State(jnp.array(0))).count)

    @staticmethod
    def right():
        @struct.dataclass
        class State:
            count: jax.Array

        step = jax.jit(lambda state: State(state.count + 1))
        return int(step(State(jnp.array(0))).count)

    @staticmethod
    def holds(count):
        return count == 1


class Float64ThatIsFloat32(Trap):
    expectation = "the mean of 16777217 and 16777217 is 16777217"
    why = """Unless jax_enable_x64 is set, JAX converts 64-bit values to 32 bits, including NumPy arrays. float32 cannot
    represent 16777217. Keep what needs 64 bits, such as a sum over a million losses, in NumPy."""

    @staticmethod
    def wrong():
        losses = np.array([16777217.0, 16777217.0])  # float64
        return float(jnp.mean(losses))

    @staticmethod
    def right():
        losses = np.array([16777217.0, 16777217.0])
        return float(np.mean(losses))

    @staticmethod
    def holds(mean):
        return mean == 16777217.0


class TimeWithoutWaiting(Trap):
    expectation = "the result is ready when the clock stops"
    why = """Dispatch is asynchronous: a call returns before its result is computed, so this measures only the dispatch. Call
    block_until_ready before reading the clock, and exclude the first call, which compiles."""

    @staticmethod
    def wrong():
        power = jax.jit(lambda x: jnp.linalg.matrix_power(x, 64))
        x = jnp.eye(1500)
        power(x).block_until_ready()
        start = time.perf_counter()
        y = power(x)
        milliseconds = 1000 * (time.perf_counter() - start)
        return y.is_ready(), f"{milliseconds:.1f} ms"

    @staticmethod
    def right():
        power = jax.jit(lambda x: jnp.linalg.matrix_power(x, 64))
        x = jnp.eye(1500)
        power(x).block_until_ready()
        start = time.perf_counter()
        y = power(x).block_until_ready()
        milliseconds = 1000 * (time.perf_counter() - start)
        return y.is_ready(), f"{milliseconds:.1f} ms"

    @staticmethod
    def holds(result):
        return result[0]


TRAPS = Trap.__subclasses__()


def outcome(trap: type[Trap], function: Any) -> str:
    """The result or error of a function, and whether it meets the expectation."""
    try:
        result = function()
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return f"returns {result}: {'as expected' if trap.holds(result) else 'WRONG'}"


def body(function: Any) -> str:
    """A function's source without its decorator and signature."""
    source = textwrap.dedent(inspect.getsource(function))
    return textwrap.indent(textwrap.dedent(source.split("():\n", 1)[1]), "    ")


def main() -> None:
    jax.config.update("jax_cpu_enable_async_dispatch", True)  # JAX's default, which the last trap needs
    for number, trap in enumerate(TRAPS, 1):
        title = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in trap.__name__).strip()
        print(f"\n{number}/{len(TRAPS)}  {title.capitalize()}. Expected: {trap.expectation}.\n")
        for name in ("Wrong", "Right"):
            function = getattr(trap, name.lower())
            print(f"{name}:\n\n{body(function)}\n  {outcome(trap, function)}\n")
        print(textwrap.fill(" ".join(trap.why.split()), 100))
        if sys.stdin.isatty() and number < len(TRAPS):
            print("\nPress Enter for the next trap ", end="", flush=True)
            sys.stdin.readline()


if __name__ == "__main__":
    cli.run(main, __doc__ or "")
