"""Loads a LanguageModel from the folder of a run, or from one in Hugging Face's format."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from minigpt_jax.config import Config, ModelConfig, differences
from minigpt_jax.data import tokenizers
from minigpt_jax.data.templates import ChatTemplate
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.files import local_path
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.generation.masked_language_model import MaskedLanguageModel
from minigpt_jax.interop import hf_reader, peft
from minigpt_jax.interop.architectures import NOT_STORED, with_vocab_rows
from minigpt_jax.interop.hf_files import TOKENIZER_CONFIG, read_chat_template
from minigpt_jax.models import lora
from minigpt_jax.models.bert import BERT
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.runs import arrays, checkpoints
from minigpt_jax.runs.folder import read_config

LANGUAGE_MODELS = ("language_modelling", "chat")  # tasks that train a GPT
# Settings that may differ from those of the model that training starts from. The context may only become shorter.
MAY_DIFFER = (*NOT_STORED, "context_length")


def load(path: str | Path, sharding: jax.sharding.Sharding) -> LanguageModel:
    """Loads the language model of a run or of a Hugging Face folder (GPT-2 or Llama as safetensors, see hf_reader.py, or a
    LoRA adapter of one, see peft.py). Adapters are merged into their base model.

    From a run it loads the parameters with the lowest validation loss (their moving average, if the run has `ema`), with
    this sharding. Raises DataError if the folder is neither, has no checkpoint yet, or is corrupt.
    """
    path = local_path(path)
    if peft.is_adapter(path):
        return peft.read(path)
    if is_huggingface(path):
        return hf_reader.read(path)
    config = read_run_config(path)
    step = checkpoints.best_intact(path)
    return load_step(path, config, step, sharding)


def load_step(workdir: Path, config: Config, step: int, sharding: jax.sharding.Sharding) -> LanguageModel:
    """Loads the language model of a verified checkpoint. Raises DataError as `load` does."""
    require_language_model(workdir, config)
    tokenizer, params = tokenizer_and_params(workdir, config, step, GPT(config.model), sharding, load)
    template = read_run_template(workdir, checkpoints.read_info(workdir, step).sources, tokenizer)
    return LanguageModel(config.model, tokenizer, params, template=template)


def load_masked(path: str | Path, sharding: jax.sharding.Sharding) -> MaskedLanguageModel:
    """Loads the masked language model of a run, as `load` does."""
    workdir = local_path(path)
    config = read_run_config(workdir)
    if config.task != "masked_language_modelling":
        raise DataError(f"{workdir} is a run of the task {config.task}: choose a run of masked_language_modelling")
    step, model = checkpoints.best_intact(workdir), BERT(config.model)
    return MaskedLanguageModel(config.model, *tokenizer_and_params(workdir, config, step, model, sharding, load_masked))


def tokenizer_and_params(
    workdir: Path, config: Config, step: int, model: nn.Module, sharding: jax.sharding.Sharding, load_model: Callable
) -> tuple[Tokenizer, Any]:
    """The run's tokenizer, and the model's parameters from a verified checkpoint. `load_model` loads a LoRA run's base."""
    if config.fine_tuning.lora_rank:
        tokenizer, base, adapter = base_and_adapter(workdir, config, step, sharding, load_model)
        return tokenizer, lora.merge(base, adapter, config.fine_tuning.lora_scale)
    tokenizer = read_tokenizer(workdir, checkpoints.read_info(workdir, step).sources["tokenizer"])
    like = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    return tokenizer, checkpoints.restore_eval_params(workdir, step, config.training.ema > 0, like, sharding)


def base_and_adapter(
    workdir: Path, config: Config, step: int, sharding: jax.sharding.Sharding, load_model: Callable
) -> tuple[Tokenizer, Any, Any]:
    """The tokenizer, the base model's parameters and the adapter of a LoRA run's verified checkpoint."""
    sources, rank = checkpoints.read_info(workdir, step).sources, config.fine_tuning.lora_rank
    assert rank is not None
    tokenizer = read_tokenizer(workdir, sources["tokenizer"])
    params, _ = read_base(config, lambda: initial_params(config, tokenizer, sharding, load_model), sources["base"])
    layers = lora.target_layers(params, config.fine_tuning.lora_targets, rank)
    like = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, layers, rank))
    return tokenizer, params, checkpoints.restore_eval_params(workdir, step, config.training.ema > 0, like, sharding)


def load_best_adapter(workdir: Path, sharding: jax.sharding.Sharding) -> tuple[Config, LanguageModel, Any]:
    """The config, base model and adapter of a LoRA run, at its lowest validation loss. Raises DataError as `load` does."""
    config, step = read_run_config(workdir), checkpoints.best_intact(workdir)
    tokenizer, params, adapter = base_and_adapter(workdir, config, step, sharding, load)
    template = read_run_template(workdir, checkpoints.read_info(workdir, step).sources, tokenizer)
    return config, LanguageModel(config.model, tokenizer, params, template=template), adapter


def read_base(config: Config, read: Callable[[], Any], expected: str | None) -> tuple[Any, str]:
    """The parameters that a LoRA run adapts, as `read` returns them, and their SHA-256 sum. Raises DataError if they cannot
    be read, or if their sum is not the `expected` one, which the run's checkpoints record."""
    restore = "restore it, or set init_from in the run's config.json to where it is now"
    try:
        params = read()
    except DataError as error:
        if expected is None:
            raise
        raise DataError(f"the base model of this LoRA adapter cannot be used: {error}; {restore}") from error
    sha256 = arrays.sha256(params)
    if expected not in (None, sha256):
        raise DataError(
            f"init_from={config.training.init_from} is not the base model that this LoRA adapter was trained on, or it has "
            f"been trained further: {restore}"
        )
    return params, sha256


