"""Token files: the tokenizer's ids are written once, then read from the cache, and rebuilt if a byte is wrong."""

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_raises, assert_says, logged

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
    full_text = Text(text.name, text.paths, text.encoding)
    return token_file.tokenize(text, scan(full_text), tokenizer, folder)


def files(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("min_piece", [5, 2**16])
def test_tokens_match_the_tokenizer_and_are_counted_and_read_only(source, tmp_path, monkeypatch, kind, min_piece):
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    monkeypatch.setattr(text_files, "MIN_PIECE", min_piece)
    tokenizer = make_tokenizer(kind, [TEXT[:40] if kind == "word" else TEXT], 270 if kind == "bpe" else None)
    tokens = tokenize(source, tokenizer, tmp_path / "new" / "nested" / "folder")
    np.testing.assert_array_equal(tokens.ids, tokenizer.encode(TEXT))
    assert (tokens.num_characters, tokens.num_bytes) == (len(TEXT), len(TEXT.encode()))
    assert tokens.num_unknown == tokens.ids.tolist().count(1) * (kind == "word")
    assert (tokens.num_unknown > 0) == (kind == "word")
    assert tokens.unknown_share == tokens.num_unknown / len(tokens.ids)
    with pytest.raises(ValueError, match="read-only"):
        tokens.ids[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):  # the mapped memory is read-only
        tokens.ids.flags.writeable = True


@pytest.mark.parametrize("vocab_size, dtype", [(2, "uint16"), (65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_ids_have_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    """A smaller type would overflow silently: id 65,536 would become 0."""
    characters = "".join(chr(code_point) for code_point in range(0x10000, 0x10000 + vocab_size))
    folder = tmp_path / "data"
    tokens = tokenize(own_text(tmp_path / "text.txt", characters), CharTokenizer(characters), folder)
    assert tokens.ids.dtype == dtype
    assert tokens.ids[-1] == vocab_size - 1
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", f".{dtype}"]


def test_files_are_written_once_and_then_only_read(source, tmp_path):
    folder, tokenizer = tmp_path / "data", CharTokenizer.train(TEXT)
    first = tokenize(source, tokenizer, folder)
    before = files(folder)
    again = tokenize(source, tokenizer, folder)
    assert files(folder) == before
    assert again.num_characters == first.num_characters
    np.testing.assert_array_equal(again.ids, first.ids)


def test_each_text_vocabulary_kind_and_part_has_its_own_files(source, tmp_path):
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
        for text, tokenizer, content in cases:
            np.testing.assert_array_equal(tokenize(text, tokenizer, folder).ids, tokenizer.encode(content))
    assert len(list(folder.iterdir())) == 2 * len(cases)


def test_documents_are_separated_by_end_of_text_or_a_line_break(tmp_path):
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
    "corrupt",
    [
        lambda ids, counts: ids.write_bytes(b"\1\0" + ids.read_bytes()[2:]),
        lambda ids, counts: ids.write_bytes(ids.read_bytes()[:-2]),
        lambda ids, counts: ids.write_bytes(ids.read_bytes() + b"\0\0"),
        lambda ids, counts: ids.write_bytes(b""),
        lambda ids, counts: counts.unlink(),
        lambda ids, counts: counts.write_text(""),
        lambda ids, counts: counts.write_text("[]"),
        lambda ids, counts: counts.write_text(counts.read_text().replace("num_bytes", "num_bites")),
        lambda ids, counts: counts.write_text(counts.read_text().replace('"num_unknown": 0', '"num_unknown": 1')),
    ],
)
def test_corrupt_tokens_are_rebuilt_with_a_warning(source, tmp_path, caplog, corrupt):
    folder, tokenizer = tmp_path / "data", CharTokenizer.train(TEXT)
    tokenize(source, tokenizer, folder)
    assert not logged(caplog)
    [ids], [counts] = folder.glob("*.uint16"), folder.glob("*.json")
    before = {path: path.read_bytes() for path in (ids, counts)}
    corrupt(ids, counts)
    tokens = tokenize(source, tokenizer, folder)
    np.testing.assert_array_equal(tokens.ids, tokenizer.encode(TEXT))
    [warning] = logged(caplog, "WARNING")
    assert_says(warning, str(ids))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("min_bytes", [len(TEXT.encode()), len(TEXT.encode()) + 1])
def test_tokenizing_a_large_text_is_logged(source, tmp_path, caplog, monkeypatch, min_bytes):
    monkeypatch.setattr(token_file, "MIN_LOGGED_BYTES", min_bytes)
    with caplog.at_level(logging.INFO):
        tokenize(source, ByteTokenizer(), tmp_path / "data")
    lines = logged(caplog)
    assert len(lines) == (min_bytes == len(TEXT.encode()))
    for line in lines:
        assert_says(line, source.name, "0 MB", "MB/s")


@pytest.mark.parametrize("failing", ["write_text", "replace"])
def test_a_failed_write_leaves_no_files(source, tmp_path, monkeypatch, failing):
    """Neither a partial file with the final name, which the next run would read, nor a temporary one."""

    def fill_the_disk(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    folder, tokenizer = tmp_path / "data", CharTokenizer.train(TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "write_text") if failing == "write_text" else (os, "replace")), fill_the_disk)
        assert_raises(
            DataError, tokenize, source, tokenizer, folder, says=(str(folder), "No space left on device", "--data_dir")
        )
    assert list(folder.iterdir()) == []
    np.testing.assert_array_equal(tokenize(source, tokenizer, folder).ids, tokenizer.encode(TEXT))


def test_a_text_that_cannot_be_encoded_leaves_no_files(source, tmp_path):
    assert_raises(DataError, tokenize, source, CharTokenizer.train("abc"), tmp_path / "data", says=("'T'", "'e'"))
    assert list((tmp_path / "data").iterdir()) == []


def test_tokens_of_a_text_that_changed_since_the_scan_are_not_kept(source, tmp_path):
    before = scan(source)
    source.paths[0].write_text(TEXT + "more")
    assert_raises(DataError, token_file.tokenize, source, before, ByteTokenizer(), tmp_path / "data", says=("text.txt",))
    assert list((tmp_path / "data").iterdir()) == []


def test_an_unusable_folder_is_reported(source, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file"
    words = (str(folder), os.strerror(errno.EEXIST), "--data_dir")
    assert_raises(DataError, tokenize, source, CharTokenizer.train(TEXT), folder, says=words)
