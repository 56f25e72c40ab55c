"""Reads a Hugging Face folder: config.json becomes a ModelConfig, the folder a LanguageModel.

All tensors are checked against config.json before memory is allocated: a folder is untrusted input.
"""

import dataclasses
import glob
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from minigpt_jax.config import ModelConfig
from minigpt_jax.data import tokenizers
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop.architectures import (
    ARCHITECTURES,
    HEAD,
    NOT_STORED,
    Tensor,
    parameter_shapes,
    stored_shapes,
    tensors,
)
from minigpt_jax.interop.hf_files import PICKLES, open_tensors, pickle_refusal, read_json

STORED_TYPES = ("F32", "F16", "BF16")  # each converts to float32 exactly
LONGEST_CONTEXT = 2**20  # limits the cache: config.json is untrusted


def is_huggingface(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face model rather than a run."""
    has_weights = bool(glob.glob(f"{glob.escape(str(folder))}/*.safetensors"))
    try:
        values = read_json(folder / "config.json")
    except (OSError, DataError):
        return has_weights
    return "training" not in values and (has_weights or "model_type" in values)


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """The model that a folder's config.json describes, and its architecture. Raises DataError if it is not supported."""
    if os.path.isfile(folder):
        reason = pickle_refusal(folder.name) if folder.suffix in PICKLES else "pass the folder with config.json and weights"
        raise DataError(f"{folder} is a file: {reason}")
    path = folder / "config.json"
    try:
        given = read_json(path)
    except OSError as error:
        raise DataError(f"{folder} has no readable config.json: {error.strerror}") from None
    model_type = given.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise DataError(f"{path}: model_type={model_type!r} is not supported; allowed: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    values = architecture.fixed | architecture.defaults | given
    for name in ("rope_parameters", "rope_scaling"):  # newer and older name; transformers prefers the older
        rope = given.get(name) or {}
        if not isinstance(rope, dict):
            raise DataError(f"{path}: {name}={rope!r} must be an object")
        rope = ({"rope_type": rope["type"]} if "type" in rope else {}) | rope
        values |= {name: value for name, value in rope.items() if name in architecture.fixed}
    fixed = architecture.fixed
    wrong = [f"{name}={values[name]!r} (must be {value!r})" for name, value in fixed.items() if values[name] != value]
    if model_type == "llama" and values["attention_bias"] != values["mlp_bias"]:
        wrong.append(f"attention_bias={values['attention_bias']!r} with mlp_bias={values['mlp_bias']!r} (must be equal)")
    if wrong:
        raise DataError(f"{path}: unsupported {model_type} settings: {', '.join(wrong)}")
    settings = {ours: values[theirs] for ours, theirs in architecture.settings.items()}
    if model_type == "gpt2" and settings["ff_dim"] is None and isinstance(settings["embed_dim"], int):
        settings["ff_dim"] = 4 * settings["embed_dim"]
    try:
        config = ModelConfig(**NOT_STORED | architecture.choices | settings)
    except UsageError as error:
        raise DataError(f"{path}: {error}") from None
    if config.num_kv_heads == config.num_heads:
        config = dataclasses.replace(config, num_kv_heads=None)
    if values.get("head_dim") not in (None, config.head_size):
        raise DataError(
            f"{path}: head_dim={values['head_dim']!r} must be hidden_size/num_attention_heads={config.head_size}"
        )
    if config.context_length > LONGEST_CONTEXT:
        raise DataError(f"{path}: a context of {config.context_length} tokens is too long; allowed: up to {LONGEST_CONTEXT}")
    return config, model_type


def read(folder: Path) -> LanguageModel:
    """The model in a folder, with float32 parameters and the folder's tokenizer.

    Names, shapes and dtypes of all tensors are compared with config.json before any memory is allocated. Raises DataError
    if anything does not match, or is corrupt, missing, unexpected or pickled.
    """
    config, model_type = read_config(folder)
    tokenizer = tokenizers.read_tokenizer(str(folder))
    if tokenizer.vocab_size != config.vocab_size:
        raise DataError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the model {config.vocab_size}")
    with open_tensors(folder) as stored:
        parameters = {}
        for name, tensor in check_tensors(folder, config, model_type, stored).items():
            array = np.asarray(stored[name].get_tensor(name), np.float32)
            parts = np.split(array.T if tensor.is_transposed else array, len(tensor.parameters), axis=-1)
            parameters |= {path: jnp.array(part) for path, part in zip(tensor.parameters, parts, strict=True)}
    for path in set(parameters) - set(parameter_shapes(config)):
        if parameters.pop(path).any():
            raise DataError(f"{folder}: config.json says bias=false, but {path} is not zero")
    return LanguageModel(config, tokenizer, traverse_util.unflatten_dict(parameters, sep="/"))


def check_tensors(folder: Path, config: ModelConfig, model_type: str, stored: dict[str, Any]) -> dict[str, Tensor]:
    """The stored tensors by name. Raises DataError unless their names, shapes and dtypes are those config.json implies."""
    prefix, ignored = ARCHITECTURES[model_type].prefix, ARCHITECTURES[model_type].ignored
    if config.num_layers > len(stored):  # before building the shapes of an absurdly deep model
        raise DataError(f"{folder}: config.json says {config.num_layers} layers, but there are only {len(stored)} tensors")
    shapes = stored_shapes(config, model_type)
    expected = tensors(config, model_type, shapes)
    if not any(name.startswith(prefix) for name in stored):
        expected = {name.removeprefix(prefix): tensor for name, tensor in expected.items()}

    unexpected = {name for name in stored if not re.fullmatch(f"({re.escape(prefix)})?({ignored})", name)} - set(expected)
    if config.tie_embeddings:
        unexpected.discard(HEAD.name)  # a copy of the token embedding, which transformers also ignores
    for problem, names in (("missing", set(expected) - set(stored)), ("unexpected", unexpected)):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DataError(f"{folder}: {problem} tensor {min(names)!r}{others}, according to config.json")
    for name, tensor in expected.items():
        view = stored[name].get_slice(name)
        stored_shape, shape = tuple(view.get_shape()), tensor.shape(shapes)
        if stored_shape != shape:
            raise DataError(f"{folder}: {name} has shape {stored_shape}, but config.json implies {shape}")
        if view.get_dtype() not in STORED_TYPES:
            raise DataError(f"{folder}: {name} is stored as {view.get_dtype()}; allowed: {', '.join(STORED_TYPES)}")
    return expected
