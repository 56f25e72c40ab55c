"""Tokenizers: ids decode to the text and are below the vocabulary size; unknown text is reported or counted."""

import errno
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_raises
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt_jax.config import SETTINGS
from minigpt_jax.data.tokenizers import (
    KINDS,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    WordTokenizer,
    from_json,
    make_tokenizer,
    read_tokenizer,
)
from minigpt_jax.data.tokenizers.base import END_OF_TEXT
from minigpt_jax.data.tokenizers.library import BYTE_SYMBOLS
from minigpt_jax.errors import DataError, UsageError

README = (Path(__file__).resolve().parents[1] / "minigpt_jax/data/README.md").read_text(encoding="utf-8")

# Code points at the limits of Unicode and its encodings: NUL, ASCII, one byte, two bytes of UTF-8, unpaired surrogates,
# the last with 16 bits, the first beyond, and the very last.
LIMITS = "\0\n\r~\x7f\x80\xff\u0100\u07ff\u0800\ud7ff\ud800\udfff\ue000\ufeff\uffff\U00010000\U0001f600\U0010ffff"

any_text = st.text(st.characters(exclude_categories=()))  # all code points, surrogates too

no_deadline = settings(deadline=None, max_examples=200)

# What lossy tokenizers change: newlines of every kind, repeated blanks, emoji, combining marks, NUL, right-to-left text, and
# the names of special tokens.
HARD = (
    "\n\r\n\r\u2028\x85\x0b  \t   \u00a0🙂👩\u200d👧e\u0301ñ\0שלום مرحبا\u202e漢字 _'’don't o'er \ufeff<unk>" + END_OF_TEXT
)
hard_text = st.lists(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from([*HARD, "the", " the", END_OF_TEXT, "<unk>"]))
).map("".join)
PROSE = "To be, or not to be: that is the question —\nWhether 'tis nobler in the mind to suffer\n" * 2


@functools.cache
def bpe(vocab_size=320):
    pytest.importorskip("tokenizers")
    return BpeTokenizer.train([PROSE], vocab_size)


def trained(kind, text=PROSE):
    return bpe() if kind == "bpe" else KINDS[kind].train([text])


@no_deadline
@given(training_text=any_text.filter(bool), data=st.data())
def test_ids_are_indices_into_the_characters_and_decode_to_the_text(training_text, data):
    tokenizer = CharTokenizer.train(training_text)
    text = data.draw(st.text(st.sampled_from(training_text)))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == [tokenizer.characters.index(character) for character in text]
    assert tokenizer.decode(ids) == text


@no_deadline
@given(training_text=any_text.filter(bool), text=any_text)
def test_unknown_characters_are_an_error_that_names_all_of_them(training_text, text):
    tokenizer = CharTokenizer.train(training_text)
    unknown = set(text) - set(training_text)
    if unknown:
        names = ", ".join(map(repr, sorted(unknown)))
        message = assert_raises(DataError, tokenizer.encode, text)
        assert names in message
        assert not any(repr(known) in message.replace(names, "", 1) for known in set(text) - unknown)
    else:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_help_and_the_readme_list_every_kind(kind):
    """config.py is below data/ and cannot import the table."""
    assert re.search(rf"\b{kind}\b", SETTINGS["tokenizer"].field.metadata["help"])
    assert f"| `{kind}` |" in README


# ---- All kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@no_deadline
@given(text=hard_text)
def test_decoding_restores_the_text(kind, text):
    tokenizer = trained(kind, text + " " + HARD) if kind in ("char", "word") else trained(kind)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
    assert tokenizer.decode(ids) == text
    assert tokenizer.to_bytes(ids) == text.encode()
    assert b"".join(tokenizer.to_bytes([i]) for i in ids) == text.encode()


@pytest.mark.parametrize("kind", KINDS)
@no_deadline
@given(text=hard_text)
def test_ids_of_unseen_text_are_below_the_vocabulary_size(kind, text):
    tokenizer = trained(kind)
    try:
        ids = tokenizer.encode(text)
    except DataError:
        assert kind == "char"
        return
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
    assert tokenizer.end_of_text not in ids.tolist()  # the name of a special token is ordinary text
    assert (kind == "word") or tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_has_its_own_bytes_and_higher_ids_are_errors(kind):
    tokenizer = trained(kind)
    assert all(tokenizer.to_bytes([i]) for i in range(tokenizer.vocab_size))
    assert len({tokenizer.to_bytes([i]) for i in range(tokenizer.vocab_size)}) == tokenizer.vocab_size
    for given_ids in ([0, 1], np.array([0, 1], np.uint16), np.array([0, 1], np.int64)):
        assert tokenizer.to_bytes(given_ids) == tokenizer.to_bytes([0]) + tokenizer.to_bytes([1])
    with pytest.raises((IndexError, OverflowError)):
        tokenizer.to_bytes([tokenizer.vocab_size])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_texts_and_an_empty_text_has_no_tokens(kind):
    tokenizer = trained(kind)
    parts = ["", "to be", "not to be", ""]
    batch = tokenizer.encode_batch(parts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(part).tolist() for part in parts]
    assert (batch[0].shape, batch[0].dtype) == ((0,), np.int32)
    assert tokenizer.decode(batch[0]) == tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", ["byte", "word", "bpe"])
