"""The model that the project is named after: 256 wide, 8 heads, 6 layers, with sinusoidal positions as in the paper."""

from minigpt_jax.config import Config, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=6, num_heads=8, embed_dim=256, ff_dim=1024, context_length=256, dropout=0.1,
            positions="learned", norm="layernorm", activation="gelu", qk_norm=False, tie_embeddings=True, bias=True,
        ),
        training=TrainingConfig(batch_size=8, steps=1000, learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=100),
    )  # fmt: skip
