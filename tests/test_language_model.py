"""Text in, text out: prompts of all kinds, and the number and length of the texts returned."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from helpers import assert_raises, assert_says, logged

from minigpt_jax.config import ModelConfig
from minigpt_jax.data.tokenizers import CharTokenizer, WordTokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.generation import sampling
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.models.gpt import GPT

CHARACTERS = "\n abcdé漢🙂"
CONFIG = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=16, context_length=8, vocab_size=len(CHARACTERS))


@pytest.fixture(scope="module")
def lm():
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(GPT(CONFIG).init, jax.random.key(0), np.zeros((2, 1), np.int32))["params"]
    params = jax.tree.map(lambda leaf: 0.5 * random.standard_normal(leaf.shape, np.float32), shapes)
    return LanguageModel(CONFIG, CharTokenizer.train(CHARACTERS), params)


def samples(lm, prompt, length, **settings):
    return [completion.text for completion in lm.complete([prompt], length, **settings)]


@pytest.mark.parametrize("prompt", ["a", "ab 漢🙂\n", "abcdabcd" * 3, ""])
@pytest.mark.parametrize("length", [1, 7, 30])
def test_text_is_the_prompt_plus_the_requested_number_of_characters(lm, prompt, length):
    text = lm.generate(prompt, length)
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + length
    assert set(text) <= set(CHARACTERS)


def test_an_empty_prompt_acts_as_a_newline_that_is_not_printed(lm):
    assert "\n" + lm.generate("", 20) == lm.generate("\n", 20)


def test_the_model_sees_the_end_of_a_long_prompt_and_a_warning_is_logged(lm, caplog):
    with caplog.at_level(logging.WARNING):
        long = lm.generate("dcba" + "abcdabcd", 20)
        [line] = logged(caplog)
        assert_says(line, "12", "8")
        caplog.clear()
        fitting = lm.generate("abcdabcd", 20)
        assert not caplog.records
    assert long == "dcba" + fitting


def test_unknown_characters_are_named(lm):
    assert_raises(DataError, lm.generate, "aßX", 5, says=("prompt", "'X', 'ß'"))


@pytest.mark.parametrize("length", [0, -1])
def test_length_and_number_of_samples_must_be_at_least_one(lm, length):
    assert_raises(UsageError, lm.generate, "a", length, says=(f"length={length}", "1"))
    assert_raises(UsageError, samples, lm, "a", 5, num_samples=length, says=(f"num_samples={length}", "1"))


def test_invalid_settings_are_rejected(lm):
    assert_raises(UsageError, lm.generate, "a", 5, top_p=2, says=("top_p=2", "1.0"))


@pytest.mark.slow
def test_samples_differ_and_do_not_depend_on_how_many_there_are(lm):
    three = samples(lm, "ab", 20, num_samples=3)
    assert len(set(three)) == 3
    assert samples(lm, "ab", 20, num_samples=2) == three[:2]
    assert samples(lm, "ab", 20, num_samples=1) == [lm.generate("ab", 20)] == three[:1]


@pytest.mark.slow
def test_rows_that_pad_the_last_batch_do_not_delay_it(lm, monkeypatch):
    """With every character as a stop string, one piece per batch is enough, including the padded batch."""
    pieces, original = [], sampling.stream

    def stream(*args, **keywords):
        for piece in original(*args, **keywords):
            pieces.append(piece.token.shape)
            yield piece

    monkeypatch.setattr(sampling, "stream", stream)
    completions = list(lm.complete(["a"] * 18, 30, stop=list(CHARACTERS)))
    assert [completion.reason for completion in completions] == ["stop"] * 18
    assert pieces == [(16, 1), (16, 1)]


@pytest.mark.slow
def test_running_past_a_position_table_is_logged(lm, caplog):
    learned = dataclasses.replace(lm, config=dataclasses.replace(CONFIG, positions="sinusoidal"))
    with caplog.at_level(logging.INFO):
        lm.generate("ab", 30)  # rotary
        learned.generate("ab", 7)
        assert not caplog.records
        learned.generate("ab", 8)
        [line] = logged(caplog)
        assert_says(line, "8")


def test_text_depends_on_the_seed_unless_it_is_greedy(lm):
    assert lm.generate("ab", 20, seed=3) == lm.generate("ab", 20, seed=3)
    assert lm.generate("ab", 20, seed=3) != lm.generate("ab", 20, seed=4)
    greedy = {lm.generate("ab", 20, seed=seed, temperature=temperature) for seed in (3, 4) for temperature in (0, 0.0)}
    assert greedy == {lm.generate("ab", 20, greedy=True)}


@pytest.fixture(scope="module")
def words(lm):
    """The same model with a word vocabulary: "\\n" becomes the end-of-text token, " " the unknown token."""
    return dataclasses.replace(lm, tokenizer=WordTokenizer.train(["to be or"]))


@pytest.mark.slow
def test_the_end_of_text_token_always_ends_a_text_and_is_not_part_of_it(words):
    assert words.tokenizer.vocab_size == words.config.vocab_size
    completions = list(words.complete(["to", "be"], 60, num_samples=4))
    ended = [completion for completion in completions if completion.reason == "stop"]
    assert ended
    for completion in completions:
        tokens = [step.token for step in completion.steps]
        assert (completion.reason == "stop") == (tokens[-1] == 0)
        assert 0 not in tokens[:-1]
        assert "<|endoftext|>" not in completion.text
    assert any(text.hypothesis.ended for text in next(words.beam_search(["to"], 60, beam_width=4)))


def test_settings_of_beam_search_are_those_of_its_section(words):
    def search(**settings):
        return next(words.beam_search(["to"], 5, **settings))

    assert_raises(
        UsageError, search, beam_width=2, length_penaltie=1.0, says=("length_penaltie", "length_penalty", "beam_width")
    )
    assert_raises(UsageError, search, beam_width=0, says=("beam_width=0", "1"))
    assert_raises(UsageError, search, beam_width=2, length_penalty=11.0, says=("length_penalty=11.0", "10.0"))


def test_unknown_words_in_a_prompt_are_logged(words, caplog):
    with caplog.at_level(logging.WARNING):
        assert words.generate("to be", 3, greedy=True).startswith("to be")
        assert not caplog.records
        assert words.generate("to zz, be", 3, greedy=True).startswith("to zz, be")
    [line] = logged(caplog)
    assert_says(line, "<unk>", "2")
