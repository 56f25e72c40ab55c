"""Strict flags for every test: each turns a whole class of silent mistakes into an error."""

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # (B,) + (B, T) must be written out
jax.config.update("jax_debug_key_reuse", True)  # the same key used twice
jax.config.update("jax_num_cpu_devices", 2)  # as many as scripts/generate.py takes; what is not divided stays on the first

# The same examples each time and no limit on theirs, so that a test depends on the code alone and not on luck or load.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def a_cache_folder_of_its_own(tmp_path, monkeypatch):
    """No test reads or writes the cache of whoever runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
