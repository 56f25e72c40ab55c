"""Evaluation: the mean loss and the objective's other measures over many batches."""

import collections
from collections.abc import Iterable
from typing import Any

import jax

from minigpt_jax.data.batches import Batch


@jax.jit
def eval_step(params: Any, batch: Batch, objective: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """(sum of the loss over a batch's targets, their number, sums of other measures by name), without dropout."""
    return objective.loss(params, batch, None)


def means(objective: Any, params: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss and other measures over the targets of all batches, accumulated in 64 bits."""
    sums, count = collections.defaultdict(float), 0.0
    for batch in batches:
        loss, num_targets, measures = jax.device_get(eval_step(params, batch, objective))
        count += float(num_targets)
        for name, value in ({"loss": loss} | measures).items():
            sums[name] += float(value)
    return {name: total / count for name, total in sums.items()}
