"""Text in, text out: prompts of all kinds, and the number and length of the texts returned."""

import dataclasses
import json
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

pytestmark = pytest.mark.e2e

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


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_a_text_depends_on_neither_jax_default_generator_nor_the_number_of_texts(lm, generator):
    expected = samples(lm, "a", 20, num_samples=3)
    with jax.default_prng_impl(generator):
        assert samples(lm, "a", 20, num_samples=3) == expected
        assert samples(lm, "a", 20) == expected[:1]


def test_an_empty_prompt_acts_as_a_newline_that_is_not_printed(lm):
    assert "\n" + lm.generate("", 20) == lm.generate("\n", 20)


def test_an_empty_prompt_is_the_first_token_of_a_vocabulary_without_a_newline(lm):
    dna = dataclasses.replace(lm, tokenizer=CharTokenizer("ACGTNRYKM"))
    assert "A" + dna.generate("", 20) == dna.generate("A", 20) == "A" + "".join(dna.stream("", 20))
    assert next(dna.beam_search("", 3, beam_width=2))[0].prompt == ""
    assert_raises(DataError, dna.generate, "\n", says=("prompt", r"'\n'"))


def test_end_tokens_of_the_model_end_texts_and_beams(lm):
    tokens = [step.token for step in next(lm.complete("ab", 20)).steps]
    ended = dataclasses.replace(lm, end_tokens=(tokens[4], tokens[5]))
    [completion] = ended.complete("ab", 20)
    end = min(tokens.index(tokens[4]), tokens.index(tokens[5]))
    assert [step.token for step in completion.steps] == tokens[: end + 1]
    assert completion.text == "ab" + lm.tokenizer.decode(tokens[:end])
    every = dataclasses.replace(lm, end_tokens=tuple(range(lm.config.vocab_size)))
    assert all(text.hypothesis.ended for text in next(every.beam_search("ab", 20, beam_width=2)))


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


# ---- What Python callers write --------------------------------------------------------------------------------------------

PROMPTS = ["ab", "漢d"]


@pytest.mark.parametrize(
    "kind",
    [tuple, np.array, iter, dict.fromkeys],
    ids=["tuple", "numpy", "iterator", "dict"],
)
def test_prompts_are_any_iterable_of_strings(lm, kind):
    prompts = kind(PROMPTS)
    assert [completion.prompt for completion in lm.complete(prompts, 3)] == PROMPTS


def test_one_string_is_one_prompt_and_one_stop_string(lm):
    assert samples(lm, "ab", 20) == [completion.text for completion in lm.complete("ab", 20)] == [lm.generate("ab", 20)]
    for stop in ("c", "b\n"):
        assert lm.generate("ab", 40, stop=stop) == lm.generate("ab", 40, stop=[stop])
    assert lm.generate("ab", 40, stop="zzc") == lm.generate("ab", 40) != lm.generate("ab", 40, stop="c")
    assert len(list(lm.beam_search("ab", 3, beam_width=2, stop="c"))) == 1
    assert [len(beams) for beams in lm.beam_search(iter(PROMPTS), 3, beam_width=2)] == [2, 2]


@pytest.mark.parametrize("number", [np.int64, np.uint8, np.array, jax.numpy.asarray], ids=["int64", "uint8", "array", "jax"])
def test_numbers_of_other_libraries_are_numbers(lm, number):
    settings = {"seed": 3, "top_k": 4, "stop_tokens": 2, "num_samples": 2}
    theirs = {name: number(value) for name, value in settings.items()}
    expected = list(lm.complete("ab", 9, **settings))
    assert list(lm.complete("ab", number(9), **theirs)) == expected
    assert all(type(value) is int for completion in expected for value in (completion.seed, completion.index))
    assert json.dumps([completion.seed for completion in lm.complete("ab", 9, **theirs)]) == "[3, 3]"
    assert lm.generate("ab", 9, stop_tokens=np.array([2, 3])) == lm.generate("ab", 9, stop_tokens=[2, 3])
    hypotheses = [next(lm.beam_search("ab", 9, beam_width=width))[0] for width in (2, number(2))]
    assert hypotheses[0] == hypotheses[1]


def test_none_is_the_default(lm):
    nothing = dict.fromkeys(["stop", "stop_tokens", "temperature", "top_k", "top_p", "greedy"])
    assert lm.generate("ab", 9, **nothing) == lm.generate("ab", 9)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"length": 10.0}, ["length=10.0", "integer"]),
        ({"length": "10"}, ["length='10'", "integer"]),
        ({"length": True}, ["length=True", "integer"]),
        ({"length": None}, ["length=None", "integer"]),
        ({"seed": None}, ["seed=None", "integer"]),
        ({"seed": -1}, ["seed=-1", "0", str(2**32)]),
        ({"seed": jax.random.key(0)}, ["seed", "integer"]),
        ({"stop": ""}, ["stop", "empty"]),
        ({"stop": ["a", ""]}, ["stop", "empty"]),
        ({"stop": b"a"}, ["stop=b'a'", "string"]),
        ({"stop": ["a", 3]}, ["stop=3", "string"]),
        ({"stop_tokens": len(CHARACTERS)}, [f"stop_tokens={len(CHARACTERS)}", "0", str(len(CHARACTERS))]),
        ({"stop_tokens": [True]}, ["stop_tokens=True", "integer"]),
        ({"stop_tokens": "a"}, ["stop_tokens='a'", "integer"]),
        ({"prompt": None}, ["prompt=None", "string"]),
        ({"prompt": b"ab"}, ["prompt=b'ab'", "string"]),
        ({"prompt": ["ab"] * 9999}, ["prompt", "'ab'", "complete"]),
        ({"num_samples": 2}, ["num_samples=2", "complete"]),
        ({"max_new_tokens": 5}, ["max_new_tokens", "length", "num_samples", "top_k"]),
        ({"num_return_sequences": 5}, ["num_return_sequences", "'num_samples'"]),
        ({"eos_token_id": 5}, ["eos_token_id", "'stop_tokens'"]),
        ({"num_beams": 4}, ["num_beams", "beam_search"]),
        ({"temprature": 4}, ["temprature", "'temperature'"]),
    ],
    ids=str,
)
def test_a_wrong_argument_is_a_short_line_before_any_text_is_asked_for(lm, arguments, words):
    for function in (lm.generate, lm.stream):
        assert len(assert_raises(UsageError, function, **{"prompt": "ab"} | arguments, says=words)) < 400
    if "prompt" not in arguments and "num_samples" not in arguments:
        assert_raises(UsageError, lm.complete, ["ab"], **arguments, says=words)
    assert_raises(UsageError, lm.complete, ["ab", 3], says=("prompt=3", "string"))
    assert_raises(UsageError, lm.beam_search, 3, beam_width=2, says=("prompt=3", "string"))
    assert_raises(UsageError, lm.beam_search, "ab", beam_width=None, says=("beam_width=None", "integer"))


@pytest.mark.parametrize("wrong", [None, 2.5, np.array([1, 2]), 0])
def test_a_wrong_number_is_named(lm, wrong):
    assert_raises(UsageError, lm.beam_search, "ab", 3, beam_width=wrong, says=("beam_width=",))
    if wrong is not None:
        assert_raises(UsageError, lm.generate, "ab", 3, num_samples=wrong, says=("num_samples=",))


def test_a_name_of_another_library_for_the_number_of_beams_is_answered_with_ours(lm):
    assert_raises(UsageError, lm.beam_search, "ab", 3, num_beams=2, says=("num_beams", "beam_width"))
