"""Part `device`: what the figures were measured on and with."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any

import jax

from minigpt_jax.api import first_device
from minigpt_jax.benchmarks.gpu.setup import Setup

PACKAGES = (
    "minigpt_jax", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "numpy",
    "torch", "triton", "transformers", "tokenizers", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
VARIABLES = "JAX_", "XLA_", "CUDA_VISIBLE", "NVIDIA_TF32", "TORCH", "PYTORCH"  # how the names of settings start


def measure(setup: Setup) -> Iterator[dict[str, Any]]:
    device = first_device()
    yield {
        "platform": device.platform,
        "kind": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "runtime": device.client.platform_version,
        "memory": device.memory_stats(),
        "devices": len(jax.local_devices()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "matmul_precision": str(jax.config.jax_default_matmul_precision),  # pyright: ignore[reportAttributeAccessIssue]
        "versions": {name: version for name in PACKAGES if (version := installed_version(name))},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
