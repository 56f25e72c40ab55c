"""Masked language modelling: a BERT is trained to predict tokens of a text that are hidden from it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minigpt_jax.commands import command
from minigpt_jax.config import Config
from minigpt_jax.errors import UsageError, require_choice
from minigpt_jax.generation.masked_language_model import MASK, MaskedLanguageModel
from minigpt_jax.interop import load
from minigpt_jax.models.bert import mask_token
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.tasks.evaluation import means
from minigpt_jax.tasks.masked_token import MaskedToken
from minigpt_jax.tasks.task import PreviousRun
from minigpt_jax.tasks.windows import WindowTask

PREVIEW_LENGTH, PREVIEW_EVERY = 64, 7  # tokens shown, and the distance between two hidden ones
MAX_COUNTED = 2**22  # tokens from which the most frequent one is determined


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedLanguageModelling(WindowTask):
    """See `tasks.Task`. The first T tokens of each window of T + 1 are its text."""

    causal = False

    def initial_params(self, sharding: jax.sharding.Sharding) -> Any:
        return load.initial_params(self.config, self.tokenizer, sharding, load.load_masked)

    def measures(self, params: Any, split: str = "val", stride: int | None = None) -> dict[str, float]:
        """Also the accuracy of a baseline that always answers with the most frequent token of the training text. Tokens are
        chosen uniformly, so it is that token's share of the split."""
        require_choice("split", split, self.splits)
        if stride is not None:
            raise UsageError(f"stride={stride} has no use here: every token already has context on both sides")
        counts_V = np.bincount(self.splits["train"].ids[:MAX_COUNTED], minlength=self.config.model.known_vocab_size)
        ids = self.splits[split].ids
        return means(self.objective, params, self.evaluation_batches(split)) | {
            "unigram_accuracy": np.count_nonzero(ids == counts_V.argmax()) / len(ids),
            "tokens": len(ids),
            "unknown_share": self.splits[split].unknown_share,
        }

    def preview(self, params: Any) -> str:
        """The first tokens of the validation text, with the model's guesses for hidden ones in brackets, and then those."""
        tokenizer, config = self.tokenizer, self.config.model
        model = MaskedLanguageModel(config, tokenizer, params, self.objective.model.kernels)
        tokens_T = np.array(self.splits["val"].ids[: min(PREVIEW_LENGTH, config.context_length)], np.int32)
        is_hidden_T = np.arange(len(tokens_T)) % PREVIEW_EVERY == PREVIEW_EVERY // 2
        guesses_T = model.token_probabilities(np.where(is_hidden_T, mask_token(config), tokens_T)).argmax(axis=-1)

        def text(tokens_T: np.ndarray) -> str:
            pieces = [tokenizer.decode([token]) for token in tokens_T.tolist()]
            return "".join(f"[{piece}]" if hidden else piece for piece, hidden in zip(pieces, is_hidden_T, strict=True))

        return f"{text(np.where(is_hidden_T, guesses_T, tokens_T))}\n--- hidden:\n{text(tokens_T)}"

    def describe_result(self, measures: Mapping[str, float]) -> str:
        return (
            f"{measures['loss']:.4f} nats per hidden token, accuracy {measures['accuracy']:.1%} (the most frequent token: "
            f"{measures['unigram_accuracy']:.1%}){self.unknown_tokens('val')}"
        )

    def next_command(self, workdir: Path) -> str:
        return f'Fill in hidden words: {command("fill_mask")} --workdir {workdir} --prompt "To be or {MASK} to be"'


def prepare(config: Config, previous: PreviousRun | None = None, kernels: Kernels = PLAIN) -> MaskedLanguageModelling:
    """Reads and tokenizes the texts, as for language modelling. [MASK] is not part of the tokenizer's vocabulary."""
    return MaskedLanguageModelling.read(config, previous, lambda config: MaskedToken.of(config, kernels))
