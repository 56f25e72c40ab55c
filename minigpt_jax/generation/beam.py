"""Beam search: the W most probable continuations found so far go on side by side; the most probable whole text wins.

The jitted loop extends the beams and records what it chose; which texts end, and when the search is over, is read off those
records in Python, between two pieces of the loop.
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
    """B prompts with W beams each; the rows of `decode` are all beams of the first prompt, then those of the second, …"""

    decode: DecodeState
    score_BW: jax.Array  # log-probability of each beam's text so far, in nats


@struct.dataclass
class Choice:
    """One step of the search: for each prompt W beams, best first, as the beam that is extended, the token and the score."""

    parent_BW: jax.Array
    token_BW: jax.Array
    score_BW: jax.Array


def extend(state: BeamState, logits_RV: jax.Array, ends_V: jax.Array) -> tuple[BeamState, tuple[Choice, Choice]]:
    """The W best extensions that go on, as the new state and its record, and the W best that end in a token of `ends_V`."""
    B, W = state.score_BW.shape
    V = logits_RV.shape[-1]
    score_BWV = state.score_BW[:, :, None] + jax.nn.log_softmax(logits_RV).reshape(B, W, V)

    def best(allowed_V: jax.Array) -> Choice:
        allowed_BWV = jnp.where(allowed_V[None, None, :], score_BWV, -jnp.inf)
        score_BW, place_BW = jax.lax.top_k(allowed_BWV.reshape(B, W * V), W)
        return Choice(place_BW // V, place_BW % V, score_BW)

    going_on = best(~ends_V)
    rows_R = (jnp.arange(B)[:, None] * W + going_on.parent_BW).reshape(-1)
    decode = state.decode.rows(rows_R)
    return BeamState(append_token(decode, going_on.token_BW.reshape(-1)), going_on.score_BW), (going_on, best(ends_V))


@functools.partial(jax.jit, static_argnames=("model", "width"))
def prefill_and_extend(
    params: Any, prompts_BS: jax.Array, lengths_B: jax.Array, ends_V: jax.Array, *, model: nn.Module, width: int
):
    """The beams after the first token: all of them extend the prompt, so that all but one count as impossible before it."""
    decode, logits_BV = prefill(params, prompts_BS, lengths_B, model=model)
    rows_R = jnp.repeat(jnp.arange(len(lengths_B)), width)
    score_BW = jnp.where(jnp.arange(width)[None, :] == 0, jnp.zeros((len(lengths_B), 1)), -jnp.inf)
    return extend(BeamState(decode.rows(rows_R), score_BW), logits_BV[rows_R], ends_V)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def extend_chunk(params: Any, state: BeamState, ends_V: jax.Array, num_steps: jax.Array, *, model: nn.Module):
    """`num_steps` more steps, at most CHUNK: the state and the records, of which the first `num_steps` count."""

    def body(i, carry):
        state, records = carry
        decode, logits_RV = decode_step(params, state.decode, model)
        state, record = extend(state.replace(decode=decode), logits_RV, ends_V)
        return state, jax.tree.map(lambda all_records, leaf: all_records.at[i].set(leaf), records, record)

    B, W = state.score_BW.shape
    none = Choice(jnp.zeros((CHUNK, B, W), jnp.int32), jnp.zeros((CHUNK, B, W), jnp.int32), jnp.zeros((CHUNK, B, W)))
    return jax.lax.fori_loop(0, num_steps, body, (state, (none, none)))


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A text that beam search found. `score` is its log-probability in nats; `rank` is score / length^length_penalty."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]  # of each token, in nats
    score: float
    rank: float
    ended: bool  # in an end token, not because it reached the length


@dataclasses.dataclass
class Search:
    """The texts of one prompt: W beams that go on, chains of (chain before, token, score), and the best W that ended."""

    width: int
    num_tokens: int
    length_penalty: float
    early_stopping: bool
    beams: list
    finished: list[Hypothesis] = dataclasses.field(default_factory=list)
    length: int = 0
    over: bool = False

    def step(self, going_on: Choice, ending: Choice) -> None:
        """Takes note of one step, given its records for this prompt alone."""
        if self.over:
            return
        self.length += 1
        for parent, token, score in rows(ending):
            self.finish((self.beams[parent], int(token), float(score)), ended=True)
        self.beams = [(self.beams[parent], int(token), float(score)) for parent, token, score in rows(going_on)]
        self.over = len(self.finished) == self.width and (self.early_stopping or not self.can_improve(going_on.score_BW[0]))
        if self.length == self.num_tokens and not self.over:
            for beam in self.beams:
                self.finish(beam, ended=False)
            self.over = True

    def finish(self, beam, ended: bool) -> None:
        if math.isfinite(beam[-1]):
            tokens, scores = zip(*links(beam, self.length), strict=True)
            log_probs = tuple(np.diff(scores, prepend=0.0).tolist())
            found = Hypothesis(tokens, log_probs, scores[-1], scores[-1] / self.length**self.length_penalty, ended)
            self.finished = sorted([*self.finished, found], key=lambda text: -text.rank)[: self.width]

    def can_improve(self, best_score: Any) -> bool:
        """Whether a beam may still end better than the worst text kept. Scores only fall, and so a beam ranks best if it
        loses nothing more and ends at once or, where length is rewarded, as late as it can."""
        length = self.num_tokens if self.length_penalty > 0 else min(self.length + 1, self.num_tokens)
        return best_score / length**self.length_penalty > self.finished[-1].rank


def rows(choice: Choice) -> Iterator[tuple]:
    """(parent, token, score) of each beam of one prompt's choice."""
    return zip(choice.parent_BW, choice.token_BW, choice.score_BW, strict=True)


def links(beam, count: int) -> list[tuple[int, float]]:
    """The last `count` tokens of a chain, or as many as there are, each with the score up to it."""
    found = []
    while beam is not None and len(found) < count:
        beam, *link = beam
        found.append(tuple(link))
    return found[::-1]


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
    """The best texts found for each prompt, at most `width` of them, best first.

    Texts are compared by log-probability / length^length_penalty: 0 prefers short texts, 1 compares the mean per token (Wu
    et al. 2016 have a similar form). A text ends with one of `end_tokens`, or at `num_tokens` tokens. The search for a
    prompt is over when `width` texts have ended and, without `early_stopping`, no beam can still beat the worst of them.
    `width` is at most the size of the vocabulary. Raises FloatingPointError where the model's logits are not finite.
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
            raise FloatingPointError("the model's logits are not finite, so no text is more probable than another")
        for i in range(num_steps):
            for b, search in enumerate(searches):
                search.step(*jax.tree.map(lambda leaf, i=i, b=b: leaf[i, b], records))
        if all(search.over for search in searches):
            return [search.finished for search in searches]
        S, left = context.size, num_tokens - max(search.length for search in searches)
        context.rows = [
            np.array([*prompt, *(token for token, _ in links(beam, S))], np.int32)[-S:]
            for prompt, search in zip(prompts, searches, strict=True)
            for beam in search.beams
        ]
        decode, num_steps = context.make_room(params, state.decode, min(CHUNK, left))
        state, records = extend_chunk(params, state.replace(decode=decode), ends_V, num_steps, model=model)
        records = jax.tree.map(np.asarray, records)
