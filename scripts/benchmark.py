"""Measures this project, and others beside it, on this machine, in turn, in one run.

python scripts/benchmark.py train             a training step; needs the extra torch for the others
python scripts/benchmark.py generate          tokens per second of decoding; needs the extras torch and hf for the others
python scripts/benchmark.py data              tokenizing, and what training waits for batches, also from a file above memory

Each contestant lives in a process of its own and is asked in turn, A B C A B C …, so that a machine that gets slower or
faster in between does so for all. What is compared are medians; the spread is given beside.
"""

import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from absl import flags

from minigpt_jax import cli, machine
from minigpt_jax.config import Config, load_preset
from minigpt_jax.data.batches import batch_at
from minigpt_jax.data.texts import find_text, scan
from minigpt_jax.data.tokenizers import KINDS, make_tokenizer
from minigpt_jax.data.tokens import map_ids, tokenize
from minigpt_jax.errors import UsageError, did_you_mean
from minigpt_jax.runtime import keep_freed_memory
from minigpt_jax.training.report import flops_per_token

ROUNDS = flags.DEFINE_integer("rounds", 7, "how often each contestant is asked")
MEGABYTES = flags.DEFINE_integer("megabytes", 50, "data: size of the text that is tokenized")
JSON = flags.DEFINE_string("json", None, "also write the figures to this file")

NUM_LAYERS, NUM_HEADS, EMBED_DIM, CONTEXT_LENGTH, VOCAB_SIZE = 6, 8, 256, 256, 65
PROMPT_LENGTH, NUM_TOKENS, TOP_K = 10, 200, 40


class MiniGPT:
    """This project's sampling loop."""

    name, needs = "minigpt_jax", "jax"

    def __init__(self, batch_size: int):
        import jax
        import numpy as np

        from minigpt_jax.config import ModelConfig
        from minigpt_jax.generation import sampler
        from minigpt_jax.generation.logits import processors
        from minigpt_jax.models.gpt import GPT, init_params

        keep_freed_memory()
        config = ModelConfig(
            num_layers=NUM_LAYERS, num_heads=NUM_HEADS, embed_dim=EMBED_DIM, ff_dim=4 * EMBED_DIM,
            context_length=CONTEXT_LENGTH, vocab_size=VOCAB_SIZE, positions="learned", norm="layernorm", activation="gelu",
            qk_norm=False, bias=True,
        )  # fmt: skip
        model = GPT(config)
        params = jax.jit(init_params, static_argnames="model")(jax.random.key(0), model=model)
        prompts = [np.arange(PROMPT_LENGTH, dtype=np.int32)] * batch_size
        keys = sampler.row_keys(jax.random.key(0), range(batch_size))
        self.run = lambda: list(sampler.stream(params, prompts, NUM_TOKENS, keys, processors(top_k=TOP_K), model=model))
        cache_bytes = 2 * NUM_LAYERS * batch_size * (PROMPT_LENGTH + NUM_TOKENS // 2) * EMBED_DIM * 4  # on average
        self.bytes_per_step = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + cache_bytes


class TorchRecompute:
    """A plain PyTorch GPT that runs the whole text anew for each token."""

    name, needs = "PyTorch, all anew", "torch"

    def __init__(self, batch_size: int):
        import torch
        from torch import nn
        from torch.nn import functional as F  # noqa: N812

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm_1, self.norm_2 = nn.LayerNorm(EMBED_DIM), nn.LayerNorm(EMBED_DIM)
                self.qkv, self.out = nn.Linear(EMBED_DIM, 3 * EMBED_DIM), nn.Linear(EMBED_DIM, EMBED_DIM)
                self.up, self.down = nn.Linear(EMBED_DIM, 4 * EMBED_DIM), nn.Linear(4 * EMBED_DIM, EMBED_DIM)

            def forward(self, x):
                B, T, D = x.shape
                q, k, v = (
                    part.view(B, T, NUM_HEADS, D // NUM_HEADS).transpose(1, 2)
                    for part in self.qkv(self.norm_1(x)).split(EMBED_DIM, dim=2)
                )
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
                return x + self.down(F.gelu(self.up(self.norm_2(x))))

        tokens, positions = nn.Embedding(VOCAB_SIZE, EMBED_DIM), nn.Embedding(CONTEXT_LENGTH, EMBED_DIM)
        blocks = nn.Sequential(*(Block() for _ in range(NUM_LAYERS)), nn.LayerNorm(EMBED_DIM))
        head = nn.Linear(EMBED_DIM, VOCAB_SIZE, bias=False)

        @torch.no_grad()
        def run():
            text = torch.arange(PROMPT_LENGTH).repeat(batch_size, 1)
            for _ in range(NUM_TOKENS):
                seen = text[:, -CONTEXT_LENGTH:]
                x = blocks(tokens(seen) + positions(torch.arange(seen.shape[1])))
                logits = head(x[:, -1])
                logits[logits < torch.topk(logits, TOP_K).values[:, -1:]] = -torch.inf
                text = torch.cat([text, torch.multinomial(F.softmax(logits, dim=-1), 1)], dim=1)

        self.run = run


class HuggingFace:
    """Hugging Face's GPT-2 and its `generate`, with its cache."""

    name, needs = "Hugging Face, cache", "transformers"

    def __init__(self, batch_size: int):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=NUM_LAYERS, n_head=NUM_HEADS, n_embd=EMBED_DIM, n_positions=CONTEXT_LENGTH, vocab_size=VOCAB_SIZE,
                bos_token_id=None, eos_token_id=None,
            )
        ).train(False)  # fmt: skip
        prompt = torch.arange(PROMPT_LENGTH).repeat(batch_size, 1)
        self.run = lambda: model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NUM_TOKENS,
            do_sample=True,
            top_k=TOP_K,
            use_cache=True,
        )


