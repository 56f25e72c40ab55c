"""Trains the same model in JAX and in PyTorch, step by step, and prints how far apart they ever are. Needs the extra torch.

python scripts/compare_torch.py
python scripts/compare_torch.py --config nanogpt_cpu --steps 50 --activation swiglu

Both get the same initial weights and the same batches, without dropout and in float32. Exits with 1, naming the first place,
where something differs by more than its limit.
"""

import importlib.util

from absl import flags

from minigpt_jax import cli
from minigpt_jax.api import choose_kernels
from minigpt_jax.config import Config, load_preset
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.tasks import prepare

CONFIG = flags.DEFINE_string("config", "shakespeare_char", "a preset in configs/, or the path of a .py file")
cli.define_setting_flags()

ROUNDS, STEPS_PER_ROUND = 5, 10


def main() -> None:
    if importlib.util.find_spec("torch") is None:
        raise UsageError("this compares with PyTorch: python -m pip install -e '.[torch]'")
    from minigpt_jax.compare.agreement import compare

    config = load_preset(CONFIG.value).override({"steps": 20} | cli.given_settings())
    task = prepare(config.override({"dropout": 0.0, "dtype": "float32"}))
    all_batches = [task.batch_at(step) for step in range(task.num_steps)]
    found = compare(task.config, all_batches, choose_kernels(task.config.model))
    print(f"{'':<58}{'absolute':>10}{'relative':>10}{'limit':>14}")
    for difference in found:
        limit = f"{difference.limit:.0e} {'rel.' if difference.is_relative else 'abs.'}"
        line = f"{difference.place:<58}{difference.absolute:10.1e}{difference.relative:10.1e}{limit:>14}"
        print(line + ("" if difference.is_within else "   DIFFERS"))
    time_both(task.config)
    if beyond := [difference for difference in found if not difference.is_within]:
        first = beyond[0]
        raise DataError(
            f"the twins differ first in {first.place}: by {first.measured:.1e}, where {first.limit:.0e} is allowed"
        )
    print(f"all {len(found)} comparisons are within their limits")


def time_both(config: Config) -> None:
    """Prints the tokens per second of both, taken in turn."""
    from minigpt_jax.benchmarks import interleave
    from minigpt_jax.benchmarks.baselines import TorchStep
    from minigpt_jax.benchmarks.train import Step

    answers = interleave.interleave((Step, TorchStep), (config, STEPS_PER_ROUND), ROUNDS)
    num_tokens = config.training.batch_size * config.model.context_length
    print(f"\n{'tokens/s, in turn':<20}median (least to most)")
    for name, told in answers.items():
        rates = [1000 * num_tokens / milliseconds for milliseconds in interleave.milliseconds(told, STEPS_PER_ROUND)]
        print(f"{name:<20}{interleave.with_spread(rates)}")


if __name__ == "__main__":
    cli.run(main, __doc__)
