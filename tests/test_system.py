"""Process-wide state: the cache folder, the compilation cache, kept memory and the number of CPU devices."""

import errno
import io
import os
import resource
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from minigpt_jax import files
from minigpt_jax.benchmarks.interleave import in_own_process
from minigpt_jax.files import sha256
from minigpt_jax.system import compilation_cache, devices, heap, signals, streams, xla

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("value", ["", "relative/cache", None])
def test_cache_folder_ignores_invalid_xdg_values(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_dir() == tmp_path / "cache" / "minigpt_jax"
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert files.cache_dir() == tmp_path / "home" / ".cache" / "minigpt_jax"


def page_faults():
    """The median number of page faults in 20 runs of a program with 128 MB of temporary buffers.

    The median, since fragmentation makes the heap grow by a few such buffers before it is large enough.
    """
    x = jnp.ones((4096, 8))
    program = jax.jit(lambda x: (x @ jnp.tile(x.T, 2)) @ jnp.tile(x, (2, 1)))
    assert program.lower(x).compile().memory_analysis().temp_size_in_bytes >= 2**27
    faults = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        program(x).block_until_ready()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return statistics.median(faults)


@pytest.mark.slow
@pytest.mark.skipif(heap.glibc() is None, reason="needs glibc")
def test_freed_memory_is_reused_by_the_next_step():
    assert in_own_process(page_faults) < 1000


def num_devices(num_cores):
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
def test_a_multi_core_cpu_becomes_two_devices_unless_the_user_has_chosen(monkeypatch, num_cores, chosen, expected):
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert in_own_process(num_devices, num_cores) == expected


@pytest.mark.parametrize(
    ("version", "chosen", "expected"),
    [
        ("0.10.2", "--a=1", "--a=1"),
        ("0.11.2", "", "--xla_cpu_experimental_ynn_fusion_type=-reduce"),
        ("0.12.0.1", "--a=1", "--a=1 --xla_cpu_experimental_ynn_fusion_type=-reduce"),
        ("0.12.0.1", "--xla_cpu_experimental_ynn_fusion_type=dot", "--xla_cpu_experimental_ynn_fusion_type=dot"),
        ("0.13.0", "", ""),
    ],
)
def test_versions_of_xla_with_wrong_sums_get_a_flag_unless_the_user_has_chosen_it(monkeypatch, version, chosen, expected):
    monkeypatch.setattr(xla.importlib.metadata, "version", {"jaxlib": version}.get)
    monkeypatch.setenv("XLA_FLAGS", chosen)
    xla.turn_off_wrong_sums()
    assert os.environ["XLA_FLAGS"] == expected


@pytest.fixture
def folder(monkeypatch):
    """The compilation cache's folder. Caches even programs that compile fast. Restores JAX's settings afterwards."""
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
    """Compiles a program with empty in-memory caches and returns its result."""
    jax.clear_caches()
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    with compilation_cache.compilation_cache():
        return jax.jit(lambda x: x * number + 1)(jnp.arange(3.0)).tolist()


def modification_times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-cache")}


def test_cached_programs_are_reused(folder):
    first = compile_and_run(3.5)
    cached = modification_times(folder)
    assert cached
    assert {path.stem for path in folder.glob("*-cache.sha256")} == set(cached)
    jax.config.update("jax_compilation_cache_dir", None)
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    try:
        assert compile_and_run(3.5) == first == [1.0, 4.5, 8.0]
    finally:
        jax.monitoring.clear_event_listeners()
    assert "/jax/compilation_cache/cache_hits" in events
    assert "/jax/compilation_cache/cache_misses" not in events
    assert modification_times(folder) == cached


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "no checksum", "wrong checksum", "binary checksum"])
def test_corrupt_programs_are_recompiled(folder, damage):
    first = compile_and_run(4.5)
    for path in list(folder.glob("*-cache")):
        content, checksum = path.read_bytes(), compilation_cache.checksum_path(path)
        if damage == "flipped bit":
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        elif damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "no checksum":
            checksum.unlink()
        elif damage == "binary checksum":
            checksum.write_bytes(b"\xff" + checksum.read_bytes()[1:])
        else:
            checksum.write_text("0" * 64)
        os.utime(path, ns=(1, 1))
    jax.config.update("jax_compilation_cache_dir", None)
    assert compile_and_run(4.5) == first
    assert 1 not in modification_times(folder).values()
    assert {path.stem for path in folder.glob("*-cache.sha256")} == set(modification_times(folder))


def test_the_oldest_programs_are_deleted_first(tmp_path):
    for age in range(4):
        path = tmp_path / f"{age}-cache"
        path.write_bytes(bytes([age]) * 10)
        os.utime(path, (1000 - age, 1000 - age))
        compilation_cache.checksum_path(path).write_text(sha256(path.read_bytes()))
    compilation_cache.prune(tmp_path, max_bytes=25)
    assert {path.name for path in tmp_path.iterdir()} == {"0-cache", "0-cache.sha256", "1-cache", "1-cache.sha256"}


