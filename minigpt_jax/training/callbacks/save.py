"""When checkpoints are saved."""

from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.run import Run


class Save(Callback):
    """Saves every `checkpoint_every` steps, and whenever the validation loss is the lowest so far."""

    def after_step(self, run: Run) -> None:
        improved = run.means is not None and run.info.evaluations_since_best == 0
        if improved or run.due(run.settings.checkpoint_every):
            run.save()
