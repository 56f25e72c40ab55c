"""Whether the validation loss is normal."""

import logging

from minigpt_jax.runs import references
from minigpt_jax.runs.metrics import read_metrics
from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.causes import Evidence, likely_causes
from minigpt_jax.training.run import Run

log = logging.getLogger(__name__)


class Expect(Callback):
    """Compares each validation loss with the reference of the run's settings, if there is one.

    `Evaluate` logs which losses are as expected; this warns of the others, with likely causes.
    """

    def begin(self, run: Run) -> None:
        self.reference = references.find(run.task.config, run.task.sources)
        if self.reference is not None and self.reference.has_data(run.task.sources):
            run.reference = self.reference

    def after_step(self, run: Run) -> None:
        loss = None if run.means is None else run.means["loss"]
        band = None if self.reference is None else self.reference.band(run.step)
        if self.reference is None or loss is None or band is None or loss in band:
            return
        with run.clock.stopped(run.state):
            evidence = Evidence(
                run.step, loss, loss < band.lowest, read_metrics(run.metrics.path), run.settings.log_every,
                run.task.sources, run.task.data_facts(), run.info.made_with,
            )  # fmt: skip
            causes = likely_causes(self.reference, evidence)
        log.warning(
            "Validation loss %.4f is %s than expected: %d seeds of %s give %s. %s.",
            loss, "higher" if loss > band.highest else "lower", len(self.reference.seeds), self.reference.preset, band,
            f"Likely causes: {'; '.join(causes)}" if causes else
            "Nothing else in the metrics is unusual: look for changes in the code, or at another seed",
        )  # fmt: skip
