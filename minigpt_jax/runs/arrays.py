"""Trees of arrays on the disk, by Orbax."""

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from minigpt_jax.errors import DataError


def save(folder: Path, trees: Mapping[str, Any]) -> None:
    """Writes each tree into a folder of its name. Raises OSError where that fails, as on a full disk."""
    require_room(folder, 2**20 + sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))  # and what Orbax adds
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            for name, tree in trees.items():
                checkpointer.save(folder / name, tree)
                checkpointer.wait_until_finished()  # a save that fails in the background says so only here
    except ValueError as error:  # its way to tell of a full disk
        raise OSError(f"Orbax could not save: {str(error).splitlines()[0]}") from error


def require_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError where so much cannot be written. Orbax's threads meet a full disk with a page of tracebacks each."""
    path = folder / "room"
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        elif shutil.disk_usage(folder).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    path.unlink()


def restore(folder: Path, like: Any, sharding: jax.sharding.Sharding) -> Any:
    """The tree that was saved in a folder, with the structure, shapes and types of `like`, placed as `sharding` says and
    not where it was when it was saved. Raises DataError where the folder holds another tree."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute(), like)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split(". ")[0].split("\n")[0]
        raise DataError(f"the arrays in {folder} are not those of the model that config.json describes: {reason}") from error
