"""Vision transformer (Dosovitskiy et al. 2020): patches of an image are the tokens, and every patch attends to all others.

H, W and C are the height, width and colour channels of an image here; N patches have P numbers each, and V is the classes.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.initial import embedding_init
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.models.layers import Dense
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.transformer import Transformer


def to_patches(images_BHWC: jax.Array, size: int) -> jax.Array:
    """patches_BNP: an image cut into squares of `size` pixels a side, row by row, each as one vector."""
    B, H, W, C = images_BHWC.shape
    squares = images_BHWC.reshape(B, H // size, size, W // size, size, C).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(B, -1, size * size * C)


class ViT(nn.Module):
    """An image classifier around the same transformer as GPT's. A learned vector, the class token, precedes the patches;
    its output, which has attended to all of them, gives the logits."""

    config: ModelConfig
    num_classes: int
    patch_size: int  # pixels a side
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, dropout=None):
        """logits_BV in float32, from pixels in [-1, 1]. H and W are multiples of the patch size."""
        config, kernels, init = self.config, self.kernels, embedding_init(self.config)
        patches_BND = Dense(config.embed_dim, config, kernels, "patches")(to_patches(images_BHWC, self.patch_size))
        B, T, D = patches_BND.shape[0], patches_BND.shape[1] + 1, config.embed_dim
        class_1D, positions_TD = self.param("class_token", init, (1, D)), self.param("positions", init, (T, D))
        x_BTD = jnp.concatenate([jnp.broadcast_to(class_1D, (B, 1, D)), patches_BND], axis=1) + positions_TD[None]
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        transformer = Transformer(config, kernels, name="transformer")
        x_BTD, _ = transformer(x_BTD.astype(config.dtype), Mask(), positions_BT, None, dropout)
        logits_B1V = Dense(self.num_classes, config, kernels, "head", bias=False)(x_BTD[:, :1])
        return logits_B1V[:, 0].astype(jnp.float32)
