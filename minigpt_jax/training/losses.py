"""What training minimises."""

import jax
import optax


def next_token_loss(logits_BTV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the next token, in nats: the *sum* over the positions where the mask is True, and their number.

    A sum and a count, not a mean, so that parts of a batch add up to the whole of it: the mean of means of parts with
    different numbers of padded positions is not the mean.
    """
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return (nats_BT * mask_BT).sum(), mask_BT.sum()
