"""The project's namesake: 6 layers, 8 heads, width 256, with sinusoidal positions as in "Attention Is All You Need".

python scripts/train.py --config mini_gpt

Measured on 2026-11-24 on two cores of an Intel Xeon server (AVX-512), jax 0.10.2, Python 3.11: 558 seconds, peak memory
1.1 GB. Loss on the full validation split: 1.822 nats per character (seed 0). It was still falling: the run covers 2 million
tokens, half of the text. With learned positions, tied embeddings and smaller initial weights the training loss was 2.46
after 400 steps, compared with 2.16 here.
"""

from minigpt_jax.config import Config, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=6, num_heads=8, embed_dim=256, ff_dim=1024, context_length=256, dropout=0.1,
            positions="sinusoidal", norm="layernorm", activation="gelu", qk_norm=False, bias=True,
        ),
        training=TrainingConfig(batch_size=8, steps=1000, learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=100),
    )  # fmt: skip
