"""Where the scripts and presets are, and what users type to run the former.

A wheel has `scripts/` and `configs/` inside the package; in a checkout they are beside it.
"""

from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
IS_CHECKOUT = not (PACKAGE_DIR / "scripts").is_dir()
SCRIPTS_DIR, CONFIGS_DIR = ((PACKAGE_DIR.parent if IS_CHECKOUT else PACKAGE_DIR) / name for name in ("scripts", "configs"))


def command(script: str) -> str:
    """How to start a script from the shell: `python scripts/train.py`, or `minigpt train` where there is no checkout."""
    return f"python scripts/{script}.py" if IS_CHECKOUT else f"minigpt {script}"


def install_command(extra: str) -> str:
    """How to install one of the optional dependencies."""
    return f"python -m pip install -e '.[{extra}]'" if IS_CHECKOUT else f"python -m pip install 'minigpt_jax[{extra}]'"
