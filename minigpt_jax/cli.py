"""Shared by all scripts: flags generated from the settings, one-line errors, logs, and the command `minigpt`."""

import ast
import contextlib
import dataclasses
import logging
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

try:
    import jax  # noqa: F401  # here it reads the environment, such as JAX_ENABLE_X64
except ValueError as error:
    print(f"error: JAX does not accept a setting: {error}", file=sys.stderr)
    sys.exit(2)

from minigpt_jax.commands import IS_CHECKOUT, SCRIPTS_DIR, command
from minigpt_jax.config import SECTIONS, SETTINGS, TASKS, Section, setting_type, settings_of
from minigpt_jax.errors import DataError, StoppedError, UsageError, did_you_mean
from minigpt_jax.files import local_path
from minigpt_jax.system import streams
from minigpt_jax.system.compilation_cache import compilation_cache
from minigpt_jax.system.heap import retain_heap
from minigpt_jax.system.logs import PROJECT_LOG, LogHandler

log = logging.getLogger(__name__)
RUNS_DIR = Path("runs")
DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool, str: flags.DEFINE_string}


def define_setting_flags(*names: str) -> None:
    """Defines a flag for each setting, or for the named ones. Flags have no defaults: the preset provides those.

    The help of a flag that tasks share is that of each of them."""
    of_tasks = [settings_of(SECTIONS | {"data": section}) for section in TASKS.values()]
    for name in names or SETTINGS:
        helps = dict.fromkeys(setting_help(settings[name].field) for settings in of_tasks if name in settings)
        define_flag(SETTINGS[name].field, "; or: ".join(helps))


def define_section_flags(section: type[Section]) -> dict[str, flags.FlagHolder]:
    """Defines a flag for each setting of a section that is not part of a run's config. Returns them by name."""
    return {field.name: define_flag(field) for field in dataclasses.fields(section)}


def define_flag(field: dataclasses.Field, text: str | None = None) -> flags.FlagHolder:
    return DEFINE[setting_type(field)](field.name, None, text or setting_help(field))


def define_moved_flags() -> dict[str, flags.FlagHolder]:
    """Defines the flags that say where and how the texts of a run are now. Returns them by the name of the setting."""
    helps = {
        "dataset": "where the run's text is now, if it has moved (default: as in training)",
        "val_dataset": "where its validation text is now (default: as in training)",
        "encoding": "their encoding now (default: as in training)",
        "data_dir": "folder for tokenized text (default: as in training)",
    }
    return {name: flags.DEFINE_string(name, None, text) for name, text in helps.items()}


def given_or(workdir: str | None, default: Path) -> Path:
    """The folder in --workdir, or the default without that flag. Raises UsageError if it is empty."""
    if workdir == "":
        raise UsageError("workdir is empty: give a folder, or omit --workdir")
    return local_path(workdir or default)


def define_kernels_flag(what_for: str = "") -> flags.FlagHolder:
    """Defines --kernels, the implementation of the model. `what_for` says what the flag applies to, if not to everything."""
    text = what_for + "the fastest implementation for this machine, or the equations as written in models/"
    return flags.DEFINE_enum("kernels", "tuned", ["tuned", "plain"], text)


def define_precision_flag() -> None:
    """Defines --matmul_precision, which `run` applies. It is JAX's own setting, which a run's checkpoints record."""
    text = "precision of float32 matmuls on accelerators (default: JAX's; tensorfloat32 on NVIDIA GPUs since Ampere)"
    flags.DEFINE_enum("matmul_precision", None, ["float32", "tensorfloat32", "bfloat16"], text)


def apply_precision_flag() -> None:
    if "matmul_precision" in flags.FLAGS and flags.FLAGS.matmul_precision:
        import jax  # not at the top: processes without JAX use this module too

        jax.config.update("jax_default_matmul_precision", flags.FLAGS.matmul_precision)


def setting_help(field: dataclasses.Field) -> str:
    choices, default = field.metadata["choices"], field.default
    text = field.metadata["help"] + (f": {' | '.join(choices)}" if choices else "")
    return text if default is None else f"{text} (default {str(default).lower() if isinstance(default, bool) else default})"


def given_settings() -> dict[str, Any]:
    """The settings given on the command line, by name."""
    values = {name: flags.FLAGS[name].value for name in SETTINGS if name in flags.FLAGS}
    return {name: value for name, value in values.items() if value is not None}


