"""Searches for the settings with the lowest validation loss, with Optuna (extra tune), and writes them as a preset.

python scripts/tune.py --config shakespeare_char --range learning_rate=1e-4..1e-2 --range num_layers=2,3,4 --minutes 20
python scripts/tune.py --config debug --range dropout=0.01..0.5:linear --range norm=rmsnorm,layernorm --trials 10
python scripts/tune.py --config mini_gpt --range weight_decay=0.01..1 --storage postgresql+psycopg://me@host/studies
python scripts/train.py --config runs/tune/shakespeare_char/best.py --workdir runs/tuned

Each trial is a run, whose settings TPE chooses given the losses of earlier ones. Runs that are worse than the median of the
others at the same step are pruned. Intervals that span more than a factor of ten are sampled on a log scale, others on a
linear one; :log and :linear choose it. Ctrl-C stops after the step, and the same command resumes. So that several processes
work on one study, start the same command several times; on other machines with the same --storage and --workdir.
"""

import shlex
from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.commands import command
from minigpt_jax.config import load_preset
from minigpt_jax.errors import UsageError
from minigpt_jax.experiments.ranges import parse
from minigpt_jax.experiments.tuning import tune
from minigpt_jax.experiments.tuning_report import table
from minigpt_jax.interop import load

CONFIG = flags.DEFINE_string("config", "shakespeare_char", "preset in configs/, or the path of a .py file with get_config()")
RANGE = flags.DEFINE_multi_string(
    "range", [], "a setting and its range, as in learning_rate=1e-4..1e-2 or num_layers=2,3,4; can be repeated"
)
TRIALS = flags.DEFINE_integer("trials", 30, "trials of the study, of all processes together")
MINUTES = flags.DEFINE_float("minutes", None, "stop after this many minutes; the same command resumes")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder for the preset, whose name is the study's (default: runs/tune/NAME_OF_THE_CONFIG)"
)
STORAGE = flags.DEFINE_string(
    "storage", None, "URL of the study's database, as in postgresql+psycopg://USER@HOST/DATABASE (default: an SQLite file)"
)
KERNELS = cli.define_kernels_flag()
cli.define_precision_flag()
cli.define_setting_flags()


def main() -> None:
    workdir, given = cli.given_or(WORKDIR.value, cli.RUNS_DIR / "tune" / Path(CONFIG.value).stem), cli.given_settings()
    config = load.override(load_preset(CONFIG.value), given)
    ranges = parse(RANGE.value, config)
    if both := given.keys() & ranges:
        raise UsageError(f"{', '.join(sorted(both))}: give a value, or values to --range, but not both")
    tuned = [("range", text) for text in RANGE.value]
    options = [("config", CONFIG.value), *tuned, *given.items(), ("trials", TRIALS.value)]
    its_command = " ".join([command("tune"), *(f"--{name}={shlex.quote(str(value))}" for name, value in options)])
    results = tune(
        CONFIG.value, config, ranges, workdir, its_command, trials=TRIALS.value, minutes=MINUTES.value,
        storage=STORAGE.value, kernels=KERNELS.value,
    )  # fmt: skip
    print(table(results))


if __name__ == "__main__":
    cli.run(main, __doc__)
