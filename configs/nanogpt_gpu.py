"""nanoGPT's published GPU configuration of Shakespeare's characters: 10.7 million parameters. Meant for a GPU.

python scripts/train.py --config nanogpt_gpu

Not measured: this project has not run on a GPU yet, and two CPU cores would take days. nanoGPT reports a validation loss of
1.4697 nats per character on random batches. It also drops attention weights, which this model does not.
"""

from minigpt_jax.config import Config, DataConfig, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=6, num_heads=6, embed_dim=384, ff_dim=1536, context_length=256, dropout=0.2,
            positions="learned", norm="layernorm", activation="gelu", qk_norm=False, tie_embeddings=True, init="gpt2",
            dtype="bfloat16",
        ),
        training=TrainingConfig(batch_size=64, steps=5000, learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=100),
        data=DataConfig(dataset="tiny_shakespeare"),
    )  # fmt: skip
