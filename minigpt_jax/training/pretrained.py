"""Models that have been trained already: those of runs, and those in folders of Hugging Face, behind one door."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from minigpt_jax.config import ModelConfig, differences
from minigpt_jax.errors import DataError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop import hf_reader as huggingface
from minigpt_jax.training import checkpoint
from minigpt_jax.training.experiment import Experiment

# What may be another than in the model from which training begins. The context may only become shorter.
FREE = ("dropout", "dtype", "remat", "init", "context_length")


def load(folder: str | Path) -> LanguageModel:
    """The language model of a run or, as safetensors, of Hugging Face: GPT-2 or Llama, see huggingface.py.

    Of a run it is that with the lowest validation loss and, with `ema`, the average of the parameters. Raises DataError
    where the folder holds neither, no checkpoint yet, or what is damaged.
    """
    folder = Path(folder)
    return huggingface.read(folder) if is_foreign(folder) else checkpoint.load(folder)


def is_foreign(path: Path) -> bool:
    """Whether it is for huggingface.py to read, or to refuse."""
    return os.path.isfile(path) or huggingface.is_one(path)  # a file of weights, perhaps


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture of what `load` would load. Raises DataError as it does."""
    return huggingface.read_config(folder)[0] if is_foreign(folder) else checkpoint.read_config(folder).model


def settings_from(folder: str) -> dict[str, Any]:
    """The settings that a run needs in order to begin with the weights of this folder, for `Config.override`."""
    model = dataclasses.asdict(read_model_config(Path(folder)))
    needed = {name: value for name, value in model.items() if name not in FREE}
    tokenizer = os.path.join(folder, "")  # a path, even where the folder is called `char`
    return needed | {"context_length": model["context_length"], "tokenizer": tokenizer, "init_from": folder}


def initial_params(experiment: Experiment) -> Any:
    """The parameters that `init_from` names; None where it names none.

    Raises DataError where they are not those of the experiment's model and tokenizer.
    """
    config = experiment.config.model
    folder = experiment.config.training.init_from
    if folder is None:
        return None
    model = load(folder)
    there = dataclasses.replace(experiment.config, model=model.config)
    changes = differences(experiment.config, there).items()
    changed = [f"{name}={here} (there {was})" for name, (here, was) in changes if name not in FREE]
    if model.tokenizer.sha256 != experiment.tokenizer.sha256:
        changed.append("another tokenizer")
    if config.context_length > model.config.context_length:
        changed.append(f"context_length={config.context_length} (there at most {model.config.context_length})")
    if changed:
        raise DataError(f"init_from={folder} does not fit {', '.join(changed)}: leave that out, or begin without init_from")
    return with_context(model.params, config)


def with_context(params: Any, config: ModelConfig) -> Any:
    """The parameters for a shorter context: of a table of positions the first."""
    if config.positions != "learned":
        return params
    embedding = params["embedding"]
    table_TD = embedding["positions"]["embedding"][: config.context_length]
    return params | {"embedding": embedding | {"positions": {"embedding": table_TD}}}
