"""Beam search: extends the W most probable continuations of a prompt token by token and returns the best complete texts.

The jitted loop extends the beams and records its choices. Between two chunks of the loop, Python reads these records to see
which texts have ended and whether the search is done.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from minigpt_jax.generation.context import Context, padded
from minigpt_jax.generation.decode import CHUNK, DecodeState, append_token, decode_step, prefill


@struct.dataclass
class BeamState:
    """B prompts with W beams each. The rows of `decode` are all beams of the first prompt, then those of the second, …"""

    decode: DecodeState
    score_BW: jax.Array  # log-probability of each beam so far, in nats


@struct.dataclass
class Choice:
    """One step of the search: the W new beams of each prompt, best first, as parent beam, appended token and score."""

    parent_BW: jax.Array
    token_BW: jax.Array
    score_BW: jax.Array


def extend(state: BeamState, logits_RV: jax.Array, ends_V: jax.Array) -> tuple[BeamState, tuple[Choice, Choice]]:
    """The new state, and a record: the W best extensions that stay live and the W best that end in a token of `ends_V`."""
    B, W = state.score_BW.shape
    V = logits_RV.shape[-1]
    score_BWV = state.score_BW[:, :, None] + jax.nn.log_softmax(logits_RV).reshape(B, W, V)

    def best(allowed_V: jax.Array) -> Choice:
        allowed_BWV = jnp.where(allowed_V[None, None, :], score_BWV, -jnp.inf)
        score_BW, index_BW = jax.lax.top_k(allowed_BWV.reshape(B, W * V), W)
        return Choice(index_BW // V, index_BW % V, score_BW)

    live = best(~ends_V)
    rows_R = (jnp.arange(B)[:, None] * W + live.parent_BW).reshape(-1)
    decode = state.decode.rows(rows_R)
    return BeamState(append_token(decode, live.token_BW.reshape(-1)), live.score_BW), (live, best(ends_V))


@functools.partial(jax.jit, static_argnames=("model", "width"))
def prefill_and_extend(
    params: Any, prompts_BS: jax.Array, lengths_B: jax.Array, ends_V: jax.Array, *, model: nn.Module, width: int
) -> tuple[BeamState, tuple[Choice, Choice]]:
    """The beams after the first token. All of them start as the same prompt, so all but one start with a score of -inf."""
    decode, logits_BV = prefill(params, prompts_BS, lengths_B, model=model)
    rows_R = jnp.repeat(jnp.arange(len(lengths_B)), width)
    score_BW = jnp.where(jnp.arange(width)[None, :] == 0, jnp.zeros((len(lengths_B), 1)), -jnp.inf)
    return extend(BeamState(decode.rows(rows_R), score_BW), logits_BV[rows_R], ends_V)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def extend_chunk(
    params: Any, state: BeamState, ends_V: jax.Array, num_steps: jax.Array, *, model: nn.Module
) -> tuple[BeamState, tuple[Choice, Choice]]:
    """Runs `num_steps` ≤ CHUNK more steps. Returns the state and the records, of which the first `num_steps` are filled."""

    def body(i, carry):
        state, records = carry
        decode, logits_RV = decode_step(params, state.decode, model)
        state, record = extend(state.replace(decode=decode), logits_RV, ends_V)
        return state, jax.tree.map(lambda all_records, leaf: all_records.at[i].set(leaf), records, record)

    B, W = state.score_BW.shape
    empty = Choice(jnp.zeros((CHUNK, B, W), jnp.int32), jnp.zeros((CHUNK, B, W), jnp.int32), jnp.zeros((CHUNK, B, W)))
    return jax.lax.fori_loop(0, num_steps, body, (state, (empty, empty)))


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A text from beam search. `score` is its log-probability in nats; `rank` is score / length^length_penalty."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]  # of each token, in nats
    score: float
    rank: float
    ended: bool  # with an end token, not by reaching the maximum length


@dataclasses.dataclass
class Search:
    """The search for one prompt: W live beams, each a linked list (parent, token, score), and the W best finished texts."""

    width: int
    num_tokens: int
    length_penalty: float
    early_stopping: bool
    beams: list
    finished: list[Hypothesis] = dataclasses.field(default_factory=list)
    length: int = 0
    done: bool = False

    def step(self, live: Choice, ending: Choice) -> None:
        """Applies the records of one step for this prompt."""
        if self.done:
            return
        self.length += 1
        for parent, token, score in rows(ending):
            self.finish((self.beams[parent], int(token), float(score)), ended=True)
        self.beams = [(self.beams[parent], int(token), float(score)) for parent, token, score in rows(live)]
        self.done = len(self.finished) == self.width and (self.early_stopping or not self.can_improve(live.score_BW[0]))
        if self.length == self.num_tokens and not self.done:
            for beam in self.beams:
                self.finish(beam, ended=False)
            self.done = True

    def finish(self, beam: tuple, ended: bool) -> None:
        if math.isfinite(beam[-1]):
            tokens, scores = zip(*backtrack(beam, self.length), strict=True)
            log_probs = tuple(np.diff(scores, prepend=0.0).tolist())
            text = Hypothesis(tokens, log_probs, scores[-1], scores[-1] / self.length**self.length_penalty, ended)
            self.finished = sorted([*self.finished, text], key=lambda text: -text.rank)[: self.width]

    def can_improve(self, best_score: Any) -> bool:
        """Whether a live beam can still outrank the worst finished text. Scores only fall, so a beam ranks best if it keeps
        its score and ends immediately or, if length is rewarded, as late as possible."""
        length = self.num_tokens if self.length_penalty > 0 else min(self.length + 1, self.num_tokens)
        return best_score / length**self.length_penalty > self.finished[-1].rank


def rows(choice: Choice) -> Iterator[tuple]:
    """(parent, token, score) of each beam of one prompt."""
    return zip(choice.parent_BW, choice.token_BW, choice.score_BW, strict=True)


def backtrack(beam: tuple | None, count: int) -> list[tuple[int, float]]:
    """The last `count` (token, score so far) pairs of a beam, or all of them if there are fewer."""
    pairs = []
    while beam is not None and len(pairs) < count:
        beam, *pair = beam
        pairs.append(tuple(pair))
    return pairs[::-1]


def beam_search(
    params: Any,
    prompts: list[np.ndarray],
    num_tokens: int,
    *,
    model: nn.Module,
    width: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    end_tokens: tuple[int, ...] = (),
) -> list[list[Hypothesis]]:
    """Returns the best texts for each prompt, best first, at most `width` of them.

    Texts are ranked by log-probability / length^length_penalty: 0 prefers short texts, 1 ranks by the mean per token (Wu et
    al. 2016 use a similar form). A text ends with one of `end_tokens` or after `num_tokens` tokens. The search for a prompt
    is done when `width` texts have ended and, unless `early_stopping`, no live beam can still outrank the worst of them.
    `width` is at most the vocabulary size. Raises FloatingPointError if the model's logits are not finite.
    """
    context = Context(prompts, model)
    ends_V = np.isin(np.arange(model.config.vocab_size), end_tokens)
    searches = [Search(width, num_tokens, length_penalty, early_stopping, [None] * width) for _ in prompts]
    state, record = prefill_and_extend(
        params, padded(prompts, context.size), context.position_B, ends_V, model=model, width=width
    )
    records = jax.tree.map(lambda leaf: np.asarray(leaf)[None], record)
    context.position_B, num_steps = np.repeat(context.position_B, width), 1
    while True:
        if np.isnan(records[0].score_BW[:num_steps]).any():
            raise FloatingPointError("the model's logits are not finite, so beam search cannot rank texts")
        for i in range(num_steps):
            for b, search in enumerate(searches):
                search.step(*jax.tree.map(lambda leaf, i=i, b=b: leaf[i, b], records))
        if all(search.done for search in searches):
            return [search.finished for search in searches]
        S, remaining = context.size, num_tokens - max(search.length for search in searches)
        context.rows = [
            np.array([*prompt, *(token for token, _ in backtrack(beam, S))], np.int32)[-S:]
            for prompt, search in zip(prompts, searches, strict=True)
            for beam in search.beams
        ]
        decode, num_steps = context.make_room(params, state.decode, min(CHUNK, remaining))
        state, records = extend_chunk(params, state.replace(decode=decode), ends_V, num_steps, model=model)
        records = jax.tree.map(np.asarray, records)
