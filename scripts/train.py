"""Trains a model, or resumes a run.

python scripts/train.py                                         Shakespeare, character by character
python scripts/train.py --config mini_gpt --epochs 5            another preset
python scripts/train.py --dataset my_text.txt --workdir runs/mine
python scripts/train.py --init_from runs/mine --workdir runs/2  starts from the weights of a run, a GPT-2 or a Llama
python scripts/train.py --max_minutes 30                        stops after 30 minutes; the same command resumes

Presets override some of the defaults below; without --config, the preset is shakespeare_char.
Ctrl-C, SIGTERM and closing the terminal finish the step, save a checkpoint and stop; a second Ctrl-C or SIGTERM stops
immediately.
"""

import logging
from pathlib import Path

from absl import flags

import minigpt_jax as mg
from minigpt_jax import cli
from minigpt_jax.config import load_preset
from minigpt_jax.errors import UsageError
from minigpt_jax.interop import load
from minigpt_jax.runs import checkpoints

CONFIG = flags.DEFINE_string(
    "config", None, "preset in configs/, or the path of a .py file with get_config() (default: shakespeare_char)"
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: runs/NAME_OF_THE_CONFIG)")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace the run in the folder, if there is one")
MAX_MINUTES = flags.DEFINE_float("max_minutes", None, "stop after this many minutes, with a checkpoint to resume from")
TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "also write the metrics for TensorBoard to the run's folder")
PROFILE = flags.DEFINE_bool(
    "profile", False, "save a trace of some steps in the run's folder, and log which operations took longest"
)
KERNELS = cli.define_kernels_flag()
cli.define_precision_flag()
cli.define_setting_flags()

log = logging.getLogger("minigpt_jax.train")


def main() -> None:
    if MAX_MINUTES.value is not None and not MAX_MINUTES.value > 0:
        raise UsageError(f"max_minutes={MAX_MINUTES.value} must be greater than 0")
    preset = CONFIG.value or "shakespeare_char"
    workdir = cli.given_or(WORKDIR.value, cli.RUNS_DIR / Path(preset).stem)
    given = cli.given_settings()
    # Without --config, an existing run keeps its own settings.
    keeps_settings = CONFIG.value is None and (workdir / "config.json").exists() and not OVERWRITE.value
    config = load.read_run_config(workdir) if keeps_settings else load_preset(preset)
    if keeps_settings and not checkpoints.steps(workdir):
        log.info("%s has no checkpoint yet: restarting with its settings. Use --overwrite to discard them.", workdir)
    keeps_model = keeps_settings and given.get("init_from", config.training.init_from) == config.training.init_from
    mg.train(
        config.override(given) if keeps_model else load.override(config, given),
        workdir,
        OVERWRITE.value,
        kernels=KERNELS.value,
        max_minutes=MAX_MINUTES.value,
        tensorboard=TENSORBOARD.value,
        profile=PROFILE.value,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
