"""Text classification: an encoder is trained to name the class of a passage."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import struct

from minigpt_jax.commands import command
from minigpt_jax.config import Config, LabelledTextConfig
from minigpt_jax.data import batches
from minigpt_jax.data.labelled import Documents, Passages, cut, read_documents
from minigpt_jax.data.tokenizers import Tokenizer, make_tokenizer
from minigpt_jax.data.tokenizers.base import json_text
from minigpt_jax.errors import UsageError, require_choice
from minigpt_jax.files import sha256
from minigpt_jax.interop import load
from minigpt_jax.models.bert import TextClassifier
from minigpt_jax.models.initial import init_params
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.tasks.classification import CLASSES_FILE, class_loss
from minigpt_jax.tasks.evaluation import confusion, means, probabilities
from minigpt_jax.tasks.task import PreviousRun
from minigpt_jax.tasks.text import TextTask, read_same, steps_of, tokenizer_for

PREVIEWED = 5  # passages
PREVIEW_LENGTH = 60  # characters


@struct.dataclass
class ClassOfText:
    """The mean cross-entropy of the classes of passages, in nats. See `tasks.Objective`."""

    model: TextClassifier = struct.field(pytree_node=False)
    dropout: float | None = None

    @classmethod
    def of(cls, config: Config, num_classes: int, kernels: Kernels = PLAIN) -> "ClassOfText":
        model = TextClassifier(dataclasses.replace(config.model, dropout=0.0), num_classes, kernels)
        return cls(model, config.model.dropout or None)

    def init(self, key: jax.Array) -> Any:
        return init_params(key, self.model)

    def logits(self, params: Any, batch: batches.Batch, **options) -> Any:
        return self.model.apply({"params": params}, batch["tokens_BT"], batch["is_token_BT"], **options)

    def loss(self, params: Any, batch: batches.Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        has_dropout = key is not None and self.dropout is not None
        options = {"dropout": self.dropout, "rngs": {"dropout": key}} if has_dropout else {}
        return class_loss(self.logits(params, batch, **options), batch["labels_B"], batch["mask_B"])


@dataclasses.dataclass(frozen=True, eq=False)
class TextClassification(TextTask):
    """See `tasks.Task`."""

    splits: dict[str, Passages]  # train, val
    classes: tuple[str, ...]

    causal = False

    @property
    def files(self) -> dict[str, str]:
        return {**super().files, CLASSES_FILE: classes_json(self.classes)}

    def initial_params(self, sharding: jax.sharding.Sharding) -> Any:
        """With `init_from`, the encoder of a masked language model. The layer that gives the classes is always new."""
        masked = load.initial_params(self.config, self.tokenizer, sharding, load.load_masked)
        if masked is None:
            return None
        new = jax.device_put(self.objective.init(jax.random.key(self.config.training.seed)), sharding)
        return new | {part: masked[part] for part in ("embedding", "transformer")}

    def batch_at(self, step: int) -> batches.Batch:
        settings, passages = self.config.training, self.splits["train"]
        rows = batches.shuffled_rows(len(passages.labels_N), settings.batch_size, settings.seed, step)
        return self.batch("train", rows, np.ones(len(rows), bool))

    def batch(self, split: str, rows: np.ndarray, mask_B: np.ndarray) -> batches.Batch:
        passages = self.splits[split]
        return {
            "tokens_BT": passages.tokens_NT[rows], "is_token_BT": passages.is_token_NT[rows],
            "labels_B": passages.labels_N[rows], "mask_B": mask_B,
        }  # fmt: skip

    def evaluation_batches(self, split: str, limit: int | None = None) -> Iterator[batches.Batch]:
        num_rows, batch_size = len(self.splits[split].labels_N), self.config.training.batch_size
        return (self.batch(split, *each) for each in batches.evaluation_rows(num_rows, batch_size, limit))

    def evaluate(self, params: Any, limit: int | None = None) -> dict[str, float]:
        return means(self.objective, params, self.evaluation_batches("val", limit))

    def measures(self, params: Any, split: str = "val", stride: int | None = None) -> dict[str, float]:
        """Also the accuracy of always answering with the class that is most frequent in training."""
        require_choice("split", split, self.splits)
        if stride is not None:
            raise UsageError(f"stride={stride} has no use here: each passage has one class")
        majority, labels_N = np.bincount(self.splits["train"].labels_N).argmax(), self.splits[split].labels_N
        measured = means(self.objective, params, self.evaluation_batches(split))
        return measured | {"majority_accuracy": float((labels_N == majority).mean()), "passages": len(labels_N)}

    def confusion(self, params: Any, split: str = "val") -> np.ndarray:
        """counts_CC: how many passages of each class (row) the model takes for each class (column), in a whole split."""
        require_choice("split", split, self.splits)
        return confusion(self.objective, params, self.evaluation_batches(split), len(self.classes))

    def preview(self, params: Any) -> str:
        """The starts of some validation passages, each with its class and the most probable one."""
        num_rows = len(self.splits["val"].labels_N)
        rows, mask_B = next(batches.evaluation_rows(num_rows, min(PREVIEWED, num_rows), limit=1))
        batch = self.batch("val", rows, mask_B)
        lines = []
        for row, probs_V in enumerate(np.asarray(probabilities(params, batch, self.objective))):
            text = " ".join(self.tokenizer.decode(batch["tokens_BT"][row][batch["is_token_BT"][row]]).split())
            label, guess = self.classes[batch["labels_B"][row]], self.classes[probs_V.argmax()]
            lines.append(f"{label}, taken for {guess} ({probs_V.max():.0%}): {text[:PREVIEW_LENGTH]}")
        return "\n".join(lines)

    def describe_data(self) -> str:
        num_passages, dataset = len(self.splits["train"].labels_N), data_of(self.config).dataset
        return f"{dataset}, {num_passages} training passages, {len(self.classes)} classes"

    def describe_result(self, measures: Mapping[str, float]) -> str:
        accuracies = f"{measures['accuracy']:.1%} of {measures['passages']} (always the most frequent class: "
        return f"{measures['loss']:.4f} nats per passage, accuracy {accuracies}{measures['majority_accuracy']:.1%})"

    def next_command(self, workdir: Path) -> str:
        return f"Classify a text: {command('classify')} --workdir {workdir} --text TEXT"


def data_of(config: Config) -> LabelledTextConfig:
    assert isinstance(config.data, LabelledTextConfig)  # guaranteed by `config.task`, which is derived from its type
    return config.data


def classes_json(classes: tuple[str, ...]) -> str:
    """The file of a run from which `text_classifier.py` learns the names of the classes."""
    return json_text({"classes": classes})


def prepare(config: Config, previous: PreviousRun | None = None, kernels: Kernels = PLAIN) -> TextClassification:
    """Reads, tokenizes and cuts the documents."""
    data = data_of(config)
    if config.fine_tuning.lora_rank:
        raise UsageError(
            f"lora_rank={config.fine_tuning.lora_rank} would leave the new layer that gives the classes untrained: "
            "omit it, and choose what not to train with freeze"
        )
    documents = read_same(lambda: read_documents(data), config, previous)
    tokenizer = tokenizer_for(previous, lambda: train_tokenizer(data, config.model.vocab_size, documents))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    classes, T = documents.classes, config.model.context_length
    splits = {"train": cut(documents.train, classes, tokenizer, T), "val": cut(documents.val, classes, tokenizer, T)}
    num_steps = steps_of(config.training, len(splits["train"].labels_N))
    sources = {
        "text": documents.sha256, "tokenizer": tokenizer.sha256, "classes": sha256(classes_json(classes).encode())
    }  # fmt: skip
    objective = ClassOfText.of(config, len(classes), kernels)
    return TextClassification(config, tokenizer, splits, sources, num_steps, objective, classes)


def train_tokenizer(data: LabelledTextConfig, vocab_size: int | None, documents: Documents) -> Tokenizer:
    """Learns words and merges from the training documents only. Characters come from all, so that each has an id."""
    learned_from = [*documents.train, *(documents.val if data.tokenizer == "char" else [])]
    return make_tokenizer(data.tokenizer, (document.text for document in learned_from), vocab_size)
