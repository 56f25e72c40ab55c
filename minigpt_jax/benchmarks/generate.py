"""Decoding: this project's loop, the PyTorch twin that computes everything anew, and Hugging Face with its cache."""

import statistics
from typing import Any

import jax
import numpy as np

from minigpt_jax.benchmarks.baselines import PROMPT_LENGTH, TOP_K, HuggingFace, TorchRecompute
from minigpt_jax.benchmarks.interleave import With, interleave, milliseconds, present, with_spread
from minigpt_jax.benchmarks.roofline import Copy, in_giga, rates
from minigpt_jax.benchmarks.train import kernels_called
from minigpt_jax.config import ModelConfig
from minigpt_jax.generation import sampling
from minigpt_jax.generation.strategy import processors
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.system.devices import use_two_cpu_devices
from minigpt_jax.system.heap import retain_heap

# The shape of GPT-2, so that all three compute the same.
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
        model = GPT(config, kernels_called(kernels, config))
        params = jax.jit(init_params, static_argnames="model")(jax.random.key(0), model=model)
        prompts = [np.arange(PROMPT_LENGTH, dtype=np.int32)] * batch_size
        keys = sampling.row_keys(jax.random.key(0), range(batch_size))
        how = {"model": model, "devices": jax.local_devices()}
        self.run = lambda: list(sampling.stream(params, prompts, num_tokens, keys, processors(top_k=TOP_K), **how))


def bytes_per_step(config: ModelConfig, batch_size: int, num_positions: float) -> float:
    """What a decoding step cannot do without reading: all weights once, and what the cache holds, in float32."""
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), GPT(config)))
    cached = 2 * config.num_layers * batch_size * num_positions * config.kv_heads * config.head_size
    return 4 * (sum(leaf.size for leaf in jax.tree.leaves(params)) + cached)


def measure(rounds: int, kernels: str = "tuned") -> dict:
    """Prints a table for batches of 1 and 16, and returns the figures."""
    candidates = present((Copy, With(MiniGPT, MiniGPT.name, {"kernels": kernels}), TorchRecompute, HuggingFace))
    print(f"{MODEL.num_layers} layers, {MODEL.embed_dim} wide, {NUM_TOKENS} tokens, top-k {TOP_K}, float32, all in turn")
    figures = {}
    for batch_size in BATCH_SIZES:
        answers = interleave(candidates, (MODEL, batch_size, NUM_TOKENS), rounds)
        bandwidths = rates(answers.pop(Copy.name))
        bandwidth = statistics.median(bandwidths)
        print(f"\n{f'batch {batch_size}':<20}{'ms a step':<28}of ours   tokens/s       start   peak memory")
        ours = statistics.median(milliseconds(answers[MiniGPT.name], NUM_TOKENS))
        for name, told in answers.items():
            values = milliseconds(told, NUM_TOKENS)
            median = statistics.median(values)
            print(f"{name:<20}{with_spread(values):<28}{median / ours:7.1f}{1000 * batch_size / median:11.0f}"
                  f"{told[0]['since_start']:10.1f} s{told[-1]['peak_mb']:11.0f} MB")  # fmt: skip
        bound = 1000 * bytes_per_step(MODEL, batch_size, PROMPT_LENGTH + NUM_TOKENS / 2) / bandwidth
        print(f"copying goes at {in_giga(bandwidths)} GB/s, by which reading weights and cache alone would take "
              f"{bound:.2f} ms: {bound / ours:.0%} of that bound is reached")  # fmt: skip
        figures[f"batch_{batch_size}"] = {"answers": answers, "bound_ms": bound, "copy_bandwidths": bandwidths}
    return figures


def draw(figures: dict, axes_of: Any) -> None:
    from minigpt_jax.benchmarks.plots import bars

    for batch_size in BATCH_SIZES:
        found = figures[f"batch_{batch_size}"]
        values = {name: milliseconds(told, NUM_TOKENS) for name, told in found["answers"].items()}
        label = "reading weights and cache, at the bandwidth of a copy"
        bars(axes_of(f"A decoding step, batch {batch_size}, ms"), values, found["bound_ms"], label)
