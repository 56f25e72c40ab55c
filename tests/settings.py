"""Every change of a single setting, derived from the config classes, so that tests need no such list.

A choice that is declared but not implemented somewhere (page, layer, kernel, cache, sampler, twin) fails in the tests there.
"""

import contextlib
import dataclasses

from minigpt_jax.config import ModelConfig, TrainingConfig

BASE = ModelConfig(num_layers=1, num_heads=4, embed_dim=16, ff_dim=24, context_length=16, vocab_size=17)
SIZES = {"num_layers": 2, "num_heads": 2, "embed_dim": 12, "ff_dim": 20, "vocab_size": 18}
TRAINING = TrainingConfig(learning_rate=5e-4, min_learning_rate=1e-4, warmup_steps=1, ema=0.15, grad_clip=0.02)
CONTEXTS = (16, 80)  # shorter and longer than an attention block


def other_values(section, field):
    """All other choices, the other boolean, or the first other number that the section accepts."""
    if field.metadata["choices"]:
        return [value for value in field.metadata["choices"] if value != getattr(section, field.name)]
    value = getattr(section, field.name)
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, float):
        return [0.5 * value if value >= 1e-4 else 0.125]  # half of an epsilon would hardly change anything
    for candidate in (2, 3, 5, 7, 18, 32):
        with contextlib.suppress(ValueError):
            dataclasses.replace(section, **{field.name: candidate})
            if candidate != value:
                return [candidate]
    raise AssertionError(f"no other valid value for {field.name}")


def changes_of(section, but=()):
    """One setting at a time, except for sizes, which change together, since each new shape takes long to compile."""
    fields = [field for field in dataclasses.fields(section) if field.name not in but]
    sizes = set(SIZES) if section is BASE else set()
    single = [{field.name: value} for field in fields if field.name not in sizes for value in other_values(section, field)]
    return [*single, SIZES] if sizes else single


MODEL_CHANGES = [{}, *changes_of(BASE, but=("context_length",))]  # varied by CONTEXTS
# Settings of the loop, the data and the files, which do not change what a step computes.
LOOP_SETTINGS = {
    "batch_size", "steps", "epochs", "seed", "init_from", "eval_every", "eval_batches", "checkpoint_every", "sample_every",
    "log_every", "patience", "max_bad_steps", "keep_checkpoints",
}  # fmt: skip
TRAINING_CHANGES = changes_of(TRAINING, but=LOOP_SETTINGS)
