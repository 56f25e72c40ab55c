"""Trains a model, or goes on with a run that was stopped.

python scripts/train.py                                         Shakespeare, character by character
python scripts/train.py --config mini_gpt --epochs 5            another preset
python scripts/train.py --dataset my_text.txt --workdir runs/mine
python scripts/train.py --init_from runs/mine --workdir runs/2  begins with the weights of a run, or of a GPT-2 or Llama
python scripts/train.py --max_minutes 30                        stops in time; the same command goes on

Defaults below are those before a preset; every preset, shakespeare_char too, sets some of them.
Ctrl-C and SIGTERM finish the step, save and stop; a second one stops at once.
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
    "config", None, "a preset in configs/, or the path of a .py file with get_config() (default shakespeare_char)"
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default runs/NAME OF THE CONFIG)")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "begin anew in a folder that has a run")
MAX_MINUTES = flags.DEFINE_float("max_minutes", None, "stop after this time, with a checkpoint from which to go on")
TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "also write the metrics for TensorBoard, into the run's folder")
PROFILE = flags.DEFINE_bool("profile", False, "trace some steps into the run's folder, and tell what took longest")
KERNELS = cli.define_kernels_flag()
cli.define_setting_flags()

log = logging.getLogger("minigpt_jax.train")


def main() -> None:
    if MAX_MINUTES.value is not None and not MAX_MINUTES.value > 0:
        raise UsageError(f"max_minutes={MAX_MINUTES.value} must be above 0")
    if WORKDIR.value == "":
        raise UsageError("workdir is empty; name a folder, or leave it out")
    preset = CONFIG.value or "shakespeare_char"
    workdir = Path(WORKDIR.value or cli.RUNS_DIR / Path(preset).stem)
    given = cli.given_settings()
    goes_on = CONFIG.value is None and (workdir / "config.json").exists() and not OVERWRITE.value
    # Resuming takes the run's own settings where none are given.
    config = load.read_run_config(workdir) if goes_on else load_preset(preset)
    if goes_on and not checkpoints.steps(workdir):
        log.info("%s has no checkpoint yet: begun again with its settings; --overwrite forgets them.", workdir)
    init_from = given.get("init_from", config.training.init_from)
    if init_from and not (goes_on and init_from == config.training.init_from):
        config = config.override(load.settings_from(init_from))
    mg.train(
        config.override(given),
        workdir,
        OVERWRITE.value,
        kernels=KERNELS.value,
        max_minutes=MAX_MINUTES.value,
        tensorboard=TENSORBOARD.value,
        profile=PROFILE.value,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
