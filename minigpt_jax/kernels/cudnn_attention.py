"""Computes `attention` with NVIDIA's cuDNN. What it saves is not measured: this project has not run on a GPU yet.
Proof: tests/test_kernels.py, test_attention_follows_every_mask, with XLA in place of cuDNN, since tests run without a GPU.
"""

from typing import Any

import jax

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.attention import attention
from minigpt_jax.models.masks import Mask


def has_cudnn(config: ModelConfig, device: Any) -> bool:
    """Whether cuDNN supports the model on this device: Ampere or later, bfloat16, head size a multiple of 8 up to 128."""
    capability = getattr(device, "compute_capability", "")  # such as "8.0"; AMD's are names like "gfx942"
    is_recent = capability[:1].isdigit() and float(capability) >= 8.0
    return is_recent and config.dtype == "bfloat16" and config.head_size <= 128 and config.head_size % 8 == 0


def cudnn_attention(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask: Mask) -> jax.Array:
    """softmax(Q Kᵀ / √K) V under the plain causal mask. Falls back to the equation for the others."""
    if not mask.only_past or mask != Mask(causal=True) or q_BTHK.shape != k_BSHK.shape:
        return attention(q_BTHK, k_BSHK, v_BSHK, mask)
    return jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, is_causal=True, implementation="cudnn")