CONTESTANTS = (MiniGPT, TorchRecompute, HuggingFace)


def serve(contestant: type, setup: int | str, connection) -> None:
    """A contestant's process: gets ready, then runs once for each request and answers with seconds and megabytes."""
    runner = contestant(setup)
    began = time.perf_counter()
    runner.run()  # compiles, and warms what there is to warm
    connection.send({"first": time.perf_counter() - began, "bytes_per_step": getattr(runner, "bytes_per_step", None)})
    while connection.recv():
        began = time.perf_counter()
        runner.run()
        seconds = time.perf_counter() - began
        connection.send((seconds, machine.peak_megabytes()))


def present(contestants: tuple[type, ...]) -> list[type]:
    """Those of them whose packages are installed; says which are left out."""
    for contestant in contestants:
        if not importlib.util.find_spec(contestant.needs):
            print(f"{contestant.name} is left out: {contestant.needs} is not installed")
    return [contestant for contestant in contestants if importlib.util.find_spec(contestant.needs)]


def race(contestants: list[type], setup: int | str, rounds: int) -> dict[str, dict]:
    """Seconds of each contestant's runs, taken in turn, and what else it tells. All are made with the same `setup`."""
    spawn = multiprocessing.get_context("spawn")
    lanes = {}
    for contestant in contestants:
        here, there = spawn.Pipe()
        process = spawn.Process(target=serve, args=(contestant, setup, there), daemon=True)
        process.start()
        there.close()  # so that a contestant that dies ends the wait for it
        lanes[contestant.name] = (here, process, here.recv())
    results = {name: {**ready, "seconds": []} for name, (_, _, ready) in lanes.items()}
    for _ in range(rounds):
        for name, (here, _, _) in lanes.items():
            here.send(True)
            seconds, results[name]["peak_mb"] = here.recv()
            results[name]["seconds"].append(seconds)
    for here, process, _ in lanes.values():
        here.send(False)
        process.join()
    return results


def generate() -> dict:
    """Prints a table for batches of 1 and 16, and returns its figures."""
    contestants = present(CONTESTANTS)
    bandwidth = machine.copy_bandwidth()
    print(f"{NUM_LAYERS} layers, {EMBED_DIM} wide, {NUM_TOKENS} tokens, top-k {TOP_K}, float32, {os.cpu_count()} CPUs; "
          f"copying goes at {bandwidth / 1e9:.1f} GB/s")  # fmt: skip
    figures = {"bandwidth": bandwidth}
    for batch_size in (1, 16):
        results = race(contestants, batch_size, ROUNDS.value)
        ours = statistics.median(results[MiniGPT.name]["seconds"])
        print(f"\nbatch {batch_size:<12} ms/token   (min to max)   times ours   first run   peak memory")
        for name, result in results.items():
            milliseconds = [1000 * seconds / NUM_TOKENS for seconds in result["seconds"]]
            median = statistics.median(milliseconds)
            print(
                f"{name:<20}{median:7.2f}   ({min(milliseconds):.2f} to {max(milliseconds):.2f})"
                f"{median / (1000 * ours / NUM_TOKENS):10.1f}{result['first']:12.1f} s{result['peak_mb']:10.0f} MB"
            )
        bound = results[MiniGPT.name]["bytes_per_step"] / bandwidth
        share = bound / (ours / NUM_TOKENS)
        print(
            f"reading weights and cache alone would take {1000 * bound:.2f} ms/token: {share:.0%} of that bound is reached"
        )
        figures[f"batch_{batch_size}"] = {"results": results, "share_of_bandwidth_bound": share}
    return figures


