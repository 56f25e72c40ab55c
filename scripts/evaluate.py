"""Prints a run's loss on a full split of its text as JSON: per token, and in bits, which compare across tokenizers.

python scripts/evaluate.py --workdir runs/shakespeare_char --split val
python scripts/evaluate.py --stride 16                  more context for each token, but slower
"""

import json
import math
from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.api import choose_kernels, default_sharding
from minigpt_jax.interop.load import read_run_config
from minigpt_jax.runs import checkpoints
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.task import Earlier, trained_params

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
SPLIT = flags.DEFINE_string("split", "val", "split of the data: val | train")
STRIDE = flags.DEFINE_integer(
    "stride", None, "tokens between the starts of windows: fewer give each token more context (default: context_length)"
)


def main() -> None:
    workdir = Path(WORKDIR.value) if WORKDIR.value else cli.newest_run()
    config = read_run_config(workdir)
    step = checkpoints.first_whole(workdir, checkpoints.best_first(workdir))
    earlier = Earlier(workdir, checkpoints.read_info(workdir, step).sources)
    task = prepare(config, earlier, kernels=choose_kernels(config.model))
    measures = task.measures(trained_params(task, workdir, step, default_sharding()), SPLIT.value, STRIDE.value)
    result = {"workdir": str(workdir), "split": SPLIT.value} | measures
    # JSON has no NaN or infinity.
    is_json = {name: not isinstance(value, float) or math.isfinite(value) for name, value in result.items()}
    print(json.dumps({name: value if is_json[name] else None for name, value in result.items()}, indent=2))


if __name__ == "__main__":
    cli.run(main, __doc__)
