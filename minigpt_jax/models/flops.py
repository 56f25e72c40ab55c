"""The number of floating-point operations."""

from minigpt_jax.config import ModelConfig


def flops_per_token(config: ModelConfig, causal: bool = True) -> float:
    """Floating-point operations that training on one token needs in any implementation.

    Six for each weight: two forward and four backward (Kaplan et al. 2020, section 2.1). Likewise six for each product in
    the scores and weighted sums of attention, which covers the context, or half of it on average under a causal mask.
    """
    D, F, kv = config.embed_dim, config.ff_dim, config.kv_heads * config.head_size
    block = 2 * D * D + 2 * D * kv + (3 if config.activation == "swiglu" else 2) * D * F
    attention = D * config.context_length * (1 if causal else 2)
    return 6.0 * (config.num_layers * (block + attention) + D * config.known_vocab_size)
