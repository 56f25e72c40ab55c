"""Models as folders that Hugging Face's transformers writes and reads: config.json, model.safetensors, tokenizer files.

Two of its architectures are special cases of the GPT here: GPT-2 and Llama. What stands below for each is which choices it
is, what transformers calls a setting, and what it calls a parameter. Both directions come from these tables.

Nothing here runs what it reads: safetensors are numbers behind a header, and pickle, which is a program, is refused.
"""

import contextlib
import dataclasses
import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from minigpt_jax.config import ModelConfig
from minigpt_jax.data import tokenizers
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.files import replaced
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.models.gpt import GPT, init_params

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
STORED_TYPES = ("F32", "F16", "BF16")  # all become float32, exactly
LONGEST_CONTEXT = 2**20  # for which a cache is made; a config.json may say anything


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What lies in a file under one name: parameters of ours, side by side along their last axis."""

    name: str
    parameters: tuple[str, ...]
    is_transposed: bool = False  # PyTorch's linear layers keep (outputs, inputs)

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Of what is stored, from the shapes of the parameters."""
        *first, last = shapes[self.parameters[0]]
        whole = (*first, last * len(self.parameters))
        return whole[::-1] if self.is_transposed else whole


@dataclasses.dataclass(frozen=True)
class Architecture:
    class_name: str
    choices: dict[str, Any]  # the settings of ours that it is
    settings: dict[str, str]  # what it calls the other ones
    fixed: dict[str, Any]  # settings of its own, with the only value that is the model here
    defaults: dict[str, Any]  # what transformers takes for settings that a config.json leaves out
    prefix: str  # of all names but the head's; files of the model without a head lack it
    outside: tuple[Tensor, ...]
    layer: tuple[Tensor, ...]  # of each layer, with {} for its number
    ignored: str  # pattern of names that some files have, and that are no parameters


