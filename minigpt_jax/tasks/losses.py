"""What training minimises."""

import jax
import optax


def next_token_loss(logits_BTV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the next token, in nats: the *sum* over the targets that the mask lets count, and their number.
    Sums of parts add up to that of the batch; means of parts with different numbers of targets would not."""
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return (nats_BT * mask_BT).sum(), mask_BT.sum()
