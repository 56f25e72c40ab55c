"""From a profile of training steps: the operations that took longest, under the names that they have in the model."""

import collections
import dataclasses
import re
import warnings
from pathlib import Path

import jax


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
    [module] = re.findall(r"\AHloModule ([\w.-]+)", compiled_text)  # other programs have instructions of the same names
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
                    name = names.get(stats.get("hlo_op", ""))
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
