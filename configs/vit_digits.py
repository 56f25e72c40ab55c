"""A vision transformer that reads handwritten digits.

python scripts/train.py --config vit_digits
"""

from minigpt_jax.config import Config, ImageConfig, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=3, num_heads=4, embed_dim=96, ff_dim=384, context_length=50,
            positions="learned", norm="rmsnorm", activation="relu2", qk_norm=True,
        ),
        training=TrainingConfig(
            batch_size=64, steps=2000, learning_rate=2e-3, min_learning_rate=2e-5, warmup_steps=100, ema=0.995,
            eval_every=500, checkpoint_every=1000, sample_every=1000, log_every=100,
        ),
        data=ImageConfig(),
    )  # fmt: skip
