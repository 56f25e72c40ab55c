"""Faster implementations of the ops in `models/`. The set for a device is selected once, at the edge, and passed down.

Each file says which op it computes, what it saves and which test proves it equal to the equation. Savings are per training
or decoding step; `python scripts/benchmark.py kernels` measures them on your machine.
"""

from dataclasses import replace
from typing import Any

from minigpt_jax.config import ModelConfig
from minigpt_jax.errors import require_choice
from minigpt_jax.kernels.activations import activate
from minigpt_jax.kernels.blocked_attention import BLOCK, blocked_attention
from minigpt_jax.kernels.cudnn_attention import cudnn_attention, has_cudnn
from minigpt_jax.kernels.dense import matmul
from minigpt_jax.kernels.norms import center, unit_rms
from minigpt_jax.kernels.partitioned_cache import empty_cache
from minigpt_jax.kernels.recompute import recompute
from minigpt_jax.kernels.split_attention import split_attention
from minigpt_jax.models.kernels import PLAIN, Kernels

TUNED = Kernels("tuned", matmul, center, unit_rms, activate, recompute=recompute)  # pyright: ignore[reportArgumentType]
BLOCKED = replace(TUNED, name="tuned, blocked attention", attention=blocked_attention, empty_cache=empty_cache)
SPLIT = replace(TUNED, name="tuned, split attention", attention=split_attention, empty_cache=empty_cache)
CUDNN = replace(TUNED, name="tuned, cuDNN attention", attention=cudnn_attention)


def select(config: ModelConfig, device: Any, kernels: str = "tuned") -> Kernels:
    """The kernels for a model on a device, one of `jax.devices()`. `kernels` is "tuned", or "plain" for the equations.

    On a CPU, attention is blocked if the context exceeds one block, else split. Accelerators do not use blocks, since
    they would wait for the host at each iteration of a loop of dynamic length. Raises UsageError for another `kernels`.
    """
    require_choice("kernels", kernels, ("tuned", "plain"))
    if kernels == "plain":
        return PLAIN
    if device.platform == "cpu":
        return BLOCKED if config.context_length > BLOCK else SPLIT
    return CUDNN if has_cudnn(config, device) else TUNED
