"""Trains the same model in JAX and in PyTorch, step by step, and prints how far apart they ever are. Needs the extra torch.

python scripts/compare_torch.py
python scripts/compare_torch.py --config nanogpt_cpu --steps 50 --activation swiglu

Both get the same initial weights and the same batches, without dropout and in float32. Exits with 1, naming the first place,
where something differs by more than its limit.
"""

import importlib.util
import statistics
import time

import jax
from absl import flags

from minigpt_jax import cli
from minigpt_jax.config import load_preset
from minigpt_jax.data import batches
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.training.experiment import Experiment, prepare
from minigpt_jax.training.step import train_step

CONFIG = flags.DEFINE_string("config", "shakespeare_char", "a preset in configs/, or the path of a .py file")
cli.define_setting_flags()

ROUNDS, STEPS_PER_ROUND = 5, 10


def main() -> None:
    if importlib.util.find_spec("torch") is None:
        raise UsageError("this compares with PyTorch: python -m pip install -e '.[torch]'")
    from minigpt_jax.compare.agreement import compare

    config = load_preset(CONFIG.value).override({"steps": 20} | cli.given_settings())
    experiment = prepare(config.override({"dropout": 0.0, "dtype": "float32", "grad_accumulation": 1}))
    found = compare(experiment.config, [batch_of(experiment, step) for step in range(experiment.num_steps)])
    print(f"{'':<58}{'absolute':>10}{'relative':>10}{'limit':>14}")
    for difference in found:
        limit = f"{difference.limit:.0e} {'rel.' if difference.is_relative else 'abs.'}"
        line = f"{difference.place:<58}{difference.absolute:10.1e}{difference.relative:10.1e}{limit:>14}"
        print(line + ("" if difference.is_within else "   DIFFERS"))
    race(experiment)
    if beyond := [difference for difference in found if not difference.is_within]:
        first = beyond[0]
        raise DataError(
            f"the twins differ first in {first.place}: by {first.measured:.1e}, where {first.limit:.0e} is allowed"
        )
    print(f"all {len(found)} comparisons are within their limits")


def batch_of(experiment: Experiment, step: int) -> batches.Batch:
    T, training = experiment.model.config.context_length, experiment.config.training
    return batches.batch_at(experiment.splits["train"].ids, T, training.batch_size, training.seed, step)


def race(experiment: Experiment) -> None:
    """Prints the tokens per second of both, taken in turn."""
    from minigpt_jax.compare import torch_gpt
    from minigpt_jax.compare.agreement import make_twin, to_tensors

    batch, settings = batch_of(experiment, 0), experiment.config.training
    state = experiment.new_state()
    twin = make_twin(experiment.config, state.params)
    twin_optimizer, twin_schedule = torch_gpt.make_optimizer(settings, twin, experiment.num_steps)
    tensors = to_tensors(batch)

    def ours() -> None:
        nonlocal state
        for _ in range(STEPS_PER_ROUND):
            state, _ = train_step(state, batch, experiment.root_key, model=experiment.model, optimizer=experiment.optimizer)
        jax.block_until_ready(state)

    def theirs() -> None:
        for _ in range(STEPS_PER_ROUND):
            torch_gpt.train_step(twin, twin_optimizer, twin_schedule, *tensors, settings.grad_clip)

    rates = {"JAX": [], "PyTorch": []}
    for round in range(ROUNDS + 1):
        for name, run in (("JAX", ours), ("PyTorch", theirs)):
            began = time.perf_counter()
            run()
            if round:  # the first compiles
                rates[name].append(STEPS_PER_ROUND * batch["inputs_BT"].size / (time.perf_counter() - began))
    print("\ntokens/s, in turn    median      min      max")
    for name, values in rates.items():
        print(f"{name:<18}{statistics.median(values):9.0f}{min(values):9.0f}{max(values):9.0f}")


if __name__ == "__main__":
    cli.run(main, __doc__)
