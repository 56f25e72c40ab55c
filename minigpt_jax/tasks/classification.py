"""What all tasks with classes share: the loss of choosing one of C classes, and the file with their names."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minigpt_jax.errors import DataError
from minigpt_jax.files import sha256
from minigpt_jax.runs import checkpoints

CLASSES_FILE = "classes.json"  # in the folder of a run that classifies texts or images


def class_loss(logits_BC: jax.Array, labels_B: jax.Array, mask_B: jax.Array) -> tuple[jax.Array, jax.Array, dict]:
    """Cross-entropy in nats: (its *sum* over the unmasked labels, their number, {"accuracy": number of correct ones}). The
    class with the largest logit is the answer. Labels may have any shape, and the logits one more axis."""
    nats_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, labels_B)
    is_correct_B = (jnp.argmax(logits_BC, axis=-1) == labels_B) & mask_B
    return (nats_B * mask_B).sum(), mask_B.sum(), {"accuracy": is_correct_B.sum()}


def read_classes(workdir: Path, step: int) -> dict[str, Any]:
    """The CLASSES_FILE of a run. Raises DataError if it is not the one that the checkpoint of `step` was trained with."""
    path = workdir / CLASSES_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if sha256(text.encode()) != checkpoints.read_info(workdir, step).sources["classes"]:
        raise DataError(f"{path} is not the file that the run's checkpoints were trained with")
    return json.loads(text)
