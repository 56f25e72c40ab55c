"""Decoding on several devices."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def shard_rows(params: Any, rows: tuple, devices: Sequence[Any]) -> tuple[Any, tuple]:
    """Shards `rows`, arrays with the rows on their first axis, over the devices of a split CPU. Returns (params, rows).

    Uses the largest number of devices that divides the number of rows. Rows are independent in decoding, so the devices
    never wait for each other. They share one copy of the parameters, which saves memory bandwidth. On other platforms, and
    with one device, everything stays where it is.
    """
    num_rows = len(rows[0])
    devices = devices[: max((n for n in range(1, len(devices) + 1) if num_rows % n == 0), default=0)]
    if len(devices) < 2 or devices[0].platform != "cpu":
        return params, rows
    mesh = Mesh(devices, "rows")
    everywhere, by_row = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("rows"))
    return jax.device_put(jax.tree.map(np.asarray, params), everywhere), jax.device_put(rows, by_row)
