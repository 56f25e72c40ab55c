"""Fills in the hidden tokens of a text with a masked language model: the best five for each, with their probabilities.

python scripts/fill_mask.py --workdir runs/bert_shakespeare --prompt "To be or [MASK] to be"

[MASK] is one token of the run's tokenizer: a word, a character, or with bpe a part of a word, with the space before it.
"""

from absl import flags

from minigpt_jax import cli
from minigpt_jax.api import choose_kernels, default_sharding
from minigpt_jax.generation.masked_language_model import MASK, MaskedLanguageModel
from minigpt_jax.interop.load import load_masked

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
PROMPT = flags.DEFINE_string("prompt", "", f"text with one or more {MASK}")
KERNELS = cli.define_kernels_flag()
cli.define_precision_flag()


def main() -> None:
    run = load_masked(WORKDIR.value or cli.newest_run(), default_sharding())
    model = MaskedLanguageModel(run.config, run.tokenizer, run.params, choose_kernels(run.config, KERNELS.value))
    for number, candidates in enumerate(model.fill(PROMPT.value), 1):
        print(f"{MASK} {number}")
        for candidate in candidates:
            print(f"{candidate.probability:8.4f}  {candidate.text!r}")


if __name__ == "__main__":
    cli.run(main, __doc__)
