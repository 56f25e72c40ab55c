"""Changes one thing at a time in a preset, and compares the losses at equal tokens and at equal time (extra plot).

python scripts/ablate.py --base shakespeare_char
python scripts/ablate.py --base shakespeare_char --only positions,norm --seeds 5 --steps 500

Prints how much each change raises or lowers the loss on the whole validation split, paired by seed, with 95 % confidence
intervals, and draws them. At equal time, a change has as many steps as fit into the time of the base's, by a measurement of
both. Each finished run is a line of results.jsonl, and no checkpoints are written. The same command resumes; with more seeds
or topics it trains the runs that are missing.
"""

from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.config import load_preset
from minigpt_jax.experiments import ablation_report
from minigpt_jax.experiments.ablation import MIN_SEEDS, ablate
from minigpt_jax.experiments.changes import CHANGES
from minigpt_jax.runs import plots

BASE = flags.DEFINE_string("base", "shakespeare_char", "preset in configs/, or the path of a .py file with get_config()")
ONLY = flags.DEFINE_list("only", [], f"what to change (default: all of it): {', '.join(CHANGES)}")
SEEDS = flags.DEFINE_integer("seeds", MIN_SEEDS, f"number of seeds to train, at least {MIN_SEEDS}")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the ablation (default: runs/ablations/NAME_OF_THE_BASE)")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace the ablation in the folder, if there is one")
KERNELS = cli.define_kernels_flag()
cli.define_precision_flag()
cli.define_setting_flags("steps", "dataset", "val_dataset", "encoding", "data_dir")


def main() -> None:
    workdir = cli.given_or(WORKDIR.value, cli.RUNS_DIR / "ablations" / Path(BASE.value).stem)
    base = load_preset(BASE.value).override(cli.given_settings())
    outcomes = ablate(
        base, workdir, num_seeds=SEEDS.value, only=ONLY.value, overwrite=OVERWRITE.value, kernels=KERNELS.value
    )
    print(ablation_report.table(outcomes))
    plots.save_if_possible(lambda: ablation_report.draw(outcomes), workdir / "ablation.png")


if __name__ == "__main__":
    cli.run(main, __doc__)
