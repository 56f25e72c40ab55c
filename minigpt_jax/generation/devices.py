"""Decoding on several devices."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def shard_rows(params: Any, rows: tuple, devices: Sequence[Any]) -> tuple[Any, tuple]:
    """The parameters and `rows`, arrays with the rows on their first axis, sharded over the devices of a split CPU.

    Each of as many devices as can have equally many rows gets its share. Rows need nothing of each other in decoding, so the
    devices do not wait. They share one copy of the parameters, since copies would have to be read as well. Elsewhere all
    remains where it is.
    """
    num_rows = len(rows[0])
    devices = devices[: max((n for n in range(1, len(devices) + 1) if num_rows % n == 0), default=0)]
    if len(devices) < 2 or devices[0].platform != "cpu":
        return params, rows
    mesh = Mesh(devices, "rows")
    everywhere, by_row = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("rows"))
    return jax.device_put(jax.tree.map(np.asarray, params), everywhere), jax.device_put(rows, by_row)
