"""The changes that an ablation tries, one line for each topic. Nothing here reads data or trains."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from minigpt_jax.config import Config, differences
from minigpt_jax.errors import UsageError, require_choice
from minigpt_jax.experiments.grid import key_of, named
from minigpt_jax.models.flops import num_weights

log = logging.getLogger(__name__)

Settings = dict[str, Any]

MULTIPLE = 4  # of which `ff_dim` is one, where it is computed
MAX_DEVIATION = 0.05  # of the number of weights, where depth and width are exchanged


def each(name: str, *values: Any) -> Callable[[Config], list[Settings]]:
    """Each of these values of a setting."""
    return lambda base: [{name: value} for value in values]


def activations(base: Config) -> list[Settings]:
    """SwiGLU has three matrices where the others have two, so they are compared at equal parameters."""
    return [at_equal_size(base, activation=name) for name in ("relu2", "gelu", "relu", "swiglu")]


def kv_heads(base: Config) -> list[Settings]:
    model = base.model
    numbers = model.num_heads, model.num_heads // 2, 1
    return [{"num_kv_heads": number} for number in numbers if number and number != model.kv_heads]


def heads(base: Config) -> list[Settings]:
    return [{"num_heads": number} for number in (base.model.num_heads // 2, 2 * base.model.num_heads) if number]


def depths(base: Config) -> list[Settings]:
    """Half and twice the layers, with a width at which the model has as many weights, where there is one."""
    model, wanted = base.model, num_weights(base.model)
    found = [at_depth(base, number) for number in (model.num_layers // 2, 2 * model.num_layers) if number]
    sizes = [num_weights(dataclasses.replace(model, **settings)) for settings in found]
    return [settings for settings, size in zip(found, sizes, strict=True) if abs(size / wanted - 1) < MAX_DEVIATION]


def learning_rates(base: Config) -> list[Settings]:
    names = "learning_rate", "min_learning_rate"
    return [{name: factor * getattr(base.training, name) for name in names} for factor in (0.5, 2)]


# What to add for a new setting: `"its_name": each("its_name", False, True)`.
CHANGES: dict[str, Callable[[Config], list[Settings]]] = {
    "positions": each("positions", "rotary", "learned", "sinusoidal"),
    "norm": each("norm", "rmsnorm", "layernorm"),
    "placement": each("norm_placement", "pre", "post"),
    "activation": activations,
    "qk_norm": each("qk_norm", True, False),
    "qk_scale": each("qk_scale", False, True),
    "kv_heads": kv_heads,
    "tying": each("tie_embeddings", False, True),
    "bias": each("bias", False, True),
    "dropout": each("dropout", 0.0, 0.1, 0.2),
    "heads": heads,
    "depth": depths,
    "init": each("init", "fan_in", "gpt2"),
    "token_shift": each("token_shift", False, True),
    "optimizer": each("optimizer", "adamw", "muon"),
    "learning_rate": learning_rates,
    "schedule": each("schedule", "cosine", "linear", "constant"),
    "warmup": each("warmup_steps", 0, 100),
    "beta2": each("beta2", 0.95, 0.99, 0.999),
    "weight_decay": each("weight_decay", 0.0, 0.1),
    "grad_clip": each("grad_clip", 1.0, 1000.0),
    "ema": each("ema", 0.0, 0.99),
}


def at_equal_size(base: Config, **settings: Any) -> Settings:
    """These settings, with the `ff_dim` at which the model has as many weights as the base, if it would have others."""

    def weights(ff_dim: int) -> int:
        return num_weights(dataclasses.replace(base.model, **settings, ff_dim=ff_dim))

    wanted, unit = num_weights(base.model), weights(2) - weights(1)
    if weights(base.model.ff_dim) == wanted:
        return settings
    ff_dim = 1 + (wanted - weights(1)) / unit
    return settings | {"ff_dim": max(MULTIPLE, MULTIPLE * round(ff_dim / MULTIPLE))}


def at_depth(base: Config, num_layers: int) -> Settings:
    """That number of layers, at the width at which the model comes closest to the size of the base."""
    model, multiple = base.model, 2 * base.model.num_heads  # heads of the same, even size, as rotary positions need

    def deviation(embed_dim: int) -> int:
        ff_dim = max(1, round(embed_dim * model.ff_dim / model.embed_dim))
        changed = dataclasses.replace(model, num_layers=num_layers, embed_dim=embed_dim, ff_dim=ff_dim)
        return abs(num_weights(changed) - num_weights(model))

    embed_dim = min(range(multiple, 2 * model.embed_dim + multiple, multiple), key=deviation)
    return at_equal_size(base, num_layers=num_layers, embed_dim=embed_dim)


def changes(base: Config, only: Sequence[str] = ()) -> list[Settings]:
    """The settings of each change, of these topics or of all, that makes another model or training than `base`, a config
    with its `vocab_size`. Changes that the base does not allow are left out, with a log line.

    Raises UsageError for a topic that does not exist, and if there are no changes.
    """
    for topic in only:
        require_choice("only", topic, CHANGES)
    found: dict[str, Settings] = {}
    for topic in only or CHANGES:
        for settings in CHANGES[topic](base):
            try:
                config = base.override(settings)
            except UsageError as error:
                log.info("Left out %s: %s", named(settings), error)
                continue
            if changed := {name: value for name, (_, value) in differences(base, config).items()}:
                found[key_of(changed)] = changed
    if not found:
        raise UsageError(f"only={','.join(only)}: the base allows no such change; choose other topics: {', '.join(CHANGES)}")
    return list(found.values())
