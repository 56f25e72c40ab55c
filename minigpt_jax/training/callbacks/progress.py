"""A progress bar, if standard error is a terminal."""

import sys

from tqdm import tqdm

from minigpt_jax.system import notebook
from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.run import Run


class Progress(Callback):
    def begin(self, run: Run) -> None:
        is_shown = sys.stderr.isatty() or notebook.is_active()
        self.bar = tqdm(total=run.task.num_steps, initial=run.step, unit="step", disable=not is_shown, leave=False)

    def after_step(self, run: Run) -> None:
        self.bar.update()

    def finish(self, run: Run) -> None:
        self.bar.close()

    def close(self) -> None:
        self.bar.close()
