"""Who answers whom: a speech in the plays is the user's, the next one is the answer. Needs the extra `bpe`.

python scripts/train.py --config chat_shakespeare
python scripts/train.py --config chat_shakespeare --dataset my_conversations.jsonl --workdir runs/mine
python scripts/chat.py --workdir runs/chat_shakespeare

Four plays are held out for validation. Not measured yet.
"""

from minigpt_jax.config import ChatConfig, Config, ModelConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(context_length=192, vocab_size=2048, dropout=0.1),
        training=TrainingConfig(batch_size=8, steps=1000, learning_rate=2e-3, eval_batches=20),
        data=ChatConfig(dataset="chat_shakespeare", tokenizer="bpe"),
    )
