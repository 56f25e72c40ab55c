"""Generates text with a trained model, on standard output.

python scripts/generate.py --prompt "To be or not to be" --length 200
python scripts/generate.py --workdir runs/mini_gpt --temperature 0.8 --top_k 40 --num_samples 3
"""

import logging
from pathlib import Path

from absl import flags

import minigpt_jax as mg
from minigpt_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
PROMPT = flags.DEFINE_string("prompt", "", "text to go on from; empty: a new line")
LENGTH = flags.DEFINE_integer("length", 200, "tokens to generate")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "texts to generate")
SEED = flags.DEFINE_integer("seed", 0, "root of the randomness: the same seed gives the same text")
STRATEGY = {
    "temperature": flags.DEFINE_float("temperature", 1.0, "below 1 more predictable, above 1 wilder; 0 is greedy"),
    "top_k": flags.DEFINE_integer("top_k", 0, "sample from the k most probable tokens; 0: from all"),
    "top_p": flags.DEFINE_float("top_p", 1.0, "sample from the most probable tokens with this mass together; 1: from all"),
    "min_p": flags.DEFINE_float("min_p", 0.0, "sample from tokens at least this share as probable as the best; 0: from all"),
    "repetition_penalty": flags.DEFINE_float("repetition_penalty", 1.0, "above 1 makes tokens seen before less probable"),
    "greedy": flags.DEFINE_bool("greedy", False, "always take the most probable token"),
}

log = logging.getLogger("minigpt_jax.generate")


def main() -> None:
    strategy = {name: flag.value for name, flag in STRATEGY.items()}
    mg.generation.logits.processors(**strategy)
    workdir = Path(WORKDIR.value) if WORKDIR.value else cli.newest_run()
    model = mg.load(workdir)
    texts = model.samples(PROMPT.value, LENGTH.value, num_samples=NUM_SAMPLES.value, seed=SEED.value, **strategy)
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            log.info("--- sample %d of %d", number, len(texts))
        print(text, flush=True)


if __name__ == "__main__":
    cli.run(main, __doc__)
