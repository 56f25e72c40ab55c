"""The layers: dense, norm, multi-head attention, feed-forward, embeddings. `kernels.f` is the plain f or a faster one."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from minigpt_jax.config import ModelConfig
from minigpt_jax.models import lora, ops
from minigpt_jax.models.attention import ages, attention_weights
from minigpt_jax.models.initial import embedding_init, kernel_init, residual_init
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.qk_norm import QKNorm


def Dense(features: int, config: ModelConfig, kernels: Kernels, name: str, init=None, bias=True) -> nn.Dense:  # noqa: N802
    """x W + b over the last axis, in the config's dtype. The config chooses whether to add b. `init` initialises W."""
    return lora.AdaptableDense(
        features, use_bias=bias and config.bias, dtype=config.dtype, kernel_init=init or kernel_init(config), name=name,
        dot_general=lambda x, kernel_DF, *_, **__: kernels.matmul(x, kernel_DF),
    )  # fmt: skip


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), which does not subtract the mean; then a learned scale.
    The default epsilon is that of GPT-2 and Llama 2. Linen has 1e-6 and, in LayerNorm, the less accurate E[x²] - E[x]²."""

    config: ModelConfig
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config, shape = self.config, x_BTD.shape[-1:]
        if config.norm == "layernorm":
            x_BTD = self.kernels.center(x_BTD.astype(jnp.float32))
        scale_D = self.param("scale", nn.initializers.ones, shape)
        y_BTD = self.kernels.unit_rms(x_BTD, config.norm_epsilon) * scale_D[None, None]
        if config.norm == "layernorm" and config.bias:
            y_BTD += self.param("bias", nn.initializers.zeros, shape)[None, None]
        return y_BTD.astype(config.dtype)


class MultiHeadAttention(nn.Module):
    """Attention in H heads of size K = D / H, concatenated and projected ("Attention Is All You Need", section 3.2.2).
    With G < H key/value heads, H / G query heads share each of them, for a smaller cache (Ainslie et al. 2023)."""

    config: ModelConfig
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask: Mask, positions_BT: jax.Array, cache=None):
        """Returns (y_BTD, cache). Attends within x or, with a cache, appends the keys and values of x to it and attends to
        all of it. Sows `heads_BTHK` and, without a cache, `weights_BHTS`. Raises ValueError for a mask unfit for a cache."""
        config, kernels = self.config, self.kernels
        (B, T, D), H, G, K = x_BTD.shape, config.num_heads, config.kv_heads, config.head_size
        q_BTHK = Dense(H * K, config, kernels, "query")(x_BTD).reshape(B, T, H, K)
        k_BTGK = Dense(G * K, config, kernels, "key")(x_BTD).reshape(B, T, G, K)
        v_BTGK = Dense(G * K, config, kernels, "value")(x_BTD).reshape(B, T, G, K)
        if config.qk_norm:
            q_BTHK, k_BTGK = (QKNorm(config, kernels, name=f"{f}_norm")(x) for f, x in (("query", q_BTHK), ("key", k_BTGK)))
        if config.positions == "rotary":
            q_BTHK, k_BTGK = ops.rotate(q_BTHK, positions_BT), ops.rotate(k_BTGK, positions_BT)

        if cache is None:
            k_BTHK, v_BTHK = jnp.repeat(k_BTGK, H // G, axis=2), jnp.repeat(v_BTGK, H // G, axis=2)
            o_BTHK = kernels.attention(q_BTHK, k_BTHK, v_BTHK, mask)
            if self.is_mutable_collection("intermediates"):  # some kernels never form the weights
                self.sow("intermediates", "weights_BHTS", attention_weights(q_BTHK, k_BTHK, mask, ages(T, T)))
        elif mask.only_past:
            cache = cache.append(k_BTGK, v_BTGK)
            o_BTHK = cache.attend(q_BTHK, mask, positions_BT)
        else:
            raise ValueError(f"attention with a cache needs a causal mask without padding or segments, not {mask}")
        self.sow("intermediates", "heads_BTHK", o_BTHK)
        return Dense(D, config, kernels, "output", init=residual_init(config))(o_BTHK.reshape(B, T, H * K)), cache


class FeedForward(nn.Module):
    """f(x W₁ + b₁) W₂ + b₂ at every position ("Attention Is All You Need", equation 2), where the config chooses f.
    SwiGLU (Shazeer 2020) has a third matrix, the gate: (f(x W₃) ⊙ x W₁) W₂."""

    config: ModelConfig
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config, kernels = self.config, self.kernels
        h_BTF = Dense(config.ff_dim, config, kernels, "up")(x_BTD)
        if config.activation == "swiglu":
            h_BTF = kernels.activate(Dense(config.ff_dim, config, kernels, "gate")(x_BTD), "swiglu") * h_BTF
        else:
            h_BTF = kernels.activate(h_BTF, config.activation)
        return Dense(config.embed_dim, config, kernels, "down", init=residual_init(config))(h_BTF)


class TokenAndPosition(nn.Module):
    """Token embeddings plus, for learned and sinusoidal positions, position embeddings."""

    config: ModelConfig
    num_special: int = 0  # rows after the vocabulary and its padding: tokens that are only inputs, such as [MASK]

    def setup(self):
        config, init = self.config, embedding_init(self.config)
        self.tokens = nn.Embed(config.num_embeddings + self.num_special, config.embed_dim, embedding_init=init)
        if config.positions == "learned":
            self.positions = nn.Embed(config.context_length, config.embed_dim, embedding_init=init)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """x_BTD from token ids in [0, V) and positions in [0, context_length). Out-of-range ids give NaN, not an error."""
        config, x_BTD = self.config, self.tokens(tokens_BT)
        if config.positions == "learned":
            x_BTD += self.positions(positions_BT)
        if config.positions == "sinusoidal":
            table_TD = ops.sinusoidal_positions(config.context_length, config.embed_dim)
            encoding_BTD = table_TD.at[positions_BT].get(mode="fill", fill_value=jnp.nan)
            x_BTD = x_BTD * config.embed_dim**0.5 + encoding_BTD  # √D: to the scale of the sinusoids (section 3.4)
        return x_BTD.astype(config.dtype)  # last, since the gradient of a lookup is a long sum


def vocabulary_logits(x_BTD: jax.Array, embedding: TokenAndPosition, kernels: Kernels) -> jax.Array:
    """logits_BTV in float32: x W, where W is the `head` or the transposed token embedding (Press & Wolf 2017). Padding and
    special tokens have none. Call it inside a module, which then owns the head."""
    config = embedding.config
    if config.tie_embeddings:
        logits_BTV = jnp.dot(x_BTD, embedding.tokens.embedding.astype(x_BTD.dtype).T)
    else:
        logits_BTV = Dense(config.num_embeddings, config, kernels, "head", bias=False)(x_BTD)
    return logits_BTV[..., : config.vocab_size].astype(jnp.float32)
