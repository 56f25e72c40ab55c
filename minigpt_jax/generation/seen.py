"""The tokens of each row so far, for the strategies that depend on them."""

import jax
import jax.numpy as jnp
from flax import struct

# Row by row, so that sharded rows need no communication.
count = jax.vmap(lambda counts_V, tokens, times: counts_V.at[tokens].add(times))


@struct.dataclass
class Seen:
    """The tokens of each row so far, including the prompt."""

    counts_BV: jax.Array  # how often each token occurs in the row
    recent_BS: jax.Array  # its last context_length tokens, newest last; -1 before the first

    @classmethod
    def of(cls, prompts_BS: jax.Array, lengths_B: jax.Array, vocab_size: int) -> "Seen":
        """For prompts in the last `lengths_B` of S columns."""
        B, S = prompts_BS.shape
        is_prompt_BS = jnp.arange(S)[None, :] >= (S - lengths_B)[:, None]
        counts_BV = count(jnp.zeros((B, vocab_size)), prompts_BS, is_prompt_BS)
        return cls(counts_BV, jnp.where(is_prompt_BS, prompts_BS, -1))

    def append(self, token_B: jax.Array) -> "Seen":
        counts_BV = count(self.counts_BV, token_B, jnp.ones_like(token_B))
        return Seen(counts_BV, jnp.concatenate([self.recent_BS[:, 1:], token_B[:, None]], axis=1))
