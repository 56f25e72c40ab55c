"""What follows from a config and its text before anything is trained; and the loss of given parameters on that text."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from minigpt_jax.config import Config
from minigpt_jax.data import batches, corpora
from minigpt_jax.data.text_files import Scan, Text, scan
from minigpt_jax.data.token_file import Tokens, tokenize
from minigpt_jax.data.tokenizers import Tokenizer, make_tokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.files import sha256
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.runtime import cache_dir
from minigpt_jax.training.optimizer import make_optimizer
from minigpt_jax.training.state import TrainState, init_state
from minigpt_jax.training.step import loss_and_count

TRAIN_FRACTION = 0.9  # of the characters, where there is no text for validation


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config with all its parts made."""

    config: Config  # with the vocabulary's size filled in
    tokenizer: Tokenizer
    splits: dict[str, Tokens]  # train, val
    text_sha256: str
    num_steps: int
    model: GPT
    optimizer: optax.GradientTransformation

    @property
    def root_key(self) -> jax.Array:
        return jax.random.key(self.config.training.seed)

    def batch(self, step: int) -> batches.Batch:
        """What the step trains on, by the number of the steps before it."""
        settings, ids = self.config.training, self.splits["train"].ids
        return batches.batch_at(ids, self.config.model.context_length, settings.batch_size, settings.seed, step)

    @property
    def train_step_kwargs(self) -> dict[str, Any]:
        """The static arguments of `train_step`."""
        settings = self.config.training
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "grad_accumulation": settings.grad_accumulation,
            "ema": settings.ema,
        }

    def new_state(self, params: Any = None) -> TrainState:
        """The state before the first step, with these parameters or freshly drawn ones.

        Its `jax.eval_shape` is what `checkpoint.restore` needs.
        """
        return init_state(self.root_key, params, model=self.model, optimizer=self.optimizer, ema=self.config.training.ema)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What the weights of a run were trained with, and what they are never to be without."""

    tokenizer: Tokenizer
    text_sha256: str


def prepare(config: Config, origin: Origin | None = None, *, kernels: Kernels = PLAIN) -> Experiment:
    """Reads the texts and tokenizes them, with the tokenizer of `origin` or one that is trained on them.

    Raises DataError where a text does not fit the config, or is not that of `origin`.
    """
    texts = read_texts(config)
    if origin is not None and origin.text_sha256 != texts.sha256:
        raise DataError(
            f"{config.data.dataset} is no longer the text of the run: bring that back, or train anew with --overwrite"
        )
    tokenizer = origin.tokenizer if origin else train_tokenizer(config, texts)
    splits = {
        "train": tokenize(texts.train, texts.train_scan, tokenizer, texts.data_dir),
        "val": tokenize(texts.val, texts.val_scan, tokenizer, texts.data_dir),
    }
    model_config = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    require_windows(splits, model_config.context_length)
    training = config.training
    num_steps = training.steps
    if num_steps is None:
        num_rows = (training.epochs or 1) * batches.num_windows(splits["train"].ids, model_config.context_length)
        if num_rows / training.batch_size >= 2**31:  # JAX counts them in 32 bits
            raise UsageError(f"epochs={training.epochs} are too many: there can be at most {2**31 - 1} steps")
        num_steps = math.ceil(num_rows / training.batch_size)
    return Experiment(
        config=dataclasses.replace(config, model=model_config),
        tokenizer=tokenizer,
        splits=splits,
        text_sha256=texts.sha256,
        num_steps=num_steps,
        model=GPT(model_config, kernels),
        optimizer=make_optimizer(training, num_steps),
    )


@dataclasses.dataclass(frozen=True)
class Texts:
    """A config's texts for training and validation, each with what is known of the text of which it is a part."""

    train: Text
    val: Text
    train_scan: Scan
    val_scan: Scan
    data_dir: Path

    @property
    def sha256(self) -> str:
        """Of the text, or of both where there are two."""
        if self.train_scan is self.val_scan:
            return self.train_scan.sha256
        return sha256(f"{self.train_scan.sha256} {self.val_scan.sha256}".encode())


