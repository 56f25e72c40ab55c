"""What follows from a config and its text before anything is trained; and the loss of given parameters on that text."""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from minigpt_jax.config import Config
from minigpt_jax.data import batches, corpora, tokenizers
from minigpt_jax.errors import DataError
from minigpt_jax.models.gpt import GPT
from minigpt_jax.training.optimizer import make_optimizer
from minigpt_jax.training.step import TrainState, eval_step, init_state


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config with all its parts made."""

    config: Config  # with the vocabulary's size filled in
    tokenizer: tokenizers.Tokenizer
    splits: dict[str, np.ndarray]
    text_sha256: str
    num_steps: int
    model: GPT
    optimizer: optax.GradientTransformation

    @property
    def root_key(self) -> jax.Array:
        return jax.random.key(self.config.training.seed)

    def new_state(self) -> TrainState:
        """The state before the first step; its `jax.eval_shape` is what `checkpoint.restore` needs."""
        return init_state(self.root_key, model=self.model, optimizer=self.optimizer, ema=self.config.training.ema)


def prepare(config: Config) -> Experiment:
    """Reads and tokenizes the text. Raises DataError where the text does not fit the config."""
    text = corpora.load_text(config.data.dataset, config.data.data_dir)
    tokenizer = tokenizers.train_tokenizer(config.data.tokenizer, text)
    if config.model.vocab_size not in (None, tokenizer.vocab_size):
        raise DataError(
            f"vocab_size={config.model.vocab_size}, but the text has {tokenizer.vocab_size} different characters"
        )
    model_config = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model_config)

    tokens = batches.tokenize(text, tokenizer, Path(config.data.data_dir or corpora.default_data_dir()))
    splits = batches.split(tokens, model_config.context_length)
    training = config.training
    num_steps = training.steps
    if num_steps is None:
        num_rows = (training.epochs or 1) * batches.num_windows(splits["train"], model_config.context_length)
        num_steps = math.ceil(num_rows / training.batch_size)
    return Experiment(
        config=config,
        tokenizer=tokenizer,
        splits=splits,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        num_steps=num_steps,
        model=GPT(model_config),
        optimizer=make_optimizer(training, num_steps),
    )


def evaluate(experiment: Experiment, params: Any, split: str = "val", limit: int | None = None) -> float:
    """Mean loss over a split in nats per token, or over `limit` batches of it that are always the same."""
    config = experiment.config
    tokens, T, B = experiment.splits[split], config.model.context_length, config.training.batch_size
    parts = [eval_step(params, batch, model=experiment.model) for batch in batches.evaluation_batches(tokens, T, B, limit)]
    total, count = np.sum(jax.device_get(parts), axis=0, dtype=np.float64)
    return float(total / count)