def linear(name: str, parameter: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of one of PyTorch's linear layers."""
    return Tensor(f"{name}.weight", (f"{parameter}/kernel",), True), Tensor(f"{name}.bias", (f"{parameter}/bias",))


def conv1d(name: str, *parameters: str) -> tuple[Tensor, Tensor]:
    """The same of GPT-2, which keeps (inputs, outputs) and has queries, keys and values in one matrix."""
    return tuple(Tensor(f"{name}.{theirs}", tuple(f"{one}/{ours}" for one in parameters))
                 for theirs, ours in (("weight", "kernel"), ("bias", "bias")))  # fmt: skip


def norm(name: str, parameter: str) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", (f"{parameter}/scale",)), Tensor(f"{name}.bias", (f"{parameter}/bias",))


HEAD, BLOCK = Tensor("lm_head.weight", ("head/kernel",), True), "transformer/block_{}"

ARCHITECTURES = {
    # Radford et al. 2019
    "gpt2": Architecture(
        class_name="GPT2LMHeadModel",
        choices={"positions": "learned", "norm": "layernorm", "activation": "gelu", "norm_placement": "pre",
                 "qk_norm": False, "num_kv_heads": None, "init": "gpt2"},
        settings={"num_layers": "n_layer", "num_heads": "n_head", "embed_dim": "n_embd", "ff_dim": "n_inner",
                  "context_length": "n_positions", "vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"},
        fixed={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
               "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        defaults={"n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": None, "n_positions": 1024, "vocab_size": 50257,
                  "tie_word_embeddings": True},
        prefix="transformer.",
        outside=(Tensor("wte.weight", ("embedding/tokens/embedding",)),
                 Tensor("wpe.weight", ("embedding/positions/embedding",)),
                 *norm("ln_f", "transformer/final_norm")),
        layer=(*norm("h.{}.ln_1", f"{BLOCK}/attention_norm"),
               *conv1d("h.{}.attn.c_attn", *(f"{BLOCK}/attention/{part}" for part in ("query", "key", "value"))),
               *conv1d("h.{}.attn.c_proj", f"{BLOCK}/attention/output"),
               *norm("h.{}.ln_2", f"{BLOCK}/feed_forward_norm"),
               *conv1d("h.{}.mlp.c_fc", f"{BLOCK}/feed_forward/up"),
               *conv1d("h.{}.mlp.c_proj", f"{BLOCK}/feed_forward/down")),
        ignored=r"h\.\d+\.attn\.(masked_)?bias",  # the causal mask, in GPT-2's first files
    ),
    # Touvron et al. 2023
    "llama": Architecture(
        class_name="LlamaForCausalLM",
        choices={"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "norm_placement": "pre", "qk_norm": False,
                 "init": "gpt2"},
        settings={"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "embed_dim": "hidden_size",
                  "num_kv_heads": "num_key_value_heads", "ff_dim": "intermediate_size", "vocab_size": "vocab_size",
                  "context_length": "max_position_embeddings", "tie_embeddings": "tie_word_embeddings",
                  "bias": "attention_bias"},
        fixed={"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_type": "default",
               "partial_rotary_factor": 1.0},
        defaults={"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "num_key_value_heads": None,
                  "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048,
                  "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-6},
        prefix="model.",
        outside=(Tensor("embed_tokens.weight", ("embedding/tokens/embedding",)), *norm("norm", "transformer/final_norm")),
        layer=(*norm("layers.{}.input_layernorm", f"{BLOCK}/attention_norm"),
               *linear("layers.{}.self_attn.q_proj", f"{BLOCK}/attention/query"),
               *linear("layers.{}.self_attn.k_proj", f"{BLOCK}/attention/key"),
               *linear("layers.{}.self_attn.v_proj", f"{BLOCK}/attention/value"),
               *linear("layers.{}.self_attn.o_proj", f"{BLOCK}/attention/output"),
               *norm("layers.{}.post_attention_layernorm", f"{BLOCK}/feed_forward_norm"),
               *linear("layers.{}.mlp.gate_proj", f"{BLOCK}/feed_forward/gate"),
               *linear("layers.{}.mlp.up_proj", f"{BLOCK}/feed_forward/up"),
               *linear("layers.{}.mlp.down_proj", f"{BLOCK}/feed_forward/down")),
        ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    ),
}  # fmt: skip


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters by path: `transformer/block_0/attention/query/kernel`."""
    model = GPT(config)
    tree = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def stored_shapes(config: ModelConfig, model_type: str) -> dict[str, tuple[int, ...]]:
    """`parameter_shapes` of what a folder holds: GPT-2 always has biases. Those that the model lacks are stored as zeros."""
    return parameter_shapes(dataclasses.replace(config, bias=True) if model_type == "gpt2" else config)


def tensors(config: ModelConfig, model_type: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What lies under which name in a folder with parameters of these shapes."""
    architecture = ARCHITECTURES[model_type]
    layers = [
        Tensor(one.name.format(layer), tuple(path.format(layer) for path in one.parameters), one.is_transposed)
        for layer in range(config.num_layers)
        for one in architecture.layer
    ]
    found = {architecture.prefix + one.name: one for one in (*architecture.outside, *layers)} | {HEAD.name: HEAD}
    return {name: one for name, one in found.items() if one.parameters[0] in shapes}


# ---- out -----------------------------------------------------------------------------------------------------------------


def model_type_of(config: ModelConfig) -> str:
    """Raises DataError, naming the settings that are in the way, where a model is no special case of either."""

    def in_the_way(architecture: Architecture) -> list[str]:
        choices = {name: value for name, value in architecture.choices.items() if name != "init"}
        if "num_kv_heads" in choices:
            choices["num_kv_heads"] = config.num_heads
        has = dataclasses.asdict(config) | {"num_kv_heads": config.kv_heads}
        return [f"{name}={has[name]} (not {value})" for name, value in choices.items() if has[name] != value]

    found = {name: in_the_way(architecture) for name, architecture in ARCHITECTURES.items()}
    nearest = min(found, key=lambda name: len(found[name]))
    if found[nearest]:
        reasons = "; ".join(f"{name}: {', '.join(settings)}" for name, settings in found.items())
        raise DataError(f"neither architecture of Hugging Face can express this model. In the way of {reasons}")
    return nearest


def write(model: LanguageModel, folder: Path) -> str:
    """Writes a model as a new folder, whole or not at all, and returns the architecture's name.

    Raises DataError where neither architecture can express it, or something is in the folder's place.
    """
    model_type = model_type_of(model.config)
    safetensors = import_safetensors()
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
            safetensors.numpy.save_file(to_tensors(model, model_type), whole / WEIGHTS, metadata={"format": "pt"})
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
        values |= {"bias": config.bias, "embd_pdrop": config.dropout, "resid_pdrop": config.dropout, "attn_pdrop": 0.0}
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
    """All parameters under transformers' names and in its layout."""
    shapes = stored_shapes(model.config, model_type)
    parameters = traverse_util.flatten_dict(model.params, sep="/")

    def part(path: str) -> np.ndarray:
        is_absent_bias = path.endswith("/bias") and path not in parameters
        return np.zeros(shapes[path], np.float32) if is_absent_bias else np.asarray(parameters[path])

    def stored(one: Tensor) -> np.ndarray:
        whole = np.concatenate([part(path) for path in one.parameters], axis=-1)
        # Contiguous, since safetensors 0.8 writes the memory of a transposed view as it lies there.
        return np.ascontiguousarray(whole.T if one.is_transposed else whole)

    return {name: stored(one) for name, one in tensors(model.config, model_type, shapes).items()}


# ---- in ------------------------------------------------------------------------------------------------------------------


def is_one(folder: Path) -> bool:
    """Whether a folder looks like a model of Hugging Face rather than like a run."""
    has_weights = bool(glob.glob(f"{glob.escape(str(folder))}/*.safetensors"))
    try:
        values = read_json(folder / "config.json")
    except (OSError, DataError):
        return has_weights
    return "training" not in values and (has_weights or "model_type" in values)


def read_json(path: Path) -> dict[str, Any]:
    """Raises OSError where it cannot be read, DataError where it is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is no JSON object")
    return values


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """The model that a folder's config.json describes, and its architecture. Raises DataError where it is none of ours."""
    if os.path.isfile(folder):
        reason = refusal(folder.name) if folder.suffix in PICKLES else "give the folder with config.json and the weights"
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
    for name in ("rope_parameters", "rope_scaling"):  # the newer name and the older, which transformers prefers
        rope = given.get(name) or {}
        if not isinstance(rope, dict):
            raise DataError(f"{path}: {name}={rope!r} must be an object")
        rope = ({"rope_type": rope["type"]} if "type" in rope else {}) | rope
        values |= {name: value for name, value in rope.items() if name in architecture.fixed}
    fixed = architecture.fixed
    wrong = [f"{name}={values[name]!r} (not {value!r})" for name, value in fixed.items() if values[name] != value]
    if model_type == "llama" and values["attention_bias"] != values["mlp_bias"]:
        wrong.append("attention_bias without mlp_bias, or the other way round")
    if wrong:
        raise DataError(f"{path}: this program's {model_type} cannot have {', '.join(wrong)}")
    settings = {ours: values[theirs] for ours, theirs in architecture.settings.items()}
    if model_type == "gpt2":
        settings["bias"] = values.get("bias", True)
        if settings["ff_dim"] is None and isinstance(settings["embed_dim"], int):
            settings["ff_dim"] = 4 * settings["embed_dim"]
    try:
        config = ModelConfig(**architecture.choices | settings)
    except UsageError as error:
        raise DataError(f"{path}: {error}") from None
    if config.num_kv_heads == config.num_heads:
        config = dataclasses.replace(config, num_kv_heads=None)
    if values.get("head_dim") not in (None, config.head_size):
        raise DataError(
            f"{path}: head_dim={values['head_dim']!r} must be hidden_size/num_attention_heads={config.head_size}"
        )
    if config.context_length > LONGEST_CONTEXT:
        raise DataError(f"{path}: a context of {config.context_length} tokens is above {LONGEST_CONTEXT}")
    return config, model_type


def read(folder: Path) -> LanguageModel:
    """The model in a folder, with float32 parameters and the folder's tokenizer.

    Names, shapes and types of all tensors are compared with config.json before memory is taken for any. Raises DataError
    where anything does not fit, is damaged, missing, too much, or pickled.
    """
    config, model_type = read_config(folder)
    tokenizer = tokenizers.read_tokenizer(str(folder))
    if tokenizer.vocab_size != config.vocab_size:
        raise DataError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}")
    with opened(folder) as stored:
        parameters = {}
        for name, one in checked(folder, config, model_type, stored).items():
            array = np.asarray(stored[name].get_tensor(name), np.float32)
            parts = np.split(array.T if one.is_transposed else array, len(one.parameters), axis=-1)
            parameters |= {path: jnp.array(part) for path, part in zip(one.parameters, parts, strict=True)}
    for path in set(parameters) - set(parameter_shapes(config)):
        if parameters.pop(path).any():
            raise DataError(f"{folder}: config.json says bias=false, and {path} is not zero")
    return LanguageModel(config, tokenizer, traverse_util.unflatten_dict(parameters, sep="/"))


def checked(folder: Path, config: ModelConfig, model_type: str, stored: dict[str, Any]) -> dict[str, Tensor]:
    """What lies under which name. Raises DataError unless that is what config.json describes, in the shapes that it says."""
    prefix, ignored = ARCHITECTURES[model_type].prefix, ARCHITECTURES[model_type].ignored
    if config.num_layers > len(stored):  # before a model of absurdly many is thought through
        raise DataError(f"{folder}: config.json says {config.num_layers} layers, and there are {len(stored)} tensors")
    shapes = stored_shapes(config, model_type)
    expected = tensors(config, model_type, shapes)
    if not any(name.startswith(prefix) for name in stored):
        expected = {name.removeprefix(prefix): one for name, one in expected.items()}

    too_many = {name for name in stored if not re.fullmatch(f"({re.escape(prefix)})?({ignored})", name)} - set(expected)
    if config.tie_embeddings:
        too_many.discard(HEAD.name)  # the token embedding again, which transformers passes over too
    for problem, names in (("lacks", set(expected) - set(stored)), ("has no place for", too_many)):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DataError(f"{folder}: by its config.json the model {problem} {min(names)!r}{others}")
    for name, one in expected.items():
        view = stored[name].get_slice(name)
        found, shape = tuple(view.get_shape()), one.shape(shapes)
        if found != shape:
            raise DataError(f"{folder}: {name} has the shape {found} and by config.json should have {shape}")
        if view.get_dtype() not in STORED_TYPES:
            raise DataError(f"{folder}: {name} is stored as {view.get_dtype()}; allowed: {', '.join(STORED_TYPES)}")
    return expected


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[dict[str, Any]]:
    """The open file in which each tensor of a folder lies, by the tensor's name. Only headers are read yet."""
    safetensors = import_safetensors()
    with contextlib.ExitStack() as stack:
        stored = {}
        for file, names in weight_files(folder).items():
            try:
                reader = stack.enter_context(safetensors.safe_open(folder / file, "numpy"))
            except FileNotFoundError:
                raise DataError(f"{folder} has no {file}, of which {INDEX} speaks") from None
            except (OSError, safetensors.SafetensorError) as error:
                raise DataError(f"{folder / file} is damaged, or no more than a pointer to it: {error}") from None
            if names is not None and names != set(reader.keys()):
                raise DataError(f"{folder}: {INDEX} and {file} disagree about {min(names ^ set(reader.keys()))!r}")
            stored |= dict.fromkeys(reader.keys(), reader)
        yield stored


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """Names of the files with weights, each with the tensors that it should have; None where nothing says."""
    if (folder / WEIGHTS).exists():
        return {WEIGHTS: None}
    try:
        weight_map = read_json(folder / INDEX)["weight_map"]
        files = {}
        for name, file in weight_map.items():
            files.setdefault(file, set()).add(name)
    except FileNotFoundError:
        found = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        reason = refusal(found[0]) if found else f"it needs {WEIGHTS}, or {INDEX} with its parts"
        raise DataError(f"{folder} has no weights that can be read: {reason}") from None
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / INDEX} is damaged: {error}") from None
    for file in files:
        # No name may lead out of the folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.safetensors", file):
            raise DataError(f"{folder / INDEX}: {file!r} is not the name of a .safetensors file in that folder")
    return files


def refusal(name: str) -> str:
    return (
        f"{name} is a pickle, a program that runs when it is read, and is not opened; "
        "save the model as safetensors, as transformers does"
    )


def import_safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UsageError("Hugging Face's files need the package safetensors: python -m pip install -e '.[hf]'") from error
    return safetensors