def read_texts(config: Config) -> Texts:
    """Where the config names no text for validation, the first 90 % of the characters are for training.

    Of the characters and not of the tokens, so that whatever the tokenizer the same text is predicted. Raises DataError.
    """
    data_dir = Path(config.data.data_dir or cache_dir())

    def read(dataset: str) -> tuple[Text, Scan]:
        text = corpora.open_text(dataset, data_dir, config.data.encoding)
        return text, scan(text)

    text, seen = read(config.data.dataset)
    if config.data.val_dataset is not None:
        val_text, val_seen = read(config.data.val_dataset)
        return Texts(text, val_text, seen, val_seen, data_dir)
    end = int(seen.num_characters * TRAIN_FRACTION)
    return Texts(dataclasses.replace(text, end=end), dataclasses.replace(text, start=end), seen, seen, data_dir)


def train_tokenizer(config: Config, texts: Texts) -> Tokenizer:
    """Words and merges are learnt from the training text alone; but every character of both texts gets its id."""
    parts = [texts.train, texts.val] if config.data.tokenizer == "char" else [texts.train]
    is_one_document = texts.train_scan.num_documents == texts.val_scan.num_documents == 1
    breaks = [] if is_one_document else ["\n"]  # what may stand between documents
    pieces = itertools.chain(breaks, (piece for part in parts for _, piece in part.pieces()))
    return make_tokenizer(config.data.tokenizer, pieces, config.model.vocab_size)


def require_windows(splits: dict[str, Tokens], context_length: int) -> None:
    """Raises DataError where a split is shorter than one window."""
    shortest = min(len(part.ids) for part in splits.values())
    for name, part in splits.items():
        if len(part.ids) <= context_length:
            raise DataError(
                f"the {name} split has {len(part.ids)} tokens and context_length={context_length} needs at least "
                f"{context_length + 1}: use a longer text"
                + (f", or a context_length of at most {shortest - 1}" if shortest > 1 else "")
            )


@functools.partial(jax.jit, static_argnames="model")
def eval_step(params: Any, batch: batches.Batch, *, model: GPT) -> tuple[jax.Array, jax.Array]:
    """Sum of the loss over a batch's targets without dropout, in nats, and their number."""
    return loss_and_count(params, batch, None, model)


def evaluate(
    experiment: Experiment, params: Any, split: str = "val", limit: int | None = None, stride: int | None = None
) -> float:
    """Mean loss over a split in nats per token, or over `limit` batches of it that are always the same.

    `stride` says how far each window is moved: see `batches.evaluation_batches`.
    """
    ids, T, B = experiment.splits[split].ids, experiment.config.model.context_length, experiment.config.training.batch_size
    total = count = 0.0  # in 64 bits
    for batch in batches.evaluation_batches(ids, T, B, limit, stride):
        loss, num_targets = jax.device_get(eval_step(params, batch, model=experiment.model))
        total, count = total + float(loss), count + float(num_targets)
    return total / count


def measures(experiment: Experiment, split: str, loss: float) -> dict[str, float]:
    """What a mean loss over a split, in nats per token, is in units that do not depend on the tokenizer.

    The first token has nothing before it and is not predicted, so its characters do not count. What a word tokenizer takes
    for unknown it need not spell: its bits leave that out, and `unknown_share` says how much it is.
    """
    part, tokenizer = experiment.splits[split], experiment.tokenizer
    num_tokens, first = len(part.ids) - 1, part.ids[:1]
    num_characters = max(part.num_characters - len(tokenizer.decode(first)), 1)
    bits = loss * num_tokens / math.log(2)
    with np.errstate(over="ignore"):  # infinity will do
        perplexity = float(np.exp(np.float64(loss)))
    return {
        "perplexity": perplexity,
        "bits_per_char": bits / num_characters,
        "bits_per_byte": bits / max(part.num_bytes - len(tokenizer.to_bytes(first)), 1),
        "tokens": num_tokens,
        "tokens_per_char": num_tokens / num_characters,
        "unknown_share": part.unknown_share,
    }
