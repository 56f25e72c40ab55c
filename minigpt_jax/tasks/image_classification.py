"""Image classification: a vision transformer is trained to name the class of an image."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from minigpt_jax.commands import command
from minigpt_jax.config import Config, ImageConfig, ModelConfig
from minigpt_jax.data import batches
from minigpt_jax.data.images import Images, open_images, split
from minigpt_jax.errors import DataError, UsageError, require_choice
from minigpt_jax.files import sha256
from minigpt_jax.models.flops import trunk_flops_per_token
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.models.vit import ViT
from minigpt_jax.tasks.augmentation import augment
from minigpt_jax.tasks.classification import CLASSES_FILE, class_loss
from minigpt_jax.tasks.evaluation import confusion, means, probabilities
from minigpt_jax.tasks.task import PreviousRun

UNUSED = "vocab_size", "vocab_multiple", "tie_embeddings"  # settings of the model that are about tokens


@struct.dataclass
class NamesOfImages:
    """The mean cross-entropy of the classes of images, in nats. See `tasks.Objective`.

    With a key, as in training, the images are varied and the labels smoothed (Szegedy et al. 2016): the target is a mixture
    of the class, and of all classes with weight `label_smoothing`. The numbers are leaves: changing them does not recompile.
    """

    model: ViT = struct.field(pytree_node=False)
    image_size: int = struct.field(pytree_node=False)
    channels: int = struct.field(pytree_node=False)
    dropout: float | None
    shift: float
    rotation: float
    scale: float
    label_smoothing: float

    @classmethod
    def of(cls, config: Config, num_classes: int, kernels: Kernels = PLAIN) -> "NamesOfImages":
        data = data_of(config)
        model = ViT(dataclasses.replace(config.model, dropout=0.0), num_classes, data.patch_size, kernels)
        return cls(
            model, data.image_size, 3 if data.color else 1, config.model.dropout or None,
            data.shift, data.rotation, data.scale, data.label_smoothing,
        )  # fmt: skip

    def init(self, key: jax.Array) -> Any:
        return self.model.init(key, jnp.zeros((1, self.image_size, self.image_size, self.channels)))["params"]

    def logits(self, params: Any, batch: batches.Batch, **options) -> Any:
        """logits_BV of images_BHWC with pixels from 0 to 255, and what the model's `apply` returns with these options."""
        return self.model.apply({"params": params}, batch["images_BHWC"] / 127.5 - 1, **options)

    def loss(self, params: Any, batch: batches.Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        labels_B, mask_B = batch["labels_B"], batch["mask_B"]
        if key is None:
            return class_loss(self.logits(params, batch), labels_B, mask_B)
        augment_key, dropout_key = jax.random.split(key)
        images_BHWC = batch["images_BHWC"].astype(jnp.float32)
        images_BHWC = augment(augment_key, images_BHWC, self.shift, self.rotation, self.scale)
        options = {} if self.dropout is None else {"dropout": self.dropout, "rngs": {"dropout": dropout_key}}
        logits_BV = self.logits(params, {"images_BHWC": images_BHWC}, **options)
        total, count, measures = class_loss(logits_BV, labels_B, mask_B)
        spread = -(jax.nn.log_softmax(logits_BV).mean(axis=-1) * mask_B).sum()
        return (1 - self.label_smoothing) * total + self.label_smoothing * spread, count, measures


@dataclasses.dataclass(frozen=True, eq=False)
class ImageClassification:
    """See `tasks.Task`."""

    config: Config
    splits: dict[str, Images]  # train, val
    sources: dict[str, str]
    num_steps: int
    objective: NamesOfImages

    unit = "images"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.splits["train"].classes

    @property
    def units_per_step(self) -> int:
        return self.config.training.batch_size

    @property
    def flops_per_step(self) -> float:
        data, D = data_of(self.config), self.config.model.embed_dim
        num_patches = num_patches_of(data)
        edges = 6.0 * D * (data.image_size**2 * self.objective.channels + len(self.classes))
        trunk = (num_patches + 1) * trunk_flops_per_token(self.config.model, num_patches + 1)
        return self.units_per_step * (trunk + edges)

    @property
    def files(self) -> dict[str, str]:
        return {CLASSES_FILE: classes_json(self.splits["train"])}

    def initial_params(self, sharding: jax.sharding.Sharding) -> Any:
        return None

    def batch_at(self, step: int) -> batches.Batch:
        settings, images = self.config.training, self.splits["train"]
        rows = batches.shuffled_rows(len(images), settings.batch_size, settings.seed, step)
        return self.batch("train", rows, np.ones(len(rows), bool))

    def batch(self, part: str, rows: np.ndarray, mask_B: np.ndarray) -> batches.Batch:
        images = self.splits[part][rows]
        return {"images_BHWC": images.images_NHWC, "labels_B": images.labels_N, "mask_B": mask_B}

    def evaluation_batches(self, part: str, limit: int | None = None):
        rows_and_masks = batches.evaluation_rows(len(self.splits[part]), self.config.training.batch_size, limit)
        return (self.batch(part, rows, mask_B) for rows, mask_B in rows_and_masks)

    def evaluate(self, params: Any, limit: int | None = None) -> dict[str, float]:
        return means(self.objective, params, self.evaluation_batches("val", limit))

    def measures(self, params: Any, split: str = "val", stride: int | None = None) -> dict[str, float]:
        require_choice("split", split, self.splits)
        if stride is not None:
            raise UsageError(f"stride={stride} is for texts: {self.config.task} has no windows")
        measured = means(self.objective, params, self.evaluation_batches(split))
        return measured | {"images": len(self.splits[split])}

    def confusion(self, params: Any, split: str = "val") -> np.ndarray:
        require_choice("split", split, self.splits)
        return confusion(self.objective, params, self.evaluation_batches(split), len(self.classes))

    def preview(self, params: Any) -> str:
        """One validation image of each class, up to ten, with the most probable class."""
        val, num_shown = self.splits["val"], min(len(self.classes), 10)
        rows = np.searchsorted(val.labels_N, np.arange(num_shown))  # they are sorted
        probs_BV = np.asarray(probabilities(params, {"images_BHWC": val.images_NHWC[rows]}, self.objective))
        guesses = [f"{self.classes[probs_V.argmax()]} ({probs_V.max():.0%})" for probs_V in probs_BV]
        return "\n".join(f"{name} is taken for {guess}" for name, guess in zip(self.classes, guesses, strict=False))

    def describe_data(self) -> str:
        return f"{data_of(self.config).dataset}, {len(self.splits['train'])} training images, {len(self.classes)} classes"

    def data_facts(self) -> dict[str, float]:
        return {}

    def describe_result(self, measures: Mapping[str, float]) -> str:
        return f"{measures['loss']:.4f} nats per image, accuracy {measures['accuracy']:.2%} of {measures['images']} images"

    def next_command(self, workdir: Path) -> str:
        return f"Classify an image: {command('classify')} --workdir {workdir} --image FILE"


def data_of(config: Config) -> ImageConfig:
    assert isinstance(config.data, ImageConfig)  # guaranteed by `config.task`, which is derived from its type
    return config.data


def classes_json(images: Images) -> str:
    """The file of a run from which `image_classifier.py` learns the names of the classes and how bright its images are."""
    brightness = round(float(images.images_NHWC.mean()), 1)
    return json.dumps({"classes": images.classes, "brightness": brightness}, indent=2) + "\n"


def num_patches_of(data: ImageConfig) -> int:
    return (data.image_size // data.patch_size) ** 2


def check(config: Config) -> None:
    """Raises UsageError for settings of the model that a vision transformer does not have."""
    model, data = config.model, data_of(config)
    for name in UNUSED:
        if getattr(model, name) != getattr(ModelConfig(), name):
            raise UsageError(f"{name}={getattr(model, name)} is about tokens, which {config.task} does not have: omit it")
    if model.positions != "learned":
        raise UsageError(f"positions={model.positions!r} must be 'learned' for {config.task}")
    if model.context_length < (length := num_patches_of(data) + 1):
        raise UsageError(
            f"context_length={model.context_length} must be at least {length}: image_size={data.image_size} with "
            f"patch_size={data.patch_size} gives {length - 1} patches, and one position is the class token's"
        )


def prepare(config: Config, previous: PreviousRun | None = None, kernels: Kernels = PLAIN) -> ImageClassification:
    """Reads and splits the images."""
    check(config)
    data, training = data_of(config), config.training
    images = open_images(data)
    splits = split(images)
    sources = {"images": images.sha256, "classes": sha256(classes_json(splits["train"]).encode())}
    if previous is not None and previous.sources != sources:
        raise DataError(
            f"{data.dataset} does not have the images that this run was trained on: restore them, set --dataset to where "
            "they are now, choose another --workdir, or restart with --overwrite"
        )
    num_steps = training.steps or math.ceil((training.epochs or 1) * len(splits["train"]) / training.batch_size)
    return ImageClassification(config, splits, sources, num_steps, NamesOfImages.of(config, len(images.classes), kernels))