def test_an_unpaired_surrogate_is_reported_with_its_position(kind):
    assert_raises(DataError, trained(kind).encode, "to\ud83d be", says=("U+D83D", "2"))


@pytest.mark.parametrize("kind", KINDS)
def test_training_depends_on_the_text_but_not_on_its_pieces(kind):
    tokenizer = trained(kind)
    cut = PROSE.index(" nobler")
    assert make_tokenizer(kind, [PROSE[:cut], PROSE[cut:]], tokenizer.vocab_size) == tokenizer
    if kind in ("word", "bpe"):  # also in a process with a different hash seed
        program = (
            "import sys; from minigpt_jax.data.tokenizers import make_tokenizer as make\n"
            f"print(make({kind!r}, [sys.argv[1]], {tokenizer.vocab_size}).sha256)"
        )
        process = subprocess.run([sys.executable, "-c", program, PROSE], capture_output=True, text=True, check=True)
        assert process.stdout.strip() == tokenizer.sha256


@pytest.mark.parametrize("kind", KINDS)
def test_json_restores_an_equal_tokenizer_and_others_have_other_hashes(kind):
    tokenizer = trained(kind)
    restored = from_json(tokenizer.to_json())
    assert restored == tokenizer
    assert restored.sha256 == tokenizer.sha256
    assert len({trained(kind).sha256 for kind in KINDS}) == len(KINDS)
    if kind != "byte":
        assert make_tokenizer(kind, ["something else"]).sha256 != tokenizer.sha256


# ---- Characters -----------------------------------------------------------------------------------------------------------


def test_characters_are_numbered_in_code_point_order():
    tokenizer = CharTokenizer.train("banana\n\U0001f600é")
    assert tokenizer.characters == "\nabné\U0001f600"
    assert tokenizer.vocab_size == 6
    assert tokenizer == CharTokenizer.train("é\U0001f600nab\n")


def test_characters_at_the_limits_of_encodings_are_distinct():
    tokenizer = CharTokenizer.train(LIMITS)
    assert tokenizer.vocab_size == len(LIMITS)
    assert tokenizer.decode(tokenizer.encode(LIMITS)) == LIMITS


@pytest.mark.parametrize("character", LIMITS)
def test_no_other_character_is_mistaken_for_a_known_one(character):
    """A table lookup can be off by one, wrap around, drop high bits or clamp at the end."""
    tokenizer, known = CharTokenizer.train(character), ord(character)
    assert tokenizer.encode(character * 2).tolist() == [0, 0]
    others = {0, known - 1, known + 1, 2 * known + 1, 2 * known + 2, known ^ 2**8, known ^ 2**16, 0x10FFFF} - {known}
    for other in others & set(range(0x110000)):
        assert_raises(DataError, tokenizer.encode, character + chr(other), says=(repr(chr(other)),))


def test_a_surrogate_pair_is_two_characters_as_in_python():
    pair = "\ud83d\ude00"  # UTF-16 would decode it as one character
    tokenizer = CharTokenizer.train(pair)
    assert tokenizer.vocab_size == 2
    assert tokenizer.decode(tokenizer.encode(pair)) == pair


def test_composed_and_decomposed_characters_are_distinct():
    text = "\u00e9e\u0301\r\n"
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text) == 5


def test_each_unknown_character_is_named_once():
    assert_raises(
        DataError, CharTokenizer.train("abc").encode, "a?!?é\n", says=(r"'\n', '!', '?', 'é'", "3", "tokenizer.json")
    )


def test_different_surrogates_have_different_hashes():
    assert CharTokenizer("\ud800").sha256 != CharTokenizer("\udfff").sha256


# ---- Bytes ----------------------------------------------------------------------------------------------------------------


def test_bytes_are_utf_8_and_partial_characters_decode_to_the_replacement_character():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([0xC3]) == "�"
    assert tokenizer.to_bytes([0xC3]) == b"\xc3"


# ---- Words ----------------------------------------------------------------------------------------------------------------


