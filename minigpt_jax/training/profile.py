"""Reads a profile of training steps: the operations that took longest, named after the model's layers."""

import collections
import dataclasses
import re
import warnings
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation, summed over all layers."""

    name: str
    milliseconds: float  # per step
    share: float  # of the time of all operations


def operations(trace_dir: Path, compiled_text: str, num_steps: int) -> list[Operation]:
    """The time of each operation of a compiled program, slowest first, from a trace of `num_steps` executions of it.

    The compiled program records for each of its instructions the name that it has in the model.
    """
    [*_, path] = sorted(trace_dir.rglob("*.xplane.pb"))
    names = operation_names(compiled_text)
    [module] = re.findall(r"\AHloModule ([\w.-]+)", compiled_text)  # instruction names repeat between programs
    nanoseconds = collections.Counter()
    with warnings.catch_warnings():
        # Python 3.13 warns about how the profile's types are created, which is fatal where warnings are errors.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    # On a CPU an event is named after its instruction, on an accelerator after the kernel.
                    if event.name not in names and not plane.name.startswith("/device:"):
                        continue
                    stats = dict(event.stats)
                    name = names.get(stats.get("hlo_op", ""))
                    if name is not None and stats.get("hlo_module") == module:
                        nanoseconds[name] += event.duration_ns
    total = sum(nanoseconds.values())
    return [Operation(name, spent / num_steps / 1e6, spent / total) for name, spent in nanoseconds.most_common()]


INSTRUCTION = re.compile(r'^ *(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\(.*\bop_name="([^"]*)"', re.MULTILINE)
CONTAINERS = {"while", "call", "conditional"}  # their time is that of the instructions inside


def operation_names(compiled_text: str) -> dict[str, str]:
    """Maps each instruction of a compiled program to the operation it comes from, without its layer number."""
    instructions = INSTRUCTION.findall(compiled_text)
    return {name: readable(op_name) for name, opcode, op_name in instructions if opcode not in CONTAINERS}


INSERTED = {"while", "body", "closed_call", "eval_jaxpr", "checkpoint"}  # parts of names that JAX inserts


def readable(op_name: str) -> str:
    """`jit(train_step)/…/transpose(jvp(GPT))/transformer/block_3/feed_forward/up/dot_general` becomes
    `transformer/block/feed_forward/up/dot_general, backward`."""
    parts = [re.sub(r"^block_\d+$", "block", part) for part in op_name.split("/")]
    kept = [part for part in parts if "(" not in part and part not in INSERTED]
    return "/".join(kept) + (", backward" if "transpose(" in op_name else "")