# ---- Training -------------------------------------------------------------------------------------------------------------

TRAINED = {"nanogpt_cpu": (12, 20), "mini_gpt": (8, 2)}  # preset: sequences in a batch, steps in a run


def training_setup(preset: str) -> tuple[Config, int, dict]:
    """The preset without dropout, the number of steps in a run, and a random batch."""
    import numpy as np

    batch_size, num_steps = TRAINED[preset]
    config = load_preset(preset).override({"vocab_size": VOCAB_SIZE, "batch_size": batch_size, "dropout": 0.0})
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=(batch_size, config.model.context_length + 1))
    batch = {"inputs_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "mask_BT": np.ones_like(tokens[:, 1:], bool)}
    return config, num_steps, batch


class Step:
    """This project's training step."""

    name, needs = "minigpt_jax", "jax"

    def __init__(self, preset: str):
        import jax

        from minigpt_jax.models.gpt import GPT
        from minigpt_jax.training.optimizer import make_optimizer
        from minigpt_jax.training.step import init_state, train_step

        self.choose_means()
        config, num_steps, batch = training_setup(preset)
        model, optimizer, key = GPT(config.model), make_optimizer(config.training, 1000), jax.random.key(0)
        self.state = init_state(key, model=model, optimizer=optimizer)

        def run():
            for _ in range(num_steps):
                self.state, _ = train_step(self.state, batch, key, model=model, optimizer=optimizer)
            jax.block_until_ready(self.state)

        self.run = run

    def choose_means(self) -> None:
        keep_freed_memory()


class PlainStep(Step):
    """The same without what makes it fast: memory goes back to the system, gradients of dense layers are JAX's own, and
    attention computes the scores of the future too."""

    name = "plain Linen step"

    def choose_means(self) -> None:
        from minigpt_jax.models import attention, layers

        layers.matmul = lambda x, kernel_DF: x @ kernel_DF
        attention.BLOCK = 10**9  # positions: no text is as long, so the equation as it stands computes all


class TorchStep:
    """The PyTorch twin's training step."""

    name, needs = "PyTorch eager", "torch"

    def __init__(self, preset: str):
        import torch

        from minigpt_jax.compare import torch_gpt

        config, num_steps, batch = training_setup(preset)
        model = torch_gpt.GPT(config.model)
        optimizer, schedule = torch_gpt.make_optimizer(config.training, model, 1000)
        inputs_BT, targets_BT = (torch.tensor(batch[name]) for name in ("inputs_BT", "targets_BT"))
        called = self.prepare(model)

        def run():
            for _ in range(num_steps):
                torch_gpt.train_step(called, optimizer, schedule, inputs_BT, targets_BT, config.training.grad_clip)

        self.run = run

    def prepare(self, model):
        return model


class TorchCompiledStep(TorchStep):
    """The PyTorch twin's training step with its model compiled."""

    name = "PyTorch compiled"

    def prepare(self, model):
        import torch

        return torch.compile(model)


def train() -> dict:
    """Prints a table for each preset, and returns its figures."""
    contestants = present((Step, PlainStep, TorchStep, TorchCompiledStep))
    rate, _ = in_own_process(machine.product_rate)
    print(f"float32, no dropout, {os.cpu_count()} CPUs; a large product of matrices goes at {rate / 1e9:.0f} GFLOP/s")
    figures = {"product_rate": rate}
    for preset, (batch_size, num_steps) in TRAINED.items():
        config, _, batch = training_setup(preset)
        num_tokens = batch["inputs_BT"].size
        flops = num_tokens * flops_per_token(config.model)
        results = race(contestants, preset, ROUNDS.value)
        ours = statistics.median(results[Step.name]["seconds"])
        print(f"\n{preset}, batch {batch_size:<5} ms/step     (min to max)   times ours   tokens/s   of the rate"
              f"   first run   peak memory")  # fmt: skip
        for name, result in results.items():
            milliseconds = [1000 * seconds / num_steps for seconds in result["seconds"]]
            median = statistics.median(milliseconds)
            print(
                f"{name:<20}{median:9.1f}   ({min(milliseconds):.1f} to {max(milliseconds):.1f})"
                f"{median / (1000 * ours / num_steps):10.2f}{1000 * num_tokens / median:12.0f}"
                f"{1000 * flops / median / rate:13.0%}{result['first']:12.1f} s{result['peak_mb']:10.0f} MB"
            )
        figures[preset] = {"results": results, "model_flops": flops}
    return figures


# ---- Data -----------------------------------------------------------------------------------------------------------------

NUM_STEPS = 200


def in_own_process(function, *arguments):
    """What the function returns, and the peak of its memory in MB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(), pool.submit(machine.peak_megabytes).result()


def write_sources(path: Path, megabytes: int) -> None:
    """A text with many different words: the Python sources on this machine, from the beginning again if they are too few."""
    left = megabytes * 1_000_000
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            for source in sources:
                text = source.read_text(encoding="utf-8", errors="ignore").replace("\0", "")[: max(left, 0)]
                left -= file.write(text)


def time_passes(kind: str, path: Path) -> dict[str, float]:
    """Seconds that each pass over a text takes."""
    text, times = find_text(str(path)), [time.perf_counter()]
    seen = scan(text)
    times.append(time.perf_counter())
    tokenizer = make_tokenizer(kind, (piece for _, piece in text.pieces()))
    times.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        tokenize(text, seen, tokenizer, Path(folder))
        times.append(time.perf_counter())
    return dict(zip(("reading", "learning", "tokenizing"), (b - a for a, b in itertools.pairwise(times)), strict=True))


def feed(path: Path, rounds: int) -> dict[str, float]:
    """Median seconds of a step of the default preset, and of reading its batch from a token file; and of the first batch."""
    import jax
    import numpy as np

    from minigpt_jax.models.gpt import GPT
    from minigpt_jax.training.optimizer import make_optimizer
    from minigpt_jax.training.step import init_state, train_step

    keep_freed_memory()
    config = load_preset("shakespeare_char").override({"vocab_size": VOCAB_SIZE})
    model, optimizer = GPT(config.model), make_optimizer(config.training, NUM_STEPS)
    key = jax.random.key(0)
    state = init_state(key, model=model, optimizer=optimizer)
    tokens = map_ids(path, np.dtype("<u2"))
    reading, training = [], []
    for step in range(rounds * NUM_STEPS):
        began = time.perf_counter()
        batch = batch_at(tokens, config.model.context_length, config.training.batch_size, 0, step)
        read = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, batch, key, model=model, optimizer=optimizer))
        reading.append(read - began)
        training.append(time.perf_counter() - read)
    return {"first": reading[0], "reading": statistics.median(reading[1:]), "training": statistics.median(training[1:])}


def data() -> dict:
    """Prints the rates of every tokenizer, then what a step waits for its batch; returns the figures."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        write_sources(text, MEGABYTES.value)
        size = text.stat().st_size / 1e6
        runs = [{kind: in_own_process(time_passes, kind, text) for kind in KINDS} for _ in range(ROUNDS.value)]
        print(f"{size:.0f} MB of Python sources, {os.cpu_count()} CPUs; MB/s, median (min to max) of {len(runs)} rounds")
        print("tokenizer   reading     learning    tokenizing                 peak memory")
        for kind in KINDS:
            rates = {name: [size / run[kind][0][name] for run in runs] for name in runs[0][kind][0]}
            medians = {name: statistics.median(values) for name, values in rates.items()}
            spread = f"({min(rates['tokenizing']):.1f} to {max(rates['tokenizing']):.1f})"
            peak = max(run[kind][1] for run in runs)
            print(
                f"{kind:<10}{medians['reading']:9.0f}{'-' if kind == 'byte' else round(medians['learning']):>13}"
                f"{medians['tokenizing']:14.1f} {spread:<18}"
                f"{peak:9.0f} MB"
            )
            figures[kind] = {"megabytes_per_second": rates, "peak_mb": peak}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print("\ntoken file   first batch   a batch      a step       share   peak memory")
    for name, num_bytes in (("10 MB", 10_000_000), (f"{2 * memory / 1e9:.0f} GB, sparse", 2 * memory)):
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(num_bytes)
            times, peak = in_own_process(feed, Path(file.name), ROUNDS.value)
        share = times["reading"] / (times["reading"] + times["training"])
        print(
            f"{name:<14}{times['first']:9.3f} s{1e3 * times['reading']:10.3f} ms{1e3 * times['training']:10.2f} ms"
            f"{share:9.2%}{peak:10.0f} MB"
        )
        figures[f"feeding from {name}"] = times | {"peak_mb": peak}
    return figures


BENCHMARKS = {"train": train, "generate": generate, "data": data}


def main(names: list[str]) -> None:
    for name in names:
        if name not in BENCHMARKS:
            raise UsageError(f"no benchmark {name!r}{did_you_mean(name, BENCHMARKS)}; there are: {', '.join(BENCHMARKS)}")
    for name, value in (("rounds", ROUNDS.value), ("megabytes", MEGABYTES.value)):
        if value < 1:
            raise UsageError(f"{name}={value} must be at least 1")
    figures = {name: BENCHMARKS[name]() for name in names or BENCHMARKS}
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, __doc__, positional=True)
