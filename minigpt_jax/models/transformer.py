"""The block and the stack of blocks, independent of what the inputs represent."""

import jax
from flax import linen as nn

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.cache import LayerCache
from minigpt_jax.models.dropout import Dropout
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.models.layers import FeedForward, MultiHeadAttention, Norm
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.token_shift import shift


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream: `pre` is x + f(norm(x)), as in GPT-2, and trains at
    higher rates with less warmup (Xiong et al. 2020); `post` is norm(x + f(x)), as in the original paper."""

    config: ModelConfig
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask: Mask, positions_BT: jax.Array, cache=None, dropout=None):
        config, kernels, drop, is_pre = self.config, self.kernels, Dropout(), self.config.norm_placement == "pre"
        attention = MultiHeadAttention(config, kernels, name="attention")
        feed_forward = FeedForward(config, kernels, name="feed_forward")
        attention_norm, feed_forward_norm = (Norm(config, kernels, name=f"{f}_norm") for f in ("attention", "feed_forward"))
        kv, before = (None, (None, None)) if cache is None else (cache.kv, cache.latest)
        mixed = shift if config.token_shift else lambda x_BTD, *_: x_BTD
        a_BTD = attention_norm(x_BTD) if is_pre else x_BTD
        y_BTD, kv = attention(mixed(a_BTD, positions_BT, before[0]), mask, positions_BT, kv)
        x_BTD = x_BTD + drop(y_BTD, dropout)
        x_BTD = x_BTD if is_pre else attention_norm(x_BTD)
        f_BTD = feed_forward_norm(x_BTD) if is_pre else x_BTD
        x_BTD = x_BTD + drop(feed_forward(mixed(f_BTD, positions_BT, before[1])), dropout)
        return x_BTD if is_pre else feed_forward_norm(x_BTD), cache and LayerCache(kv, (a_BTD[:, -1], f_BTD[:, -1]))


class Transformer(nn.Module):
    """L blocks and, with `pre`, a final norm: those blocks leave the residual stream unnormalised."""

    config: ModelConfig
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask: Mask, positions_BT: jax.Array, cache=None, dropout=None):
        """Returns (x_BTD, cache), with one cache entry per layer. Sows `residual_BTD` before and after each block."""
        config = self.config
        x_BTD = Dropout()(x_BTD, dropout)
        self.sow("intermediates", "residual_BTD", x_BTD)
        has_side_outputs = cache is not None or self.is_initializing() or self.is_mutable_collection("intermediates")
        new_cache = []
        for layer in range(config.num_layers):
            layer_cache = None if cache is None else cache[layer]
            block = Block(config, self.kernels, name=f"block_{layer}")
            if config.remat and not has_side_outputs:
                x_BTD = self.kernels.recompute(block, x_BTD, mask, positions_BT, None, dropout)
            else:
                x_BTD, layer_cache = block(x_BTD, mask, positions_BT, layer_cache, dropout)
            self.sow("intermediates", "residual_BTD", x_BTD)
            new_cache.append(layer_cache)
        if config.norm_placement == "pre":
            x_BTD = Norm(config, self.kernels, name="final_norm")(x_BTD)
        return x_BTD, None if cache is None else tuple(new_cache)
