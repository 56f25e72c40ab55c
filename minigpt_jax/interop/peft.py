"""LoRA adapters as the files of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

For a linear layer NAME of the base model, PEFT stores base_model.model.NAME.lora_A.weight of shape (R, inputs) and
base_model.model.NAME.lora_B.weight of shape (outputs, R), and adds lora_alpha/R · B A to the layer's weight. One layer of a
GPT-2 holds our queries, keys and values: their adapters become one of a higher rank, with all A below each other and the B
as the blocks of a diagonal. Its lora_alpha is higher by the same factor.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from minigpt_jax.config import FineTuningConfig, ModelConfig
from minigpt_jax.errors import DataError, shortened
from minigpt_jax.files import local_path
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop import hf_reader, hf_writer
from minigpt_jax.interop.architectures import Tensor, abbreviated, stored_shapes, tensors
from minigpt_jax.interop.hf_files import ADAPTER, ADAPTER_CONFIG, open_tensors, pickle_refusal, read_json
from minigpt_jax.models.patterns import by_path

BASE = "base"  # subfolder of an exported adapter for its base model, unless that has a Hugging Face folder already
NAME = "base_model.model.{}.lora_{}.weight"

# Settings that do not change what the adapter computes: which layers it has follows from the tensors.
IGNORED = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip
READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
INITIAL = (True, "gaussian", "orthogonal", "eva")  # other initial values also change the base model


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def linear_layers(config: ModelConfig, model_type: str) -> dict[str, Tensor]:
    """The weights of the dense layers by PEFT's name of the layer."""
    by_name = tensors(config, model_type, stored_shapes(config, model_type))
    kernels = {name: tensor for name, tensor in by_name.items() if tensor.parameters[0].endswith("/kernel")}
    return {name.removesuffix(".weight"): tensor for name, tensor in kernels.items()}


# ---- Writing --------------------------------------------------------------------------------------------------------------


def write(base: LanguageModel, adapter: Any, settings: FineTuningConfig, init_from: str, folder: Path) -> str:
    """Writes an adapter as a new folder, atomically, and returns the folder of the base model that it names. That is
    `init_from`, if transformers can load it and has the same layers there, or else a subfolder, which is written too.

    Raises DataError as `hf_writer.write` does.
    """
    model_type = hf_writer.model_type_of(base.config)
    config = dataclasses.replace(base.config, vocab_multiple=1)  # as it is stored, without padding
    arrays, ranks = to_tensors(config, model_type, adapter)
    source = local_path(init_from)
    is_usable = hf_reader.is_huggingface(source) and not is_adapter(source)
    is_usable = is_usable and hf_reader.read_config(source)[0].vocab_size == config.vocab_size
    base_path = (source if is_usable else folder / BASE).resolve()
    values = json_values(settings, model_type, ranks, list(linear_layers(config, model_type)))
    files = {ADAPTER_CONFIG: values | {"base_model_name_or_path": str(base_path)}, ADAPTER: arrays}
    if not is_usable:
        files |= {f"{BASE}/{name}": content for name, content in hf_writer.contents(base, model_type).items()}
    hf_writer.write_folder(folder, files)
    return str(base_path)


def to_tensors(config: ModelConfig, model_type: str, adapter: Any) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The adapter in PEFT's naming and layout, and the rank in each layer."""
    factors, shapes = by_path(adapter), stored_shapes(config, model_type)
    arrays, ranks = {}, {}
    for name, tensor in linear_layers(config, model_type).items():
        widths = {path.removesuffix("/kernel"): shapes[path][-1] for path in tensor.parameters}
        adapted = [layer for layer in widths if f"{layer}/lora_A" in factors]
        if not adapted:
            continue
        a_RD = np.concatenate([np.asarray(factors[f"{layer}/lora_A"]).T for layer in adapted])
        b_FR = np.zeros((sum(widths.values()), len(a_RD)), np.float32)
        row, rank = 0, len(a_RD) // len(adapted)
        for layer, width in widths.items():
            if layer in adapted:
                column = adapted.index(layer) * rank
                block = np.asarray(factors[f"{layer}/lora_B"]).T[:width]  # without padding
                b_FR[row : row + width, column : column + rank] = block
            row += width
        arrays |= {NAME.format(name, "A"): np.ascontiguousarray(a_RD), NAME.format(name, "B"): b_FR}
        ranks[name] = len(a_RD)
    return arrays, ranks


def json_values(settings: FineTuningConfig, model_type: str, ranks: dict[str, int], names: list[str]) -> dict[str, Any]:
    """The contents of adapter_config.json, without the base model. `names` are all of the model's dense layers."""
    short = {name: re.sub(r".*\.\d+\.", "", name) for name in names}  # self_attn.q_proj, in every layer
    in_layers = {name: {ranks.get(other) for other in names if short[other] == short[name]} for name in names}
    if all(len(different) == 1 for different in in_layers.values()):
        ranks = {short[name]: rank for name, rank in ranks.items()}
    assert settings.lora_rank is not None
    factors = {name: rank // settings.lora_rank for name, rank in ranks.items() if rank != settings.lora_rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": list(ranks),
        "rank_pattern": {name: factor * settings.lora_rank for name, factor in factors.items()},
        "alpha_pattern": {name: factor * settings.lora_alpha for name, factor in factors.items()},
        "fan_in_fan_out": model_type == "gpt2",  # its layers store (inputs, outputs)
        "bias": "none",
    }


