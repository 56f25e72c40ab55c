"""Text with [MASK] in, the most probable tokens out: a masked language model's parameters, tokenizer and config together."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minigpt_jax.config import ModelConfig
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.generation.language_model import warn_of_unknown
from minigpt_jax.models.bert import BERT, mask_token
from minigpt_jax.models.kernels import PLAIN, Kernels

MASK = "[MASK]"  # in a prompt


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A token for a [MASK], as text, and its probability under the model."""

    text: str
    probability: float


@functools.partial(jax.jit, static_argnames="model")
def probabilities(params: Any, tokens_BT: jax.Array, is_token_BT: jax.Array, *, model: BERT) -> jax.Array:
    """p_BTV: the probability of each token of the vocabulary at each position."""
    logits_BTV: Any = model.apply({"params": params}, tokens_BT, is_token_BT)
    return jax.nn.softmax(logits_BTV)


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModel:
    """Usually created by `interop.load.load_masked(workdir)`. Built from its parts, it uses plain kernels by default."""

    config: ModelConfig
    tokenizer: Tokenizer
    params: Any
    kernels: Kernels = PLAIN

    def fill(self, text: str, num_best: int = 5) -> list[list[Candidate]]:
        """For each [MASK] in the text, the most probable tokens, best first. <unk> is not among them.

        Raises UsageError for a text without [MASK], and DataError for one that is longer than the context or has characters
        that are not in the vocabulary.
        """
        first, *rest = text.split(MASK)
        if not rest:
            raise UsageError(f'the prompt has no {MASK}: mark what to fill in, as in "To be or {MASK} to be"')
        mask = [mask_token(self.config)]
        tokens_T = np.concatenate([self.tokenizer.encode(first)] + [[*mask, *self.tokenizer.encode(part)] for part in rest])
        warn_of_unknown(tokens_T, self.tokenizer)
        p_NV = self.token_probabilities(tokens_T)[tokens_T == mask]
        if (unknown := self.tokenizer.unknown) is not None:
            p_NV[:, unknown] = 0.0
        return [
            [Candidate(self.tokenizer.decode([token]), float(p_V[token])) for token in np.argsort(-p_V)[:num_best].tolist()]
            for p_V in p_NV
        ]

    def token_probabilities(self, tokens_T: np.ndarray) -> np.ndarray:
        """p_TV for tokens of which some are `mask_token`. Raises DataError if they are more than the context holds."""
        length, T = len(tokens_T), self.config.context_length
        if length > T:
            raise DataError(f"the text has {length} tokens, more than the model's context of {T}: shorten it")
        padded_BT = jnp.asarray(np.pad(tokens_T, (0, T - length))[None], jnp.int32)  # one program for all lengths
        is_token_BT, model = jnp.arange(T)[None, :] < length, BERT(self.config, self.kernels)
        return np.array(probabilities(self.params, padded_BT, is_token_BT, model=model)[0, :length])
