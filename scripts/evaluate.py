"""The loss of a run over a whole split of its text, as JSON on standard output.

python scripts/evaluate.py --workdir runs/shakespeare_char --split val
"""

import json
import math
from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.errors import DataError, require_choice
from minigpt_jax.training import checkpoint
from minigpt_jax.training.experiment import evaluate, prepare

SPLITS = ("val", "train")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
SPLIT = flags.DEFINE_string("split", "val", "which part of the text: val | train")


def main() -> None:
    require_choice("split", SPLIT.value, SPLITS)
    workdir = Path(WORKDIR.value) if WORKDIR.value else cli.newest_run()
    config = checkpoint.read_config(workdir)
    step = checkpoint.first_whole(workdir, checkpoint.best_first(workdir))
    model = checkpoint.load_step(workdir, config, step)
    experiment = prepare(config)
    if experiment.text_sha256 != checkpoint.read_info(workdir, step).text_sha256:
        raise DataError(f"{experiment.config.data.dataset} is no longer the text that {workdir} was trained on")
    tokens = experiment.splits[SPLIT.value][1:]  # the first token has nothing before it, so it is not predicted
    text = model.tokenizer.decode(tokens)
    loss = evaluate(experiment, model.params, SPLIT.value)
    bits = loss * len(tokens) / math.log(2)
    result = {
        "workdir": str(workdir),
        "split": SPLIT.value,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_char": bits / len(text),
        "bits_per_byte": bits / len(text.encode()),
        "tokens": len(tokens),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    cli.run(main, __doc__)