# ---- Reading --------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> LanguageModel:
    """The base model of an adapter, with the adapter merged into it.

    Raises DataError if the base model is not a folder here, or is another model; and if anything else does not match, or is
    corrupt, missing, unexpected or pickled.
    """
    settings, base = read_settings(folder), base_folder(folder)
    stored_config, model_type = hf_reader.read_config(base)
    model = hf_reader.read(base)
    if not (folder / ADAPTER).is_file():
        pickles = sorted(folder.glob("adapter_model.bin"))
        raise DataError(f"{folder} has no {ADAPTER}{': ' + pickle_refusal(pickles[0].name) if pickles else ''}")
    layers, parameters = linear_layers(stored_config, model_type), by_path(model.params)
    with open_tensors(folder, {ADAPTER: None}) as stored:
        check_tensors(folder, base, stored_config, model_type, stored)
        for name, tensor in layers.items():
            if NAME.format(name, "A") not in stored:
                continue
            a_RD, b_FR = (np.asarray(stored[key].get_tensor(key), np.float32) for key in names_of(name))
            change_DF = scale_of(settings, name, len(a_RD)) * (b_FR @ a_RD).T
            for path, part_DF in zip(tensor.parameters, np.split(change_DF, len(tensor.parameters), axis=-1), strict=True):
                kernel_DF = parameters[path]
                parameters[path] = kernel_DF + jnp.asarray(part_DF[:, : kernel_DF.shape[-1]])  # without padded ids
    return dataclasses.replace(model, params=traverse_util.unflatten_dict(parameters, sep="/"))


def names_of(layer: str) -> list[str]:
    return [NAME.format(layer, factor) for factor in "AB"]


def read_settings(folder: Path) -> dict[str, Any]:
    """The values of adapter_config.json. Raises DataError for a setting that is not supported."""
    path = folder / ADAPTER_CONFIG
    try:
        values = read_json(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if values.get("peft_type") != "LORA":
        raise DataError(f"{path}: peft_type={shortened(values.get('peft_type'))} must be 'LORA'")
    neutral = {"init_lora_weights": INITIAL, "bias": ("none",)}
    unsupported = [
        f"{name}={shortened(value)}"
        for name, value in values.items()
        if name not in READ | IGNORED and value and value not in neutral.get(name, ())
    ]
    if unsupported:
        raise DataError(f"{path}: only plain LoRA is supported, not {', '.join(unsupported)}")
    return values


def scale_of(settings: dict[str, Any], layer: str, rank: int) -> float:
    """The factor of B A in a layer. A key of alpha_pattern is a regular expression for the end of the layer's name."""
    try:
        patterns = settings.get("alpha_pattern") or {}
        alphas = [alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer)]
        alpha = float([*alphas, settings["lora_alpha"]][0])
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise DataError(f"{ADAPTER_CONFIG}: lora_alpha or alpha_pattern is invalid: {error}") from None
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def base_folder(folder: Path) -> Path:
    """The folder of an adapter's base model. Raises DataError if there is no such folder here."""
    name = read_settings(folder).get("base_model_name_or_path")
    if isinstance(name, str) and name:
        for path in (local_path(name), folder / BASE):  # an exported folder may have moved
            if path.is_dir():
                return path
    raise DataError(
        f"{folder / ADAPTER_CONFIG}: the base model, base_model_name_or_path={shortened(name)}, is not a folder here: "
        "set it to where that model is"
    )


def check_tensors(folder: Path, base: Path, config: ModelConfig, model_type: str, stored: dict[str, Any]) -> None:
    """Raises DataError unless each tensor belongs to a layer of the base model and has its size."""
    layers, shapes = linear_layers(config, model_type), stored_shapes(config, model_type)
    sizes = {config.kv_heads * config.head_size: "num_kv_heads · head size", config.known_vocab_size: "vocab_size"}
    sizes |= {3 * config.embed_dim: "3 · embed_dim", config.ff_dim: "ff_dim", config.embed_dim: "embed_dim"}
    unknown, differing = set(stored), {}
    for name, tensor in layers.items():
        unknown -= (pair := set(names_of(name)))
        if not pair & set(stored):
            continue
        if missing := pair - set(stored):
            raise DataError(f"{folder / ADAPTER}: {min(missing)} is missing")
        views = {key: stored[key].get_slice(key) for key in names_of(name)}
        if wrong := [key for key, view in views.items() if view.get_dtype() not in hf_reader.STORED_TYPES]:
            allowed = ", ".join(hf_reader.STORED_TYPES)
            raise DataError(f"{folder / ADAPTER}: {wrong[0]} is stored as {views[wrong[0]].get_dtype()}; allowed: {allowed}")
        a_shape, b_shape = (tuple(view.get_shape()) for view in views.values())
        if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1] or not a_shape[0]:
            raise DataError(
                f"{folder / ADAPTER}: lora_A and lora_B of {name} have the shapes {a_shape} and {b_shape}, "
                "which are not (rank, inputs) and (outputs, rank)"
            )
        inputs, outputs = shapes[tensor.parameters[0]][0], sum(shapes[path][-1] for path in tensor.parameters)
        pairs = (inputs, a_shape[1]), (outputs, b_shape[0])
        differing |= {sizes.get(ours, name): (ours, theirs) for ours, theirs in pairs if ours != theirs}
    numbers = [int(match[1]) for name in unknown if (match := re.search(r"\.(?:h|layers)\.(\d+)\.", name))]
    if max(numbers, default=0) >= config.num_layers:
        differing["num_layers"] = config.num_layers, max(numbers) + 1
    if differing:
        what = ", ".join(f"{name}={ours} (the adapter has {theirs})" for name, (ours, theirs) in differing.items())
        raise DataError(f"{folder} is an adapter of another model than {base}, which has {what}")
    if unknown:
        raise DataError(f"{folder / ADAPTER}: {base} has no layer for {abbreviated(unknown)}")
