"""The runs of a sweep: one for each combination of the varied settings. Nothing here reads data or trains."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from minigpt_jax.config import AFFECT_RESULTS, Config, get_setting, setting_type
from minigpt_jax.errors import UsageError, did_you_mean, shortened

# With these settings, losses would be measured on other data.
FIXED = {"eval_batches", "image_size", "color"}
FORM = "as in learning_rate=1e-3,2e-3"
BOOLEANS = {"true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep: its values of the varied settings, and its config."""

    settings: dict[str, Any]
    config: Config

    @property
    def name(self) -> str:
        return named(self.settings)

    @property
    def key(self) -> str:
        """Equal for equal settings in any order."""
        return key_of(self.settings)


def named(settings: Mapping[str, Any]) -> str:
    """`learning_rate=0.001 seed=0`, for people."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def key_of(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def sweepable(config: Config) -> list[str]:
    """The names of the settings that a sweep can vary: numbers, choices and booleans that change what is trained, but not
    the data that losses are measured on."""
    names = []
    for name, entry in config.settings.items():
        rules = entry.field.metadata
        is_text = setting_type(entry.field) is str and not rules["choices"]
        has_no_effect = rules["may_change"] and name not in AFFECT_RESULTS
        if not (is_text or has_no_effect or rules["from_data"] or name in FIXED):
            names.append(name)
    return names


def require_allowed(flag: str, config: Config, name: str, allowed: Sequence[str]) -> type:
    """The type of a setting's values. Raises UsageError, naming the allowed settings, if this is not one of them."""
    if name not in allowed:
        what = "cannot be varied" if name in config.settings else f"is not a setting{did_you_mean(name, allowed)}"
        raise UsageError(f"{flag}: {shortened(name)} {what}; allowed: {', '.join(allowed)}")
    return setting_type(config.settings[name].field)


def name_and_values(flag: str, text: str, form: str) -> tuple[str, str]:
    """The two parts of a text such as `learning_rate=1e-3,2e-3`. Raises UsageError for a text of another form."""
    name, equals, values = (part.strip() for part in text.partition("="))
    if not equals:
        raise UsageError(f"{flag}={shortened(text)} must be a setting and its values, {form}")
    return name, values


def read_values(flag: str, text: str, kind: type, words: Sequence[str], form: str) -> list[Any]:
    """The words of a text as values of this type. Raises UsageError if one is of another type."""
    read = BOOLEANS.__getitem__ if kind is bool else kind
    try:
        return [read(word.strip()) for word in words]
    except (ValueError, KeyError) as error:
        what = "true or false" if kind is bool else f"of type {kind.__name__}"
        raise UsageError(f"{flag}={shortened(text)}: each value must be {what}, {form}") from error


def parse(texts: Sequence[str], config: Config) -> dict[str, list[Any]]:
    """The values to try of each setting, from texts such as `learning_rate=1e-3,2e-3`.

    Raises UsageError for a text of another form, a setting that cannot be varied or is given twice, and a value of the wrong
    type. Whether values are allowed is checked by `expand`.
    """
    vary = {}
    for text in texts:
        name, values = name_and_values("vary", text, FORM)
        kind = require_allowed("vary", config, name, sweepable(config))
        if name in vary:
            raise UsageError(f"vary: {name} is given twice: give all of its values in one list")
        vary[name] = read_values("vary", text, kind, values.split(","), FORM)
    return vary


def expand(config: Config, vary: Mapping[str, Sequence[Any]]) -> list[Point]:
    """One run for each combination of values; those of the last setting change fastest.

    Raises UsageError if there is nothing to vary, for an empty list, for a value given twice, and for values that the config
    does not allow.
    """
    if not vary:
        raise UsageError(f"a sweep needs settings to vary: give their values, {FORM}")
    lists = {}
    for name, values in vary.items():
        kind = require_allowed("vary", config, name, sweepable(config))
        if isinstance(values, str) or not (values := list(values)):
            raise UsageError(f"vary: {name}={shortened(values)} must be a list of values")
        # 1 and 1.0 would be arrays of different types, and thus different programs.
        lists[name] = [float(value) if kind is float and type(value) is int else value for value in values]
    points = []
    for values in itertools.product(*lists.values()):
        changed = config.override(dict(zip(lists, values, strict=True)))
        points.append(Point({name: get_setting(changed, name) for name in lists}, changed))
    names = [point.name for point in points]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"vary: {repeated[0]} is given twice")
    return points
