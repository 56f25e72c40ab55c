"""The shell's command `minigpt`: `minigpt train` runs scripts/train.py, and so on for every script.

A wheel has `scripts/` and `configs/` inside the package; in a checkout they are beside it.
"""

import ast
import runpy
import sys
from pathlib import Path

from minigpt_jax.errors import UsageError, did_you_mean

PACKAGE_DIR = Path(__file__).resolve().parent
IS_CHECKOUT = not (PACKAGE_DIR / "scripts").is_dir()
SCRIPTS_DIR, CONFIGS_DIR = ((PACKAGE_DIR.parent if IS_CHECKOUT else PACKAGE_DIR) / name for name in ("scripts", "configs"))


def command(script: str) -> str:
    """How to start a script from the shell: `python scripts/train.py`, or `minigpt train` where there is no checkout."""
    return f"python scripts/{script}.py" if IS_CHECKOUT else f"minigpt {script}"


def install_command(extra: str) -> str:
    """How to install one of the optional dependencies."""
    return f"python -m pip install -e '.[{extra}]'" if IS_CHECKOUT else f"python -m pip install 'minigpt_jax[{extra}]'"


def main() -> None:
    """Runs the script named by the first argument, with the remaining arguments."""
    scripts = {path.stem: path for path in sorted(SCRIPTS_DIR.glob("*.py")) if path.stem != "__init__"}
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: minigpt COMMAND [--flags]; minigpt COMMAND --help lists the flags\n")
        for name, path in scripts.items():
            summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"  {name:<14}{summary.splitlines()[0]}")
        return
    _, name, *arguments = sys.argv
    if name not in scripts:
        print(
            f"error: unknown command {name!r}{did_you_mean(name, scripts)}; allowed: {', '.join(scripts)}", file=sys.stderr
        )
        sys.exit(UsageError.exit_status)
    sys.argv = [str(scripts[name]), *arguments]
    runpy.run_path(str(scripts[name]), run_name="__main__")
