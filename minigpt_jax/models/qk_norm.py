"""QK-norm: queries and keys of unit RMS, which bounds their dot products and keeps high learning rates stable."""

import jax
from flax import linen as nn

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.kernels import PLAIN, Kernels

INITIAL_SCALE = 2**0.5  # of queries and keys each: attention may start sharper than without a scale


class QKNorm(nn.Module):
    """RMS-normalises each head (Henry et al. 2020). With the config's `qk_scale`, each feature then has a learned scale,
    shared by the heads, as in Qwen3."""

    config: ModelConfig
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, x_BTHK: jax.Array) -> jax.Array:
        x_BTHK = self.kernels.unit_rms(x_BTHK, 1e-6)
        if not self.config.qk_scale:
            return x_BTHK
        scale_K = self.param("scale", nn.initializers.constant(INITIAL_SCALE), x_BTHK.shape[-1:])
        return x_BTHK * scale_K.astype(x_BTHK.dtype)[None, None, None]
