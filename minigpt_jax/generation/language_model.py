"""Text in, text out: a model's parameters, tokenizer and config together."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from minigpt_jax.config import ModelConfig, plain, whole_number
from minigpt_jax.data.templates import ChatTemplate
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError, UsageError, shortened
from minigpt_jax.generation import beam, sampling
from minigpt_jax.generation.decode import CHUNK
from minigpt_jax.generation.logits import Processor
from minigpt_jax.generation.strategy import BeamConfig, DecodingConfig, checked, processors
from minigpt_jax.generation.text import TextStream
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.kernels import PLAIN, Kernels

log = logging.getLogger(__name__)

MAX_ROWS = 16  # texts sampled in one batch
STREAM_CHUNK = 4  # tokens per portion of a stream


@dataclasses.dataclass(frozen=True)
class TokenStep:
    """Statistics of one generated token."""

    token: int
    log_prob: float  # in nats, under the model
    prob: float  # after temperature, top-k etc.: the probability it was sampled with
    num_kept: int  # candidates left by these
    mass_kept: float  # their total probability under the model
    entropy: float  # in nats, of the model's distribution


@dataclasses.dataclass(frozen=True)
class Completion:
    """A generated text."""

    prompt: str
    text: str  # with the prompt, without the stop string
    steps: list[TokenStep]  # up to and including the token that ended the text
    reason: str  # "length" or "stop"
    seed: int
    index: int  # position among the texts of the call; with the seed it determines the random key


@dataclasses.dataclass(frozen=True)
class BeamText:
    """A text from beam search."""

    prompt: str
    text: str  # with the prompt, without the stop string
    hypothesis: beam.Hypothesis


@dataclasses.dataclass
class Row:
    """A text that is being generated."""

    index: int
    prompt: str
    prompt_tokens: np.ndarray
    text: TextStream
    steps: list[TokenStep] = dataclasses.field(default_factory=list)
    reason: str = "length"

    def feed(self, steps: list[TokenStep]) -> None:
        for step in steps:
            if not self.text.stopped:
                self.steps.append(step)
                self.text.feed(step.token)
                self.reason = "stop" if self.text.stopped else "length"

    def end(self) -> None:
        if not self.text.stopped:
            self.text.end()


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Usually created by `minigpt_jax.load(workdir)`. Built from its parts, it uses plain kernels by default.

    `devices` are the devices of a split CPU, over which rows are sharded. `end_tokens` end every text, in addition to the
    tokenizer's end-of-text token: a Hugging Face folder names them in its config. `template` is its own format of
    conversations, if it has one.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    params: Any
    kernels: Kernels = PLAIN
    devices: tuple[Any, ...] = ()
    end_tokens: tuple[int, ...] = ()
    template: ChatTemplate | None = None

    @property
    def model(self) -> GPT:
        return GPT(self.config, self.kernels)

    def generate(self, prompt: str, length: int = 200, **settings) -> str:
        """Returns the prompt and up to `length` more tokens. See `complete` for the settings."""
        return next(self.complete(one_text(prompt, settings), length, **settings)).text

    def stream(self, prompt: str, length: int = 200, **settings) -> Iterator[str]:
        """Yields the text of `generate` in portions as it is generated."""
        rows, number, seed, strategy = self.prepare(one_text(prompt, settings), length, **settings)
        [row] = rows

        def portions() -> Iterator[str]:
            yield row.prompt
            for _ in self.decode(rows, number, seed, strategy, chunk=STREAM_CHUNK):
                yield row.text.take()

        return portions()

    def complete(self, prompts: str | Iterable[str], length: int = 200, **settings) -> Iterator[Completion]:
        """Yields completions of each prompt in order, each with up to `length` tokens after the prompt. One string is one
        prompt. Settings:

          num_samples=1           texts per prompt
          seed=0                  random seed; text number i of a call does not depend on the other texts
          stop=()                 a string or several, each of which ends a text and is left out of it
          stop_tokens=()          a token id or several, each of which ends a text
          temperature, top_k, top_p, greedy etc.: the settings of `generation.strategy.DecodingConfig`

        The tokenizer's end-of-text token and the model's end tokens always end a text. An empty prompt is treated as a
        newline or, in a vocabulary without one, as the first token. If a prompt is longer than the context, the model sees
        only its end and a warning is logged. Raises UsageError for invalid values, and DataError for a prompt with
        characters that are not in the vocabulary, both before the first text is asked for.
        """
        return self.completions(*self.prepare(prompts, length, **settings))

    def completions(self, rows: list[Row], length: int, seed: int, strategy: tuple[Processor, ...]) -> Iterator[Completion]:
        """Generates the rows, batch by batch."""
        for first in range(0, len(rows), MAX_ROWS):
            batch = rows[first : first + MAX_ROWS]
            padded = list(batch)
            if first:  # the last batch is padded to the size of the others to avoid recompilation
                unused = dataclasses.replace(batch[0], text=TextStream(self.tokenizer))
                unused.text.end()  # already stopped, so that the batch does not wait for it
                padded += [unused] * (MAX_ROWS - len(batch))
            for _ in self.decode(padded, length, seed, strategy):
                pass
            for row in batch:
                yield Completion(row.prompt, row.prompt + row.text.text, row.steps, row.reason, seed, row.index)

    def prepare(
        self,
        prompts: str | Iterable[str],
        length: int,
        *,
        num_samples: int = 1,
        seed: int = 0,
        stop: str | Iterable[str] = (),
        stop_tokens: int | Iterable[int] = (),
        **strategy,
    ) -> tuple[list[Row], int, int, tuple[Processor, ...]]:
        """Checks the arguments of `complete`. Returns a row for each text, and length, seed and strategy for `decode`."""
        checked(DecodingConfig, strategy, also=("length", "num_samples", "seed", "stop", "stop_tokens"))
        chosen = processors(**strategy)
        length, num_samples = whole_number("length", length, 1), whole_number("num_samples", num_samples, 1)
        seed = whole_number("seed", seed, 0, below=2**32)
        stop, stop_tokens = stop_strings(stop), self.all_stop_tokens(stop_tokens)
        encoded = [(prompt, self.encode_prompt(prompt)) for prompt in strings("prompt", prompts)]
        longest = max((len(tokens) for _, tokens in encoded), default=0)
        if not self.config.can_slide and longest + length - 1 > self.config.context_length:
            log.info("Beyond its %d-token context the model continues from the last half of it.", self.config.context_length)
        rows = [
            Row(i * num_samples + j, prompt, tokens, TextStream(self.tokenizer, stop, stop_tokens))
            for i, (prompt, tokens) in enumerate(encoded)
            for j in range(num_samples)
        ]
        return rows, length, seed, chosen

    def decode(
        self, rows: list[Row], length: int, seed: int, strategy: tuple[Processor, ...], chunk: int = CHUNK
    ) -> Iterator[None]:
        """Feeds the rows chunk by chunk until each has stopped or has `length` tokens. Yields after each chunk."""
        key = jax.random.key(seed, impl="threefry2x32")  # JAX_DEFAULT_PRNG_IMPL may be one whose rows depend on each other
        key_B = sampling.row_keys(key, [row.index for row in rows])
        prompts = [row.prompt_tokens for row in rows]
        options = {"model": self.model, "chunk": chunk, "devices": self.devices}
        for sampled in sampling.stream(self.params, prompts, length, key_B, strategy, **options):
            columns = [leaf_BC.tolist() for leaf_BC in jax.tree.leaves(sampled)]
            for row, *values in zip(rows, *columns, strict=True):
                row.feed([TokenStep(*step) for step in zip(*values, strict=True)])
            yield
            if all(row.text.stopped for row in rows):
                return
        for row in rows:
            row.end()
        yield

    def beam_search(
        self,
        prompts: str | Iterable[str],
        length: int = 200,
        *,
        beam_width: int | None = None,
        stop: str | Iterable[str] = (),
        stop_tokens: int | Iterable[int] = (),
        **settings,
    ) -> Iterator[list[BeamText]]:
        """Yields, for each prompt, the most probable texts from a search with `beam_width` beams, best first.

        See `generation.strategy.BeamConfig` for the other settings and `generation.beam.beam_search` for how texts are
        ranked. Each of `stop` must be a single token. Raises UsageError and DataError as `complete` does.
        """
        how = checked(BeamConfig, {"beam_width": beam_width} | settings, also=("length", "stop", "stop_tokens"))
        length, width = whole_number("length", length, 1), whole_number("beam_width", beam_width, 1)
        V = self.tokenizer.vocab_size
        if width > V:
            raise UsageError(f"beam_width={width} must be at most {V}, the vocabulary size")
        prompts, stop, stop_tokens = strings("prompt", prompts), stop_strings(stop), self.all_stop_tokens(stop_tokens)
        encoded = [self.encode_prompt(prompt) for prompt in prompts]
        end_tokens = [self.tokenizer.encode(string).tolist() for string in stop]
        for string, tokens in zip(stop, end_tokens, strict=True):
            if len(tokens) != 1:
                raise UsageError(f"stop={string!r} must be a single token in beam search, but has {len(tokens)} tokens")

        def text(prompt: str, hypothesis: beam.Hypothesis) -> BeamText:
            tokens = hypothesis.tokens[:-1] if hypothesis.ended else hypothesis.tokens
            return BeamText(prompt, prompt + self.tokenizer.decode(tokens), hypothesis)

        def results() -> Iterator[list[BeamText]]:
            at_a_time = max(1, MAX_ROWS // width)
            for first in range(0, len(prompts), at_a_time):
                part = slice(first, first + at_a_time)
                found = beam.beam_search(
                    self.params,
                    encoded[part],
                    length,
                    model=self.model,
                    width=width,
                    length_penalty=how.length_penalty,
                    early_stopping=how.early_stopping,
                    end_tokens=(*stop_tokens, *(token for [token] in end_tokens)),
                )
                for prompt, hypotheses in zip(prompts[part], found, strict=True):
                    yield [text(prompt, hypothesis) for hypothesis in hypotheses]

        return results()

    def all_stop_tokens(self, stop_tokens: int | Iterable[int]) -> tuple[int, ...]:
        """Checks `stop_tokens` and adds the tokens that always end a text."""
        given = [whole_number("stop_tokens", token, 0, below=self.tokenizer.vocab_size) for token in listed(stop_tokens)]
        return (*given, *self.all_end_tokens)

    @property
    def all_end_tokens(self) -> tuple[int, ...]:
        """The tokens that end every text: the tokenizer's end-of-text token, if there is one, and `end_tokens`."""
        end_of_text = self.tokenizer.end_of_text
        return tuple(dict.fromkeys((*(() if end_of_text is None else (end_of_text,)), *self.end_tokens)))

    def encode_prompt(self, prompt: str) -> np.ndarray:
        """The prompt's tokens: at least one, at most context_length."""
        try:
            tokens = self.tokenizer.encode(prompt or "\n")
        except DataError as error:
            if prompt:
                raise DataError(f"prompt: {error}") from error
            tokens = np.zeros(1, np.int32)  # DNA, music and numbers may have no line breaks
        warn_of_unknown(tokens, self.tokenizer)
        context_length = self.config.context_length
        if len(tokens) > context_length:
            log.warning("The prompt has %d tokens; the model sees the last %d, its context.", len(tokens), context_length)
        return tokens[-context_length:]


