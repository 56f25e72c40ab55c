"""Likely causes of a validation loss that differs from that of other seeds, from what a run has measured so far."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minigpt_jax.runs.references import Evaluation, Reference, expected

MAX_LR_ERROR = 0.01  # relative: rates are computed from the settings, so they should be equal
GRAD_NORM_FACTOR = 2  # beyond the range of the seeds: the norm of a single step varies much
MAX_SHARE_ERROR = 0.01


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a run has measured up to an evaluation whose loss is not in the expected band."""

    step: int
    val_loss: float
    is_low: bool  # rather than high
    rows: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    log_every: int
    sources: Mapping[str, str]  # sha256 of the data by name
    data_facts: Mapping[str, float]  # see `tasks.Task`
    made_with: Mapping[str, str]  # see `resume.environment`

    @property
    def training(self) -> Mapping[str, Any]:
        """The training metrics of this step. Empty if they were not logged."""
        return next((row for row in self.rows if row["step"] == self.step and "train_loss" in row), {})


def likely_causes(reference: Reference, evidence: Evidence) -> list[str]:
    """What differs from the runs of the reference, the most conclusive first."""
    usual = reference.at(evidence.step)
    assert usual is not None  # since its loss is outside the band
    causes = [*data_causes(reference, evidence), *learning_rate_causes(reference, evidence)]
    where = [] if causes else training_loss_causes(usual, evidence, reference.config.training.log_every)
    return [*causes, *gradient_causes(usual, evidence), *where, *environment_causes(reference, evidence)]


def data_causes(reference: Reference, evidence: Evidence) -> Iterator[str]:
    if changed := [name for name in reference.sources if evidence.sources.get(name) != reference.sources[name]]:
        yield f"another {' and '.join(changed)} than the reference's, by checksum"
    unknown, usual = (facts.get("unknown", 0.0) for facts in (evidence.data_facts, reference.data_facts))
    if abs(unknown - usual) > MAX_SHARE_ERROR:
        yield f"{unknown:.1%} of the validation tokens are unknown, not {usual:.1%}"
    shared, usual = (facts.get("also_in_training", 0.0) for facts in (evidence.data_facts, reference.data_facts))
    if abs(shared - usual) > MAX_SHARE_ERROR and (shared > usual) == evidence.is_low:
        yield f"{shared:.1%} of the validation text is also in the training text, not {usual:.1%}"


def learning_rate_causes(reference: Reference, evidence: Evidence) -> Iterator[str]:
    """Looks at the whole run, since an earlier part of it may have had another schedule."""
    if skipped := evidence.training.get("skipped_steps"):
        yield f"{skipped} steps without effect, since their loss or gradient was not finite"
    usual = {each.step: each.learning_rate for each in reference.evaluations if each.learning_rate is not None}
    for row in evidence.rows:
        ours, theirs = row.get("learning_rate"), usual.get(row["step"])
        if ours is not None and theirs is not None and abs(ours - theirs) > MAX_LR_ERROR * theirs:
            yield f"learning rate {ours:.1e} at step {row['step']}, not {theirs:.1e}"
            return


def gradient_causes(usual: Evaluation, evidence: Evidence) -> Iterator[str]:
    norm = evidence.training.get("grad_norm")
    if norm is None or not usual.grad_norm:
        return
    lowest, highest = min(usual.grad_norm), max(usual.grad_norm)
    if not lowest / GRAD_NORM_FACTOR <= norm <= highest * GRAD_NORM_FACTOR:
        yield f"gradient norm {norm:.2g}, not {lowest:.2g} to {highest:.2g}"


def training_loss_causes(usual: Evaluation, evidence: Evidence, log_every: int) -> Iterator[str]:
    """Where to look if nothing conclusive is known: the gap to the training loss shows whether that is just as unusual.

    The training loss is a mean over `log_every` steps, so these must be as many as in the reference.
    """
    train_loss = evidence.training.get("train_loss")
    if train_loss is None or not usual.train_loss or evidence.log_every != log_every:
        return
    band = expected([val - train for val, train in zip(usual.val_loss, usual.train_loss, strict=True)])
    gap = evidence.val_loss - train_loss
    if gap > band.highest:
        where = ": overfitting, a model that sees its targets in training, or an evaluation that differs from training"
    elif gap < band.lowest:
        where = ": validation text that is easier or known from training, or an evaluation that differs from training"
    elif evidence.is_low:
        where = ", so both are low: the model may see its targets, through its mask or a wrong shift"
    else:
        where = ", so both are high: look at the model and the optimizer, not at the validation text"
    yield f"validation minus training loss is {gap:.3f} (usually {band}){where}"


def environment_causes(reference: Reference, evidence: Evidence) -> Iterator[str]:
    ours, theirs = evidence.made_with, reference.made_with
    changed = [name for name in theirs if name not in ("python", "machine") and ours.get(name) != theirs[name]]
    if changed:
        yield ", ".join(f"{name} {ours.get(name)!r}, not {theirs[name]!r}" for name in changed)
