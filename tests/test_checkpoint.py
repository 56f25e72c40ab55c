"""Checkpoints: restored bit for bit, complete or absent, and refused when a single byte is wrong."""

import dataclasses
import errno
import functools
import json
import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_raises, assert_says, disk_events, logged

from minigpt_jax.config import Config, ModelConfig, TrainingConfig
from minigpt_jax.data.tokenizers import CharTokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.interop import load
from minigpt_jax.models.gpt import GPT
from minigpt_jax.runs import arrays, checkpoints, manifest
from minigpt_jax.runs.checkpoints import CheckpointInfo
from minigpt_jax.runs.folder import locked, read_config
from minigpt_jax.training.optimizer import make_optimizer
from minigpt_jax.training.resume import restore
from minigpt_jax.training.state import TrainState

CHARACTERS = "\n abc"
MODEL_CONFIG = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=16, context_length=8, vocab_size=len(CHARACTERS))


@functools.cache
def some_state(seed=0) -> TrainState:
    """The state of a real model and optimizer with random bits in every array, including NaN, infinities and subnormals."""
    model, optimizer = GPT(MODEL_CONFIG), make_optimizer(TrainingConfig(), 10)
    random = np.random.default_rng(seed)

    def random_bits(leaf):
        return jnp.asarray(np.frombuffer(random.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape))

    params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((2, 1), np.int32))["params"]
    return TrainState(
        step=jnp.asarray(seed, jnp.int32),
        params=jax.tree.map(random_bits, params),
        opt_state=jax.tree.map(random_bits, jax.eval_shape(optimizer.chain.init, params)),
    )


def info(step, **values):
    return CheckpointInfo(step, {"text": "abc", "tokenizer": CharTokenizer(CHARACTERS).sha256}, **values)


SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def bits(tree):
    return [(str(path), leaf.dtype, np.asarray(leaf).tobytes()) for path, leaf in jax.tree.leaves_with_path(tree)]


