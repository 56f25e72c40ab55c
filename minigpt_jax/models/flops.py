"""The number of weights and of floating-point operations."""

from minigpt_jax.config import ModelConfig


def block_weights(config: ModelConfig) -> int:
    """Weights of the matrices of a block."""
    D, F, kv = config.embed_dim, config.ff_dim, config.kv_heads * config.head_size
    return 2 * D * D + 2 * D * kv + (3 if config.activation == "swiglu" else 2) * D * F


def num_weights(config: ModelConfig) -> int:
    """Weights of all matrices: those of the blocks and of the embeddings. All other parameters are vectors."""
    rows = config.num_embeddings * (1 if config.tie_embeddings else 2)
    rows += config.context_length if config.positions == "learned" else 0
    return config.num_layers * block_weights(config) + rows * config.embed_dim


def trunk_flops_per_token(config: ModelConfig, num_keys: float) -> float:
    """Floating-point operations that training the blocks on one token needs in any implementation.

    Six for each weight: two forward and four backward (Kaplan et al. 2020, section 2.1). Likewise six for each product in
    the scores and weighted sums of attention over `num_keys` keys.
    """
    return 6.0 * config.num_layers * (block_weights(config) + 2 * config.embed_dim * num_keys)


def flops_per_token(config: ModelConfig, causal: bool = True) -> float:
    """The same with the logits. Attention covers the context, or half of it on average under a causal mask."""
    num_keys = config.context_length * (0.5 if causal else 1)
    return trunk_flops_per_token(config, num_keys) + 6.0 * config.embed_dim * config.known_vocab_size
