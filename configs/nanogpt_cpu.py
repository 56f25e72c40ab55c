"""nanoGPT's published CPU configuration, as a baseline to validate this implementation.

python scripts/train.py --config nanogpt_cpu

Measured on 2026-11-23 on two cores of an AMD EPYC server (AVX-512), jax 0.10.2, Python 3.11: 106 seconds, peak memory
0.9 GB. Loss on the full validation split of tiny Shakespeare: 1.900 nats per character (seed 0). nanoGPT reports 1.88, on
random batches.
"""

from minigpt_jax.config import Config, DataConfig, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=4, num_heads=4, embed_dim=128, ff_dim=512, context_length=64,
            positions="learned", norm="layernorm", activation="gelu", qk_norm=False, tie_embeddings=True, init="gpt2",
        ),
        training=TrainingConfig(batch_size=12, steps=2000, learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=100),
        data=DataConfig(dataset="tiny_shakespeare"),
    )  # fmt: skip
