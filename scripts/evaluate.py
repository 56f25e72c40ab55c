"""The loss of a run over a whole split of its text, as JSON: per token, and in bits, by which tokenizers can be compared.

python scripts/evaluate.py --workdir runs/shakespeare_char --split val
python scripts/evaluate.py --stride 16                  each token with more before it, in more time
"""

import json
import math
from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.api import choose_kernels
from minigpt_jax.errors import UsageError, require_choice
from minigpt_jax.training import checkpoint
from minigpt_jax.training.experiment import evaluate, measures, prepare

SPLITS = ("val", "train")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
SPLIT = flags.DEFINE_string("split", "val", "which part of the text: val | train")
STRIDE = flags.DEFINE_integer(
    "stride", None, "tokens between the beginnings of two windows: the less, the more context (default context_length)"
)


def main() -> None:
    require_choice("split", SPLIT.value, SPLITS)
    workdir = Path(WORKDIR.value) if WORKDIR.value else cli.newest_run()
    config = checkpoint.read_config(workdir)
    stride = config.model.context_length if STRIDE.value is None else STRIDE.value
    if not 1 <= stride <= config.model.context_length:
        raise UsageError(f"stride={stride} must be at least 1 and at most context_length={config.model.context_length}")
    step = checkpoint.first_whole(workdir, checkpoint.best_first(workdir))
    origin = checkpoint.read_origin(workdir, step)
    model = checkpoint.load_step(workdir, config, step, origin.tokenizer)
    experiment = prepare(config, origin, kernels=choose_kernels(config.model))
    loss = evaluate(experiment, model.params, SPLIT.value, stride=stride)
    result = {"workdir": str(workdir), "split": SPLIT.value, "stride": stride, "loss": loss}
    result |= measures(experiment, SPLIT.value, loss)
    is_number = {name: not isinstance(value, float) or math.isfinite(value) for name, value in result.items()}
    print(json.dumps({name: value if is_number[name] else None for name, value in result.items()}, indent=2))


if __name__ == "__main__":
    cli.run(main, __doc__)
