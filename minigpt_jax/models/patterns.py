"""Patterns that select parameters by their paths, as a user writes them.

A path is `transformer/block_0/attention/query/kernel`. In a pattern, `*` stands for any text, also with a `/`, and `?` for
one character. A pattern that matches the start of a path, up to a `/`, selects all that is below: `embedding` selects every
parameter of the embedding, `*block_0` the first block, `*attention` the attention of all blocks.
"""

import fnmatch
import itertools
import re
from typing import Any

from flax import traverse_util

from minigpt_jax.errors import UsageError


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by path."""
    return traverse_util.flatten_dict(tree, sep="/")


def matching(paths: list[str], patterns: str, setting: str) -> list[str]:
    """The paths that at least one of the comma-separated patterns selects, in the order of `paths`.

    Raises UsageError, listing the paths, if one of the patterns selects none. `setting` is the name of the user's setting.
    """
    selected = set()
    for pattern in patterns.split(","):
        hits = {path for path in paths if any(fnmatch.fnmatchcase(start, pattern.strip()) for start in starts(path))}
        if not hits:
            kinds = dict.fromkeys(re.sub(r"_\d+(?=/|$)", "_*", path) for path in paths)
            raise UsageError(f"{setting}={pattern!r} matches nothing; the model has {', '.join(kinds)}")
        selected |= hits
    return [path for path in paths if path in selected]


def frozen_mask(params: Any, freeze: str) -> Any:
    """A tree like `params`: whether each parameter is frozen. Raises UsageError if a pattern selects none, or if all are."""
    paths = by_path(params)
    frozen = set(matching(list(paths), freeze, "freeze"))
    if len(frozen) == len(paths):
        raise UsageError(f"freeze={freeze} leaves nothing to train: it selects all {len(paths)} parameters")
    return traverse_util.unflatten_dict({path: path in frozen for path in paths}, sep="/")


def starts(path: str) -> list[str]:
    """`a`, `a/b` and `a/b/c` for `a/b/c`."""
    return list(itertools.accumulate(path.split("/"), "{}/{}".format))
