"""From a folder to a LanguageModel: that of a run, or one in the format of Hugging Face."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from minigpt_jax.config import Config, DataConfig, ModelConfig, differences
from minigpt_jax.data import tokenizers
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop import hf_reader
from minigpt_jax.interop.architectures import NOT_STORED
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.runs import arrays, checkpoints
from minigpt_jax.runs.folder import read_config

# What may be another than in the model from which training begins. The context may only become shorter.
FREE = (*NOT_STORED, "context_length")


def load(path: str | Path, sharding: jax.sharding.Sharding) -> LanguageModel:
    """The language model of a run or, as safetensors, of Hugging Face: GPT-2 or Llama, see hf_reader.py.

    Of a run it has the parameters with the lowest validation loss and, with `ema`, the average of the parameters; they are
    placed as `sharding` says. Raises DataError where the folder holds neither, no checkpoint yet, or what is damaged.
    """
    path = Path(path)
    if is_foreign(path):
        return hf_reader.read(path)
    config = read_run_config(path)
    step = checkpoints.first_whole(path, checkpoints.best_first(path))
    return load_step(path, config, step, sharding)


def load_step(workdir: Path, config: Config, step: int, sharding: jax.sharding.Sharding) -> LanguageModel:
    """The language model of a checkpoint that was verified. Raises DataError as `load` does."""
    if not isinstance(config.data, DataConfig):
        raise DataError(f"{workdir} holds a run of the task {config.task}, which is not a language model")
    tokenizer = read_tokenizer(workdir, checkpoints.read_info(workdir, step).sources["tokenizer"])
    model = GPT(config.model)
    like = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    saved = checkpoints.folder_of(workdir, step) / ("average" if config.training.ema else "params")
    return LanguageModel(config.model, tokenizer, arrays.restore(saved, like, sharding))


def read_tokenizer(workdir: Path, sha256: str) -> Tokenizer:
    """The tokenizer of a run. Raises DataError where it is not the one with this sum, which its checkpoints name."""
    path = workdir / "tokenizer.json"
    try:
        tokenizer = tokenizers.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if tokenizer.sha256 != sha256:
        raise DataError(f"{path} is not the tokenizer that the checkpoints of the run were trained with")
    return tokenizer


def is_foreign(path: Path) -> bool:
    """Whether it is for hf_reader.py to read, or to refuse."""
    return os.path.isfile(path) or hf_reader.is_one(path)  # a file of weights, perhaps


def check_not_foreign(workdir: Path) -> None:
    """Raises DataError where a folder is no run's but a model of Hugging Face."""
    if hf_reader.is_one(workdir):
        raise DataError(
            f"{workdir} is a model of Hugging Face and not a run: begin one in another folder, with --init_from {workdir}"
        )


def read_run_config(workdir: Path) -> Config:
    """The config of a run. Raises DataError where there is none."""
    check_not_foreign(workdir)
    return read_config(workdir)


def read_model_config(path: Path) -> ModelConfig:
    """The architecture of what `load` would load. Raises DataError as it does."""
    return hf_reader.read_config(path)[0] if is_foreign(path) else read_run_config(path).model


def settings_from(path: str) -> dict[str, Any]:
    """The settings that a run needs in order to begin with the weights of this folder, for `Config.override`."""
    model = dataclasses.asdict(read_model_config(Path(path)))
    needed = {name: value for name, value in model.items() if name not in FREE}
    tokenizer = os.path.join(path, "")  # a path, even where the folder is called `char`
    return needed | {"context_length": model["context_length"], "tokenizer": tokenizer, "init_from": path}


def initial_params(config: Config, tokenizer: Tokenizer, sharding: jax.sharding.Sharding) -> Any:
    """The parameters that `init_from` names; None where it names none.

    Raises DataError where they are not those of the config's model and of this tokenizer.
    """
    path = config.training.init_from
    if path is None:
        return None
    model = load(path, sharding)
    there = dataclasses.replace(config, model=model.config)
    changes = differences(config, there).items()
    changed = [f"{name}={here} (there {was})" for name, (here, was) in changes if name not in FREE]
    if model.tokenizer.sha256 != tokenizer.sha256:
        changed.append("another tokenizer")
    if config.model.context_length > model.config.context_length:
        changed.append(f"context_length={config.model.context_length} (there at most {model.config.context_length})")
    if changed:
        raise DataError(f"init_from={path} does not fit {', '.join(changed)}: leave that out, or begin without init_from")
    return with_context(model.params, config.model)


def with_context(params: Any, config: ModelConfig) -> Any:
    """The parameters for a shorter context: of a table of positions the first."""
    if config.positions != "learned":
        return params
    embedding = params["embedding"]
    table_TD = embedding["positions"]["embedding"][: config.context_length]
    return params | {"embedding": embedding | {"positions": {"embedding": table_TD}}}