def newest_run() -> Path:
    """The folder under `runs/` with the newest checkpoint. Raises DataError if there is none."""
    checkpoints = sorted(RUNS_DIR.glob("*/checkpoints/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise DataError(
            f"no run found under {RUNS_DIR}/: train one with {command('train')}, or give a run's folder with --workdir"
        )
    workdir = checkpoints[-1].parents[2]
    log.info("Using the newest run: %s", workdir)
    return workdir


def run(main: Callable[..., None], usage: str, positional: bool = False) -> None:
    """Parses the command line and calls `main`, with the list of positional arguments if it takes any.

    User errors print one line on standard error, without a traceback. The exit status is 2 for an invalid command, 1 for
    unusable data.
    """
    PROJECT_LOG.setLevel(logging.INFO)
    PROJECT_LOG.propagate = False
    PROJECT_LOG.addHandler(LogHandler())
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the exceptions that it raises, with tracebacks
    flags.DEFINE_bool("help", False, "show this help", short_name="h", allow_override=True)
    retain_heap()
    with errors_in_one_line():
        arguments = parsed_arguments()
        if arguments and not positional:
            raise UsageError(f"unexpected argument {arguments[0]!r}: give settings as --name value")
        if flags.FLAGS.help:
            print_help(usage)
        else:
            apply_precision_flag()
            with compilation_cache():
                main(*([arguments] if positional else []))


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the process where the user's input, a signal or a stream stops a command: one line, no traceback."""
    with streams.of_command() as output:
        try:
            yield
            output.flush()  # what cannot be written raises here, not at interpreter exit, where Python would print it
        except (UsageError, DataError) as error:
            sys.exit(report(str(error), error.exit_status))
        except FloatingPointError as error:
            sys.exit(report(str(error), DataError.exit_status))
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):  # JAX's status code
                raise
            message = f"out of memory: {error}; use a smaller --batch_size or model, or --remat"
            sys.exit(report(message, DataError.exit_status))
        except StoppedError as stopped:  # already logged
            sys.exit(stopped.exit_status)
        except KeyboardInterrupt:
            sys.exit(report("interrupted", 130))  # 128 + SIGINT, as in a shell
        except OSError as error:
            if error is not output.error:
                raise
            if isinstance(error, BrokenPipeError):  # the reader has left, as in `| head`
                sys.exit()
            sys.exit(report(f"cannot write to standard output: {error.strerror}", DataError.exit_status))


def parsed_arguments() -> list[str]:
    """The positional arguments on the command line."""
    try:
        return flags.FLAGS(sys.argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(
            f"unknown flag --{error.flagname}{did_you_mean(error.flagname, flags.FLAGS)}; see --help"
        ) from error
    except (flags.Error, ValueError) as error:  # ValueError: for --noNAME=VALUE
        raise UsageError(str(error)) from error


def report(message: str, exit_status: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return exit_status


def print_help(usage: str) -> None:
    commands = usage if IS_CHECKOUT else re.sub(r"python scripts/(\w+)\.py", r"minigpt \1", usage)
    print(commands.strip(), "\n\nFlags:")
    by_module = flags.FLAGS.flags_by_module_dict()  # to leave out the many flags of absl, jax and orbax
    own = {flag.name for module in (__name__, sys.argv[0]) for flag in by_module.get(module, [])}
    for name in sorted(own - {"help"}):
        print(f"  --{name}\n      {flags.FLAGS[name].help}")


def minigpt() -> None:
    """The shell's command `minigpt`: `minigpt train` runs scripts/train.py, and so on for every script."""
    scripts = {path.stem: path for path in sorted(SCRIPTS_DIR.glob("*.py"))}
    with errors_in_one_line():
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            print("usage: minigpt COMMAND [--flags]; minigpt COMMAND --help lists the flags\n")
            for name, path in scripts.items():
                summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                print(f"  {name:<14}{summary.splitlines()[0]}")
            return
        name, *arguments = sys.argv[1:]
        if name not in scripts:
            raise UsageError(f"unknown command {name!r}{did_you_mean(name, scripts)}; allowed: {', '.join(scripts)}")
    sys.argv = [str(scripts[name]), *arguments]
    runpy.run_path(str(scripts[name]), run_name="__main__")
