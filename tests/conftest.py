"""Strict flags for every test: each turns a whole class of silent mistakes into an error."""

import importlib.metadata
import os

# Nearly all of the suite's time is compilation, of programs that run for milliseconds. Without LLVM's optimisations it takes
# half as long, and with XLA's older way to emit fused operations, which ended with jax 0.10, a third of that. Set before JAX
# is imported, and for the processes that tests start, too.
os.environ["XLA_FLAGS"] = (
    f"--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 {os.environ.get('XLA_FLAGS', '')} "
    + "--xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10.")
)

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # (B,) + (B, T) must be written out
jax.config.update("jax_debug_key_reuse", True)  # the same key used twice
jax.config.update("jax_num_cpu_devices", 2)  # as many as scripts/generate.py takes; what is not divided stays on the first

# The same examples each time and no limit on theirs, so that a test depends on the code alone and not on luck or load.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a skipped test is a failure: every extra is installed")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--no-skips"):
        for report in terminalreporter.stats.get("skipped", []):
            terminalreporter.write_line(f"SKIPPED, which is a failure here: {report.nodeid}: {report.longrepr[2]}", red=True)


@pytest.fixture(autouse=True, scope="module")
def no_programs_left_behind():
    """A test file compiles hundreds of programs that no other needs: kept, they make a process of several gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def a_cache_folder_of_its_own(tmp_path, monkeypatch):
    """No test reads or writes the cache of whoever runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def cudnn_on_a_cpu(monkeypatch):
    """What can be known of cuDNN without a GPU: that it is asked for the same. The library answers by other means."""

    def on_a_cpu(*qkv, implementation, **options):
        assert implementation == "cudnn"
        return library(*qkv, implementation="xla", **options)

    library = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_a_cpu)
