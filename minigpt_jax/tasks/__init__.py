"""What is trained. A task knows its data and its loss; the loop in `training/` depends only on task.py.

A new task is a file in this folder, a row in TASKS and the section of its settings, with its row in `config.TASKS`.
"""

import importlib

from minigpt_jax.config import Config
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.tasks.task import Earlier, Task

# The module of each task, imported when the task is. It has `prepare(config, earlier, kernels) -> Task`.
TASKS = {"language_modelling": "minigpt_jax.tasks.language_modelling"}


def prepare(config: Config, earlier: Earlier | None = None, *, kernels: Kernels = PLAIN) -> Task:
    """The config's task, with its data read; of a run to resume, with what that was trained on.

    Raises DataError where the data does not fit the config, or is not that of the run.
    """
    return importlib.import_module(TASKS[config.task]).prepare(config, earlier, kernels)