def test_nothing_is_cached_without_a_writable_folder(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with compilation_cache.compilation_cache():
        assert not jax.config.jax_compilation_cache_dir


def test_a_cache_folder_set_by_the_user_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", str(tmp_path / "mine"), raising=False)
    with compilation_cache.compilation_cache():
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not Path(files.cache_dir()).exists()


# ---- Logs -----------------------------------------------------------------------------------------------------------------


PROGRAM = """
import logging, sys
from minigpt_jax.system import logs
if sys.argv[1] == "stream": logging.basicConfig(format="elsewhere %(message)s")
if sys.argv[1] == "info": logging.basicConfig(level=logging.INFO, format="elsewhere %(message)s")
if sys.argv[1] == "quiet": logging.getLogger("minigpt_jax").setLevel(logging.WARNING)
log = logging.getLogger("minigpt_jax.anything")
with logs.shown():
    log.info("inside")
log.info("outside")
"""


@pytest.mark.parametrize(
    "setup, lines",
    [("none", ["inside"]), ("stream", ["inside"]), ("info", ["elsewhere inside", "elsewhere outside"]), ("quiet", [])],
)
def test_log_lines_are_shown_unless_the_program_has_set_up_logging(setup, lines):
    process = subprocess.run([sys.executable, "-c", PROGRAM, setup], capture_output=True, text=True, check=True)
    assert process.stderr.splitlines() == lines


# ---- Streams --------------------------------------------------------------------------------------------------------------


def broken_stream(reason):
    """A stream that cannot be written, and the error number."""
    if reason == "missing":
        return None, errno.EBADF
    if reason == "closed":
        stream = io.StringIO()
        stream.close()
        return stream, errno.EBADF
    if reason == "full":
        return open("/dev/full", "w"), errno.ENOSPC
    read_end, write_end = os.pipe()
    os.close(read_end)
    return open(write_end, "w"), errno.EPIPE


NO_DEV_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@pytest.mark.parametrize("reason", ["missing", "closed", "no reader", pytest.param("full", marks=NO_DEV_FULL)])
def test_only_the_first_failure_of_a_stream_is_reported(reason):
    (raw, number), errors = broken_stream(reason), []
    stream = streams.Stream(raw, errors.append)
    for _ in range(3):
        print("text", file=stream, flush=True)
    assert [error.errno for error in errors] == [number]
    assert stream.error is errors[0]
    assert not stream.isatty()
    streams.discard_rest(raw)
    if reason in ("full", "no reader"):
        raw.close()  # raises if there were anything left that cannot be written


@pytest.mark.parametrize("error", [RuntimeError("no connection"), ValueError("closed")])
def test_a_programs_own_stream_may_have_two_methods_and_raise_anything(error):
    class Tee:
        def write(self, text):
            raise error

        def flush(self):
            pass

    errors = []
    stream = streams.Stream(Tee(), errors.append)
    print("text", file=stream, flush=True)
    assert [str(reported.strerror) for reported in errors] == [str(error)]
    assert not stream.isatty()


def test_a_stream_that_can_be_written_again_is_written():
    class Disk(io.StringIO):
        is_full = True

        def write(self, text):
            if self.is_full:
                raise OSError(errno.ENOSPC, "full")
            return super().write(text)

    disk = Disk()
    stream = streams.Stream(disk, streams.ignore)
    print("lost", end="", file=stream)
    disk.is_full = False
    print("kept", end="", file=stream)
    assert disk.getvalue() == "kept"


@pytest.mark.parametrize(
    "encoding, written", [("ascii", r"caf\xe9 \u6f22"), ("cp1252", r"café \u6f22"), ("utf-8", "café 漢"), (None, "café 漢")]
)
def test_characters_that_an_encoding_lacks_are_escaped(encoding, written):
    raw = io.StringIO() if encoding is None else io.TextIOWrapper(io.BytesIO(), encoding)
    stream = streams.Stream(raw, streams.fail)
    assert stream.write("café 漢") == 6
    assert (raw.getvalue() if encoding is None else (stream.flush(), raw.buffer.getvalue().decode(encoding))[1]) == written


def test_bytes_that_are_not_text_lose_no_line_of_the_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"To\n\xff\nbe\n"), "utf-8"))
    with streams.of_command():
        assert [input() for _ in range(3)] == ["To", "\udcff", "be"]


PRINT = """
import sys
from minigpt_jax.system import streams
try:
    with streams.of_command() as output:
        print("log", file=sys.stderr)
        assert sys.stdin.read() == ""
        file = open("file", "w")
        assert file.fileno() > 2
        print("text", flush=True)
except OSError as error:
    assert error is output.error
    file.write("failed")
"""


@pytest.mark.parametrize(
    "closed, content", [("<&- 2>&-", ""), ("<&- >&- 2>&-", "failed"), (">/dev/full </dev/null", "failed")]
)
def test_a_process_without_streams_ends_normally_and_its_files_get_other_numbers(tmp_path, closed, content):
    command = f'"$0" -c "$1" {closed}'
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # leaves nothing to write
    environment = inherited | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.run(["sh", "-c", command, sys.executable, PRINT], cwd=tmp_path, env=environment)
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == content


# ---- Signals --------------------------------------------------------------------------------------------------------------

NO_SIGHUP = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")


@NO_SIGHUP
def test_a_closed_terminal_sends_sighup_twice_and_does_not_end_the_process(default_handlers):
    with signals.capture_signals() as received:
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert received == [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP]
        assert {signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} == {signal.SIG_DFL}
    assert {signal.getsignal(number) for number in default_handlers} == {signal.SIG_DFL}


@pytest.mark.parametrize("name", signals.STOP_SIGNALS)
def test_an_ignored_signal_stays_ignored(default_handlers, name):
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    signal.signal(getattr(signal, name), signal.SIG_IGN)
    with signals.capture_signals() as received:
        signal.raise_signal(getattr(signal, name))
        assert received == []
        signal.raise_signal(signal.SIGINT if name == "SIGTERM" else signal.SIGTERM)
        signal.raise_signal(getattr(signal, name))
    assert len(received) == 1
    assert signal.getsignal(getattr(signal, name)) == signal.SIG_IGN


def test_without_sighup_the_other_signals_are_captured(default_handlers, monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    with signals.capture_signals() as received:
        signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]
