"""What concerns the whole process: the user's cache folder, and which compiled programs are taken from it."""

import os
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from minigpt_jax import files
from minigpt_jax.benchmarks.interleave import in_own_process
from minigpt_jax.files import sha256
from minigpt_jax.system import compilation_cache, devices, heap

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("value", ["", "relative/cache", None])
def test_cache_folder_ignores_what_xdg_forbids(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_dir() == tmp_path / "cache" / "minigpt_jax"
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert files.cache_dir() == tmp_path / "home" / ".cache" / "minigpt_jax"


def faults_of_a_program():
    """Pages that the system hands out while a program runs that takes 128 MB for itself: the fewest of six runs.

    Of some runs only, since the memory that is kept is now and then in parts that are too small.
    """
    x = jnp.ones((4096, 8))
    program = jax.jit(lambda x: (x @ jnp.tile(x.T, 2)) @ jnp.tile(x, (2, 1)))
    assert program.lower(x).compile().memory_analysis().temp_size_in_bytes >= 2**27
    faults = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        program(x).block_until_ready()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults)


@pytest.mark.slow
@pytest.mark.skipif(heap.glibc() is None, reason="needs the C library of GNU")
def test_memory_that_was_freed_is_kept_for_the_next_step():
    assert in_own_process(faults_of_a_program) < 1000


def devices_of_a_cpu(num_cores):
    devices.num_cores = lambda: num_cores
    devices.use_two_cpu_devices()
    return jax.local_device_count()


@pytest.mark.parametrize(
    ("num_cores", "chosen", "expected"),
    [
        (1, {}, 1),
        (8, {}, 2),
        (8, {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        (8, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3),
    ],
)
def test_a_cpu_of_several_cores_becomes_two_devices_unless_the_user_has_chosen(monkeypatch, num_cores, chosen, expected):
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert in_own_process(devices_of_a_cpu, num_cores) == expected


@pytest.fixture
def folder(monkeypatch):
    """Where programs are kept; all of them are, however quickly they were compiled. Afterwards JAX is as before."""
    cache = jax.experimental.compilation_cache.compilation_cache
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    update = jax.config.update
    monkeypatch.setattr(jax.config, "update", lambda name, value: update(name, 0 if name == names[1] else value))
    yield files.cache_dir() / f"programs-{compilation_cache.processor()}"
    for name, value in before.items():
        update(name, value)
    cache.reset_cache()


def compile_and_run(number):
    """A program that is compiled anew, and what it gives."""
    jax.clear_caches()
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    with compilation_cache.compilation_cache():
        return jax.jit(lambda x: x * number + 1)(jnp.arange(3.0)).tolist()


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-cache")}


def test_programs_are_found_again(folder):
    first = compile_and_run(3.5)
    kept = stamps(folder)
    assert kept
    assert {path.stem for path in folder.glob("*-cache.sha256")} == set(kept)
    jax.config.update("jax_compilation_cache_dir", None)
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    try:
        assert compile_and_run(3.5) == first == [1.0, 4.5, 8.0]
    finally:
        jax.monitoring.clear_event_listeners()
    assert "/jax/compilation_cache/cache_hits" in events
    assert "/jax/compilation_cache/cache_misses" not in events
    assert stamps(folder) == kept


@pytest.mark.parametrize("damage", ["flipped", "cut", "unchecked", "another's", "not even text"])
def test_a_program_that_is_not_as_it_was_written_is_compiled_again(folder, damage):
    first = compile_and_run(4.5)
    for path in list(folder.glob("*-cache")):
        content, checksum = path.read_bytes(), compilation_cache.checksum_of(path)
        if damage == "flipped":
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        elif damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "unchecked":
            checksum.unlink()
        elif damage == "not even text":
            checksum.write_bytes(b"\xff" + checksum.read_bytes()[1:])
        else:
            checksum.write_text("0" * 64)
        os.utime(path, ns=(1, 1))
    jax.config.update("jax_compilation_cache_dir", None)
    assert compile_and_run(4.5) == first
    assert 1 not in stamps(folder).values()
    assert {path.stem for path in folder.glob("*-cache.sha256")} == set(stamps(folder))


def test_the_oldest_programs_go_first(tmp_path):
    for age in range(4):
        path = tmp_path / f"{age}-cache"
        path.write_bytes(bytes([age]) * 10)
        os.utime(path, (1000 - age, 1000 - age))
        compilation_cache.checksum_of(path).write_text(sha256(path.read_bytes()))
    compilation_cache.delete_unchecked(tmp_path, most=25)
    assert {path.name for path in tmp_path.iterdir()} == {"0-cache", "0-cache.sha256", "1-cache", "1-cache.sha256"}


def test_without_a_folder_to_write_nothing_is_kept(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with compilation_cache.compilation_cache():
        assert not jax.config.jax_compilation_cache_dir


def test_the_folder_that_a_user_has_chosen_for_jax_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", str(tmp_path / "mine"), raising=False)
    with compilation_cache.compilation_cache():
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not Path(files.cache_dir()).exists()