def test_words_punctuation_marks_and_white_space_are_tokens():
    text = "To be, or not:\r\n\tto  be o'er don’t e'e'r 'tis x_1"
    tokenizer = WordTokenizer.train([text])
    pieces = [tokenizer.words[i] for i in tokenizer.encode(text)]
    expected = "To| |be|,| |or| |not|:|\r|\n|\t|to| | |be| |o'er| |don’t| |e'e'r| |'|tis| |x_1"
    assert pieces == expected.split("|")


@no_deadline
@given(st.lists(st.sampled_from(["to", "be", "o'er", ",", "!", "'", " ", "\n", "\t", "\r\n", "  "])).map(" ".join))
def test_known_words_are_lossless_in_any_order_and_white_space_is_always_known(text):
    tokenizer = WordTokenizer.train(["to be,o'er!'"])
    assert tokenizer.unknown not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_is_the_most_frequent_words_with_ties_in_code_point_order():
    special = (END_OF_TEXT, "<unk>", " ", "\n", "\r", "\t")
    tokenizer = WordTokenizer.train(["b b b c a a\n\n\nd c é "], vocab_size=10)
    assert tokenizer.words == (*special, "b", "a", "c", "d")
    assert WordTokenizer.train(["b a"]).words == (*special, "a", "b")  # fewer words than the limit
    assert WordTokenizer.train([" ".join(map(str, range(20_000)))]).vocab_size == 10_000


def test_only_unknown_words_are_lost():
    tokenizer = WordTokenizer.train(["to be, not"])
    text = "to be hamlet,romeo not\tto"
    assert tokenizer.decode(tokenizer.encode(text)) == "to be <unk>,<unk> not\tto"
    assert tokenizer.encode(text).tolist().count(tokenizer.unknown) == 2
    assert tokenizer.decode(tokenizer.encode("<unk>" + END_OF_TEXT)) == "<unk>" * (3 + 5)


def test_the_rarest_of_too_many_distinct_words_are_dropped(monkeypatch):
    monkeypatch.setattr(WordTokenizer, "MAX_COUNTED", 50)
    pieces = [f" often sometimes {' '.join(str(1000 * n + i) for i in range(40))}" for n in range(30)]
    tokenizer = WordTokenizer.train(pieces)
    assert {"often", "sometimes"} <= set(tokenizer.words)
    assert tokenizer.vocab_size <= 50 + 6


# ---- Byte-level BPE -------------------------------------------------------------------------------------------------------


def test_merges_are_the_most_frequent_pairs_within_words():
    tokenizer = BpeTokenizer.train(["aaab ab ab cd"], 257 + 2)
    assert [tokenizer.to_bytes([i]) for i in (257, 258)] == [b"ab", b" ab"]  # three times, and twice
    assert [tokenizer.to_bytes([i]) for i in tokenizer.encode("aab ab")] == [b"a", b"ab", b" ab"]
    assert tokenizer.end_of_text == 0
    assert tokenizer.to_bytes([0]) == END_OF_TEXT.encode()


def test_byte_symbols_match_published_vocabularies():
    library = pytest.importorskip("tokenizers")
    assert set(BYTE_SYMBOLS) == set(library.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_SYMBOLS.values()) == list(range(256))
    assert (BYTE_SYMBOLS["Ġ"], BYTE_SYMBOLS["Ċ"], BYTE_SYMBOLS["a"], BYTE_SYMBOLS["ĉ"]) == (32, 10, 97, 9)  # as in GPT-2
    assert BYTE_SYMBOLS["Ń"] == 0xAD


def test_the_library_reads_the_json_and_gives_the_same_ids(tmp_path):
    library = pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(bpe().to_json(), encoding="utf-8")
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = HARD.replace(END_OF_TEXT, "") + PROSE
    assert theirs.encode(text).ids == bpe().encode(text).tolist()
    assert theirs.decode(theirs.encode(text).ids) == text


# ---- Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json_is_read_from_its_file_or_folder(tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    path.write_text(trained(kind).to_json(), encoding="utf-8")
    for name in (path, tmp_path):
        assert make_tokenizer(str(name), []) == trained(kind)


