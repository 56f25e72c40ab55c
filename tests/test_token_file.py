"""Token files: the tokenizer's ids, written once, found again, and made anew when a byte of them is wrong."""

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_says, error_message, logged

from minigpt_jax.data import text_files, token_file
from minigpt_jax.data.text_files import Text, find_text, scan
from minigpt_jax.data.tokenizers import KINDS, ByteTokenizer, CharTokenizer, WordTokenizer, make_tokenizer
from minigpt_jax.errors import DataError

TEXT = "To be, or not to be: that is the question — naïve.\n"


@pytest.fixture
def source(tmp_path):
    return own_text(tmp_path / "text.txt", TEXT)


def own_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return find_text(str(path))


def tokenize(text, tokenizer, folder):
    whole = Text(text.name, text.paths, text.encoding)
    return token_file.tokenize(text, scan(whole), tokenizer, folder)


def files(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [5, 2**16])
def test_tokens_are_those_of_the_tokenizer_with_counts_and_cannot_be_changed(source, tmp_path, monkeypatch, kind, piece):
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    monkeypatch.setattr(text_files, "PIECE", piece)
    tokenizer = make_tokenizer(kind, [TEXT[:40] if kind == "word" else TEXT], 270 if kind == "bpe" else None)
    made = tokenize(source, tokenizer, tmp_path / "made" / "on" / "the" / "way")
    np.testing.assert_array_equal(made.ids, tokenizer.encode(TEXT))
    assert (made.num_characters, made.num_bytes) == (len(TEXT), len(TEXT.encode()))
    assert made.num_unknown == made.ids.tolist().count(1) * (kind == "word")
    assert (made.num_unknown > 0) == (kind == "word")
    assert made.unknown_share == made.num_unknown / len(made.ids)
    with pytest.raises(ValueError, match="read-only"):
        made.ids[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):  # the memory itself is
        made.ids.flags.writeable = True


