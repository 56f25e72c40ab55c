"""A mini-GPT in JAX and Flax.

Read reference.py first, the whole model on one page; then config.py, data/, models/, training/, generation/. From Python:

    import minigpt_jax as mg
    lm = mg.load("runs/shakespeare_char")
    print(lm.generate("To be or not to be", length=200, temperature=0.8, top_k=40, seed=0))
"""

import importlib
from typing import Any

from minigpt_jax.system.xla import turn_off_wrong_sums

__version__ = "0.2.0"

turn_off_wrong_sums()

# Public names and their modules, which are imported on first access. Parts that do not need JAX, such as the PyTorch twin,
# can thus be imported without loading JAX.
_HOMES = {
    "ChatConfig": "config",
    "Config": "config",
    "DataConfig": "config",
    "DataError": "errors",
    "ReferenceResult": "config",
    "LanguageModel": "generation.language_model",
    "ImageConfig": "config",
    "ModelConfig": "config",
    "StoppedError": "errors",
    "TrainingConfig": "config",
    "UsageError": "errors",
    "evaluate": "api",
    "load": "api",
    "load_image_classifier": "api",
    "load_preset": "config",
    "load_text_classifier": "api",
    "measure_memorisation": "experiments.memorisation",
    "train": "api",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