def step_dir(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / str(step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with one checkpoint. Tests must not change it."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints.save(workdir, some_state().trees, info(3))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of it that a test may change."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


# ---- Save and restore -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("device", jax.devices(), ids=str)
def test_the_state_is_restored_bit_for_bit_to_the_requested_device(saved, abstract, device):
    state = some_state()
    like = jax.eval_shape(lambda: state) if abstract else state
    restored = restore(saved, 3, like, jax.sharding.SingleDeviceSharding(device))
    assert {leaf.device for leaf in jax.tree.leaves(restored)} == {device}
    assert bits((restored.params, restored.opt_state)) == bits((state.params, state.opt_state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert (restored.step, restored.step.dtype) == (3, jnp.int32)


def test_dtypes_are_preserved(tmp_path):
    params = {name: jnp.arange(6).reshape(2, 3).astype(name) for name in ("bfloat16", "float16", "int8", "uint16", "bool")}
    state = TrainState(step=jnp.asarray(1), params=params, opt_state=(optax.EmptyState(), {"count": jnp.asarray(7)}))
    checkpoints.save(tmp_path, state.trees, info(1))
    restored = restore(tmp_path, 1, state, SHARDING)
    assert bits((restored.params, restored.opt_state)) == bits((state.params, state.opt_state))


def test_metadata_is_read_as_written(tmp_path):
    written = info(5, val_loss=1.25, best_val_loss=0.1 + 0.2, pending_losses=(1.5, float(np.float32(0.1))), seconds=3.5)
    write_info(tmp_path, written)
    read = checkpoints.read_info(tmp_path, 5)
    assert dataclasses.replace(read, pending_losses=tuple(read.pending_losses)) == written


def test_saving_works_in_a_relative_folder_and_over_leftovers_of_a_kill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leftover = step_dir(Path("run"), 7).with_name("7.tmp")
    leftover.mkdir(parents=True)
    (leftover / "partial").write_text("half a checkpoint")
    assert checkpoints.steps(Path("run")) == []
    checkpoints.save(Path("run"), some_state().trees, info(7))
    assert checkpoints.steps(Path("run")) == [7]
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["7"]
    assert bits(restore(Path("run"), 7, some_state(), SHARDING).params) == bits(some_state().params)


def test_saving_a_step_again_replaces_it(workdir):
    checkpoints.save(workdir, some_state(1).trees, info(3, val_loss=2.0))
    restored = restore(workdir, 3, some_state(), SHARDING)
    assert bits(restored.params) == bits(some_state(1).params)
    assert checkpoints.read_info(workdir, 3).val_loss == 2.0


@pytest.mark.parametrize("failing", ["wait_until_finished", "checksums", "replace"])
def test_a_failed_save_leaves_earlier_checkpoints_intact(workdir, monkeypatch, failing):
    def fail(*args, **keywords):
        raise OSError(28, "No space left on device")

    if failing == "wait_until_finished":
        original = arrays.ocp.StandardCheckpointer.wait_until_finished

        def finish_and_fail(self):
            original(self)
            fail()

        monkeypatch.setattr(arrays.ocp.StandardCheckpointer, failing, finish_and_fail)
    else:
        monkeypatch.setattr({"checksums": manifest, "replace": os}[failing], failing, fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(workdir, some_state().trees, info(4))
    monkeypatch.undo()
    assert checkpoints.steps(workdir) == [3]
    checkpoints.verify(workdir, 3)
    checkpoints.save(workdir, some_state().trees, info(4))
    assert checkpoints.steps(workdir) == [3, 4]
    checkpoints.verify(workdir, 4)


def test_a_full_disk_leaves_earlier_checkpoints_intact_and_nothing_incomplete(workdir):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save(workdir, some_state().trees, info(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
    checkpoints.verify(workdir, 3)


def test_a_checkpoint_is_flushed_before_it_is_renamed_and_before_older_ones_are_deleted(workdir, monkeypatch):
    """A power cut loses at most the newest checkpoint."""
    events = disk_events(monkeypatch)
    checkpoints.save(workdir, some_state().trees, info(4))
    checkpoints.prune(workdir, keep=1)
    final = step_dir(workdir, 4).absolute()
    named = events.index(("rename", final))
    saved = {path.relative_to(final) for path in final.rglob("*")}
    flushed = {path for kind, path in events[:named] if kind == "flush"}
    assert {final.with_name("4.tmp") / path for path in saved} <= flushed
    assert events[named + 1] == ("flush", final.parent)
    assert checkpoints.steps(workdir) == [4]
    deleted = [number for number, (kind, path) in enumerate(events) if kind == "delete" and path.name == "3.gone"]
    assert deleted
    assert min(deleted) > named + 1


def test_a_folder_without_checkpoints_has_no_steps(tmp_path):
    assert checkpoints.steps(tmp_path) == []
    assert checkpoints.best_first(tmp_path) == []


# ---- Corruption -----------------------------------------------------------------------------------------------------------


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("corrupt", [flip_a_bit, truncate, Path.unlink])
def test_corruption_of_any_file_is_detected_and_the_file_named(workdir, corrupt):
    folder = step_dir(workdir, 3)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.relative_to(folder).parts[0] for path in files} == {
        "params", "opt_state", "checkpoint.json", "manifest.json"
    }  # fmt: skip
    for path in files:
        if not path.stat().st_size and corrupt is not Path.unlink:
            continue
        before = path.read_bytes()
        corrupt(path)
        # A corrupt manifest that is still readable may blame another file, so the message names only the folder.
        named = str(folder) if path.name == "manifest.json" else path.relative_to(folder).as_posix()
        assert_raises(DataError, checkpoints.verify, workdir, 3, says=(named,))
        path.write_bytes(before)
        checkpoints.verify(workdir, 3)


@pytest.mark.parametrize("text", ["null\n", "5\n", "[]\n", "{}\n", '[\n  "params"\n]\n'])
def test_a_manifest_of_the_wrong_structure_is_corrupt(workdir, text):
    (step_dir(workdir, 3) / "manifest.json").write_text(text)
    with pytest.raises(DataError):
        checkpoints.verify(workdir, 3)


def test_any_flipped_bit_in_the_manifest_is_detected(workdir):
    path = step_dir(workdir, 3) / "manifest.json"
    intact = path.read_bytes()
    for index in range(0, len(intact), 29):
        data = bytearray(intact)
        data[index] ^= 1 << index % 8
        path.write_bytes(data)
        with pytest.raises(DataError):
            checkpoints.verify(workdir, 3)


@pytest.mark.parametrize("name", ["extra", "params/extra", "opt_state/d/extra"])
def test_an_unexpected_file_is_detected_and_named(workdir, name):
    path = step_dir(workdir, 3) / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert_raises(DataError, checkpoints.verify, workdir, 3, says=(str(step_dir(workdir, 3)), name))


def test_one_error_names_all_corrupt_files(workdir):
    folder = step_dir(workdir, 3)
    (folder / "extra").touch()
    truncate(folder / "checkpoint.json")
    assert_raises(DataError, checkpoints.verify, workdir, 3, says=(str(folder), "extra", "checkpoint.json"))


def write_info(workdir, info, **changes):
    """Writes a checkpoint's folder with nothing but its metadata."""
    folder = step_dir(workdir, info.step)
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(json.dumps(dataclasses.asdict(info) | changes))


@pytest.mark.parametrize(
    "changes, words", [({"format": 99}, ["99", "2", "3"]), ({"extra_field": 1}, ["extra_field"]), ({"step": 2}, ["2"])]
)
def test_metadata_of_another_format_is_refused(tmp_path, changes, words):
    write_info(tmp_path, info(1), **changes)
    assert_raises(
        DataError, checkpoints.read_info, tmp_path, 1, says=(str(step_dir(tmp_path, 1) / "checkpoint.json"), *words)
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\xff"])
def test_unreadable_metadata_is_corrupt(tmp_path, text):
    write_info(tmp_path, info(1))
    path = step_dir(tmp_path, 1) / "checkpoint.json"
    path.write_text(text, encoding="latin-1")
    assert_raises(DataError, checkpoints.read_info, tmp_path, 1, says=(str(path),))


# ---- Which to keep and which to use ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "losses, expected",
    [
        ({10: 2.0, 20: 1.0, 30: 1.5}, [20, 30, 10]),
        ({10: 1.0, 20: 1.0, 100: 1.0}, [10, 20, 100]),  # ties: the earliest
        ({10: None, 20: 1.9, 30: None}, [20, 30, 10]),
        ({9: None, 10: None, 100: None}, [100, 10, 9]),  # without evaluations: the newest
        ({10: 2.0, 20: float("nan")}, [10, 20]),
    ],
)
def test_best_is_the_lowest_loss(tmp_path, losses, expected):
    for step, loss in losses.items():
        write_info(tmp_path, info(step, val_loss=loss))
    assert checkpoints.steps(tmp_path) == sorted(losses)
    assert checkpoints.best_first(tmp_path) == expected
    (step_dir(tmp_path, expected[-1]) / "checkpoint.json").write_text("{")
    assert checkpoints.best_first(tmp_path) == [expected[-1], *expected[:-1]]


def test_the_first_intact_checkpoint_is_used_and_each_corrupt_one_named(saved, tmp_path, caplog):
    for step in (3, 5, 7):
        checkpoints.save(tmp_path, some_state().trees, info(step))
    assert checkpoints.first_intact(tmp_path, [7, 5, 3]) == 7
    assert not caplog.records
    flip_a_bit(step_dir(tmp_path, 7) / "checkpoint.json")
    (step_dir(tmp_path, 5) / "manifest.json").unlink()
    assert checkpoints.first_intact(tmp_path, [7, 5, 3]) == 3
    first, second = logged(caplog, "WARNING")
    assert_says(first, str(step_dir(tmp_path, 7)), "checkpoint.json", "5")
    assert_says(second, str(step_dir(tmp_path, 5)), "manifest.json", "3")
    assert_raises(DataError, checkpoints.first_intact, tmp_path, [7, 5], says=(str(step_dir(tmp_path, 5)), "manifest.json"))
    assert_raises(DataError, checkpoints.first_intact, tmp_path, [], says=(f"scripts/train.py --workdir {tmp_path}",))


def test_all_intact_checkpoints_are_used_and_each_corrupt_one_named(saved, tmp_path, caplog):
    assert_raises(DataError, checkpoints.all_intact, tmp_path, says=(f"scripts/train.py --workdir {tmp_path}",))
    for step in (10, 3, 7):
        checkpoints.save(tmp_path, some_state().trees, info(step))
    assert checkpoints.all_intact(tmp_path) == [3, 7, 10]
    assert not caplog.records
    flip_a_bit(step_dir(tmp_path, 7) / "checkpoint.json")
    assert checkpoints.all_intact(tmp_path) == [3, 10]
    [warning] = logged(caplog, "WARNING")
    assert_says(warning, str(step_dir(tmp_path, 7)), "checkpoint.json")
    for step in (3, 10):
        (step_dir(tmp_path, step) / "manifest.json").unlink()
    assert_raises(DataError, checkpoints.all_intact, tmp_path, says=(str(step_dir(tmp_path, 10)), "manifest.json"))


def test_an_interrupted_delete_leaves_nothing_that_looks_like_a_checkpoint(workdir, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.shutil, "rmtree", lambda *args, **keywords: None)
        checkpoints.delete(step_dir(workdir, 3))
    assert checkpoints.steps(workdir) == []
    checkpoints.check_owned(workdir)
    (workdir / "checkpoints" / "9.tmp").mkdir()
    (workdir / "checkpoints" / "4.damaged").mkdir()
    checkpoints.delete_leftovers(workdir)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4.damaged"]


def test_a_corrupt_checkpoint_is_set_aside_and_not_deleted(workdir):
    before = sorted(path.name for path in step_dir(workdir, 3).iterdir())
    (workdir / "checkpoints" / "3.damaged" / "older").mkdir(parents=True)
    checkpoints.set_aside(workdir, 3)
    assert checkpoints.steps(workdir) == []
    assert sorted(path.name for path in (workdir / "checkpoints" / "3.damaged").iterdir()) == before


def test_only_one_process_can_lock_a_folder(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(DataError, match=str(tmp_path / "run")), locked(tmp_path / "run"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass


def test_the_average_is_saved_and_loaded(run_dir):
    config = read_config(run_dir).override({"ema": 0.9})
    (run_dir / "config.json").write_text(config.to_json())
    state = some_state().replace(average=some_state(1).params)
    checkpoints.save(run_dir, state.trees, info(4, val_loss=0.1))
    assert bits(restore(run_dir, 4, state, SHARDING).average) == bits(state.average)
    assert bits(load.load(run_dir, SHARDING).params) == bits(state.average)


@pytest.mark.e2e
def test_a_checkpoint_of_an_earlier_version_is_still_readable():
    """Written with jax 0.10.2 and orbax-checkpoint 0.12. A change that breaks this must increase FORMAT and document it."""
    lm = load.load(Path(__file__).parent / "golden_run", SHARDING)
    numbers = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(lm.params)])
    np.testing.assert_array_equal(numbers, np.arange(len(numbers), dtype=np.float32) / 1024)
    assert lm.tokenizer.characters == CHARACTERS
    assert lm.generate("abc", 5, greedy=True).startswith("abc")


@pytest.mark.parametrize("keep, left", [(1, [20, 100]), (2, [20, 90, 100]), (3, [20, 80, 90, 100]), (9, [20, 80, 90, 100])])
def test_pruning_keeps_the_newest_and_the_best(tmp_path, keep, left):
    for step, loss in {20: 1.0, 80: 1.5, 90: None, 100: 1.25}.items():
        write_info(tmp_path, info(step, val_loss=loss))
        replace_info(tmp_path, step, info(step, val_loss=loss))
    checkpoints.prune(tmp_path, keep)
    assert checkpoints.steps(tmp_path) == left


def test_pruning_keeps_the_best_intact_checkpoint_if_a_corrupt_one_claims_a_lower_loss(tmp_path):
    for step, loss in {20: 1.0, 80: 1.5, 100: 1.25}.items():
        write_info(tmp_path, info(step, val_loss=loss))
        replace_info(tmp_path, step, info(step, val_loss=loss))
    path = step_dir(tmp_path, 80) / "checkpoint.json"
    path.write_text(path.read_text().replace("1.5", "0.5"))
    checkpoints.prune(tmp_path, 1)
    assert checkpoints.steps(tmp_path) == [20, 80, 100]  # resuming will report the corrupt one


# ---- Loading a language model ---------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(workdir):
    """A run with checkpoints at steps 3 and 4, of which the first has the lower loss."""
    checkpoints.save(workdir, some_state(1).trees, info(4, val_loss=2.0))
    replace_info(workdir, 3, dataclasses.replace(info(3), val_loss=1.0))
    (workdir / "config.json").write_text(Config(model=MODEL_CONFIG).to_json())
    (workdir / "tokenizer.json").write_text(CharTokenizer.train(CHARACTERS).to_json())
    return workdir


def replace_info(workdir, step, info):
    """Replaces a checkpoint's metadata, and updates its manifest."""
    saved = step_dir(workdir, step)
    (saved / "checkpoint.json").write_text(json.dumps(dataclasses.asdict(info)))
    (saved / "manifest.json").write_text(manifest.to_text(manifest.checksums(saved)))


def test_load_returns_the_best_parameters_with_config_and_tokenizer(run_dir):
    for workdir in (run_dir, str(run_dir)):
        lm = load.load(workdir, SHARDING)
        assert bits(lm.params) == bits(some_state().params)
        assert lm.config == MODEL_CONFIG
        assert lm.tokenizer.decode([1, 2]) == " a"


def test_load_names_a_missing_file(run_dir, tmp_path):
    nowhere, missing = tmp_path / "nowhere", os.strerror(errno.ENOENT)
    assert_raises(DataError, load.load, nowhere, SHARDING, says=(str(nowhere), "config.json", missing, "scripts/train.py"))
    (run_dir / "tokenizer.json").unlink()
    assert_raises(DataError, load.load, run_dir, SHARDING, says=(str(run_dir / "tokenizer.json"), missing))
    shutil.rmtree(run_dir / "checkpoints")
    assert_raises(DataError, load.load, run_dir, SHARDING, says=(f"scripts/train.py --workdir {run_dir}",))
    (run_dir / "config.json").unlink()
    assert_raises(DataError, load.load, run_dir, SHARDING, says=(str(run_dir), "config.json", missing, "scripts/train.py"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_load_names_a_corrupt_file(run_dir, name):
    intact = (run_dir / name).read_bytes()
    for corrupt in (intact[:20], intact[:20] + b"\xff" + intact[21:], b"[" * 100_000):
        (run_dir / name).write_bytes(corrupt)
        assert_raises(DataError, load.load, run_dir, SHARDING, says=(str(run_dir / name),))


def test_load_refuses_another_tokenizer(run_dir):
    """It has the same vocabulary size, so nothing else would fail."""
    (run_dir / "tokenizer.json").write_text(CharTokenizer("\n abd").to_json())
    assert_raises(DataError, load.load, run_dir, SHARDING, says=(str(run_dir / "tokenizer.json"),))


def test_load_skips_corrupt_parameters_for_the_next_best_with_a_warning(run_dir, caplog):
    folder = step_dir(run_dir, 3)
    data = next(path for path in (folder / "params").rglob("*") if path.parent.name == "d")
    named = str(folder), data.relative_to(folder).as_posix()
    flip_a_bit(data)
    before = bits(some_state().params)
    assert bits(load.load(run_dir, SHARDING).params) != before
    [warning] = logged(caplog, "WARNING")
    assert_says(warning, *named, "4")
    for step in set(checkpoints.steps(run_dir)) - {3}:
        checkpoints.delete(step_dir(run_dir, step))
    assert_raises(DataError, load.load, run_dir, SHARDING, says=named)
