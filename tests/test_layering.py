"""The rooms of the project: which may import which, and what each may use. Checked in the source, without running it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "minigpt_jax"

# From bottom to top. A room imports from itself and from the floors below.
FLOORS = [
    {"errors"},
    {"files"},
    {"commands"},
    {"system"},
    {"config"},
    {"data", "models", "runs"},  # independent of each other
    {"reference"},  # the model on one page
    {"generation"},
    {"interop"},
    {"tasks"},
    {"training"},
    {"kernels"},  # imported only by the entry points, which pass them down
    {"api"},  # the entry points for Python callers
    {"experiments"},
    {"cli"},
    {"compare"},
    {"benchmarks"},
    {"__init__"},  # the public names
    {"scripts", "configs"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# The same order for the files and folders inside these folders, from bottom to top. `__init__` is above them all.
ORDER_WITHIN = {
    "data": [
        "text_files", "download", "shakespeare", "corpora", "tokenizers", "token_file", "overlap", "splits", "labelled",
        "batches", "images", "conversations", "templates", "packing", "passages", "chats",
    ],
    "data/tokenizers": ["base", "library", "lossless", "char", "byte", "word", "bpe"],
    "models": [
        "ops", "masks", "attention", "cache", "kernels", "initial", "patterns", "dropout", "lora", "qk_norm", "layers",
        "token_shift", "transformer", "gpt", "bert", "vit", "flops",
    ],
    "generation": [
        "seen", "logits", "strategy", "decode", "context", "devices", "sampling", "beam", "text", "language_model", "chat",
        "masked_language_model",
    ],
    "runs": ["folder", "manifest", "arrays", "checkpoints", "metrics", "references", "plots"],
    "interop": ["architectures", "hf_files", "hf_reader", "hf_writer", "peft", "load"],
    "tasks": [
        "task", "plots", "next_token", "classification", "augmentation", "masked_token", "evaluation", "fine_tuning", "text",
        "windows", "language_modelling", "chat", "masked_language_modelling", "text_classification", "image_classification",
        "image_classifier", "text_classifier",
    ],
    "training": [
        "schedule", "muon", "optimizer", "state", "step", "clock", "compilations", "profile", "resume", "run", "causes",
        "callbacks", "loop",
    ],
    "experiments": [
        "memorisation", "reference_runs", "grid", "stacked", "sweep_report", "sweep", "changes", "ablation",
        "ablation_report", "ranges", "tuning_report", "studies", "tuning", "attribution", "lds",
    ],
}  # fmt: skip
# `training` trains a task. It knows neither tokens nor models.
CLOSED_TO_TRAINING = (
    "data",
    "generation",
    "interop",
    "models.gpt",
    "models.bert",
    "models.transformer",
    "models.layers",
    "models.vit",
    "tasks.language_modelling",
    "tasks.chat",
    "tasks.image_classification",
    "tasks.masked_language_modelling",
    "tasks.text_classification",
    "tasks.text",
    "tasks.windows",
)
# Only the entry points query the devices. They pass on the one that they chose.
DEVICE_NAMES = {"devices", "local_devices", "default_backend", "device_count", "local_device_count"}
MAY_QUERY_DEVICES = {"api", "benchmarks", "cli", "compare", "scripts"}

# Models are pure computation: no files, clocks, flags or logs.
CLOSED_TO_MODELS = {
    "absl",
    "argparse",
    "io",
    "json",
    "logging",
    "os",
    "pathlib",
    "shutil",
    "sys",
    "tempfile",
    "time",
    "tqdm",
}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_NAMES = {"eval", "exec", "__import__", "exec_module", "allow_pickle"}
# A preset is the user's own code, named on the command line. It is never part of a run or a download.
MAY_RUN_USER_CODE = {("config.py", "exec_module")}
MAY_JIT = {
    "system/hardware.py",
    "reference.py",
    "training/state.py",
    "training/step.py",
    "training/callbacks/log.py",
    "tasks/evaluation.py",
    "generation/decode.py",
    "generation/context.py",
    "generation/beam.py",
    "generation/masked_language_model.py",
    "compare/traps.py",
    "experiments/attribution.py",
    "experiments/stacked.py",
    "benchmarks/generate.py",
    "benchmarks/gpu/correctness.py",
    "benchmarks/gpu/limits.py",
    "benchmarks/gpu/training.py",
}
MAY_IMPORT_TORCH = {"compare", "benchmarks"}  # benchmarks also measure PyTorch


def imported(tree: ast.AST) -> Iterator[str]:
    """The full names of all imports, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)


