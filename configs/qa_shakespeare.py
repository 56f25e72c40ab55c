"""Questions about a passage of four speeches: who says a line, what is next, which play. Needs the extra `bpe`.

python scripts/train.py --config qa_shakespeare
python scripts/evaluate.py --workdir runs/qa_shakespeare

Training makes new passages in every step, of random short speeches and a random title, and asks up to six questions about
each. Validation asks one question about each passage of four plays that are held out. `evaluate.py` prints exact matches by
kind of question (exact_match_who, _next, _play), beside what naming the passage's most frequent speaker gives (guess_who).

The goal, 70 % exact matches on held-out plays within 15 minutes on two cores, is not reached. Measured with seed 0 on
2026-11-29 on two cores of an AMD EPYC server (AVX2 only), jax 0.10.2, Python 3.11, with `--max_minutes 8 --eval_batches 8`,
partly beside other work: 5,229 of the 8,000 steps. The checkpoint of step 4,500 answers 512 held-out questions:

    kind    right on held-out plays    guessed    right on passages of the training plays
    who     17.8 %                     48.0 %     23.6 %
    next     0.0 %                      0.0 %      0.0 %
    play     0.0 %                      0.0 %     99.5 %
    all      7.0 %                     18.9 %     46.1 %

Loss on the answers: 3.563 nats per token, 43.8 % of tokens right; both were still improving. The 34 titles are learned by
heart rather than read. The full 8,000 steps are not measured.
"""

from minigpt_jax.config import ChatConfig, Config, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        # Two wide heads without QK-norm, since attention has to pick out single tokens to copy them.
        model=ModelConfig(
            num_layers=3, num_heads=2, context_length=256, vocab_size=1024, qk_norm=False, tie_embeddings=True
        ),
        training=TrainingConfig(
            batch_size=4, steps=8000, learning_rate=2e-3, eval_every=500, eval_batches=40, sample_every=1000, log_every=100
        ),
        data=ChatConfig(dataset="qa_shakespeare", tokenizer="bpe"),
    )
