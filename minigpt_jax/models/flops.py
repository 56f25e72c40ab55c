"""How much there is to compute."""

from minigpt_jax.config import ModelConfig


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations of training on a token that no implementation can do without.

    Six for each weight that it is multiplied with, two forward and four backward (Kaplan et al. 2020, section 2.1), and as
    many for each pair of features in the scores and sums of causal attention, which looks at half of the context on average.
    """
    D, F, kv = config.embed_dim, config.ff_dim, config.kv_heads * config.head_size
    block = 2 * D * D + 2 * D * kv + (3 if config.activation == "swiglu" else 2) * D * F
    return 6.0 * (config.num_layers * (block + D * config.context_length) + D * config.known_vocab_size)
