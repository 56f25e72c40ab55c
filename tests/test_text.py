"""Text as it comes: whatever the portions, they add up to the whole, with no half characters and nothing after a stop."""

import dataclasses

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt_jax.data.tokenizers import CharTokenizer
from minigpt_jax.generation.text import TextStream, held_back


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A tokenizer whose tokens are bytes, so that a character can take several of them."""

    def to_bytes(self, ids):
        return bytes(ids)


def run(text, stop=(), stop_tokens=(), tokenizer=None):
    """The portions that a text's bytes come out in, and the stream."""
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
    """The text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        if found := [text.find(string) for string in stop if string in text[:end]]:
            return text[: min(found)]
    return text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_portions_add_up_to_the_text_and_no_character_is_cut(text):
    portions, stream = run(text)
    assert "".join(portions) == stream.text == text
    assert all(portion in text for portion in portions)


@example("\naa", ["a", "\naa"])
@example("nab", ["b", "ab"])
@given(st.text("abn\n🙂", max_size=30), st.lists(st.text("ab\n🙂", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_stop_string_that_is_complete_first_and_no_portion_has_to_be_taken_back(text, stop):
    portions, stream = run(text, stop)
    expected = up_to_stop(text, stop)
    assert stream.text == expected
    assert "".join(portions) == expected


class Whole(Bytes):
    """A tokenizer with one token, which is a whole text."""

    def to_bytes(self, ids):
        return b"xabcd"


def test_a_stop_string_that_ends_first_wins_though_another_begins_first():
    stream = TextStream(Whole(), ("abcd", "bc"), ())
    stream.feed(0)
    assert stream.stopped
    assert stream.take() == "xa" == up_to_stop("xabcd", ("abcd", "bc"))


def test_what_is_certain_is_not_held_back():
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


def test_characters_of_a_vocabulary_come_one_by_one():
    tokenizer = CharTokenizer.train("añ🙂")
    portions, _ = run("ñ🙂a", tokenizer=tokenizer)
    assert portions == ["ñ", "🙂", "a", ""]
    assert tokenizer.to_bytes(np.array([1, 2])) == "ñ🙂".encode()


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_held_back_is_the_longest_end_that_begins_a_stop_string(text, stop):
    beginnings = {string[:n] for string in stop for n in range(1, len(string))}
    ends = [n for n in range(1, len(text) + 1) if text[-n:] in beginnings]
    assert held_back(text, stop) == max(ends, default=0)
