"""Evaluation during training."""

import logging
import math

from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.run import Run

log = logging.getLogger(__name__)


class Evaluate(Callback):
    """Evaluates every `eval_every` steps on `eval_batches` batches, and a model in `init_from` also before the first step.
    Non-finite means are recorded as None."""

    def begin(self, run: Run) -> None:
        if run.step == 0 and run.settings.init_from is not None:
            self.measure(run)

    def after_step(self, run: Run) -> None:
        if not run.due(run.settings.eval_every):
            return
        loss, best = self.measure(run)["loss"], run.info.best_val_loss
        if loss is not None and (best is None or loss < best):
            run.note(best_val_loss=loss, evaluations_since_best=0)
        else:
            run.note(evaluations_since_best=run.info.evaluations_since_best + 1)

    def measure(self, run: Run) -> dict[str, float | None]:
        with run.clock.stopped(run.state):
            means = run.task.evaluate(run.state.eval_params, limit=run.settings.eval_batches)
        run.means = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
        row = {"step": run.step} | {f"val_{name}": mean for name, mean in run.means.items()}
        run.metrics.append(row | {"seconds": round(run.clock.seconds, 3)})
        others = "".join(f"  {name} {mean:.4f}" for name, mean in means.items() if name != "loss")
        band = run.reference and run.reference.band(run.step)
        verdict = f"  as expected ({band})" if band and means["loss"] in band else ""
        log.info("step %d/%d  validation loss %.4f%s%s", run.step, run.task.num_steps, means["loss"], others, verdict)
        return run.means
