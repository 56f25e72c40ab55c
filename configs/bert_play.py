"""Comedy, history or tragedy? A small encoder that classifies passages of plays that it was not trained on.

python scripts/train.py --config bert_play

The words of 31 of Shakespeare's plays, without the names of the speakers, in passages of 128 tokens; the passages of seven
other plays are for validation. To start from a masked language model:

python scripts/train.py --config bert_play --init_from runs/bert_shakespeare --workdir runs/bert_play_2

Not measured yet.
"""

from minigpt_jax.config import Config, LabelledTextConfig, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=2, num_heads=4, embed_dim=64, ff_dim=256, context_length=128, vocab_size=5_000, dropout=0.3,
        ),
        training=TrainingConfig(
            batch_size=32, steps=600, learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=50, weight_decay=0.3,
            eval_every=100, sample_every=300, ema=0.98,
        ),
        data=LabelledTextConfig(),
    )  # fmt: skip
