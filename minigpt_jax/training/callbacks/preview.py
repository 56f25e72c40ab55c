"""Samples from the model during training."""

import sys

from tqdm import tqdm

from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.run import Run


class Preview(Callback):
    """Prints the task's preview to standard output every `sample_every` steps."""

    def after_step(self, run: Run) -> None:
        if run.settings.sample_every and run.due(run.settings.sample_every):
            with run.clock.stopped(run.state):
                tqdm.write(f"\n{run.task.preview(run.state.eval_params)}\n", file=sys.stdout)
                sys.stdout.flush()
