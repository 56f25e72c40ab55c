"""The files of a Hugging Face folder: JSON, and safetensors in one file or in several. Knows no architectures.

Nothing here runs what it reads: safetensors are numbers behind a header, and pickle, which is a program, is refused.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt_jax.errors import DataError, UsageError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """Raises OSError where it cannot be read, DataError where it is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is no JSON object")
    return values


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[dict[str, Any]]:
    """The open file in which each tensor of a folder lies, by the tensor's name. Only headers are read yet."""
    safetensors = import_safetensors()
    with contextlib.ExitStack() as stack:
        stored = {}
        for file, names in weight_files(folder).items():
            try:
                reader = stack.enter_context(safetensors.safe_open(folder / file, "numpy"))
            except FileNotFoundError:
                raise DataError(f"{folder} has no {file}, of which {INDEX} speaks") from None
            except (OSError, safetensors.SafetensorError) as error:
                raise DataError(f"{folder / file} is damaged, or no more than a pointer to it: {error}") from None
            if names is not None and names != set(reader.keys()):
                raise DataError(f"{folder}: {INDEX} and {file} disagree about {min(names ^ set(reader.keys()))!r}")
            stored |= dict.fromkeys(reader.keys(), reader)
        yield stored


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """Names of the files with weights, each with the tensors that it should have; None where nothing says."""
    if (folder / WEIGHTS).exists():
        return {WEIGHTS: None}
    try:
        weight_map = read_json(folder / INDEX)["weight_map"]
        files = {}
        for name, file in weight_map.items():
            files.setdefault(file, set()).add(name)
    except FileNotFoundError:
        found = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        reason = refusal(found[0]) if found else f"it needs {WEIGHTS}, or {INDEX} with its parts"
        raise DataError(f"{folder} has no weights that can be read: {reason}") from None
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / INDEX} is damaged: {error}") from None
    for file in files:
        # No name may lead out of the folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.safetensors", file):
            raise DataError(f"{folder / INDEX}: {file!r} is not the name of a .safetensors file in that folder")
    return files


def refusal(name: str) -> str:
    return (
        f"{name} is a pickle, a program that runs when it is read, and is not opened; "
        "save the model as safetensors, as transformers does"
    )


def import_safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UsageError("Hugging Face's files need the package safetensors: python -m pip install -e '.[hf]'") from error
    return safetensors
