"""Reads a Hugging Face folder: config.json becomes a ModelConfig, the folder a LanguageModel.

All tensors are checked against config.json before memory is allocated: a folder is untrusted input.
"""

import dataclasses
import glob
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from minigpt_jax.config import ModelConfig
from minigpt_jax.data import tokenizers
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError, UsageError, shortened
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop.architectures import (
    ARCHITECTURES,
    ENCODERS,
    HEAD,
    NOT_STORED,
    SAME_ACTIVATION,
    Architecture,
    Tensor,
    architecture_of,
    parameter_shapes,
    stored_shapes,
    tensors,
    with_vocab_rows,
)
from minigpt_jax.interop.hf_files import PICKLES, open_tensors, pickle_refusal, read_chat_template, read_json

log = logging.getLogger(__name__)

STORED_TYPES = ("F32", "F16", "BF16")  # each converts to float32 exactly
PADDING_MULTIPLE, MOST_PADDING = 8, 1024  # a larger difference is the tokenizer of another model
LONGEST_CONTEXT = 2**20  # limits the cache: config.json is untrusted


def is_huggingface(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face model rather than a run."""
    has_weights = bool(glob.glob(f"{glob.escape(str(folder))}/*.safetensors"))
    try:
        values = read_json(folder / "config.json")
    except (OSError, DataError):
        return has_weights
    return "training" not in values and (has_weights or "model_type" in values)


def read_config(folder: Path, allowed: Mapping[str, Architecture] = ARCHITECTURES) -> tuple[ModelConfig, str]:
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
    if not isinstance(model_type, str) or model_type not in allowed:
        raise DataError(f"{path}: model_type={model_type!r} is not supported; allowed: {', '.join(allowed)}")
    architecture = allowed[model_type]
    values = architecture.fixed | architecture.defaults | given
    for name in ("rope_parameters", "rope_scaling"):  # newer and older name; transformers prefers the older
        rope = given.get(name) or {}
        if not isinstance(rope, dict):
            raise DataError(f"{path}: {name}={rope!r} must be an object")
        rope = ({"rope_type": rope["type"]} if "type" in rope else {}) | rope
        values |= {name: value for name, value in rope.items() if name in architecture.fixed}
    fixed, values = architecture.fixed, {name: plain_name(value) for name, value in values.items()}
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
    check_vocabulary(folder, config, tokenizer)
    end_tokens = read_end_tokens(folder, tokenizer.vocab_size, config.known_vocab_size)
    parameters = read_parameters(folder, config, model_type)
    for path in set(parameters) - set(parameter_shapes(config)):
        if parameters.pop(path).any():
            raise DataError(f"{folder}: config.json says bias=false, but {path} is not zero")
    config, params = without_padding(config, tokenizer.vocab_size, traverse_util.unflatten_dict(parameters, sep="/"))
    template = read_chat_template(folder, tokenizer)
    return LanguageModel(config, tokenizer, params, end_tokens=end_tokens, template=template)


def read_encoder(folder: Path) -> tuple[ModelConfig, Any]:
    """Config and float32 parameters of the `models.bert.Encoder` in a folder. Raises DataError as `read` does.

    The tokenizers of these models change text, so they are not read: use the library `tokenizers`.
    """
    config, model_type = read_config(folder, ENCODERS)
    return config, traverse_util.unflatten_dict(read_parameters(folder, config, model_type), sep="/")


def read_parameters(folder: Path, config: ModelConfig, model_type: str) -> dict[str, jax.Array]:
    """All parameters by path, from tensors that have been checked."""
    with open_tensors(folder) as stored:
        parameters = {}
        for name, tensor in check_tensors(folder, config, model_type, stored).items():
            array = np.asarray(stored[name].get_tensor(name), np.float32)
            parts = np.split(array.T if tensor.is_transposed else array, len(tensor.parameters), axis=-1)
            parameters |= {path: jnp.array(part) for path, part in zip(tensor.parameters, parts, strict=True)}
    return parameters


def read_end_tokens(folder: Path, num_tokens: int, num_ids: int) -> tuple[int, ...]:
    """The end tokens that generation_config.json and config.json name: a number, a list or none in each.

    Ids that the model lacks are left out: they cannot be sampled, and small models often keep GPT-2's 50256. Raises
    DataError for an id that only the tokenizer lacks, without which texts would not end, and for anything else.
    """
    ends = []
    for path in (folder / "generation_config.json", folder / "config.json"):
        try:
            value = read_json(path).get("eos_token_id")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        several = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in several):
            raise DataError(f"{path}: eos_token_id={shortened(value)} must be a token id or a list of them")
        if lost := [token for token in several if num_tokens <= token < num_ids]:
            raise DataError(f"{path}: eos_token_id={lost[0]} is not among the {num_tokens} tokens of the tokenizer's files")
        ends += several
    return tuple(dict.fromkeys(token for token in ends if 0 <= token < num_tokens))


def plain_name(value: Any) -> Any:
    """The table's name for a name of an activation."""
    return SAME_ACTIVATION.get(value, value) if isinstance(value, str) else value


def check_vocabulary(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises DataError unless the model has as many ids as the tokenizer, or is padded: see `without_padding`."""
    if config.vocab_size is None:
        raise DataError(f"{folder}: config.json has no vocab_size")
    V, size = config.vocab_size, tokenizer.vocab_size
    if size > V:
        reason = f"so the token {shortened(tokenizer.decode([V]))} has no embedding"
    elif size < V and (V % PADDING_MULTIPLE or V - size > MOST_PADDING):
        reason = f"which is not padding: that is up to {MOST_PADDING} more, to a multiple of {PADDING_MULTIPLE}"
    else:
        return
    raise DataError(f"{folder}: the tokenizer has {size} tokens, but the model {V}, {reason}")


def without_padding(config: ModelConfig, vocab_size: int, params: Any) -> tuple[ModelConfig, Any]:
    """The model without the ids that its tokenizer lacks, which are therefore never sampled.

    Vocabularies are often padded to a multiple of 64 or 128, for speed. The padding is never trained as a target.
    """
    if vocab_size == config.vocab_size:
        return config, params
    log.info("Leaving out %d ids that the tokenizer lacks: padding.", config.known_vocab_size - vocab_size)
    return dataclasses.replace(config, vocab_size=vocab_size), with_vocab_rows(params, vocab_size)


def read_model_config(folder: Path) -> ModelConfig:
    """The config of the model that `read` would return. Raises DataError as it does."""
    config, tokenizer = read_config(folder)[0], tokenizers.read_tokenizer(str(folder))
    check_vocabulary(folder, config, tokenizer)
    return dataclasses.replace(config, vocab_size=tokenizer.vocab_size)


def check_tensors(folder: Path, config: ModelConfig, model_type: str, stored: dict[str, Any]) -> dict[str, Tensor]:
    """The stored tensors by name. Raises DataError unless their names, shapes and dtypes are those config.json implies."""
    prefix, ignored = architecture_of(model_type).prefix, architecture_of(model_type).ignored
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
