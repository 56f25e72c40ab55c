"""Tokenizers: every character has its id, ids come back as the text, and what has no id is named."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt_jax.data.tokenizers import TOKENIZERS, CharTokenizer, from_json, train_tokenizer
from minigpt_jax.errors import DataError

# Neighbours of every border in Unicode and its encodings: NUL, ASCII, bytes, the last of two bytes of UTF-8, unpaired
# surrogates, the last of 16 bits, the first beyond them and the very last.
BORDERS = "\0\n\r~\x7f\x80\xff\u0100\u07ff\u0800\ud7ff\ud800\udfff\ue000\ufeff\uffff\U00010000\U0001f600\U0010ffff"

any_text = st.text(st.characters(exclude_categories=()))  # all code points, surrogates too

without_time_limit = settings(deadline=None, max_examples=200)


@without_time_limit
@given(training_text=any_text.filter(bool), data=st.data())
def test_encode_gives_each_character_its_place_and_decode_gives_the_text_back(training_text, data):
    tokenizer = CharTokenizer.train(training_text)
    text = data.draw(st.text(st.sampled_from(training_text)))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == [tokenizer.characters.index(character) for character in text]
    assert tokenizer.decode(ids) == text


@without_time_limit
@given(training_text=any_text.filter(bool), text=any_text)
def test_characters_without_an_id_are_all_named_and_nothing_is_encoded_in_their_place(training_text, text):
    tokenizer = CharTokenizer.train(training_text)
    unknown = set(text) - set(training_text)
    if unknown:
        with pytest.raises(DataError) as caught:
            tokenizer.encode(text)
        assert str(caught.value).startswith(f"the vocabulary has no {', '.join(map(repr, sorted(unknown)))}; ")
    else:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_below_the_size_of_the_vocabulary_and_all_of_them_are_used(kind):
    text = "To be, or not to be — that is the question:\n" * 3
    tokenizer = train_tokenizer(kind, text)
    ids = tokenizer.encode(text)
    assert ids.min() >= 0
    assert len(np.unique(ids)) <= tokenizer.vocab_size
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text


def test_characters_are_numbered_in_code_point_order_whatever_their_order_in_the_text():
    tokenizer = CharTokenizer.train("banana\n\U0001f600é")
    assert tokenizer.characters == "\nabné\U0001f600"
    assert tokenizer.vocab_size == 6
    assert tokenizer == CharTokenizer.train("é\U0001f600nab\n")


def test_characters_on_the_borders_of_encodings_are_told_apart():
    tokenizer = CharTokenizer.train(BORDERS)
    assert tokenizer.vocab_size == len(BORDERS)
    assert tokenizer.decode(tokenizer.encode(BORDERS)) == BORDERS


@pytest.mark.parametrize("character", BORDERS)
def test_no_other_character_is_taken_for_the_one_that_is_known(character):
    """Lookups in a table can be off by one, wrap around, lose high bits or clamp at the end."""
    tokenizer, known = CharTokenizer.train(character), ord(character)
    assert tokenizer.encode(character * 2).tolist() == [0, 0]
    others = {0, known - 1, known + 1, 2 * known + 1, 2 * known + 2, known ^ 2**8, known ^ 2**16, 0x10FFFF} - {known}
    for other in others & set(range(0x110000)):
        with pytest.raises(DataError, match="the vocabulary has no"):
            tokenizer.encode(character + chr(other))


def test_pairs_of_surrogates_are_two_characters_as_in_python():
    pair = "\ud83d\ude00"  # not the one character that UTF-16 would make of them
    tokenizer = CharTokenizer.train(pair)
    assert tokenizer.vocab_size == 2
    assert tokenizer.decode(tokenizer.encode(pair)) == pair


def test_composed_and_decomposed_characters_are_kept_apart():
    text = "\u00e9e\u0301\r\n"
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text) == 5


def test_empty_text_has_no_tokens_and_no_tokens_are_an_empty_text():
    tokenizer = CharTokenizer.train("ab")
    ids = tokenizer.encode("")
    assert (ids.shape, ids.dtype) == ((0,), np.int32)
    assert tokenizer.decode(ids) == tokenizer.decode([]) == ""


def test_unknown_characters_are_named_once_with_what_to_do():
    with pytest.raises(DataError) as caught:
        CharTokenizer.train("abc").encode("a?!?é\n")
    message = str(caught.value)
    assert message.startswith(r"the vocabulary has no '\n', '!', '?', 'é'; leave it out")
    assert "tokenizer.json" in message


def test_decode_takes_lists_and_arrays_of_any_integer_type():
    ids = [0, 1, 1]
    for given_ids in (ids, np.array(ids, np.uint16), np.array(ids, np.int64)):
        assert CharTokenizer.train("ab").decode(given_ids) == "abb"


# ---- JSON -----------------------------------------------------------------------------------------------------------------


@without_time_limit
@given(text=any_text.filter(bool))
def test_json_gives_an_equal_tokenizer(text):
    tokenizer = CharTokenizer.train(text)
    assert from_json(tokenizer.to_json()) == tokenizer


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_json_names_the_kind(kind):
    assert json.loads(train_tokenizer(kind, "ab").to_json())["type"] == kind


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"type": "char"}',
        '{"type": "chars", "characters": "ab"}',
        '{"type": ["char"], "characters": "ab"}',
        '{"type": "char", "characters": ""}',
        '{"type": "char", "characters": "aba"}',
        '{"type": "char", "characters": ["a", "b"]}',
        '{"type": "char", "characters": 7}',
        '{"type": "char", "characters": null}',
        '{"type": "char", "characters": "ab", "merges": []}',
        CharTokenizer.train("abc").to_json()[:-6],
    ],
)
def test_json_that_is_no_tokenizer_is_a_data_error(text):
    with pytest.raises(DataError, match=r"^not a tokenizer of this version: "):
        from_json(text)