def warn_of_unknown(tokens: np.ndarray, tokenizer: Tokenizer) -> None:
    """Logs how many words of a text are not in the vocabulary."""
    if num_unknown := np.count_nonzero(tokens == tokenizer.unknown):
        log.warning("Words outside the vocabulary: the model sees them as <unk> (%d times).", num_unknown)


def listed(values: Any) -> list:
    """The values of an iterable. A single string or number is one value, and None is none."""
    values = plain(values)
    if values is None:
        return []
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes) else [values]


def strings(name: str, values: Any) -> list[str]:
    """The strings of an iterable, or a single one. Raises UsageError for anything else."""
    several = listed(values) if values is not None else [None]
    for value in several:
        if not isinstance(value, str):
            raise UsageError(f"{name}={shortened(value)} must be a string")
    return [str(value) for value in several]  # NumPy's are a subclass


def stop_strings(stop: Any) -> tuple[str, ...]:
    chosen = strings("stop", listed(stop))
    if "" in chosen:
        raise UsageError("a stop string must not be empty")
    return tuple(chosen)


def one_text(prompt: Any, settings: dict[str, Any]) -> list[str]:
    """The prompt as a list of one. Raises UsageError where the arguments ask for several texts."""
    num_samples = whole_number("num_samples", settings.get("num_samples", 1), 1)
    if num_samples > 1 or not isinstance(prompt, str):
        problem = f"num_samples={num_samples}" if isinstance(prompt, str) else f"prompt={shortened(prompt)}"
        raise UsageError(f"{problem}: this call returns one text for one prompt, a string; complete() returns several")
    return [prompt]
