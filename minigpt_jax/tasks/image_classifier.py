"""A trained image classifier: which class an image has, and where its class token looks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minigpt_jax.config import ImageConfig, ModelConfig
from minigpt_jax.errors import DataError
from minigpt_jax.interop.load import read_run_config
from minigpt_jax.models.kernels import Kernels
from minigpt_jax.runs import checkpoints
from minigpt_jax.tasks.classification import read_classes
from minigpt_jax.tasks.evaluation import probabilities
from minigpt_jax.tasks.image_classification import NamesOfImages


@dataclasses.dataclass(frozen=True, eq=False)
class ImageClassifier:
    """Pixels are from 0 to 255, as `data.images.read_image` returns them."""

    data: ImageConfig
    classes: tuple[str, ...]
    brightness: float  # mean pixel of the training images
    objective: NamesOfImages
    params: Any

    def probabilities(self, image_HWC: np.ndarray) -> dict[str, float]:
        """The probability of each class, the most probable one first."""
        [probs_V] = np.asarray(probabilities(self.params, {"images_BHWC": image_HWC[None]}, self.objective))
        return {self.classes[index]: float(probs_V[index]) for index in np.argsort(-probs_V, kind="stable")}

    def attention(self, image_HWC: np.ndarray) -> np.ndarray:
        """weights_LHN: in each layer and head, how much the class token attends to each patch, row by row. What it attends
        to itself is missing from a sum of 1."""
        _, state = self.objective.logits(self.params, {"images_BHWC": image_HWC[None]}, mutable=["intermediates"])
        layers = state["intermediates"]["transformer"]
        names = [f"block_{layer}" for layer in range(self.objective.model.config.num_layers)]
        return np.stack([layers[name]["attention"]["weights_BHTS"][0][0, :, 0, 1:] for name in names])


def load(workdir: Path, sharding: Any, choose_kernels: Callable[[ModelConfig], Kernels]) -> ImageClassifier:
    """Loads a run's parameters with the lowest validation loss. Raises DataError if there is no run, or it is corrupt or of
    another task."""
    config = read_run_config(workdir)
    if not isinstance(config.data, ImageConfig):
        raise DataError(f"{workdir} is a run of the task {config.task}, which does not train an image classifier")
    step = checkpoints.best_intact(workdir)
    known = read_classes(workdir, step)
    objective = NamesOfImages.of(config, len(known["classes"]), choose_kernels(config.model))
    like = jax.eval_shape(objective.init, jax.random.key(0))
    params = checkpoints.restore_eval_params(workdir, step, config.training.ema > 0, like, sharding)
    return ImageClassifier(config.data, tuple(known["classes"]), known["brightness"], objective, params)
