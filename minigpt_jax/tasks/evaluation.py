"""Evaluation: the mean loss and the objective's other measures over many batches; what a classifier takes for what."""

import collections
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

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


@jax.jit
def probabilities(params: Any, batch: Batch, objective: Any) -> jax.Array:
    """probs_BC of a classifier, whose objective has `logits(params, batch)`."""
    return jax.nn.softmax(objective.logits(params, batch))


def confusion(objective: Any, params: Any, batches: Iterable[Batch], num_classes: int) -> np.ndarray:
    """counts_CC, see `tasks.Classifier`. The batches have `labels_B` and `mask_B`."""
    counts_CC = np.zeros((num_classes, num_classes), int)
    for batch in batches:
        guesses_B = np.asarray(probabilities(params, batch, objective)).argmax(axis=-1)
        np.add.at(counts_CC, (batch["labels_B"], guesses_B), batch["mask_B"])
    return counts_CC
