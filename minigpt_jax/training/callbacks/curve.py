"""The loss curve, in a notebook."""

import io
import logging

from minigpt_jax.errors import UsageError
from minigpt_jax.runs.metrics import read_metrics
from minigpt_jax.runs.plots import draw
from minigpt_jax.system.notebook import Picture
from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.run import Run

log = logging.getLogger(__name__)


class Curve(Callback):
    """Shows the losses so far below the cell, and redraws them at every evaluation."""

    def begin(self, run: Run) -> None:
        self.picture: Picture | None = Picture()

    def after_step(self, run: Run) -> None:
        if run.means is None or self.picture is None:
            return
        png = io.BytesIO()
        with run.clock.stopped(run.state):
            try:
                runs = {run.workdir.name: read_metrics(run.metrics.path)}
                draw(runs, ["loss"], (7, 3.5), [run.reference] if run.reference else []).savefig(png, dpi=100)
            except (UsageError, OSError) as error:  # not installed, or a folder for fonts that cannot be written
                self.picture = None
                log.info("No loss curve: %s", error)
            else:
                self.picture.show(png.getvalue())
