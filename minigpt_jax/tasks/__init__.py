"""What is trained. A task defines its data and its loss; the loop in `training/` depends only on task.py.

A new task needs a file in this folder, an entry in TASKS, and a config section with its settings and an entry in
`config.TASKS`.
"""

import importlib

import jax

from minigpt_jax.config import Config
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.tasks.fine_tuning import check, fine_tuned
from minigpt_jax.tasks.task import PreviousRun, Task

# The module of each task, imported on first use. It has `prepare(config, previous, kernels) -> Task`.
TASKS = {
    "language_modelling": "minigpt_jax.tasks.language_modelling",
    "chat": "minigpt_jax.tasks.chat",
    "masked_language_modelling": "minigpt_jax.tasks.masked_language_modelling",
    "text_classification": "minigpt_jax.tasks.text_classification",
    "image_classification": "minigpt_jax.tasks.image_classification",
}


def prepare(
    config: Config, previous: PreviousRun | None = None, *, kernels: Kernels = PLAIN,
    sharding: jax.sharding.Sharding | None = None,
) -> Task:  # fmt: skip
    """Reads the data and returns the config's task. To resume a run, pass as `previous` what it was trained on. A LoRA run
    also reads its base model, with this sharding.

    Raises DataError if the data does not fit the config or is not what the previous run was trained on.
    """
    check(config)
    task = importlib.import_module(TASKS[config.task]).prepare(config, previous, kernels)
    return fine_tuned(task, previous, sharding)
