"""A model that takes and gives text: parameters, tokenizer and config together."""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from minigpt_jax.config import ModelConfig
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.generation import sampler
from minigpt_jax.generation.logits import processors
from minigpt_jax.models.gpt import GPT

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Made by `minigpt_jax.load(workdir)`, or from parts."""

    config: ModelConfig
    tokenizer: Tokenizer
    params: Any

    def generate(self, prompt: str, length: int = 200, *, seed: int = 0, **strategy) -> str:
        """The prompt and `length` more tokens: the first of `samples`."""
        return self.samples(prompt, length, num_samples=1, seed=seed, **strategy)[0]

    def samples(self, prompt: str, length: int = 200, *, num_samples: int, seed: int = 0, **strategy) -> list[str]:
        """`num_samples` texts that begin with the prompt and go on for `length` tokens, each with randomness of its own.

        `strategy` is what `generation.logits.processors` takes: temperature, top_k, top_p, greedy and so on. Text `i` is the
        same for every `num_samples` above i. An empty prompt stands for a new line. Of a prompt longer than the context
        the model sees the end, and a line is logged. Raises UsageError for bad values, DataError for a prompt with
        characters that the vocabulary lacks.
        """
        for name, value in (("length", length), ("num_samples", num_samples)):
            if value < 1:
                raise UsageError(f"{name}={value} must be at least 1")
        chosen = processors(**strategy)
        tokens = self.encode_prompt(prompt)
        tokens_BT = sampler.generate(
            self.params, [tokens] * num_samples, length, jax.random.key(seed), chosen, model=GPT(self.config)
        )
        return [prompt + self.tokenizer.decode(row) for row in tokens_BT]

    def encode_prompt(self, prompt: str) -> np.ndarray:
        """The prompt's tokens, at least one and at most context_length of them."""
        try:
            tokens = self.tokenizer.encode(prompt or "\n")
        except DataError as error:
            raise DataError(f"prompt: {error}") from error
        context_length = self.config.context_length
        if len(tokens) > context_length:
            log.warning("The prompt has %d tokens; the model sees the last %d, its context.", len(tokens), context_length)
        return tokens[-context_length:]
