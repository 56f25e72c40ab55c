"""Trains the same model in JAX and in PyTorch, step by step, and prints how much they differ. Needs the extra torch.

python scripts/compare_torch.py
python scripts/compare_torch.py --config nanogpt_cpu --steps 50 --activation swiglu

Both get the same initial weights and the same batches, in float32 and without dropout. Exits with status 1 if a quantity
differs by more than its limit, and names the first one.
"""

import importlib.util

from absl import flags

from minigpt_jax import cli
from minigpt_jax.api import choose_kernels
from minigpt_jax.commands import install_command
from minigpt_jax.config import Config, load_preset
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.tasks import prepare

CONFIG = flags.DEFINE_string("config", "shakespeare_char", "a preset in configs/, or the path of a .py file")
cli.define_setting_flags()

ROUNDS, STEPS_PER_ROUND = 5, 10


def main() -> None:
    config = load_preset(CONFIG.value).override({"steps": 20} | cli.given_settings())
    if config.task != "language_modelling":
        raise UsageError(f"{CONFIG.value} is a preset of the task {config.task}, but the twin is a GPT")
    if importlib.util.find_spec("torch") is None:
        raise UsageError(f"comparing with PyTorch needs torch: {install_command('torch')}")
    from minigpt_jax.compare.agreement import compare

    task = prepare(config.override({"dropout": 0.0, "dtype": "float32"}))
    batches = [task.batch_at(step) for step in range(task.num_steps)]
    differences = compare(task.config, batches, choose_kernels(task.config.model))
    print(f"{'':<58}{'absolute':>10}{'relative':>10}{'limit':>14}")
    for difference in differences:
        limit = f"{difference.limit:.0e} {'rel.' if difference.is_relative else 'abs.'}"
        line = f"{difference.quantity:<58}{difference.absolute:10.1e}{difference.relative:10.1e}{limit:>14}"
        print(line + ("" if difference.is_within_limit else "   DIFFERS"))
    time_both(task.config)
    if exceeded := [difference for difference in differences if not difference.is_within_limit]:
        first = exceeded[0]
        raise DataError(
            f"JAX and PyTorch differ in {first.quantity}: by {first.measured:.1e}, more than the limit of {first.limit:.0e}"
        )
    print(f"All {len(differences)} comparisons are within their limits.")


def time_both(config: Config) -> None:
    """Prints the training throughput of both, measured in interleaved runs."""
    from minigpt_jax.benchmarks import interleave
    from minigpt_jax.benchmarks.baselines import TorchStep
    from minigpt_jax.benchmarks.train import Step

    results = interleave.interleave((Step, TorchStep), (config, STEPS_PER_ROUND), ROUNDS)
    num_tokens = config.training.batch_size * config.model.context_length
    print(f"\n{'tokens/s':<20}median (min–max), interleaved")
    for name, runs in results.items():
        throughputs = [1000 * num_tokens / ms for ms in interleave.milliseconds(runs, STEPS_PER_ROUND)]
        print(f"{name:<20}{interleave.with_spread(throughputs)}")


if __name__ == "__main__":
    cli.run(main, __doc__)
