"""A mini-GPT in JAX and Flax.

Read in this order: config.py, data/, models/, training/, generation/. From Python:

    import minigpt_jax as mg
    lm = mg.load("runs/shakespeare_char")
    print(lm.generate("To be or not to be", length=200, temperature=0.8, top_k=40, seed=0))
"""

from minigpt_jax.config import Config, DataConfig, Expectation, ModelConfig, TrainingConfig, load_preset
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.training.loop import train
from minigpt_jax.training.pretrained import load

__all__ = [
    "Config",
    "DataConfig",
    "DataError",
    "Expectation",
    "LanguageModel",
    "ModelConfig",
    "TrainingConfig",
    "UsageError",
    "load",
    "load_preset",
    "train",
]
