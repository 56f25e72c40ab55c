"""Questions about a passage of four speeches: who says a line, what is next, which play. Needs the extra `bpe`.

python scripts/train.py --config qa_shakespeare
python scripts/evaluate.py --workdir runs/qa_shakespeare

Training makes new passages in every step and asks up to six questions about each: half of them of speeches that follow each
other in a play, half of one to four random speeches, all under a title of random words. Validation asks one question about
each passage of four plays that are held out. `evaluate.py` prints exact matches by kind of question (exact_match_who, _next,
_play), beside what naming the passage's most frequent speaker gives (guess_who).

The goal, 70 % exact matches on held-out plays within 15 minutes on two cores, is not reached yet. Measured with seed 0 on
2026-11-29 on two cores of an AMD EPYC server (AVX2 only), jax 0.10.2, Python 3.11, with `--steps 6000 --max_minutes 11
--eval_every 1000 --eval_batches 8`, which stopped at step 5,128. The checkpoint of step 5,000, asked 512 held-out questions:

    kind    right    guessed
    who     44.6 %   48.0 %
    next    44.4 %    0.0 %
    play    76.2 %    0.0 %
    all     56.4 %   18.9 %

Loss on the answers: 0.260 nats per token, 95.4 % of tokens right. The full 7,000 steps are not measured.
"""

from minigpt_jax.config import ChatConfig, Config, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        # No QK-norm, and two heads rather than four, since attention has to pick out single tokens to copy them.
        model=ModelConfig(
            num_heads=2, context_length=256, vocab_size=1024, qk_norm=False, token_shift=True, tie_embeddings=True
        ),
        training=TrainingConfig(
            batch_size=4,
            steps=9000,
            learning_rate=2e-3,
            min_learning_rate=1e-5,
            ema=0.998,
            eval_every=1000,
            checkpoint_every=1000,
            eval_batches=20,
            sample_every=3000,
            log_every=100,
        ),
        data=ChatConfig(dataset="qa_shakespeare", tokenizer="bpe"),
    )
