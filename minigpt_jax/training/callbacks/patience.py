"""Early stopping."""

import logging

from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.run import Run

log = logging.getLogger(__name__)


class Patience(Callback):
    """Completes the run after `patience` evaluations in a row without a lower loss."""

    def after_step(self, run: Run) -> None:
        patience = run.settings.patience
        if run.means is None or run.is_over or not run.info.is_out_of_patience(patience):
            return
        run.has_ended_early = True
        log.info("No lower validation loss in %d evaluations: stopping early.", patience)
