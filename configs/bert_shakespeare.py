"""A small BERT that fills in words of Shakespeare's plays.

python scripts/train.py --config bert_shakespeare
python scripts/fill_mask.py --workdir runs/bert_shakespeare --prompt "To be or [MASK] to be"

Measured with seeds 0, 1 and 2 on 2026-11-29 on one core of an AMD EPYC server (AVX2 only), jax 0.10.2, Python 3.11, in
seven minutes each. Share of the hidden tokens of the validation split that are named right, beside two others:

    BERT, from both sides       61.5, 61.4, 61.8 %   2.284, 2.284, 2.265 nats per hidden token
    GPT, from the left only     51.7, 51.4, 51.5 %   2.508, 2.526, 2.520 nats per next token
    always the most frequent    35.9 %

The GPT has the same size, vocabulary and training settings, but is asked for every next token:

python scripts/train.py --config shakespeare_word --vocab_size 5000 --tie_embeddings --batch_size 16 --steps 2000 \
    --learning_rate 2e-3 --min_learning_rate 2e-4 --warmup_steps 100 --ema 0.99 --workdir runs/gpt_word
"""

from minigpt_jax.config import Config, MaskedDataConfig, ModelConfig, ReferenceResult, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=4, num_heads=4, embed_dim=128, ff_dim=512, context_length=64, vocab_size=5_000, tie_embeddings=True,
        ),
        training=TrainingConfig(
            batch_size=16, steps=2000, learning_rate=2e-3, min_learning_rate=2e-4, warmup_steps=100, ema=0.99,
        ),
        data=MaskedDataConfig(tokenizer="word"),
        reference_result=ReferenceResult(mean=0.615, spread=0.002, seeds=3, measure="accuracy"),
    )  # fmt: skip
