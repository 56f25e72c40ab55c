"""The gallery of traps: what is called wrong is wrong in the way that it says, and its twin is right."""

import subprocess
import sys

import jax
import pytest

from minigpt_jax.compare import traps

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def as_jax_is_by_default():
    """The flags under which the other tests run would catch some of the traps."""
    with jax.debug_key_reuse(False):
        yield


@pytest.mark.parametrize("trap", traps.TRAPS, ids=lambda trap: trap.__name__)
def test_the_wrong_one_fails_and_the_right_one_does_not(trap):
    assert trap.holds(trap.right())
    if trap.error is None:
        assert not trap.holds(trap.wrong())
    else:
        with pytest.raises(trap.error):
            trap.wrong()


def test_as_a_command_the_wrong_ones_fail_too():
    """In a process of its own, which has its own ways with JAX."""
    shown = subprocess.run([sys.executable, "-m", "minigpt_jax.compare.traps"], capture_output=True, text=True, check=True)
    assert shown.stdout.count("as expected") == 10


def test_all_of_them_are_shown_with_source_outcome_and_reason(capsys):
    traps.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("as expected") == len(traps.TRAPS) == 10
    assert shown.count(": WRONG") + shown.count(" raises ") == 10
    assert "10/10 Time without waiting." in shown
    assert "return jax.random.normal(key), jax.random.normal(key) gives (Array(1.6226422" in shown
    for trap in traps.TRAPS:
        assert trap.expectation in shown
        assert " ".join(trap.why.split()) in shown
