"""References: the losses of several seeds of a preset, from which a run can see whether its own losses are normal.

`python scripts/reference.py --config NAME` makes configs/references/NAME.json.
"""

import dataclasses
import json
import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from minigpt_jax.commands import CONFIGS_DIR
from minigpt_jax.config import NAME_THE_TEXT, Config, differences
from minigpt_jax.errors import DataError, one_line, shortened
from minigpt_jax.runs import checkpoints
from minigpt_jax.runs.folder import read_config

log = logging.getLogger(__name__)

REFERENCES_DIR = CONFIGS_DIR / "references"
MIN_SEEDS = 5
# 99.5 % quantiles of Student's t with n - 1 degrees of freedom, by the number of seeds n; beyond 10 seeds that of 10.
T_QUANTILES = {5: 4.604, 6: 4.032, 7: 3.707, 8: 3.499, 9: 3.355, 10: 3.250}


@dataclasses.dataclass(frozen=True)
class Band:
    """Where one more seed is expected."""

    lowest: float
    highest: float

    def __contains__(self, value: float) -> bool:
        return self.lowest <= value <= self.highest

    def __str__(self) -> str:
        return f"{self.lowest:.3f} to {self.highest:.3f}"


def expected(values: Sequence[float]) -> Band:
    """The 99 % prediction interval for one more seed: mean ± t · sd · sqrt(1 + 1/n), with t of Student for n - 1 degrees.

    Unlike mean ± 2 sd, it allows for the error of a mean and a deviation that come from few seeds. For five, t is 4.6.
    """
    n, mean = len(values), statistics.fmean(values)
    margin = T_QUANTILES[min(n, 10)] * statistics.stdev(values, mean) * math.sqrt(1 + 1 / n)
    return Band(mean - margin, mean + margin)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the runs measured at one step: a value per seed. The last three are those of the row of training metrics of the
    same step, and empty or None if there is none."""

    step: int
    val_loss: tuple[float, ...]
    train_loss: tuple[float, ...] = ()  # mean since the previous row
    grad_norm: tuple[float, ...] = ()  # before clipping
    learning_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """The losses of several seeds of a preset, and how they were made. Raises DataError if it is incomplete."""

    preset: str
    command: str  # that made it
    date: str
    machine: str
    made_with: dict[str, str]  # as in a checkpoint: versions, device, JAX's settings
    sources: dict[str, str]  # as in a checkpoint: sha256 of the data by name
    data_facts: dict[str, float]  # see `tasks.Task`
    seeds: tuple[int, ...]
    final: dict[str, tuple[float, ...]]  # measures of the last step on all validation data, a value per seed
    evaluations: tuple[Evaluation, ...]
    config: Config  # with the settings that follow from the data filled in

    def __post_init__(self):
        n = len(self.seeds)
        if n < MIN_SEEDS:
            raise DataError(f"{n} seeds: a reference needs at least {MIN_SEEDS}")
        logged = [values for each in self.evaluations for values in (each.train_loss, each.grad_norm) if values]
        for values in [*self.final.values(), *(each.val_loss for each in self.evaluations), *logged]:
            if len(values) != n or not all(isinstance(value, float) and math.isfinite(value) for value in values):
                raise DataError(f"{shortened(values)} must be {n} finite numbers, one per seed")

    def at(self, step: int) -> Evaluation | None:
        """The evaluation after this step, if there was one."""
        return next((each for each in self.evaluations if each.step == step), None)

    def band(self, step: int) -> Band | None:
        """Where the validation loss of one more seed is expected, in nats. None at steps that were not evaluated."""
        evaluation = self.at(step)
        return evaluation and expected(evaluation.val_loss)

    def is_comparable(self, config: Config, sources: Mapping[str, str]) -> bool:
        """Whether a run has the same settings, except neutral ones such as the seed, and the same data by its checksums.

        Also if the data has only the same name, and has changed since the reference was made: `has_data` is false then.
        """
        changed = set(differences(self.config, config)) - config.neutral_settings
        if self.has_data(sources):
            return changed <= NAME_THE_TEXT
        has_same_text = sources.get("text") == self.sources.get("text")
        return changed <= (set() if has_same_text else config.settings_from_data)

    def has_data(self, sources: Mapping[str, str]) -> bool:
        return dict(sources) == self.sources

    def to_json(self) -> str:
        """Readable JSON, with the values of the seeds on one line."""
        text = json.dumps(dataclasses.asdict(self) | {"config": json.loads(self.config.to_json())}, indent=2)
        return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda list: f"[{' '.join(list[1].split())}]", text) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Reference":
        """Inverse of `to_json`. Raises DataError if the file cannot be read as a reference."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            config = Config.from_json(json.dumps(values.pop("config")))
            evaluations = tuple(Evaluation(**with_tuples(each)) for each in values.pop("evaluations"))
            final = with_tuples(values.pop("final"))
            return cls(**with_tuples(values), final=final, evaluations=evaluations, config=config)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is not a reference: {one_line(str(error))}") from error


def with_tuples(values: dict) -> dict:
    """A JSON object with tuples in place of its lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def find(config: Config, sources: Mapping[str, str]) -> Reference | None:
    """The reference with which a run of this config and data can be compared, the same data first. Logs corrupt files."""
    comparable = []
    for path in sorted(REFERENCES_DIR.glob("*.json")):
        try:
            reference = Reference.read(path)
        except DataError as error:
            log.warning("%s. Make it again, or delete it.", error)
        else:
            if reference.is_comparable(config, sources):
                comparable.append(reference)
    return max(comparable, key=lambda reference: reference.has_data(sources), default=None)


def of_run(workdir: Path) -> Reference | None:
    """The reference of a run's settings and data. None if there is none, or no checkpoint that records the data."""
    try:
        config, sources = read_config(workdir), checkpoints.read_info(workdir, checkpoints.steps(workdir)[-1]).sources
    except (DataError, IndexError):
        return None
    reference = find(config, sources)
    return reference if reference is not None and reference.has_data(sources) else None
