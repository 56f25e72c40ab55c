"""The manifest of a checkpoint: size and sha256 of each of its files, to detect corruption."""

import json
from pathlib import Path
from typing import Any

from minigpt_jax.errors import DataError
from minigpt_jax.files import file_sha256

MANIFEST = "manifest.json"


def write(folder: Path) -> None:
    """Writes the manifest of all files that are in the folder now, subfolders included."""
    (folder / MANIFEST).write_text(to_text(checksums(folder)), encoding="utf-8")


def to_text(sums: dict[str, dict[str, Any]]) -> str:
    return json.dumps(sums, indent=2) + "\n"


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in a folder and its subfolders except the manifest, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }


def verify(folder: Path) -> None:
    """Raises DataError naming every file that is missing, unexpected or changed."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        written = json.loads(text)
        if not isinstance(written, dict) or text != to_text(written):
            raise ValueError("its content has changed")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no readable {MANIFEST}: {error}") from error
    try:
        actual = checksums(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error
    problems = [f"{name} is missing" for name in sorted(set(written) - set(actual))]
    problems += [f"{name} is unexpected" for name in sorted(set(actual) - set(written))]
    problems += [f"{name} has changed" for name in sorted(set(actual) & set(written)) if actual[name] != written[name]]
    if problems:
        raise DataError(f"{folder} is corrupt: {', '.join(problems)}")
