"""Incremental text: the portions add up to the whole text, with no half characters and nothing after a stop string."""

import dataclasses

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt_jax.data.tokenizers import CharTokenizer
from minigpt_jax.generation.text import TextStream, held_back


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A tokenizer whose tokens are bytes, so that a character can span several of them."""

    def to_bytes(self, ids):
        return bytes(ids)


def run(text, stop=(), stop_tokens=(), tokenizer=None):
    """Feeds a text token by token. Returns the portions taken and the stream."""
    stream = TextStream(tokenizer or Bytes(), tuple(stop), tuple(stop_tokens))
    portions = []
    for token in text.encode() if tokenizer is None else tokenizer.encode(text):
        stream.feed(int(token))
        portions.append(stream.take())
        if stream.stopped:
            return portions, stream
    stream.end()
    return [*portions, stream.take()], stream


def up_to_stop(text, stop):
    """The text before the stop string that is completed first."""
    for end in range(len(text) + 1):
        if starts := [text.find(string) for string in stop if string in text[:end]]:
            return text[: min(starts)]
    return text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_portions_add_up_to_the_text_and_no_character_is_cut(text):
    portions, stream = run(text)
    assert "".join(portions) == stream.text == text
    assert all(portion in text for portion in portions)


@example("\naa", ["a", "\naa"])
@example("nab", ["b", "ab"])
@given(st.text("abn\n🙂", max_size=30), st.lists(st.text("ab\n🙂", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_completed_stop_string_and_portions_are_final(text, stop):
    portions, stream = run(text, stop)
    expected = up_to_stop(text, stop)
    assert stream.text == expected
    assert "".join(portions) == expected


class OneToken(Bytes):
    """A tokenizer with one token, which decodes to several characters."""

    def to_bytes(self, ids):
        return b"xabcd"


def test_the_stop_string_that_ends_first_wins_even_if_another_starts_first():
    stream = TextStream(OneToken(), ("abcd", "bc"), ())
    stream.feed(0)
    assert stream.stopped
    assert stream.take() == "xa" == up_to_stop("xabcd", ("abcd", "bc"))


def test_final_text_is_not_held_back():
    portions, _ = run("hello\nwo", ["\n\n"])
    assert portions == ["h", "e", "l", "l", "o", "", "\nw", "o", ""]


def test_a_stop_token_ends_the_text_and_is_not_part_of_it():
    portions, stream = run("abcabc", stop_tokens=[ord("c")])
    assert "".join(portions) == "ab"
    assert stream.stopped


def test_half_a_character_at_the_end_becomes_one_replacement_character():
    stream = TextStream(Bytes())
    for byte in "é🙂".encode()[:-1]:
        stream.feed(byte)
    assert stream.take() == "é"
    stream.end()
    assert stream.take() == "\N{REPLACEMENT CHARACTER}"


def test_a_character_vocabulary_yields_one_character_per_token():
    tokenizer = CharTokenizer.train("añ🙂")
    portions, _ = run("ñ🙂a", tokenizer=tokenizer)
    assert portions == ["ñ", "🙂", "a", ""]
    assert tokenizer.to_bytes(np.array([1, 2])) == "ñ🙂".encode()


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_longest_suffix_that_may_start_a_stop_string_is_held_back(text, stop):
    prefixes = {string[:n] for string in stop for n in range(1, len(string))}
    lengths = [n for n in range(1, len(text) + 1) if text[-n:] in prefixes]
    assert held_back(text, stop) == max(lengths, default=0)
