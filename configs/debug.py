"""A model too small to learn much, for tests and for trying things out."""

from minigpt_jax.config import Config, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(num_layers=2, num_heads=2, embed_dim=32, ff_dim=64, context_length=16, dropout=0.1),
        training=TrainingConfig(
            batch_size=4,
            steps=20,
            warmup_steps=5,
            eval_every=10,
            eval_batches=4,
            checkpoint_every=10,
            sample_every=10,
            log_every=5,
        ),
    )
