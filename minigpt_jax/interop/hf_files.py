"""The files of a Hugging Face folder: JSON, a chat template, and safetensors, perhaps in shards. Knows no architectures.

Reading never executes code: safetensors files hold only a header and numbers. Pickles, which can run code, are refused.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt_jax.commands import install_command
from minigpt_jax.data.templates import ChatTemplate
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError, UsageError, shortened

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"  # PEFT's, for LoRA
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
HEAD = "lm_head.weight"  # where it is tied, some indexes list it though no shard has it, or the reverse
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """Raises OSError if the file cannot be read, DataError if it does not contain a JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a JSON object")
    return values


def read_chat_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template in a folder, or None if there is none. Raises DataError if its files cannot be used."""
    path = folder / TOKENIZER_CONFIG
    try:
        values = read_json(path) if path.exists() else {}
        source = values.get("chat_template")
        if (folder / CHAT_TEMPLATE).exists():
            source = (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the chat template in {folder} cannot be read: {error}") from None
    if isinstance(source, list):  # several, by name
        source = next(
            (one.get("template") for one in source if isinstance(one, dict) and one.get("name") == "default"), None
        )
    if source is None:
        return None
    if not isinstance(source, str):
        raise DataError(f"{path}: chat_template={shortened(source)} must be a string")
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    names = {name: value for name, value in contents.items() if name.endswith("_token") and isinstance(value, str)}
    return ChatTemplate(tokenizer, source, names)


@contextlib.contextmanager
def open_tensors(folder: Path, files: dict[str, set[str] | None] | None = None) -> Iterator[dict[str, Any]]:
    """The open file that contains each tensor of a folder, by tensor name. Reads only the headers. `files` is what
    `weight_files` returns, by default for this folder."""
    safetensors = import_safetensors()
    with contextlib.ExitStack() as stack:
        stored = {}
        for file, names in (files or weight_files(folder)).items():
            try:
                reader = stack.enter_context(safetensors.safe_open(folder / file, "numpy"))
            except FileNotFoundError:
                raise DataError(f"{folder}: {file}, listed in {INDEX}, is missing") from None
            except (OSError, safetensors.SafetensorError) as error:
                raise DataError(f"{folder / file} is corrupt, or only a Git LFS pointer: {error}") from None
            if names is not None and (differing := (names ^ set(reader.keys())) - {HEAD}):
                raise DataError(f"{folder}: {INDEX} and {file} disagree about tensor {min(differing)!r}")
            stored |= dict.fromkeys(reader.keys(), reader)
        yield stored


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The names of the weight files, each with the tensors that it should contain, or None if there is no index."""
    if (folder / WEIGHTS).exists():
        return {WEIGHTS: None}
    try:
        weight_map = read_json(folder / INDEX)["weight_map"]
        files = {}
        for name, file in weight_map.items():
            files.setdefault(file, set()).add(name)
    except FileNotFoundError:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        reason = pickle_refusal(pickles[0]) if pickles else f"it needs {WEIGHTS}, or {INDEX} with its shards"
        raise DataError(f"{folder} has no readable weights: {reason}") from None
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / INDEX} is corrupt: {error}") from None
    for file in files:
        # A file name must not point outside the folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.safetensors", file):
            raise DataError(f"{folder / INDEX}: {file!r} is not the name of a .safetensors file in that folder")
    return files


def pickle_refusal(name: str) -> str:
    return (
        f"{name} is a pickle, which can run code when it is loaded, so it is not opened; "
        "save the model as safetensors, the default in transformers"
    )


def import_safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UsageError(f"Hugging Face files need the package safetensors: {install_command('hf')}") from error
    return safetensors
