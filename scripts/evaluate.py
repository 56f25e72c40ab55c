"""Prints a run's measures on a full split of its data as JSON. For a text: the loss per token, and in bits, which compare
across tokenizers. For images: loss and accuracy. With --memorisation: also what a GPT repeats of its training text.

python scripts/evaluate.py --workdir runs/shakespeare_char --split val
python scripts/evaluate.py --stride 16                  more context for each token, but slower
python scripts/evaluate.py --dataset texts/mine.txt     the run's text has moved there
python scripts/evaluate.py --workdir runs/vit_digits --plot confusion.png
python scripts/evaluate.py --memorisation               also copied spans, n-grams, and passages learned by heart
"""

import json
import math

from absl import flags

import minigpt_jax as mg
from minigpt_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
SPLIT = flags.DEFINE_string("split", "val", "split of the data: val | train")
STRIDE = flags.DEFINE_integer(
    "stride", None, "tokens between the starts of windows: fewer give each token more context (default: context_length)"
)
MOVED = cli.define_moved_flags()
PLOT = flags.DEFINE_string("plot", None, "PNG file for the confusion matrix of a classifier (extra plot)")
MEMORISATION = flags.DEFINE_bool(
    "memorisation", False, "also measure what the model repeats of its training text (extra memorisation)"
)
cli.define_precision_flag()


def main() -> None:
    workdir = WORKDIR.value or cli.newest_run()
    moved = {name: flag.value for name, flag in MOVED.items()}
    memorisation = {"memorisation": mg.measure_memorisation(workdir, **moved)} if MEMORISATION.value else {}
    measures = mg.evaluate(workdir, SPLIT.value, STRIDE.value, plot=PLOT.value, **moved)
    result = {"workdir": str(workdir), "split": SPLIT.value} | measures | memorisation
    # JSON has no NaN or infinity.
    is_json = {name: not isinstance(value, float) or math.isfinite(value) for name, value in result.items()}
    print(json.dumps({name: value if is_json[name] else None for name, value in result.items()}, indent=2))


if __name__ == "__main__":
    cli.run(main, __doc__)
