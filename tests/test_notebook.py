"""Training in a notebook: logs, samples and the loss curve are shown, errors are one line, an interrupt stops politely."""

import base64
import os

import pytest

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
nbformat = pytest.importorskip("nbformat")

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SETUP = """
import os, signal
import minigpt_jax as mg
from minigpt_jax.training.callbacks import Callback
open("text.txt", "w").write("To be, or not to be, that is the question." * 50)
config = mg.load_preset("debug").override({"dataset": "text.txt", "steps": 6, "eval_every": 2, "sample_every": 6})
"""
INTERRUPTED = """
class Interrupt(Callback):
    def after_step(self, run):
        if run.step == 3: os.kill(os.getpid(), signal.SIGINT)

mg.train(config, "runs/second", callbacks=[Interrupt()])
"""


TWICE = """
class InterruptTwice(Callback):
    def after_step(self, run):
        if run.step == 3:
            for _ in range(2): os.kill(os.getpid(), signal.SIGINT)

mg.train(config, "runs/third", callbacks=[InterruptTwice()])
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The outputs of each cell of a notebook, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("notebook")
    sources = [SETUP, 'mg.train(config, "runs/first")', 'mg.load_preset("debgu")', INTERRUPTED, TWICE, 'print("alive")']
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    environment = os.environ | {"IPYTHONDIR": str(folder / "ipython"), "PYTHONWARNINGS": "ignore"}
    client = nbclient.NotebookClient(
        notebook, timeout=300, allow_errors=True, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    return [cell.outputs for cell in notebook.cells], folder


def text_of(outputs, stream):
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == stream)


def test_logs_samples_progress_and_one_curve_are_shown(cells):
    (setup, training, *_), _ = cells
    assert not [output for output in setup if output.output_type == "error"]
    assert not [output for output in training if output.output_type == "error"]
    log = text_of(training, "stderr")
    assert "step 6/6" in log
    assert "6/6 [" in log  # the progress bar
    assert text_of(training, "stdout").strip()
    [curve] = [output for output in training if output.output_type == "display_data"]
    assert base64.b64decode(curve.data["image/png"]).startswith(b"\x89PNG")


def test_an_error_is_one_line_that_says_what_was_meant(cells):
    (_, _, mistake, *_), _ = cells
    [error] = [output for output in mistake if output.output_type == "error"]
    assert error.ename == "UsageError"
    [line] = error.traceback
    assert "debgu" in line
    assert "'debug'" in line


def test_an_interrupt_stops_after_the_step_with_a_checkpoint(cells):
    (*_, interrupted, _, _), folder = cells
    [error] = [output for output in interrupted if output.output_type == "error"]
    assert (error.ename, len(error.traceback)) == ("StoppedError", 1)
    assert "runs/second" in text_of(interrupted, "stderr")  # how to resume
    assert (folder / "runs" / "second" / "checkpoints" / "3").is_dir()


def test_a_second_interrupt_stops_at_once_and_the_kernel_survives(cells):
    (*_, twice, afterwards), _ = cells
    [error] = [output for output in twice if output.output_type == "error"]
    assert error.ename == "KeyboardInterrupt"
    assert text_of(afterwards, "stdout") == "alive\n"
