"""The manifest of a checkpoint: size and sha256 of each of its files, by which damage is found."""

import json
from pathlib import Path
from typing import Any

from minigpt_jax.errors import DataError
from minigpt_jax.files import file_sha256

MANIFEST = "manifest.json"


def write(folder: Path) -> None:
    """Of all files that are below the folder now."""
    (folder / MANIFEST).write_text(to_text(checksums(folder)), encoding="utf-8")


def to_text(sums: dict[str, dict[str, Any]]) -> str:
    return json.dumps(sums, indent=2) + "\n"


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below a folder but its manifest, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }


def verify(folder: Path) -> None:
    """Raises DataError that names every file that is not as it was written."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        written = json.loads(text)
        if not isinstance(written, dict) or text != to_text(written):
            raise ValueError("it is not as it was written")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no readable {MANIFEST}: {error}") from error
    try:
        found = checksums(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error
    problems = [f"{name} is missing" for name in sorted(set(written) - set(found))]
    problems += [f"{name} does not belong there" for name in sorted(set(found) - set(written))]
    problems += [f"{name} has changed" for name in sorted(set(found) & set(written)) if found[name] != written[name]]
    if problems:
        raise DataError(f"{folder} is damaged: {', '.join(problems)}")
