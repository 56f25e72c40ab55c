"""Files and folders are written atomically: partial output never gets the final name and is always deleted."""

import errno
import os
import stat
from pathlib import Path

import pytest
from helpers import assert_raises, disk_events

import minigpt_jax as mg
from minigpt_jax import files
from minigpt_jax.config import Config, DataConfig
from minigpt_jax.data.splits import read_texts
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.files import atomic_path, local_path, sha256, write_text


class StoppedError(BaseException):
    """Like KeyboardInterrupt, not an Exception."""


def write_half(path, kind):
    with atomic_path(path) as temporary:
        if kind == "file":
            temporary.write_text("half")
        elif kind == "folder":
            temporary.mkdir()
            (temporary / "part").touch()
        raise StoppedError


def test_the_old_file_remains_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["nothing", "file", "folder"])
def test_a_failed_write_leaves_only_the_old_file(tmp_path, kind):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(StoppedError):
        write_half(path, kind)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_renamed_is_deleted(tmp_path):
    (tmp_path / "file" / "something").mkdir(parents=True)
    with pytest.raises(OSError, match=r"\.tmp") as caught:
        write_text(tmp_path / "file", "new")
    assert caught.value.filename2 == str(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_writers_can_run_at_once(tmp_path):
    with atomic_path(tmp_path / "file") as one, atomic_path(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one"


def test_a_folder_replaces_an_empty_one(tmp_path):
    (tmp_path / "folder").mkdir()
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "part").touch()
    assert (tmp_path / "folder" / "part").exists()


def test_sha256_matches_the_published_value():
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def test_content_is_flushed_before_the_rename_and_its_folder_after(tmp_path, monkeypatch):
    events = disk_events(monkeypatch)
    with atomic_path(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir(parents=True)
        for path in (temporary / "one", temporary / "deep" / "two"):
            path.write_text("new")
    *flushed, renamed, last = events
    names = {str(path.relative_to(temporary)) for kind, path in flushed if kind == "flush"}
    assert names == {".", "one", "deep", "deep/two"}
    assert renamed == ("rename", tmp_path / "folder")
    assert last == ("flush", tmp_path)


@pytest.mark.parametrize("number, is_raised", [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_may_be_unable_to_flush_but_a_disk_may_not_fail(tmp_path, monkeypatch, number, is_raised):
    def fail(descriptor):
        if number == errno.EIO or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    if is_raised:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_text(tmp_path / "file", "new")
        assert list(tmp_path.iterdir()) == []
    else:
        write_text(tmp_path / "file", "new")
        assert (tmp_path / "file").read_text() == "new"


def test_new_folders_are_flushed_into_their_parents(tmp_path, monkeypatch):
    events = disk_events(monkeypatch)
    files.make_folder(tmp_path / "one" / "two")
    assert {path for kind, path in events if kind == "flush"} == {tmp_path, tmp_path / "one"}
    events.clear()
    files.make_folder(tmp_path / "one" / "two")
    assert events == []


def test_without_a_home_directory_the_error_says_what_to_set(monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(files.Path, "home", fail)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert_raises(DataError, files.cache_dir, says=("XDG_CACHE_HOME",))


# ---- Addresses ------------------------------------------------------------------------------------------------------------

ADDRESSES = [
    "gs://bucket/run",
    "s3://bucket/run",
    "hdfs://host:8020/run",
    "file:///tmp/run",
    "https://example.com/t.txt",
    "hf://a/b",
    "me@host.org:runs/a",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("kind", [str, Path])
def test_an_address_is_refused_and_does_not_become_a_folder(tmp_path, monkeypatch, address, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be " * 99)
    for function, *arguments in (
        (mg.train, Config(), kind(address)),
        (mg.train, Config(), kind(address), True),
        (mg.load, kind(address)),
        (mg.evaluate, kind(address)),
        (read_texts, DataConfig(dataset=address)),
        (read_texts, DataConfig(dataset="./text.txt", val_dataset=address)),
        (read_texts, DataConfig(dataset="./text.txt", data_dir=address)),
    ):
        assert_raises(UsageError, function, *arguments, says=(address,))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    "path", ["runs/a", "./gs", "C:/runs/a", "C:\\runs", "/a:b/c", "a:b", "12:30/x", "\\\\server\\share"]
)
def test_a_path_is_not_an_address(path):
    assert local_path(path) == Path(path)


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("to be " * 99)
    assert read_texts(DataConfig(dataset="~/text.txt", data_dir="~/data")).data_dir == tmp_path / "data"
    assert_raises(DataError, mg.load, "~/run", says=(str(tmp_path / "run"),))
    assert_raises(DataError, mg.evaluate, Path("~/run"), says=(str(tmp_path / "run"),))
    assert local_path("~doc.txt") == Path("~doc.txt")
    assert local_path("a~/b") == Path("a~/b")


@pytest.mark.parametrize("path", ["", None, 5, "a\0b", ["run"]])
def test_what_is_not_a_path_is_refused(path):
    assert_raises(UsageError, local_path, path, says=(repr(path), "path"))


@pytest.mark.skipif(os.name == "nt", reason="two slashes are the start of a server's name there")
def test_two_slashes_at_the_start_are_one():
    assert str(local_path("//tmp//run")) == "/tmp/run"


@pytest.mark.skipif(os.name == "nt", reason="names cannot have these characters there")
@pytest.mark.parametrize("name", ["[y]", "p[1]/run", "a\\b", "caf\udce9"])
def test_a_folder_that_checkpoints_cannot_be_saved_in_is_refused_before_training(tmp_path, name):
    assert_raises(UsageError, mg.train, Config(), tmp_path / name, says=(repr(str(tmp_path / name)),))
    assert list(tmp_path.iterdir()) == []