@pytest.mark.parametrize("vocab_size, dtype", [(2, "uint16"), (65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_type_is_the_smallest_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    """A type too small would wrap around without a word: id 65,536 would become 0."""
    characters = "".join(chr(code_point) for code_point in range(0x10000, 0x10000 + vocab_size))
    folder = tmp_path / "data"
    made = tokenize(own_text(tmp_path / "text.txt", characters), CharTokenizer(characters), folder)
    assert made.ids.dtype == dtype
    assert made.ids[-1] == vocab_size - 1
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", f".{dtype}"]


def test_files_are_written_once_and_then_only_read(source, tmp_path):
    folder, tokenizer = tmp_path / "data", CharTokenizer.train(TEXT)
    first = tokenize(source, tokenizer, folder)
    before = files(folder)
    again = tokenize(source, tokenizer, folder)
    assert files(folder) == before
    assert again.num_characters == first.num_characters
    np.testing.assert_array_equal(again.ids, first.ids)


def test_another_text_vocabulary_kind_or_part_has_files_of_its_own(source, tmp_path):
    folder, tokenizer = tmp_path / "data", CharTokenizer.train(TEXT)
    other = own_text(tmp_path / "other.txt", TEXT[:-1])
    cases = [
        (source, tokenizer, TEXT),
        (other, tokenizer, TEXT[:-1]),
        (source, CharTokenizer.train(TEXT + "z"), TEXT),
        (source, ByteTokenizer(), TEXT),
        (Text("", source.paths, end=9), tokenizer, TEXT[:9]),
        (Text("", source.paths, start=9), tokenizer, TEXT[9:]),
    ]
    for _ in range(2):
        for text, by, whole in cases:
            np.testing.assert_array_equal(tokenize(text, by, folder).ids, by.encode(whole))
    assert len(list(folder.iterdir())) == 2 * len(cases)


def test_the_end_of_a_document_is_a_token_of_its_own_where_there_is_one(tmp_path):
    for name, text in {"a": "one two", "b": "two <|endoftext|>", "c": "one\n"}.items():
        own_text(tmp_path / "texts" / f"{name}.txt", text)
    source, folder = find_text(str(tmp_path / "texts")), tmp_path / "data"
    word = WordTokenizer.train(["one two <|endoftext|>\n"])
    ends = np.flatnonzero(tokenize(source, word, folder).ids == word.end_of_text)
    np.testing.assert_array_equal(
        tokenize(source, word, folder).ids,
        np.concatenate([word.encode("one two"), [0], word.encode("two <|endoftext|>"), [0], word.encode("one\n")]),
    )
    assert len(ends) == 2
    byte = tokenize(source, ByteTokenizer(), folder)
    assert bytes(byte.ids.astype(np.uint8)) == b"one two\ntwo <|endoftext|>\none\n"
    assert byte.num_characters == len("one twotwo <|endoftext|>one\n")


@pytest.mark.parametrize(
    "damage",
    [
        lambda ids, about: ids.write_bytes(b"\1\0" + ids.read_bytes()[2:]),
        lambda ids, about: ids.write_bytes(ids.read_bytes()[:-2]),
        lambda ids, about: ids.write_bytes(ids.read_bytes() + b"\0\0"),
        lambda ids, about: ids.write_bytes(b""),
        lambda ids, about: about.unlink(),
        lambda ids, about: about.write_text(""),
        lambda ids, about: about.write_text("[]"),
        lambda ids, about: about.write_text(about.read_text().replace("num_bytes", "num_bites")),
        lambda ids, about: about.write_text(about.read_text().replace('"num_unknown": 0', '"num_unknown": 1')),
    ],
)
def test_damaged_tokens_are_made_anew_and_that_is_said(source, tmp_path, caplog, damage):
    folder, tokenizer = tmp_path / "data", CharTokenizer.train(TEXT)
    tokenize(source, tokenizer, folder)
    assert not logged(caplog)
    [ids], [about] = folder.glob("*.uint16"), folder.glob("*.json")
    before = {path: path.read_bytes() for path in (ids, about)}
    damage(ids, about)
    made = tokenize(source, tokenizer, folder)
    np.testing.assert_array_equal(made.ids, tokenizer.encode(TEXT))
    [warning] = logged(caplog, "WARNING")
    assert_says(warning, str(ids))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("worth_telling", [len(TEXT.encode()), len(TEXT.encode()) + 1])
def test_how_much_was_tokenized_is_said_where_it_takes_a_while(source, tmp_path, caplog, monkeypatch, worth_telling):
    monkeypatch.setattr(token_file, "WORTH_TELLING", worth_telling)
    with caplog.at_level(logging.INFO):
        tokenize(source, ByteTokenizer(), tmp_path / "data")
    lines = logged(caplog)
    assert len(lines) == (worth_telling == len(TEXT.encode()))
    for line in lines:
        assert_says(line, source.name, "0 MB", "MB/s")


@pytest.mark.parametrize("failing", ["write_text", "replace"])
def test_a_write_that_fails_leaves_nothing_behind(source, tmp_path, monkeypatch, failing):
    """Neither half a file under the final name, which the next start would take for the tokens, nor one beside it."""

    def fill_the_disk(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    folder, tokenizer = tmp_path / "data", CharTokenizer.train(TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "write_text") if failing == "write_text" else (os, "replace")), fill_the_disk)
        error_message(
            DataError, tokenize, source, tokenizer, folder, says=(str(folder), "No space left on device", "--data_dir")
        )
    assert list(folder.iterdir()) == []
    np.testing.assert_array_equal(tokenize(source, tokenizer, folder).ids, tokenizer.encode(TEXT))


def test_a_text_that_cannot_be_encoded_leaves_nothing_behind(source, tmp_path):
    error_message(DataError, tokenize, source, CharTokenizer.train("abc"), tmp_path / "data", says=("'T'", "'ï'"))
    assert list((tmp_path / "data").iterdir()) == []


def test_a_text_that_changes_while_it_is_read_is_not_kept_under_the_sum_of_the_old_one(source, tmp_path):
    before = scan(source)
    source.paths[0].write_text(TEXT + "more")
    error_message(DataError, token_file.tokenize, source, before, ByteTokenizer(), tmp_path / "data", says=("text.txt",))
    assert list((tmp_path / "data").iterdir()) == []


def test_folder_that_cannot_be_written_is_named(source, tmp_path):
    (tmp_path / "file").write_text("in the folder's place")
    folder = tmp_path / "file"
    words = (str(folder), os.strerror(errno.EEXIST), "--data_dir")
    error_message(DataError, tokenize, source, CharTokenizer.train(TEXT), folder, says=words)
