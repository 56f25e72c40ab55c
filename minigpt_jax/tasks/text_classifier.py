"""A trained text classifier: which class a text has."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_jax.config import ModelConfig
from minigpt_jax.data.labelled import Document, cut
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.generation.language_model import warn_of_unknown
from minigpt_jax.interop.load import load_masked, read_run_config, tokenizer_and_params
from minigpt_jax.models.kernels import Kernels
from minigpt_jax.runs import checkpoints
from minigpt_jax.tasks.classification import read_classes
from minigpt_jax.tasks.evaluation import probabilities
from minigpt_jax.tasks.text_classification import ClassOfText


@dataclasses.dataclass(frozen=True, eq=False)
class PassageClassifier:
    classes: tuple[str, ...]
    tokenizer: Tokenizer
    objective: ClassOfText
    params: Any

    def probabilities(self, text: str) -> dict[str, float]:
        """The probability of each class, the most probable one first. A text longer than the context is cut into passages,
        as in training, and their probabilities are averaged.

        Raises DataError for a text without tokens, or with characters that are not in the vocabulary.
        """
        context_length = self.objective.model.config.context_length
        passages = cut([Document(text, self.classes[0])], self.classes, self.tokenizer, context_length)
        if not len(passages.tokens_NT):
            raise DataError("the text is empty")
        warn_of_unknown(passages.tokens_NT[passages.is_token_NT], self.tokenizer)
        batch = {"tokens_BT": passages.tokens_NT, "is_token_BT": passages.is_token_NT}
        probs_C = np.asarray(probabilities(self.params, batch, self.objective)).mean(axis=0)
        return {self.classes[index]: float(probs_C[index]) for index in np.argsort(-probs_C, kind="stable")}


def load(workdir: Path, sharding: Any, choose_kernels: Callable[[ModelConfig], Kernels]) -> PassageClassifier:
    """Loads a run's parameters with the lowest validation loss. Raises DataError if there is no run, or it is corrupt or of
    another task."""
    config = read_run_config(workdir)
    if config.task != "text_classification":
        raise DataError(f"{workdir} is a run of the task {config.task}, which does not train a text classifier")
    step = checkpoints.best_intact(workdir)
    classes = tuple(read_classes(workdir, step)["classes"])
    objective = ClassOfText.of(config, len(classes), choose_kernels(config.model))
    tokenizer, params = tokenizer_and_params(workdir, config, step, objective.model, sharding, load_masked)
    return PassageClassifier(classes, tokenizer, objective, params)
