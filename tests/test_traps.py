"""JAX traps: each wrong function fails as described, and its corrected version works."""

import subprocess
import sys

import jax
import pytest

from minigpt_jax.compare import traps

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def jax_defaults():
    """Without the test suite's strict flags, which would catch some of the traps."""
    with jax.debug_key_reuse(False):
        yield


@pytest.mark.parametrize("trap", traps.TRAPS, ids=lambda trap: trap.__name__)
def test_the_wrong_function_fails_and_the_right_one_works(trap):
    assert trap.holds(trap.right())
    if trap.error is None:
        assert not trap.holds(trap.wrong())
    else:
        with pytest.raises(trap.error):
            trap.wrong()


@pytest.mark.slow
def test_the_wrong_functions_fail_in_the_command_too():
    """In a separate process, where `cli.run` sets JAX's flags."""
    process = subprocess.run([sys.executable, "-m", "minigpt_jax.compare.traps"], capture_output=True, text=True, check=True)
    assert process.stdout.count("as expected") == 10


def test_each_trap_is_shown_with_source_outcome_and_reason(capsys):
    traps.main()
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("as expected") == len(traps.TRAPS) == 10
    assert output.count(": WRONG") + output.count(" raises ") == 10
    assert "10/10 Time without waiting." in output
    assert "return jax.random.normal(key), jax.random.normal(key) returns (Array(1.6226422" in output
    for trap in traps.TRAPS:
        assert trap.expectation in output
        assert " ".join(trap.why.split()) in output
