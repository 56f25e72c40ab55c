"""Saves and restores trees of arrays with Orbax."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from minigpt_jax.errors import DataError, UsageError


def check_path(folder: Path) -> None:
    """Raises UsageError for paths that Orbax cannot save to: it takes them for patterns, and needs UTF-8."""
    name = str(folder.absolute())
    is_text = name == name.encode("utf-8", "ignore").decode()
    if not is_text or re.search(r"\[.+\]", name) or (os.sep == "/" and "\\" in name):
        allowed = "[...], a backslash or bytes that are not UTF-8"
        raise UsageError(f"checkpoints cannot be saved in {name!r}: choose a folder whose path has no {allowed}")


def save(folder: Path, trees: Mapping[str, Any]) -> None:
    """Writes each tree to a subfolder of its name. Raises OSError if that fails, for example because the disk is full."""
    require_room(folder, 2**20 + sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))  # 1 MiB for what Orbax adds
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            for name, tree in trees.items():
                checkpointer.save(folder / name, tree)
                checkpointer.wait_until_finished()  # raises the errors of saving in the background
    except ValueError as error:  # Orbax raises this when the disk is full
        raise OSError(f"Orbax could not save: {str(error).splitlines()[0]}") from error


def require_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError if `num_bytes` cannot be written. Otherwise each of Orbax's threads would print a long traceback."""
    path = folder / "room"
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        elif shutil.disk_usage(folder).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    path.unlink()


def restore(folder: Path, like: Any, sharding: jax.sharding.Sharding) -> Any:
    """The tree saved in a folder, with the structure, shapes and dtypes of `like`. It is placed according to `sharding`, not
    on the devices it was saved from. Raises DataError if the folder holds a different tree."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute(), like)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split(". ")[0].split("\n")[0]
        raise DataError(f"the arrays in {folder} do not match the model described by config.json: {reason}") from error


def sha256(tree: Any) -> str:
    """The SHA-256 sum of a tree's paths, types, shapes and values, wherever they were read from."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
