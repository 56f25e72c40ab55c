"""Trains every combination of some settings, and compares the losses: a table, and a plot with bands (extra plot).

python scripts/sweep.py --config shakespeare_char --vary learning_rate=1e-3,2e-3,4e-3 --vary seed=0,1,2,3,4 --steps 500
python scripts/sweep.py --config debug --vary norm=rmsnorm,layernorm --vary seed=0,1,2 --workdir runs/sweeps/norms

Runs that differ only in numbers, such as the learning rate, share a compiled step. They are trained side by side if a
measured step is then faster, otherwise one after another. Each finished run is a line of results.jsonl, and no checkpoints
are written. The same command resumes; with more values it trains the runs that are missing. Losses are those of the last
step on the whole validation split.
"""

from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.config import load_preset
from minigpt_jax.errors import UsageError
from minigpt_jax.experiments import sweep_report
from minigpt_jax.experiments.grid import parse
from minigpt_jax.experiments.sweep import sweep
from minigpt_jax.interop import load
from minigpt_jax.runs import plots

CONFIG = flags.DEFINE_string("config", "shakespeare_char", "preset in configs/, or the path of a .py file with get_config()")
VARY = flags.DEFINE_multi_string("vary", [], "a setting and its values, as in learning_rate=1e-3,2e-3; can be repeated")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the sweep (default: runs/sweeps/NAME_OF_THE_CONFIG)")
STACK = flags.DEFINE_integer(
    "stack", None, "runs to train side by side; 1: one after another (default: what is faster, as measured)"
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace the sweep in the folder, if there is one")
KERNELS = cli.define_kernels_flag()
cli.define_precision_flag()
cli.define_setting_flags()


def main() -> None:
    workdir = cli.given_or(WORKDIR.value, cli.RUNS_DIR / "sweeps" / Path(CONFIG.value).stem)
    given = cli.given_settings()
    config = load.override(load_preset(CONFIG.value), given)
    vary = parse(VARY.value, config)
    if both := given.keys() & vary:
        raise UsageError(f"{', '.join(sorted(both))}: give a value, or values to --vary, but not both")
    results = sweep(config, vary, workdir, stack=STACK.value, overwrite=OVERWRITE.value, kernels=KERNELS.value)
    print(sweep_report.table(results))
    plots.save_if_possible(lambda: sweep_report.draw(results, vary), workdir / "sweep.png")


if __name__ == "__main__":
    cli.run(main, __doc__)
