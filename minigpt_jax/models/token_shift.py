"""Token shift: what a sub-layer reads at a position mixes that position with the one before."""

import jax
import jax.numpy as jnp


def shift(x_BTD: jax.Array, positions_BT: jax.Array, before_BD: jax.Array | None = None) -> jax.Array:
    """x with the second half of its features one position later (after "RWKV", Peng et al. 2023), and 0 at position 0.
    `before_BD` is x in the column before the first one."""
    half = x_BTD.shape[-1] // 2
    first_B1h = jnp.zeros_like(x_BTD[:, :1, half:]) if before_BD is None else before_BD[:, None, half:]
    later_BTh = jnp.concatenate([first_B1h, x_BTD[:, :-1, half:]], axis=1)
    return jnp.concatenate([x_BTD[..., :half], jnp.where(positions_BT[..., None] == 0, 0, later_BTh)], axis=-1)
