"""The loss of choosing one of C classes: for a text, an image or a hidden token."""

import jax
import jax.numpy as jnp
import optax


def class_loss(logits_BC: jax.Array, labels_B: jax.Array, mask_B: jax.Array) -> tuple[jax.Array, jax.Array, dict]:
    """Cross-entropy in nats: (its *sum* over the unmasked labels, their number, {"accuracy": number of correct ones}). The
    class with the largest logit is the answer. Labels may have any shape, and the logits one more axis."""
    nats_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, labels_B)
    is_correct_B = (jnp.argmax(logits_BC, axis=-1) == labels_B) & mask_B
    return (nats_B * mask_B).sum(), mask_B.sum(), {"accuracy": is_correct_B.sum()}
