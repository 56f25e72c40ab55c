"""Makes the reference of a preset: the losses of several seeds, so that `train.py` can say whether yours are normal.

python scripts/reference.py --config shakespeare_char
python scripts/reference.py --config debug --dataset tiny_shakespeare --seeds 5

Trains the preset once for each seed, in runs/references/NAME/SEED, and writes configs/references/NAME.json. Ctrl-C stops it;
the same command keeps complete runs and resumes the interrupted one. The reference applies to runs with the same settings on
the same text, however they are started.
"""

import logging
from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.commands import command
from minigpt_jax.config import load_preset
from minigpt_jax.errors import DataError
from minigpt_jax.experiments.reference_runs import make_reference
from minigpt_jax.files import local_path, make_folder, write_text
from minigpt_jax.runs.references import MIN_SEEDS, REFERENCES_DIR

CONFIG = flags.DEFINE_string("config", "shakespeare_char", "preset in configs/, or the path of a .py file with get_config()")
SEEDS = flags.DEFINE_integer("seeds", MIN_SEEDS, f"number of seeds to train, at least {MIN_SEEDS}")
WORKDIR = flags.DEFINE_string("workdir", None, "folder for the runs (default: runs/references/NAME_OF_THE_CONFIG)")
OUT = flags.DEFINE_string("out", None, "file to write (default: configs/references/NAME_OF_THE_CONFIG.json)")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "restart the runs, if there are any")
cli.define_setting_flags("dataset", "val_dataset", "encoding", "data_dir")

log = logging.getLogger("minigpt_jax.reference_runs")


def main() -> None:
    name, given = Path(CONFIG.value).stem, cli.given_settings()
    config = load_preset(CONFIG.value).override(given)
    workdir = local_path(WORKDIR.value or cli.RUNS_DIR / "references" / name)
    path = local_path(OUT.value or REFERENCES_DIR / f"{name}.json")
    texts = "".join(f" --{setting} {value}" for setting, value in given.items() if setting != "data_dir")
    its_command = f"{command('reference')} --config {CONFIG.value}{texts} --seeds {SEEDS.value}"
    reference = make_reference(name, config, workdir, SEEDS.value, its_command, OVERWRITE.value)
    try:
        make_folder(path.parent)
        write_text(path, reference.to_json())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    for evaluation in reference.evaluations:
        log.info("step %d  validation loss of another seed: %s expected", evaluation.step, reference.band(evaluation.step))
    log.info("Wrote %s", path)


if __name__ == "__main__":
    cli.run(main, __doc__)
