"""The rooms of the project: which may import which, and what may be used where. Read from the source, nothing is run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "minigpt_jax"

# From the bottom upwards: a room imports from itself and from the floors below.
FLOORS = [
    {"errors", "files"},
    {"system"},
    {"config"},
    {"data", "models", "runs"},  # which do not know each other
    {"reference"},  # the page
    {"generation"},
    {"interop"},
    {"tasks"},
    {"training"},
    {"kernels"},  # which nothing below the edge imports: they are passed down
    {"api"},  # the edge for Python callers
    {"cli"},
    {"compare"},
    {"benchmarks"},
    {"__init__"},  # the public names
    {"scripts", "configs"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Inside these folders the same holds for files and the folders in them. `__init__` is above them all.
ORDER_WITHIN = {
    "data": ["text_files", "download", "shakespeare", "corpora", "tokenizers", "token_file", "splits", "batches"],
    "data/tokenizers": ["base", "library", "char", "byte", "word", "bpe"],
    "models": ["ops", "masks", "attention", "cache", "kernels", "initial", "layers", "transformer", "gpt", "flops"],
    "generation": [
        "seen", "logits", "strategy", "decode", "context", "devices", "sampling", "beam", "text", "language_model",
    ],
    "runs": ["folder", "manifest", "arrays", "checkpoints", "metrics"],
    "interop": ["architectures", "hf_files", "hf_reader", "hf_writer", "load"],
    "tasks": ["task", "next_token", "evaluation", "language_modelling"],
    "training": [
        "schedule", "optimizer", "state", "step", "clock", "compilations", "profile", "resume", "run", "callbacks", "loop",
    ],
}  # fmt: skip
# What `training` trains comes from a task: it knows neither tokens nor a model.
CLOSED_TO_TRAINING = (
    "data",
    "generation",
    "interop",
    "models.gpt",
    "models.transformer",
    "models.layers",
    "tasks.language_modelling",
)
# Only the edge asks which devices there are, and passes on what it chose.
DEVICE_NAMES = {"devices", "local_devices", "default_backend", "device_count", "local_device_count"}
MAY_ASK_FOR_DEVICES = {"api", "benchmarks", "cli", "compare", "scripts"}

# Models know of nothing but numbers: no files, clocks, flags or logs.
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
# A preset is the user's own program, named on the command line, and never part of a run or a download.
MAY_RUN_PROGRAMS = {("config.py", "exec_module")}
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
    "compare/traps.py",
    "benchmarks/generate.py",
}
MAY_IMPORT_TORCH = {"compare", "benchmarks"}  # a benchmark is about the others, too


def imported(tree: ast.AST) -> Iterator[str]:
    """The full name of everything that is imported, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)


def used(tree: ast.AST) -> Iterator[str]:
    """Names, attributes and keywords that occur, without what they belong to: `jit` of `jax.jit`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


def asked_of_jax(tree: ast.AST) -> set[str]:
    """Names that are taken directly from jax: `devices` of `jax.devices()`."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    found = {node.attr for node in attributes if node.value.id == "jax"}
    return found | {name.removeprefix("jax.") for name in imported(tree) if name.startswith("jax.")}


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def is_below(other: list[str], here: list[str]) -> bool:
    """Whether what is imported is below the file that imports it, in the order of the folder where their paths part."""
    for depth, (theirs, ours) in enumerate(zip(other, here, strict=False)):
        if theirs != ours:
            order = ORDER_WITHIN.get("/".join(here[:depth]), [])
            return ours not in order or theirs in order[: order.index(ours)]
    return False  # the file itself, or a package that it is in


def may_import(path: str, name: str) -> bool:
    room, (top, *rest) = room_of(path), name.split(".")
    if top == PACKAGE:
        other = rest[0] if rest and rest[0] in FLOOR_OF else "__init__"  # what is no room is one of the public names
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
    """What a file does that its place does not allow. The path is taken from the package's folder or the root."""
    tree, room = ast.parse(source), room_of(path)
    if room not in FLOOR_OF:
        return {f"has no floor: add {room!r} to FLOORS"}
    found = {f"imports {name}" for name in imported(tree) if not may_import(path, name)}
    names = set(used(tree)) | {name.split(".")[-1] for name in imported(tree)}
    found |= {f"uses {name}" for name in names & UNSAFE_NAMES if (path, name) not in MAY_RUN_PROGRAMS}
    if room == "models":
        found |= {f"uses {name}" for name in names & {"open", "print"}}
    if room not in MAY_ASK_FOR_DEVICES:
        found |= {f"uses jax.{name}" for name in asked_of_jax(tree) & DEVICE_NAMES}
    if "jit" in names and path not in MAY_JIT:
        found.add("uses jit")
    return found


SOURCES = {path.relative_to(ROOT / PACKAGE).as_posix(): path for path in (ROOT / PACKAGE).rglob("*.py")} | {
    path.relative_to(ROOT).as_posix(): path for folder in ("scripts", "configs") for path in (ROOT / folder).glob("*.py")
}


@pytest.mark.parametrize("path", sorted(SOURCES))
def test_file_does_only_what_its_place_allows(path):
    assert violations(path, SOURCES[path].read_text(encoding="utf-8")) == set()


def test_all_rooms_have_been_looked_at():
    assert {room_of(path) for path in SOURCES} >= set(FLOOR_OF)
    assert set(SOURCES) >= MAY_JIT | {path for path, _ in MAY_RUN_PROGRAMS}
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
def test_a_violation_is_found(path, source, violation):
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
def test_what_is_allowed_is_not_taken_for_a_violation(path, source):
    assert violations(path, source) == set()
