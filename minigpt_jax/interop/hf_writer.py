"""Writes a model as a Hugging Face folder: config.json, model.safetensors and the tokenizer files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from minigpt_jax.config import ModelConfig
from minigpt_jax.errors import DataError
from minigpt_jax.files import atomic_path
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop.architectures import (
    ARCHITECTURES,
    NOT_STORED,
    Architecture,
    Tensor,
    abbreviated,
    check_no_unmapped,
    parameter_shapes,
    stored_shapes,
    tensors,
    with_vocab_rows,
)
from minigpt_jax.interop.hf_files import TOKENIZER_CONFIG, WEIGHTS, import_safetensors


def model_type_of(config: ModelConfig) -> str:
    """The architecture that can express a model. Raises DataError, naming the unsupported settings, if there is none."""

    def unsupported(architecture: Architecture) -> list[str]:
        needs = dict(architecture.choices)
        if "num_kv_heads" in needs:
            needs["num_kv_heads"] = config.num_heads
        # Only defaults are allowed for settings in no table, since nothing defines them in this architecture.
        known = {*needs, *architecture.settings, *NOT_STORED}
        needs |= {field.name: field.default for field in dataclasses.fields(config) if field.name not in known}
        has = dataclasses.asdict(config) | {"num_kv_heads": config.kv_heads}
        return [f"{name}={has[name]} (must be {value})" for name, value in needs.items() if has[name] != value]

    problems = {name: unsupported(architecture) for name, architecture in ARCHITECTURES.items()}
    closest = min(problems, key=lambda name: len(problems[name]))
    if problems[closest]:
        reasons = "; ".join(f"{name} does not support {', '.join(settings)}" for name, settings in problems.items())
        raise DataError(f"no supported Hugging Face architecture can express this model: {reasons}")
    return closest


def write(model: LanguageModel, folder: Path) -> str:
    """Writes a model as a new folder, atomically, and returns the architecture's name.

    Raises DataError if no architecture can express the whole model, or if `folder` exists and is not an empty folder.
    """
    model_type = model_type_of(model.config)
    write_folder(folder, contents(model, model_type))
    return model_type


def contents(model: LanguageModel, model_type: str) -> dict[str, Any]:
    """A model's files by name: the JSON values or text of each, or arrays."""
    texts = {"tokenizer.json": model.tokenizer.to_huggingface()}
    return json_files(model, model_type) | texts | {WEIGHTS: to_tensors(model, model_type)}


def write_folder(folder: Path, contents: dict[str, Any]) -> None:
    """Writes a new folder with these files, atomically. Raises DataError if `folder` exists and is not an empty folder."""
    safetensors = import_safetensors()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder} already exists: choose another folder")
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder.absolute()) as temp:
            temp.mkdir()
            for name, content in contents.items():
                path = temp / name
                path.parent.mkdir(exist_ok=True)
                path.touch()
                if path.suffix == ".safetensors":
                    mode = path.stat().st_mode
                    safetensors.numpy.save_file(content, path, metadata={"format": "pt"})
                    path.chmod(mode)  # safetensors lets only the owner read it
                else:
                    text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
                    path.write_text(text, encoding="utf-8")
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error


def json_files(model: LanguageModel, model_type: str) -> dict[str, dict[str, Any]]:
    config, architecture = model.config, ARCHITECTURES[model_type]
    end_of_text = model.tokenizer.end_of_text
    # Without these, transformers would use the ids of the original models and stop at an ordinary token.
    after_answers = () if model.template is None else model.template.end_tokens
    ends = list(dict.fromkeys((*model.all_end_tokens, *after_answers)))
    eos = ends if len(ends) > 1 else ends[0] if ends else None
    special = {"bos_token_id": end_of_text, "eos_token_id": eos, "pad_token_id": end_of_text}
    settings = {theirs: getattr(config, ours) for ours, theirs in architecture.settings.items()}
    values = {"architectures": [architecture.class_name], "model_type": model_type, "dtype": "float32"}
    values |= settings | architecture.fixed | special
    if model_type == "gpt2":
        values |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}  # transformers defaults to 0.1
    else:
        rope = {name: values.pop(name) for name in ("rope_theta", "rope_type", "partial_rotary_factor")}
        values |= {"mlp_bias": config.bias, "rope_parameters": rope}
    token = {"eos_token": end_of_text, "bos_token": end_of_text, "unk_token": model.tokenizer.unknown}
    names = {kind: model.tokenizer.to_bytes([i]).decode() for kind, i in token.items() if i is not None}
    return {
        "config.json": values,
        "generation_config.json": special,
        TOKENIZER_CONFIG: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.context_length,
            "clean_up_tokenization_spaces": False,
        } | names | ({} if model.template is None else model.template.to_json()),
    }  # fmt: skip


def to_tensors(model: LanguageModel, model_type: str) -> dict[str, np.ndarray]:
    """All parameters in transformers' naming and layout, without the padding of the vocabulary.

    Raises DataError unless the model has exactly the parameters of its settings, and the architecture a tensor for each.
    """
    config = dataclasses.replace(model.config, vocab_multiple=1)
    shapes, stored = parameter_shapes(config), stored_shapes(config, model_type)
    by_name = tensors(config, model_type, stored)
    parameters: dict[str, Any] = traverse_util.flatten_dict(model.params, sep="/")
    check_no_unmapped(set(parameters) - set(shapes), model_type)
    if missing := set(shapes) - set(parameters):
        raise DataError(f"the model lacks the parameters {abbreviated(missing)}, which its settings require")
    parameters = traverse_util.flatten_dict(with_vocab_rows(model.params, config.known_vocab_size), sep="/")

    def part(path: str) -> np.ndarray:
        return np.asarray(parameters[path]) if path in shapes else np.zeros(stored[path], np.float32)

    def array(tensor: Tensor) -> np.ndarray:
        values = np.concatenate([part(path) for path in tensor.parameters], axis=-1)
        # Contiguous, since safetensors 0.8 ignores the strides of a transposed view.
        return np.ascontiguousarray(values.T if tensor.is_transposed else values)

    return {name: array(tensor) for name, tensor in by_name.items()}
