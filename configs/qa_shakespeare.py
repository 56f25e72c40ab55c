"""Questions about a passage of four speeches: who says a line, what is next, which play. Needs the extra `bpe`.

python scripts/train.py --config qa_shakespeare
python scripts/evaluate.py --workdir runs/qa_shakespeare

Training makes new passages in every step, of random short speeches and a random title, and asks up to six questions about
each. Validation asks one question about each passage of four plays that are held out. `evaluate.py` prints exact matches by
kind of question (exact_match_who, _next, _play), beside what naming the passage's most frequent speaker gives (guess_who).

Not measured yet.
"""

from minigpt_jax.config import ChatConfig, Config, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        # Two wide heads without QK-norm, since attention has to pick out single tokens to copy them.
        model=ModelConfig(num_heads=2, context_length=256, vocab_size=1024, qk_norm=False, tie_embeddings=True),
        training=TrainingConfig(
            batch_size=8,
            steps=3000,
            learning_rate=2e-3,
            eval_batches=20,
            sample_every=500,
        ),
        data=ChatConfig(dataset="qa_shakespeare", tokenizer="bpe"),
    )