def used(tree: ast.AST) -> Iterator[str]:
    """All names, attributes and keywords, without the object that they belong to: `jit` for `jax.jit`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


def used_from_jax(tree: ast.AST) -> set[str]:
    """Names taken directly from jax: `devices` for `jax.devices()`."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    names = {node.attr for node in attributes if node.value.id == "jax"}
    return names | {name.removeprefix("jax.") for name in imported(tree) if name.startswith("jax.")}


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def is_below(module: list[str], importer: list[str]) -> bool:
    """Whether a module is below the file that imports it, in the order of the folder where their paths diverge."""
    for depth, (lower, upper) in enumerate(zip(module, importer, strict=False)):
        if lower != upper:
            order = ORDER_WITHIN.get("/".join(importer[:depth]), [])
            return upper not in order or lower in order[: order.index(upper)]
    return False  # the file itself, or a package that contains it


def may_import(path: str, name: str) -> bool:
    room, (top, *rest) = room_of(path), name.split(".")
    if top == PACKAGE:
        other = rest[0] if rest and rest[0] in FLOOR_OF else "__init__"  # anything but a room is a public name
        if room == "training" and f"{'.'.join(rest)}.".startswith(tuple(f"{closed}." for closed in CLOSED_TO_TRAINING)):
            return False
        if other == room:
            return is_below(rest, path.removesuffix(".py").split("/"))
        return FLOOR_OF[other] < FLOOR_OF[room]
    if top == "torch":
        return not MAY_IMPORT_TORCH.isdisjoint({room, path})
    if room == "models" and top in CLOSED_TO_MODELS:
        return False
    return top not in {"", "scripts", "configs", "tests"} | UNSAFE_MODULES  # "": a relative import


def violations(path: str, source: str) -> set[str]:
    """The rules that a file breaks. The path is relative to the package, or to the root."""
    tree, room = ast.parse(source), room_of(path)
    if room not in FLOOR_OF:
        return {f"has no floor: add {room!r} to FLOORS"}
    broken = {f"imports {name}" for name in imported(tree) if not may_import(path, name)}
    names = set(used(tree)) | {name.split(".")[-1] for name in imported(tree)}
    broken |= {f"uses {name}" for name in names & UNSAFE_NAMES if (path, name) not in MAY_RUN_USER_CODE}
    if room == "models":
        broken |= {f"uses {name}" for name in names & {"open", "print"}}
    if room not in MAY_QUERY_DEVICES:
        broken |= {f"uses jax.{name}" for name in used_from_jax(tree) & DEVICE_NAMES}
    if "jit" in names and path not in MAY_JIT:
        broken.add("uses jit")
    return broken


SOURCES = {path.relative_to(ROOT / PACKAGE).as_posix(): path for path in (ROOT / PACKAGE).rglob("*.py")} | {
    path.relative_to(ROOT).as_posix(): path for folder in ("scripts", "configs") for path in (ROOT / folder).glob("*.py")
}


@pytest.mark.parametrize("path", sorted(SOURCES))
def test_file_keeps_the_rules_of_its_room(path):
    assert violations(path, SOURCES[path].read_text(encoding="utf-8")) == set()


def test_all_rooms_are_checked():
    assert {room_of(path) for path in SOURCES} >= set(FLOOR_OF)
    assert set(SOURCES) >= MAY_JIT | {path for path, _ in MAY_RUN_USER_CODE}
    for folder, order in ORDER_WITHIN.items():
        inside = [path.removeprefix(f"{folder}/") for path in SOURCES if path.startswith(f"{folder}/")]
        assert {room_of(path) for path in inside} == {*order, "__init__"}


