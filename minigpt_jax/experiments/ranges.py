"""The settings that a study may try: an interval or a list of values for each. Nothing here reads data or trains."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from minigpt_jax.config import Config, setting_type
from minigpt_jax.errors import UsageError, shortened
from minigpt_jax.experiments.grid import name_and_values, read_values, require_allowed, sweepable

FORM = "as in learning_rate=1e-4..1e-2 or num_layers=2,3,4"
DIGITS = 4  # significant ones of a sampled float: what the table shows is what was trained
DECADE = 10  # intervals that span more than this factor are sampled on a log scale


@dataclasses.dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`, both included, sampled uniformly or, with `log`, uniformly in their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self):
        if not -math.inf < self.low < self.high < math.inf:
            raise UsageError(f"range={self.low}..{self.high} must be two finite numbers, the lower one first")
        if self.log and self.low <= 0:
            raise UsageError(f"range={self.low}..{self.high}: a log scale needs numbers above 0; use :linear")

    def __str__(self) -> str:
        return f"{self.low}..{self.high}:{'log' if self.log else 'linear'}"


Range = Interval | Sequence[Any]


def tunable(config: Config) -> list[str]:
    """The names of the settings that can be tuned: those that can be swept, but for the seed. A lucky seed is not a better
    setting."""
    return [name for name in sweepable(config) if name != "seed"]


def parse(texts: Sequence[str], config: Config) -> dict[str, Range]:
    """The range of each setting, from texts such as `learning_rate=1e-4..1e-2`, `dropout=0.01..0.5:linear` or
    `num_layers=2,3,4`. An interval that spans more than a factor of ten has a log scale, unless it ends in `:linear`.

    Raises UsageError for a text of another form, and for a setting that cannot be tuned or is given twice. `Space` checks
    whether values are allowed.
    """
    ranges: dict[str, Range] = {}
    for text in texts:
        name, values = name_and_values("range", text, FORM)
        kind = require_allowed("range", config, name, tunable(config))
        if name in ranges:
            raise UsageError(f"range: {name} is given twice: give one interval, or all of its values in one list")
        if ".." not in values:
            ranges[name] = read_values("range", text, kind, values.split(","), FORM)
            continue
        if kind not in (int, float):
            raise UsageError(f"range={shortened(text)}: {name} has no intervals; list its values, separated by commas")
        ends, colon, scale = values.partition(":")
        if colon and scale not in ("log", "linear"):
            raise UsageError(f"range={shortened(text)}: the scale must be log or linear, as in 1e-4..1e-3:log")
        low, high = read_values("range", text, kind, ends.split("..", 1), FORM)
        ranges[name] = Interval(low, high, scale == "log" or (not scale and low > 0 and high > DECADE * low))
    return ranges


@dataclasses.dataclass(frozen=True)
class Space:
    """The configs that a study may try: `config`, with a value of each range.

    Raises UsageError if there is no range, for a setting that cannot be tuned, for a list of fewer than two values, and for
    values that the config does not allow.
    """

    config: Config
    ranges: Mapping[str, Range]

    def __post_init__(self):
        if not self.ranges:
            raise UsageError(f"tuning needs a range of values to try, {FORM}")
        for name, values in self.ranges.items():
            require_allowed("range", self.config, name, tunable(self.config))
            if not isinstance(values, Interval) and not 2 <= len(values) == len(set(values)):
                raise UsageError(f"range: {name}={shortened(values)} must be an interval, or a list of different values")
        first = {name: to_check(values)[0] for name, values in self.ranges.items()}
        for name, values in self.ranges.items():
            for value in to_check(values):
                self.config_of(first | {name: value})

    @property
    def described(self) -> dict[str, str]:
        """The ranges as text, by setting."""
        return {
            name: str(values) if isinstance(values, Interval) else ",".join(map(str, values))
            for name, values in self.ranges.items()
        }

    def config_of(self, settings: Mapping[str, Any]) -> Config:
        """The config with these values of the tuned settings. If the peak learning rate is tuned alone, the last one keeps
        its ratio to it. Raises UsageError if the values do not fit together."""
        changes = dict(settings)
        if "learning_rate" in changes and "min_learning_rate" not in changes:
            ratio = self.config.training.min_learning_rate / self.config.training.learning_rate
            changes["min_learning_rate"] = rounded(ratio * changes["learning_rate"])
        return self.config.override(changes)

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Settings for a trial of Optuna, chosen by the sampler of its study."""
        for name, values in self.ranges.items():
            if not isinstance(values, Interval):
                trial.suggest_categorical(name, list(values))
            elif self.type_of(name) is int:
                trial.suggest_int(name, values.low, values.high, log=values.log)
            else:
                trial.suggest_float(name, values.low, values.high, log=values.log)
        return self.settings_of(trial.params)

    def settings_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The settings for what Optuna has chosen: the same, but floats from an interval are rounded."""
        settings = {}
        for name, values in self.ranges.items():
            value = params[name]
            if self.type_of(name) is float:
                value = min(max(rounded(value), values.low), values.high) if isinstance(values, Interval) else float(value)
            settings[name] = value
        return settings

    def type_of(self, name: str) -> type:
        return setting_type(self.config.settings[name].field)


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def to_check(values: Range) -> list[Any]:
    """The values that must be allowed. Of an interval of whole numbers also the second one: if they had to be divisible by
    another setting, the first two would not both be."""
    if not isinstance(values, Interval):
        return list(values)
    return [values.low, *([values.low + 1] if type(values.low) is int else []), values.high]
