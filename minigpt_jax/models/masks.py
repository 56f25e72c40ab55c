"""Which keys a query may attend to, and with what bias: one rule for the equation, the kernels and the cache."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Mask:
    """A rule on the age of a key: query position minus key position. It is negative for future keys.

        Mask()              causal=True         …, window=2         padding_BS=[[1, 1, 1, 0]]   segments_BS=[[1, 1, 2, 2]]

           s 0 1 2 3           s 0 1 2 3           s 0 1 2 3           s 0 1 2 3                   s 0 1 2 3
        t 0  ■ ■ ■ ■        t 0  ■ · · ·        t 0  ■ · · ·        t 0  ■ ■ ■ ·                t 0  ■ ■ · ·
          1  ■ ■ ■ ■          1  ■ ■ · ·          1  ■ ■ · ·          1  ■ ■ ■ ·                  1  ■ ■ · ·
          2  ■ ■ ■ ■          2  ■ ■ ■ ·          2  · ■ ■ ·          2  ■ ■ ■ ·                  2  · · ■ ■
          3  ■ ■ ■ ■          3  ■ ■ ■ ■          3  · · ■ ■          3  ■ ■ ■ ·                  3  · · ■ ■

    `causal` hides future keys. `window` hides keys of age `window` or more. `slopes`, one per query head, subtract
    slope · |age| from the scores (ALiBi, Press et al. 2022). `padding_BS` is False at padding, True at tokens. `segments_BS`
    numbers the adjacent texts of a row, each of which sees only itself. Every query must be allowed at least one key.
    """

    causal: bool = struct.field(pytree_node=False, default=False)
    window: int | None = struct.field(pytree_node=False, default=None)
    slopes: tuple[float, ...] | None = struct.field(pytree_node=False, default=None)
    padding_BS: jax.Array | None = None
    segments_BS: jax.Array | None = None

    @property
    def only_past(self) -> bool:
        """Whether the mask is causal and depends on age alone, as required by caches and by kernels that skip the future."""
        return self.causal and not jax.tree.leaves(self)  # padding_BS and segments_BS are leaves

    def __call__(self, scores_BHTS: jax.Array, age_BTS: jax.Array, exists_BTS: jax.Array | bool = True) -> jax.Array:
        """The masked scores in float32. B may be 1 in the ages. Keys where `exists_BTS` is False are hidden too."""
        scores_BHTS, allowed_BTS = scores_BHTS.astype(jnp.float32), jnp.ones(age_BTS.shape, bool) & exists_BTS
        if self.causal:
            allowed_BTS &= age_BTS >= 0
        if self.window is not None:
            allowed_BTS &= age_BTS < self.window
        if self.padding_BS is not None:
            allowed_BTS &= self.padding_BS[:, None, :]
        if self.segments_BS is not None:
            allowed_BTS &= self.segments_BS[:, : age_BTS.shape[1], None] == self.segments_BS[:, None, :]
        if self.slopes is not None:
            scores_BHTS -= jnp.array(self.slopes)[None, :, None, None] * jnp.abs(age_BTS)[:, None]
        # The lowest finite number rather than, say, -1e4, which a model could outweigh with large scores to see the future.
        return jnp.where(allowed_BTS[:, None], scores_BHTS, jnp.finfo(jnp.float32).min)
