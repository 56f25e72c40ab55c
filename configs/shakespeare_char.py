"""The default: a small model of Shakespeare's characters, in minutes on a laptop's CPU."""

from minigpt_jax.config import Config, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=4, num_heads=4, embed_dim=128, ff_dim=512, context_length=64,
            positions="rotary", norm="rmsnorm", activation="relu2", qk_norm=True,
        ),
        training=TrainingConfig(batch_size=12, steps=2000, learning_rate=4e-3, min_learning_rate=4e-4, warmup_steps=100),
    )  # fmt: skip
