"""From a model to a Hugging Face folder: config.json, model.safetensors and the tokenizer's files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from minigpt_jax.config import ModelConfig
from minigpt_jax.errors import DataError
from minigpt_jax.files import replaced
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop.architectures import (
    ARCHITECTURES,
    NOT_STORED,
    Architecture,
    Tensor,
    check_placed,
    listed,
    parameter_shapes,
    stored_shapes,
    tensors,
)
from minigpt_jax.interop.hf_files import WEIGHTS, import_safetensors


def model_type_of(config: ModelConfig) -> str:
    """Raises DataError, naming the settings that are in the way, where a model is no special case of either."""

    def in_the_way(architecture: Architecture) -> list[str]:
        needs = dict(architecture.choices)
        if "num_kv_heads" in needs:
            needs["num_kv_heads"] = config.num_heads
        # Nothing says what a setting means there that no table names, so that only its default is let through.
        known = {*needs, *architecture.settings, *NOT_STORED}
        needs |= {field.name: field.default for field in dataclasses.fields(config) if field.name not in known}
        has = dataclasses.asdict(config) | {"num_kv_heads": config.kv_heads}
        return [f"{name}={has[name]} (not {value})" for name, value in needs.items() if has[name] != value]

    found = {name: in_the_way(architecture) for name, architecture in ARCHITECTURES.items()}
    nearest = min(found, key=lambda name: len(found[name]))
    if found[nearest]:
        reasons = "; ".join(f"{name}: {', '.join(settings)}" for name, settings in found.items())
        raise DataError(f"neither architecture of Hugging Face can express this model. In the way of {reasons}")
    return nearest


def write(model: LanguageModel, folder: Path) -> str:
    """Writes a model as a new folder, whole or not at all, and returns the architecture's name.

    Raises DataError where neither architecture can express all of it, or something is in the folder's place.
    """
    model_type = model_type_of(model.config)
    safetensors = import_safetensors()
    arrays = to_tensors(model, model_type)
    files = {name: json.dumps(values, indent=2) + "\n" for name, values in json_files(model, model_type).items()}
    files["tokenizer.json"] = model.tokenizer.to_huggingface()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder} is there already: choose another folder")
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replaced(folder.absolute()) as whole:
            whole.mkdir()
            for name, text in files.items():
                (whole / name).write_text(text, encoding="utf-8")
            safetensors.numpy.save_file(arrays, whole / WEIGHTS, metadata={"format": "pt"})
            (whole / WEIGHTS).chmod((whole / "config.json").stat().st_mode)  # the library lets nobody else read it
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error
    return model_type


def json_files(model: LanguageModel, model_type: str) -> dict[str, dict[str, Any]]:
    config, architecture = model.config, ARCHITECTURES[model_type]
    end_of_text = model.tokenizer.end_of_text
    # Where none are given transformers would take those of the original models, and stop at a letter.
    special = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    settings = {theirs: getattr(config, ours) for ours, theirs in architecture.settings.items()}
    values = {"architectures": [architecture.class_name], "model_type": model_type, "dtype": "float32"}
    values |= settings | architecture.fixed | special
    if model_type == "gpt2":
        values |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}  # where transformers' default is 0.1
    else:
        rope = {name: values.pop(name) for name in ("rope_theta", "rope_type", "partial_rotary_factor")}
        values |= {"mlp_bias": config.bias, "rope_parameters": rope}
    token = {"eos_token": end_of_text, "bos_token": end_of_text, "unk_token": model.tokenizer.unknown}
    names = {kind: model.tokenizer.to_bytes([i]).decode() for kind, i in token.items() if i is not None}
    return {
        "config.json": values,
        "generation_config.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.context_length,
            "clean_up_tokenization_spaces": False,
        } | names,
    }  # fmt: skip


def to_tensors(model: LanguageModel, model_type: str) -> dict[str, np.ndarray]:
    """All parameters under transformers' names and in its layout.

    Raises DataError unless the model has exactly the parameters of its settings, and the architecture a place for each.
    """
    shapes, stored = parameter_shapes(model.config), stored_shapes(model.config, model_type)
    places = tensors(model.config, model_type, stored)
    parameters = traverse_util.flatten_dict(model.params, sep="/")
    check_placed(set(parameters) - set(shapes), model_type)
    if missing := set(shapes) - set(parameters):
        raise DataError(f"the model lacks the parameters {listed(missing)}, which its settings call for")

    def part(path: str) -> np.ndarray:
        return np.asarray(parameters[path]) if path in shapes else np.zeros(stored[path], np.float32)

    def array(one: Tensor) -> np.ndarray:
        whole = np.concatenate([part(path) for path in one.parameters], axis=-1)
        # Contiguous, since safetensors 0.8 writes the memory of a transposed view as it lies there.
        return np.ascontiguousarray(whole.T if one.is_transposed else whole)

    return {name: array(one) for name, one in places.items()}
