"""Decoding with this project, with the PyTorch twin (no cache), and with Hugging Face (cache)."""

import statistics
from typing import Any

import jax
import numpy as np

from minigpt_jax.benchmarks.baselines import PROMPT_LENGTH, TOP_K, HuggingFace, TorchRecompute
from minigpt_jax.benchmarks.interleave import Variant, installed, interleave, milliseconds, with_spread
from minigpt_jax.benchmarks.roofline import Copy, in_giga, rates
from minigpt_jax.benchmarks.train import kernels_by_name
from minigpt_jax.config import ModelConfig
from minigpt_jax.generation import sampling
from minigpt_jax.generation.strategy import processors
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.system.devices import use_two_cpu_devices
from minigpt_jax.system.heap import retain_heap

# GPT-2's architecture, so that all three compute the same.
MODEL = ModelConfig(
    num_layers=6, num_heads=8, embed_dim=256, ff_dim=1024, context_length=256, vocab_size=65, positions="learned",
    norm="layernorm", activation="gelu", qk_norm=False, tie_embeddings=True, bias=True, init="gpt2",
)  # fmt: skip
ROUNDS = 7
NUM_TOKENS = 200
BATCH_SIZES = 1, 16


class MiniGPT:
    """This project's sampling loop."""

    name, needs = "minigpt_jax", "jax"

    def __init__(self, config: ModelConfig, batch_size: int, num_tokens: int, kernels: str = "tuned"):
        retain_heap()
        use_two_cpu_devices()
        model = GPT(config, kernels_by_name(kernels, config))
        params = jax.jit(init_params, static_argnames="model")(jax.random.key(0), model=model)
        prompts = [np.arange(PROMPT_LENGTH, dtype=np.int32)] * batch_size
        keys = sampling.row_keys(jax.random.key(0), range(batch_size))
        options = {"model": model, "devices": jax.local_devices()}
        self.run = lambda: list(sampling.stream(params, prompts, num_tokens, keys, processors(top_k=TOP_K), **options))


def bytes_per_step(config: ModelConfig, batch_size: int, num_positions: float) -> float:
    """The bytes that a decoding step must read: all weights once, and the cached keys and values, in float32."""
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), GPT(config)))
    cached = 2 * config.num_layers * batch_size * num_positions * config.kv_heads * config.head_size
    return 4 * (sum(leaf.size for leaf in jax.tree.leaves(params)) + cached)


def measure(rounds: int, kernels: str = "tuned") -> dict:
    """Prints a table for each batch size, and returns the figures."""
    candidates = installed((Copy, Variant(MiniGPT, MiniGPT.name, {"kernels": kernels}), TorchRecompute, HuggingFace))
    print(f"{MODEL.num_layers} layers × {MODEL.embed_dim}, {NUM_TOKENS} tokens, top-k {TOP_K}, float32, interleaved runs;\n"
          f"ms/step: median (min–max); speed-up: of {MiniGPT.name} over each row")  # fmt: skip
    figures = {}
    for batch_size in BATCH_SIZES:
        results = interleave(candidates, (MODEL, batch_size, NUM_TOKENS), rounds)
        bandwidths = rates(results.pop(Copy.name))
        bandwidth = statistics.median(bandwidths)
        print(f"\n{f'batch {batch_size}':<20}{'ms/step':<28}speed-up   tokens/s   startup   peak memory")
        our_ms = statistics.median(milliseconds(results[MiniGPT.name], NUM_TOKENS))
        for name, runs in results.items():
            values = milliseconds(runs, NUM_TOKENS)
            median = statistics.median(values)
            print(f"{name:<20}{with_spread(values):<28}{median / our_ms:8.1f}{1000 * batch_size / median:11.0f}"
                  f"{runs[0]['since_start']:8.1f} s{runs[-1]['peak_mb']:11.0f} MB")  # fmt: skip
        bound = 1000 * bytes_per_step(MODEL, batch_size, PROMPT_LENGTH + NUM_TOKENS / 2) / bandwidth
        print(f"{MiniGPT.name} reaches {bound / our_ms:.0%} of the bandwidth bound: reading weights and cache takes "
              f"{bound:.2f} ms at the bandwidth of a copy, {in_giga(bandwidths)} GB/s")  # fmt: skip
        figures[f"batch_{batch_size}"] = {"answers": results, "bound_ms": bound, "copy_bandwidths": bandwidths}
    return figures


def draw(figures: dict, axes_of: Any) -> None:
    from minigpt_jax.benchmarks.plots import bars

    for batch_size in BATCH_SIZES:
        measured = figures[f"batch_{batch_size}"]
        values = {name: milliseconds(runs, NUM_TOKENS) for name, runs in measured["answers"].items()}
        label = "reading weights and cache at the bandwidth of a copy"
        bars(axes_of(f"Decoding step, batch {batch_size}, ms"), values, measured["bound_ms"], label)