@pytest.mark.parametrize(
    "path, source, violation",
    [
        ("models/a.py", "from minigpt_jax.training import step", "imports minigpt_jax.training.step"),
        ("models/a.py", "from minigpt_jax.data.batches import split", "imports minigpt_jax.data.batches.split"),
        ("models/a.py", "def f():\n    import minigpt_jax.cli", "imports minigpt_jax.cli"),
        ("models/a.py", "import minigpt_jax", "imports minigpt_jax"),
        ("models/gpt.py", "from minigpt_jax.kernels import PLAIN", "imports minigpt_jax.kernels.PLAIN"),
        ("training/loop.py", "from minigpt_jax import kernels", "imports minigpt_jax.kernels"),
        ("models/ops.py", "from minigpt_jax.models.masks import Mask", "imports minigpt_jax.models.masks.Mask"),
        ("models/cache.py", "from minigpt_jax.models import layers", "imports minigpt_jax.models.layers"),
        ("models/layers.py", "device = jax.devices()[0]", "uses jax.devices"),
        ("training/step.py", "if jax.default_backend() == 'cpu': pass", "uses jax.default_backend"),
        ("runs/arrays.py", "from jax import local_devices as here", "uses jax.local_devices"),
        ("runs/checkpoints.py", "from minigpt_jax.models.gpt import GPT", "imports minigpt_jax.models.gpt.GPT"),
        ("training/loop.py", "from minigpt_jax.models.gpt import GPT", "imports minigpt_jax.models.gpt.GPT"),
        ("training/run.py", "import minigpt_jax.tasks.language_modelling", "imports minigpt_jax.tasks.language_modelling"),
        ("training/resume.py", "from minigpt_jax.interop import load", "imports minigpt_jax.interop.load"),
        ("training/step.py", "from minigpt_jax.data import batches", "imports minigpt_jax.data.batches"),
        ("training/callbacks/log.py", "from minigpt_jax.training import loop", "imports minigpt_jax.training.loop"),
        ("tasks/next_token.py", "from minigpt_jax.training.step import f", "imports minigpt_jax.training.step.f"),
        ("models/a.py", "from minigpt_jax import load", "imports minigpt_jax.load"),
        ("models/a.py", "from ..training import step", "imports ..training.step"),
        ("models/a.py", "import os.path", "imports os.path"),
        ("models/a.py", "from pathlib import Path", "imports pathlib.Path"),
        ("models/a.py", "def f():\n    import time", "imports time"),
        ("models/a.py", "if True:\n    from absl import logging", "imports absl.logging"),
        ("models/a.py", "def f(x):\n    print(x)", "uses print"),
        ("models/a.py", "@jax.jit\ndef f(): pass", "uses jit"),
        ("generation/logits.py", "@functools.partial(jax.jit, static_argnums=0)\ndef f(): pass", "uses jit"),
        ("training/loop.py", "from jax import jit as compiled", "uses jit"),
        ("errors.py", "from minigpt_jax.config import Config", "imports minigpt_jax.config.Config"),
        ("config.py", "from minigpt_jax.data import batches", "imports minigpt_jax.data.batches"),
        ("data/a.py", "from minigpt_jax.models import gpt", "imports minigpt_jax.models.gpt"),
        ("data/text_files.py", "from minigpt_jax.data import corpora", "imports minigpt_jax.data.corpora"),
        ("data/tokenizers/base.py", "import minigpt_jax.data.token_file", "imports minigpt_jax.data.token_file"),
        ("data/tokenizers/base.py", "import minigpt_jax.data.tokenizers.bpe", "imports minigpt_jax.data.tokenizers.bpe"),
        ("data/tokenizers/bpe.py", "from minigpt_jax.data import tokenizers", "imports minigpt_jax.data.tokenizers"),
        ("data/tokenizers/bpe.py", "from minigpt_jax.data.tokenizers import A", "imports minigpt_jax.data.tokenizers.A"),
        ("generation/a.py", "from minigpt_jax.training.loop import train", "imports minigpt_jax.training.loop.train"),
        ("training/a.py", "from minigpt_jax import cli", "imports minigpt_jax.cli"),
        ("training/a.py", "from scripts import train", "imports scripts.train"),
        ("training/a.py", "import torch.nn as nn", "imports torch.nn"),
        ("training/a.py", "import pickle", "imports pickle"),
        ("data/a.py", "value = eval(text)", "uses eval"),
        ("data/a.py", "run = exec", "uses exec"),
        ("data/a.py", "array = np.load(path, allow_pickle=True)", "uses allow_pickle"),
        ("data/a.py", "spec.loader.exec_module(module)", "uses exec_module"),
        ("vision/a.py", "", "has no floor: add 'vision' to FLOORS"),
    ],
)
def test_violations_are_detected(path, source, violation):
    assert violations(path, source) == {violation}


@pytest.mark.parametrize(
    "path, source",
    [
        (
            "models/a.py",
            "from minigpt_jax.config import ModelConfig\nfrom minigpt_jax.models.layers import Norm\nimport jax",
        ),
        ("training/step.py", "from minigpt_jax.training.state import TrainState\nf = jax.jit(g)"),
        ("training/callbacks/log.py", "from minigpt_jax.training.callbacks.callback import Callback"),
        ("generation/sampling.py", "def f(devices):\n    return devices[0].platform"),
        ("data/tokenizers/bpe.py", "from minigpt_jax.data.tokenizers.base import Tokenizer"),
        ("data/tokenizers/__init__.py", "from minigpt_jax.data.tokenizers.bpe import BpeTokenizer"),
        ("compare/a.py", "import torch\nfrom minigpt_jax.training.step import train_step"),
        ("scripts/a.py", "import minigpt_jax as mg\nfrom minigpt_jax import cli\nimport logging"),
        ("data/a.py", "import time\nword = 'pickle eval('  # exec()"),
        ("config.py", "spec.loader.exec_module(module)"),
    ],
)
def test_allowed_code_is_not_a_violation(path, source):
    assert violations(path, source) == set()
