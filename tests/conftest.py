"""Strict flags for every test: each turns a class of silent mistakes into errors."""

import importlib.metadata
import os
import signal
from pathlib import Path

# Nearly all of the suite's time is spent compiling programs that run for milliseconds. Disabling LLVM's optimisations halves
# it. XLA's older fusion emitters, last supported in jax 0.10, reduce the rest to a third. Set before JAX is imported. The
# processes that tests start inherit it.
os.environ["XLA_FLAGS"] = (
    f"--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 {os.environ.get('XLA_FLAGS', '')} "
    + ("--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
)

import hypothesis
import jax
import pytest

from minigpt_jax.system import signals

MEMORY_MAPS = Path("/proc/self/maps")

jax.config.update("jax_numpy_rank_promotion", "raise")  # (B,) + (B, T) must be explicit
jax.config.update("jax_debug_key_reuse", True)  # reusing a key
jax.config.update("jax_num_cpu_devices", 2)  # as in scripts/generate.py; what is not sharded stays on the first

# The same examples in each run and no deadline, so that a test depends only on the code, not on chance or load.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="fail if a test is skipped, for environments with every extra")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--no-skips"):
        for report in terminalreporter.stats.get("skipped", []):
            terminalreporter.write_line(f"SKIPPED, fails with --no-skips: {report.nodeid}: {report.longrepr[2]}", red=True)


@pytest.fixture(autouse=True, scope="module")
def clear_jax_caches():
    """Frees the hundreds of programs that each test file compiles. They would add up to several gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def limit_memory_maps():
    """Frees the programs of a long test file before Linux refuses to map more: then XLA's compiler crashes.

    A process has at most 65,530 maps (vm.max_map_count), and each program takes three.
    """
    yield
    if MEMORY_MAPS.exists() and MEMORY_MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    """Keeps tests out of the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def default_handlers():
    """Resets the signals that stop a run, since tests started in the background inherit ignored ones."""
    numbers = [getattr(signal, name) for name in signals.STOP_SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield before.keys()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fake_cudnn(monkeypatch):
    """Tests the call of cuDNN's attention without a GPU: checks that it is requested, and computes it with XLA instead."""

    def on_a_cpu(*qkv, implementation, **options):
        assert implementation == "cudnn"
        return library(*qkv, implementation="xla", **options)

    library = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_a_cpu)
