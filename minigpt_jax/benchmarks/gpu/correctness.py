"""Part `correctness`: the device against the CPU's plain equations, attention against its equation, ours against PyTorch.

Each check is an error with its limit. Errors of arrays are relative: the norm of the difference over that of the truth.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minigpt_jax.api import choose_kernels, first_device
from minigpt_jax.benchmarks.baselines import random_batch, use_gpu
from minigpt_jax.benchmarks.gpu.setup import TINY_MODEL, Setup, attempt
from minigpt_jax.config import Config, ModelConfig, TrainingConfig
from minigpt_jax.generation import sampling
from minigpt_jax.generation.strategy import processors
from minigpt_jax.models.attention import attention
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.models.masks import Mask
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.training.optimizer import make_optimizer
from minigpt_jax.training.state import init_state
from minigpt_jax.training.step import train_step

SIZES = {"num_layers": 2, "num_heads": 4, "embed_dim": 256, "ff_dim": 1024, "context_length": 256}
MODELS = {
    "GPT-2": {"positions": "learned", "norm": "layernorm", "activation": "gelu", "qk_norm": False, "tie_embeddings": True},
    "default": {},  # rotary positions, RMSNorm, ReLU², QK-norm
}
FLOAT32_LIMIT = 5e-5  # of logits and gradients; with TF32, errors are near 3e-4
STEP_LIMIT = 1e-2  # of the change of the parameters: Adam's first step turns tiny gradients into full-sized changes
BFLOAT16_FACTOR = 2.0  # times the error of the CPU in bfloat16


def measure(setup: Setup) -> Iterator[dict[str, Any]]:
    jax.config.update("jax_default_matmul_precision", "float32")  # not TF32
    yield {"matmul_precision": "float32"}
    sizes = TINY_MODEL if setup.rehearse else SIZES
    models = {name: ModelConfig(**sizes | choices, vocab_size=1000, vocab_multiple=64) for name, choices in MODELS.items()}
    configs = {name: Config(model, TrainingConfig(batch_size=4, warmup_steps=1)) for name, model in models.items()}
    for name, config in configs.items():
        yield from attempt(f"against the CPU, {name}", against_cpu, config)
    yield from attempt("attention", attention_errors, TINY_MODEL["context_length"] if setup.rehearse else 1024)
    yield from attempt("greedy text", greedy_text, configs["GPT-2"])
    yield from attempt("against PyTorch", against_torch, configs["GPT-2"])


def check(error: float, limit: float) -> dict[str, float | bool]:
    return {"error": float(error), "limit": limit, "ok": bool(error <= limit)}  # False for NaN


def relative(actual: Any, expected: Any) -> float:
    """The error of arrays, or of trees of arrays."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)))


def initial_params(config: Config) -> Any:
    """Initialised on the CPU: devices round random numbers differently."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(jax.jit(init_params, static_argnums=1)(jax.random.key(0), GPT(config.model)))


# ---- Logits, gradients and a step -----------------------------------------------------------------------------------------


def against_cpu(config: Config) -> dict[str, Any]:
    """Errors of the device with its own kernels. The truth is the CPU's result in float32 with the plain equations."""
    device, cpu, params, result = first_device(), jax.devices("cpu")[0], initial_params(config), {}
    truth = outputs(config, params, PLAIN, cpu)
    for dtype in ("float32", "bfloat16"):
        config = config.override({"dtype": dtype})
        kernels = choose_kernels(config.model)
        limits = {"logits": FLOAT32_LIMIT, "gradients": FLOAT32_LIMIT, "step": STEP_LIMIT}
        if dtype == "bfloat16":
            on_cpu = outputs(config, params, PLAIN, cpu)
            limits = {name: BFLOAT16_FACTOR * relative(on_cpu[name], truth[name]) for name in limits}
        for name, value in outputs(config, params, kernels, device).items():
            result[f"{name}, {dtype}"] = check(relative(value, truth[name]), limits[name]) | {"kernels": kernels.name}
    return result


def outputs(config: Config, params: Any, kernels: Kernels, device: Any) -> dict[str, Any]:
    """Logits, gradients, and by how much a training step changes the parameters, computed on this device."""
    parts = {"objective": NextToken.of(config, kernels), "optimizer": make_optimizer(config.training, 10)}
    batch, key = jax.device_put(random_batch(config), device), jax.random.key(0)
    logits_BTV, _ = jax.jit(GPT(config.model, kernels).apply)({"params": jax.device_put(params, device)}, batch["inputs_BT"])
    state, _ = train_step(init_state(key, jax.device_put(params, device), **parts), batch, key, **parts)
    gradients = optax.tree_utils.tree_get(state.opt_state, "mu")  # after one step a multiple of the clipped gradients
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params)
    return {"logits": logits_BTV, "gradients": gradients, "step": change}


# ---- Text, attention, PyTorch ---------------------------------------------------------------------------------------------


def greedy_text(config: Config) -> dict[str, Any]:
    """Whether the device continues two prompts, to the end of the context, with the same tokens as the CPU."""
    length = config.model.context_length // 2
    prompts = [*np.random.default_rng(0).integers(config.model.known_vocab_size, size=(2, length), dtype=np.int32)]
    params, keys, texts = initial_params(config), sampling.row_keys(jax.random.key(0), range(2)), []
    for kernels, device in ((PLAIN, jax.devices("cpu")[0]), (choose_kernels(config.model), first_device())):
        options = {"processors": processors(greedy=True), "model": GPT(config.model, kernels)}
        chunks = sampling.stream(jax.device_put(params, device), prompts, length, keys, **options)
        texts.append(np.concatenate([chunk.token for chunk in chunks], axis=1))
    same = texts[0] == texts[1]
    return {"tokens": same.size, "same": int(same.sum()), "ok": bool(same.all())}


def attention_errors(length: int) -> dict[str, Any]:
    """Errors of the kernel for bfloat16 on this device, cuDNN on recent GPUs. The truth is the equation in float32."""
    config = ModelConfig(num_heads=4, embed_dim=256, context_length=length, dtype="bfloat16")
    kernels, mask = choose_kernels(config), Mask(causal=True)
    shape, keys = (2, length, config.num_heads, config.head_size), jax.random.split(jax.random.key(0), 4)
    *qkv, weights = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)

    def output_and_gradients(attend, dtype):
        def weighted_sum(q, k, v):
            o_BTHK = attend(q, k, v, mask)
            return (o_BTHK.astype(jnp.float32) * weights).sum(), o_BTHK

        inputs = [x.astype(dtype) for x in qkv]
        (_, output), gradients = jax.jit(jax.value_and_grad(weighted_sum, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return {"output": output, "gradients": gradients}

    truth = output_and_gradients(attention, jnp.float32)
    plain, fast = (output_and_gradients(attend, jnp.bfloat16) for attend in (attention, kernels.attention))
    limits = {name: BFLOAT16_FACTOR * relative(plain[name], truth[name]) for name in truth}
    return {"kernels": kernels.name} | {name: check(relative(fast[name], truth[name]), limits[name]) for name in truth}


def against_torch(config: Config) -> dict[str, Any]:
    """The worst difference from the twin on the same device, in float32, relative to its limit in `compare_torch.py`."""
    if importlib.util.find_spec("torch") is None:
        return {"skipped": "torch is not installed"}
    from minigpt_jax.compare import agreement

    use_gpu()
    differences = agreement.compare(config, [random_batch(config)] * 3, choose_kernels(config.model))
    worst = max(differences, key=lambda difference: difference.measured / difference.limit)
    return check(worst.measured, worst.limit) | {"worst": worst.quantity, "comparisons": len(differences)}
