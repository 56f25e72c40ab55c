"""Entry points for Python callers. They choose the kernels and devices that a model runs on.

Training and loading code is imported on first use, so that programs that only decode do not hold it in memory.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from minigpt_jax import kernels as kernel_sets
from minigpt_jax.config import Config, ModelConfig, whole_number
from minigpt_jax.errors import UsageError, shortened
from minigpt_jax.files import local_path
from minigpt_jax.models.kernels import Kernels
from minigpt_jax.system import logs, streams
from minigpt_jax.system.heap import retain_heap

if TYPE_CHECKING:
    from minigpt_jax.generation.language_model import LanguageModel
    from minigpt_jax.tasks.image_classifier import ImageClassifier
    from minigpt_jax.tasks.text_classifier import PassageClassifier

REQUIRED_SETTINGS = {
    "jax_enable_x64": (False,), "jax_numpy_dtype_promotion": ("standard",), "jax_no_tracing": (False,),
    "jax_transfer_guard": (None, "allow", "log"),
}  # fmt: skip


def first_device() -> Any:
    """The device to use. Raises UsageError if JAX has none, or has settings that the models do not support."""
    for name, allowed in REQUIRED_SETTINGS.items():
        if (value := getattr(jax.config, name)) not in allowed:
            variable = f"{name.upper()}={allowed[-1]}"
            raise UsageError(f"JAX's setting {name}={value} is not supported: set {variable}, or unset it")
    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # JAX raises the latter for "cuda" if its plugin is not installed
        platforms: str = jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]
        reason = " ".join(str(error).split()) or "not installed"
        what = "JAX finds no device, look at its environment variables"
        if platforms:
            what = f"JAX_PLATFORMS={platforms} is not available here, unset it or choose another such as cpu"
        raise UsageError(f"{what}: {reason}") from error


def choose_kernels(config: ModelConfig, kernels: str = "tuned") -> Kernels:
    """The fastest kernels for this machine's first device ("tuned"), or the equations ("plain"). Else UsageError."""
    return kernel_sets.select(config, first_device(), kernels)


def default_sharding() -> jax.sharding.Sharding:
    """Restores arrays to this machine's first device, not to the one they were saved from, which may be a GPU."""
    return jax.sharding.SingleDeviceSharding(first_device())


def train(config: Config, workdir: str | Path, overwrite: bool = False, *, kernels: str = "tuned", **options) -> None:
    """Trains in a run's folder, resuming from its newest checkpoint if it has one. `kernels` is "tuned" or "plain".

    Prints logs, samples and progress, and continues if they cannot be written. A notebook also shows the loss curve, and
    interrupting its cell stops after a checkpoint. See `training.loop.train` for the options and exceptions.
    """
    from minigpt_jax.interop.load import check_not_huggingface
    from minigpt_jax.training import loop

    if not isinstance(config, Config):
        raise UsageError(f"config={shortened(config)} must be a Config, such as minigpt_jax.load_preset('shakespeare_char')")
    workdir = local_path(workdir)
    check_not_huggingface(workdir)
    retain_heap()
    device, chosen = first_device(), choose_kernels(config.model, kernels)
    with streams.optional(), logs.shown():
        loop.train(config, workdir, overwrite, device=device, kernels=chosen, **options)


def evaluate(
    workdir: str | Path, split: str = "val", stride: int | None = None, *, dataset: str | Path | None = None,
    val_dataset: str | Path | None = None, encoding: str | None = None, data_dir: str | Path | None = None,
    plot: str | Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """The measures of a run's best checkpoint over all data of a split: `loss`, and what its task adds.

    `stride` is the distance in tokens between the starts of two windows, by default the context length. `dataset`,
    `val_dataset`, `encoding` and `data_dir` say where and how the run's texts are now, if that has changed. `plot` is a PNG
    file for the confusion matrix of a classifier. Raises DataError where the folder holds no run or its data has changed,
    UsageError for a bad split or stride, and for a plot if the task has no classes.
    """
    from minigpt_jax.interop.load import read_run_config
    from minigpt_jax.runs import checkpoints, plots
    from minigpt_jax.tasks import prepare
    from minigpt_jax.tasks.plots import draw_confusion
    from minigpt_jax.tasks.task import Classifier, PreviousRun, trained_params

    workdir, stride = local_path(workdir), None if stride is None else whole_number("stride", stride)
    moved = {"dataset": dataset, "val_dataset": val_dataset, "encoding": encoding, "data_dir": data_dir}
    png = None if plot is None else plots.check_png("plot", str(plot))
    config = read_run_config(workdir).override({name: value for name, value in moved.items() if value is not None})
    with streams.optional(), logs.shown():
        step = checkpoints.best_intact(workdir)
        previous = PreviousRun(workdir, checkpoints.read_info(workdir, step).sources)
        sharding = default_sharding()
        task = prepare(config, previous, kernels=choose_kernels(config.model), sharding=sharding)
        params = trained_params(task, workdir, step, sharding)
        if png is not None:
            if not isinstance(task, Classifier):
                raise UsageError(f"{config.task} has no classes that could be confused: omit plot")
            plots.save(draw_confusion(task.confusion(params, split), task.classes), png)
        return task.measures(params, split, stride)


def load(folder: str | Path, *, kernels: str = "tuned") -> "LanguageModel":
    """Loads the language model of a run's folder or a Hugging Face folder. See `interop.load.load`."""
    from minigpt_jax.interop import load

    model = load.load(folder, default_sharding())
    return dataclasses.replace(model, kernels=choose_kernels(model.config, kernels), devices=tuple(jax.local_devices()))


def load_image_classifier(workdir: str | Path, *, kernels: str = "tuned") -> "ImageClassifier":
    """Loads the image classifier of a run's folder. See `tasks.image_classifier.load`."""
    from minigpt_jax.tasks import image_classifier

    return image_classifier.load(local_path(workdir), default_sharding(), lambda config: choose_kernels(config, kernels))


def load_text_classifier(workdir: str | Path, *, kernels: str = "tuned") -> "PassageClassifier":
    """Loads the text classifier of a run's folder. See `tasks.text_classifier.load`."""
    from minigpt_jax.tasks import text_classifier

    return text_classifier.load(local_path(workdir), default_sharding(), lambda config: choose_kernels(config, kernels))
