"""Trains a model, or goes on with a run that was stopped.

python scripts/train.py                                         Shakespeare, character by character
python scripts/train.py --config mini_gpt --epochs 5            another preset
python scripts/train.py --dataset my_text.txt --workdir runs/mine
"""

from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.config import load_preset
from minigpt_jax.training import checkpoint
from minigpt_jax.training.loop import train

CONFIG = flags.DEFINE_string(
    "config", None, "a preset in configs/, or the path of a .py file with get_config() (default shakespeare_char)"
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default runs/NAME OF THE CONFIG)")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "begin anew in a folder that has a run")
cli.define_setting_flags()


def main() -> None:
    preset = CONFIG.value or "shakespeare_char"
    workdir = Path(WORKDIR.value or cli.RUNS_DIR / Path(preset).stem)
    if CONFIG.value is None and (workdir / "config.json").exists() and not OVERWRITE.value:
        config = checkpoint.read_config(workdir)  # resuming takes the run's own settings where none are given
    else:
        config = load_preset(preset)
    train(config.override(cli.given_settings()), workdir, OVERWRITE.value)


if __name__ == "__main__":
    cli.run(main, __doc__)