def test_gpt_2s_two_files_are_read_and_names_of_special_tokens_are_ordinary_text(tmp_path):
    model = json.loads(bpe().to_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("", "vocab.json", "merges.txt"):
        tokenizer = read_tokenizer(str(tmp_path / name))
        assert tokenizer.encode(PROSE + HARD).tolist() == bpe().encode(PROSE + HARD).tolist()
        assert tokenizer.end_of_text == 0
        assert 0 not in tokenizer.encode(END_OF_TEXT)
    (tmp_path / "merges.txt").unlink()
    assert_raises(DataError, read_tokenizer, str(tmp_path), says=(str(tmp_path / "vocab.json"), "merges.txt"))


def changed(change):
    values = json.loads(bpe().to_json())
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(normalizer={"type": "Lowercase"}),
        lambda values: values.update(normalizer={"type": "NFC"}),
        lambda values: values["pre_tokenizer"].update(add_prefix_space=True),
        lambda values: values.update(pre_tokenizer={"type": "Whitespace"}),
        lambda values: values["model"]["vocab"].pop("Ġ") and values["model"].update(merges=[]),
        lambda values: values.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
    ],
)
def test_a_lossy_tokenizer_is_rejected(change):
    assert_raises(DataError, from_json, changed(change))


def test_merge_dropout_is_disabled():
    tokenizer = from_json(changed(lambda values: values["model"].update(dropout=0.5)))
    assert all(tokenizer.encode(PROSE).tolist() == bpe().encode(PROSE).tolist() for _ in range(5))


def test_truncation_padding_and_post_processing_are_disabled():
    def change(values):
        values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        values["padding"] = {
            "strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT,
        }  # fmt: skip
        values["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}},
        }

    assert from_json(changed(change)).encode(PROSE).tolist() == bpe().encode(PROSE).tolist()


@pytest.mark.parametrize(
    "tokenizer, vocab_size, kind, words",
    [
        ("chra", None, UsageError, ["tokenizer='chra'", "char", *KINDS, "tokenizer.json"]),
        ("missing/tokenizer.json", None, DataError, ["missing/tokenizer.json", os.strerror(errno.ENOENT)]),
        (".", None, DataError, ["tokenizer.json", "vocab.json"]),
        ("./broken.json", None, DataError, ["./broken.json"]),
        ("./binary.json", None, DataError, ["./binary.json"]),
        ("char", 99, DataError, ["vocab_size=99", "tokenizer=char", "24"]),
        ("byte", 99, DataError, ["vocab_size=99", "tokenizer=byte", "256"]),
        ("word", 10_000, DataError, ["vocab_size=10000", "tokenizer=word", "25"]),
        ("word", 6, UsageError, ["vocab_size=6", "7", "tokenizer=word"]),
        ("word", 2**20 + 1, UsageError, ["vocab_size=1048577", "1048576", "tokenizer=word"]),
        ("bpe", 10_000, DataError, ["vocab_size=10000", "tokenizer=bpe"]),
        ("bpe", 256, UsageError, ["vocab_size=256", "257", "tokenizer=bpe"]),
        ("bpe", 10**18, UsageError, ["vocab_size=1000000000000000000", "1048576", "tokenizer=bpe"]),
        ("./" + "long" * 99, None, DataError, ["./" + "long" * 99, os.strerror(errno.ENAMETOOLONG)]),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_a_one_line_error(tmp_path, monkeypatch, tokenizer, vocab_size, kind, words):
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('{"type": "char"')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    assert_raises(kind, make_tokenizer, tokenizer, [PROSE], vocab_size, says=words)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    text = bpe().to_json()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for build in (lambda: make_tokenizer("bpe", [PROSE]), lambda: from_json(text)):
        assert_raises(UsageError, build, says=("tokenizers", "python -m pip install -e '.[bpe]'"))


# ---- JSON -----------------------------------------------------------------------------------------------------------------


@no_deadline
@given(text=any_text.filter(bool))
def test_json_restores_an_equal_tokenizer(text):
    tokenizer = CharTokenizer.train(text)
    assert from_json(tokenizer.to_json()) == tokenizer


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
        '{"type": "byte", "vocab_size": 3}',
        '{"type": "word", "words": "ab"}',
        '{"type": "word", "words": ["<|endoftext|>", "<unk>", " ", "\\n", "\\r", "\\t", "a", "a"]}',
        '{"type": "word", "words": ["<|endoftext|>", "<unk>", " ", "\\n", "\\r", "\\t", ""]}',
        '{"type": "word", "words": ["<|endoftext|>", "<unk>", " ", "\\n", "\\r", "\\t", 7]}',
        '{"type": "word", "words": ["a", "b"]}',
        '{"model": 7}',
        "[" * 100_000,
        '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        CharTokenizer.train("abc").to_json()[:-6],
    ],
)
def test_json_that_is_not_a_tokenizer_is_a_data_error(text):
    assert_raises(DataError, from_json, text)


def test_an_unpaired_surrogate_cannot_be_exported_to_hugging_face():
    assert_raises(DataError, CharTokenizer("a\ud800").to_huggingface, says=("U+D800", "1"))
