"""What all scripts share: flags made from the settings, one line for what is wrong, logs on standard error."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from minigpt_jax.config import SETTINGS, Section, setting_type
from minigpt_jax.errors import DataError, StoppedError, UsageError
from minigpt_jax.system.compilation_cache import compilation_cache
from minigpt_jax.system.heap import retain_heap

log = logging.getLogger(__name__)
RUNS_DIR = Path("runs")
DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool, str: flags.DEFINE_string}


def define_setting_flags(*names: str) -> None:
    """A flag for every setting, or for these, without a default of its own: what is not given comes from the preset."""
    for name in names or SETTINGS:
        define_flag(SETTINGS[name].field)


def define_section_flags(section: type[Section]) -> dict[str, flags.FlagHolder]:
    """A flag for every setting of a section that is not part of a run, by name."""
    return {field.name: define_flag(field) for field in dataclasses.fields(section)}


def define_flag(field: dataclasses.Field) -> flags.FlagHolder:
    return DEFINE[setting_type(field)](field.name, None, setting_help(field))


def define_kernels_flag(what_for: str = "") -> flags.FlagHolder:
    """Which implementation of the model runs. `what_for` says what it applies to, if not to all."""
    text = what_for + "tuned: what is fast on this machine; plain: the equations as they are in models/"
    return flags.DEFINE_enum("kernels", "tuned", ["tuned", "plain"], text)


def setting_help(field: dataclasses.Field) -> str:
    choices, default = field.metadata["choices"], field.default
    text = field.metadata["help"] + (f": {' | '.join(choices)}" if choices else "")
    return text if default is None else f"{text} (default {str(default).lower() if isinstance(default, bool) else default})"


def given_settings() -> dict[str, Any]:
    """The settings that the command line gives."""
    values = {name: flags.FLAGS[name].value for name in SETTINGS if name in flags.FLAGS}
    return {name: value for name, value in values.items() if value is not None}


def newest_run() -> Path:
    """The folder under `runs/` with the newest checkpoint. Raises DataError where there is none."""
    checkpoints = sorted(RUNS_DIR.glob("*/checkpoints/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise DataError(
            f"there is no run under {RUNS_DIR}/: train one with scripts/train.py, or name its folder with --workdir"
        )
    workdir = checkpoints[-1].parents[2]
    log.info("The newest run is %s.", workdir)
    return workdir


def run(main: Callable[..., None], usage: str, positional: bool = False) -> None:
    """Parses the command line and calls `main`, with the list of positional arguments where it takes any.

    What a user got wrong ends in one line on standard error and its exit status, with no traceback: 2 for the command, 1 for
    what it was to work on.
    """
    project_log = logging.getLogger("minigpt_jax")
    project_log.setLevel(logging.INFO)
    project_log.propagate = False
    project_log.addHandler(LogHandler())
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs with a traceback what it also raises
    flags.DEFINE_bool("help", False, "show this help", short_name="h", allow_override=True)
    retain_heap()
    try:
        arguments = parsed_arguments()
        if arguments and not positional:
            raise UsageError(f"unexpected argument {arguments[0]!r}: give settings as --name value")
        if flags.FLAGS.help:
            print_help(usage)
        else:
            with compilation_cache():
                main(*([arguments] if positional else []))
        sys.stdout.flush()  # a reader that has gone is noticed here, and not after the end, where Python complains of it
    except flags.Error as error:
        sys.exit(report(str(error), UsageError.exit_status))
    except (UsageError, DataError) as error:
        sys.exit(report(str(error), error.exit_status))
    except FloatingPointError as error:
        sys.exit(report(str(error), DataError.exit_status))
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # as JAX calls it
            raise
        message = f"out of memory: {error}; take a smaller --batch_size or model, or --remat"
        sys.exit(report(message, DataError.exit_status))
    except StoppedError as stopped:  # it has said so itself
        sys.exit(stopped.exit_status)
    except KeyboardInterrupt:
        sys.exit(report("interrupted", 130))  # as a shell has it: 128 + SIGINT
    except BrokenPipeError:  # the reader of standard output has gone, as after `| head`: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parsed_arguments() -> list[str]:
    """The command line's arguments that are no flags."""
    try:
        return flags.FLAGS(sys.argv)[1:]
    except ValueError as error:  # absl's, for --noNAME=VALUE
        raise UsageError(str(error)) from error


def report(message: str, exit_status: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return exit_status


def print_help(usage: str) -> None:
    print(usage.strip(), "\n\nFlags:")
    by_module = flags.FLAGS.flags_by_module_dict()  # absl, jax and orbax have flags too, which would bury ours
    own = {flag.name for module in (__name__, sys.argv[0]) for flag in by_module.get(module, [])}
    for name in sorted(own - {"help"}):
        print(f"  --{name}\n      {flags.FLAGS[name].help}")


class LogHandler(logging.Handler):
    """Plain lines on standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage(), file=sys.stderr)
