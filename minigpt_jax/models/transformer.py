"""The block, and the stack of blocks; it does not know what its inputs stand for."""

import jax
from flax import linen as nn

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.attention import CAUSAL, KVCache, MultiHeadAttention
from minigpt_jax.models.layers import FeedForward, Norm


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream.

    `pre` normalises what goes into a sub-layer, x + f(norm(x)), as GPT-2 does; `post` normalises the sum, norm(x + f(x)),
    as the original paper does. `pre` trains at higher rates and with less warmup (Xiong et al. 2020).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, mask_BTS, positions_BT, cache=None, deterministic=True) -> tuple[jax.Array, KVCache | None]:
        config = self.config
        attention = MultiHeadAttention(config, name="attention")
        feed_forward = FeedForward(config, name="feed_forward")
        attention_norm, feed_forward_norm = Norm(config, name="attention_norm"), Norm(config, name="feed_forward_norm")
        dropout = nn.Dropout(config.dropout, deterministic=deterministic)

        if config.norm_placement == "pre":
            y_BTD, cache = attention(attention_norm(x_BTD), mask_BTS, positions_BT, cache)
            x_BTD = x_BTD + dropout(y_BTD)
            x_BTD = x_BTD + dropout(feed_forward(feed_forward_norm(x_BTD)))
        else:
            y_BTD, cache = attention(x_BTD, mask_BTS, positions_BT, cache)
            x_BTD = attention_norm(x_BTD + dropout(y_BTD))
            x_BTD = feed_forward_norm(x_BTD + dropout(feed_forward(x_BTD)))
        return x_BTD, cache


def run_anew(block: Block, x_BTD, mask_BTS, positions_BT, deterministic: bool) -> jax.Array:
    """The block's output, keeping for its gradient what goes in alone: the block runs anew for it (Chen et al. 2016).

    What nn.remat promises. On a CPU, XLA takes out the barriers that it relies on and keeps everything all the same.
    """
    unbound, variables = block.unbind()
    is_causal = mask_BTS is CAUSAL
    rngs = None if deterministic else {"dropout": block.make_rng("dropout")}
    others = (None if is_causal else mask_BTS, positions_BT, rngs)  # what has no gradient

    def run(variables, x_BTD, others):
        mask_BTS, positions_BT, rngs = others
        mask_BTS = CAUSAL if is_causal else mask_BTS
        return unbound.apply(variables, x_BTD, mask_BTS, positions_BT, None, deterministic, rngs=rngs)[0]

    def forward(*inputs):
        return run(*inputs), inputs

    def backward(inputs, dy_BTD):
        variables, x_BTD, others = inputs
        # The zero makes the second run wait for dy, and so for the blocks after this one. (Where dy is not finite it is NaN;
        # so are the gradients then anyway.)
        x_BTD = x_BTD + 0 * dy_BTD[:, :1, :1]
        _, gradient = jax.vjp(lambda variables, x_BTD: run(variables, x_BTD, others), variables, x_BTD)
        return *gradient(dy_BTD), None

    anew = jax.custom_vjp(run)
    anew.defvjp(forward, backward)
    return anew(variables, x_BTD, others)


class Transformer(nn.Module):
    """L blocks and, where the blocks leave the residual stream without one (`pre`), a last norm."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BTS: jax.Array | str | None,
        positions_BT: jax.Array,
        cache: tuple[KVCache, ...] | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, tuple[KVCache, ...] | None]:
        """Returns (x_BTD, cache), the cache with one KVCache a layer, or None where none was given.

        `mask_BTS` is True where attention is allowed: CAUSAL for GPT, None where everything may see everything.
        `positions_BT` are read by rotary attention and by the cache. With `cache` given, x is appended to it and attends
        to what it then holds.
        `deterministic=False` drops out, with the rng named "dropout".
        """
        config = self.config
        x_BTD = nn.Dropout(config.dropout, deterministic=deterministic)(x_BTD)
        new_cache = []
        for layer in range(config.num_layers):
            layer_cache = None if cache is None else cache[layer]
            block = Block(config, name=f"block_{layer}")
            if config.remat and cache is None and not self.is_initializing():
                x_BTD = run_anew(block, x_BTD, mask_BTS, positions_BT, deterministic)
            else:
                x_BTD, layer_cache = block(x_BTD, mask_BTS, positions_BT, layer_cache, deterministic)
            new_cache.append(layer_cache)
        if config.norm_placement == "pre":
            x_BTD = Norm(config, name="final_norm")(x_BTD)
        return x_BTD, None if cache is None else tuple(new_cache)
