"""The shape of the smallest GPT-2 (Radford et al. 2019): 124 million parameters, context 1024. Meant for a GPU.

python scripts/train.py --config gpt2_124m --dataset my_texts/ --tokenizer path/to/vocab.json

`vocab.json`, with `merges.txt` beside it, is GPT-2's tokenizer; without --tokenizer the merges are learnt from the texts.
Its 50257 tokens are padded to 50304 embeddings, a multiple of 64, because matrix units compute in blocks; the padding is
never a token. A step is half a million tokens in 16 micro-batches, and the run 10 billion tokens.

Not measured: this project has not run on a GPU yet.
"""

from minigpt_jax.config import Config, DataConfig, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=12, num_heads=12, embed_dim=768, ff_dim=3072, context_length=1024, vocab_size=50257,
            vocab_multiple=64, bias=True, positions="learned", norm="layernorm", activation="gelu", qk_norm=False,
            tie_embeddings=True, init="gpt2", dtype="bfloat16",
        ),
        training=TrainingConfig(
            batch_size=512, grad_accumulation=16, steps=19_000, learning_rate=6e-4, min_learning_rate=6e-5,
            warmup_steps=700, beta2=0.95,
        ),
        data=DataConfig(tokenizer="bpe"),
    )  # fmt: skip
