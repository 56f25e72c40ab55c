"""The edge for Python callers: where it is decided which kernels and devices a model runs on.

What trains and what reads runs is imported when it is asked for: who only decodes need not have it in memory.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from minigpt_jax import kernels as kernels_room
from minigpt_jax.config import Config, ModelConfig
from minigpt_jax.models.kernels import Kernels

if TYPE_CHECKING:
    from minigpt_jax.generation.language_model import LanguageModel


def choose_kernels(config: ModelConfig, kernels: str = "tuned") -> Kernels:
    """The kernels that suit this machine's first device or, with "plain", the equations. UsageError for another choice."""
    return kernels_room.select(config, jax.devices()[0], kernels)


def default_sharding() -> jax.sharding.Sharding:
    """Where restored arrays go: to this machine's first device, and not where they were saved, which may be a GPU."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def train(config: Config, workdir: str | Path, overwrite: bool = False, *, kernels: str = "tuned", **options) -> None:
    """Trains in a run's folder, continuing from its newest checkpoint where it has one. `kernels` is "tuned" or "plain".

    For the options and what is raised see `training.loop.train`.
    """
    from minigpt_jax.interop.load import check_not_foreign
    from minigpt_jax.training import loop

    check_not_foreign(Path(workdir))
    device, chosen = jax.devices()[0], choose_kernels(config.model, kernels)
    loop.train(config, Path(workdir), overwrite, device=device, kernels=chosen, **options)


def load(folder: str | Path, *, kernels: str = "tuned") -> "LanguageModel":
    """The language model in a folder: that of a run, or of Hugging Face. See `interop.load.load`."""
    from minigpt_jax.interop import load

    model = load.load(folder, default_sharding())
    return dataclasses.replace(model, kernels=choose_kernels(model.config, kernels), devices=tuple(jax.local_devices()))