def read_tokenizer(workdir: Path, sha256: str) -> Tokenizer:
    """The tokenizer of a run. Raises DataError unless it has this SHA-256 sum, which the checkpoints record."""
    path = workdir / "tokenizer.json"
    try:
        tokenizer = tokenizers.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if tokenizer.sha256 != sha256:
        raise DataError(f"{path} is not the tokenizer that the run's checkpoints were trained with")
    return tokenizer


def read_template(path: str | Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of the model that `load` would load, if it has one. Raises DataError as it does."""
    path = local_path(path)
    path = peft.base_folder(path) if peft.is_adapter(path) else path
    if is_huggingface(path):
        return read_chat_template(path, tokenizer)
    return read_run_template(path, checkpoints.read_info(path, checkpoints.best_intact(path)).sources, tokenizer)


def read_run_template(workdir: Path, sources: Mapping[str, str], tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of a run, if its checkpoints' `sources` have one. Raises DataError if it is another one now."""
    if "template" not in sources:
        return None
    template = read_chat_template(workdir, tokenizer)
    if template is None or template.sha256 != sources["template"]:
        raise DataError(f"{workdir / TOKENIZER_CONFIG} is not the chat template that the run was trained with")
    return template


def is_huggingface(path: Path) -> bool:
    """Whether hf_reader.py is to read the path, or to refuse it."""
    return os.path.isfile(path) or hf_reader.is_huggingface(path)  # a file may hold weights


def check_not_huggingface(workdir: Path) -> None:
    """Raises DataError if a folder is a Hugging Face model and not a run."""
    if hf_reader.is_huggingface(workdir):
        raise DataError(
            f"{workdir} is a Hugging Face model, not a run: start one in another folder, with --init_from {workdir}"
        )


def read_run_config(workdir: Path) -> Config:
    """The config of a run. Raises DataError if there is none."""
    check_not_huggingface(workdir)
    return read_config(workdir)


def require_language_model(workdir: Path, config: Config) -> None:
    """Raises DataError if a run's task trains another kind of model."""
    if config.task not in LANGUAGE_MODELS:
        raise DataError(
            f"{workdir} is a run of the task {config.task}, which does not train a language model: choose a run of "
            f"{' or '.join(LANGUAGE_MODELS)}, or a Hugging Face GPT-2 or Llama"
        )


def read_model_config(path: Path) -> ModelConfig:
    """The config of the model that `load` would load. Raises DataError as it does."""
    path = peft.base_folder(path) if peft.is_adapter(path) else path
    if is_huggingface(path):
        return hf_reader.read_model_config(path)
    return read_run_config(path).model


def settings_from(path: str) -> dict[str, Any]:
    """The settings, for `Config.override`, of a run that starts from the weights in this folder. Raises DataError if it does
    not hold a model of text."""
    folder = local_path(path)
    model = dataclasses.asdict(read_model_config(folder))
    needed = {name: value for name, value in model.items() if name not in MAY_DIFFER}
    source = peft.base_folder(folder) if peft.is_adapter(folder) else folder
    if not is_huggingface(source) and "tokenizer" not in (config := read_run_config(source)).settings:
        raise DataError(
            f"{folder} is a run of the task {config.task}, which has no tokenizer: init_from takes a run on text, or a "
            "Hugging Face GPT-2 or Llama"
        )
    tokenizer = os.path.join(source, "")  # ends in a slash: a path, even if the folder is called `char`
    return needed | {"context_length": model["context_length"], "tokenizer": tokenizer, "init_from": str(folder)}


def override(config: Config, given: Mapping[str, Any]) -> Config:
    """The config with these settings and, if it starts from a model, with those that the model needs."""
    if init_from := given.get("init_from", config.training.init_from):
        config = config.override(init_from=init_from).override(settings_from(init_from))
    return config.override(given)


def initial_params(
    config: Config, tokenizer: Tokenizer, sharding: jax.sharding.Sharding, load_model: Callable[..., Any] = load
) -> Any:
    """The parameters that training starts from if `init_from` is set, else None. `load_model` loads a model of the task.

    Raises DataError if they do not fit the config's model or this tokenizer.
    """
    path = config.training.init_from
    if path is None:
        return None
    model = load_model(path, sharding)
    changes = differences(config, dataclasses.replace(config, model=model.config)).items()
    changed = [f"{name}={new} (the model has {old})" for name, (new, old) in changes if name not in MAY_DIFFER]
    if model.tokenizer.sha256 != tokenizer.sha256:
        changed.append("a different tokenizer")
    if config.model.context_length > model.config.context_length:
        changed.append(f"context_length={config.model.context_length} (at most {model.config.context_length})")
    same_rows = config.model.num_embeddings == model.config.num_embeddings
    if not same_rows and load_model is not load:  # special tokens follow the padding
        changed.append(f"vocab_multiple={config.model.vocab_multiple} (the model has {model.config.vocab_multiple})")
    if changed:
        raise DataError(f"init_from={path} does not fit {', '.join(changed)}: drop these settings, or init_from")
    params = with_context(model.params, config.model)
    return params if same_rows else with_vocab_rows(params, config.model.num_embeddings)


def with_context(params: Any, config: ModelConfig) -> Any:
    """The parameters for a shorter context: the first rows of a position table."""
    if config.positions != "learned":
        return params
    embedding = params["embedding"]
    table_TD = embedding["positions"]["embedding"][: config.context_length]
    return params | {"embedding": embedding | {"positions": {"embedding": table_TD}}}
