"""Prints which passages of a run's training text most raised the probability of a text, and which most lowered it (TracIn).
With --lds: also how far such scores can be trusted, measured on small models trained on halves of the passages.

python scripts/attribute.py --workdir runs/shakespeare_char --text "To be, or not to be"
python scripts/attribute.py --workdir runs/shakespeare_char --lds

Scores are in nats per token: by how much a step of gradient descent on the passage alone would lower the loss of the text,
summed over the checkpoints that the run has kept. Train with --checkpoint_every N --keep_checkpoints 10 to have more.
"""

from collections.abc import Sequence

from absl import flags

from minigpt_jax import cli
from minigpt_jax.errors import UsageError
from minigpt_jax.experiments.attribution import Passage, attribute
from minigpt_jax.experiments.lds import measure_lds

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
TEXT = flags.DEFINE_string("text", None, "text to attribute: at least two tokens, at most a context and its next token")
NUM_PASSAGES = flags.DEFINE_integer("num_passages", 5, "number of passages to print, of those that raised and that lowered")
LDS = flags.DEFINE_bool("lds", False, "measure how well the scores of small models predict retraining (minutes)")
MOVED = cli.define_moved_flags()
cli.define_precision_flag()


def main() -> None:
    if TEXT.value is None and not LDS.value:
        raise UsageError("nothing to do: give a text with --text, or --lds")
    workdir = WORKDIR.value or cli.newest_run()
    moved = {name: flag.value for name, flag in MOVED.items()}
    if TEXT.value is not None:
        found = attribute(workdir, TEXT.value, NUM_PASSAGES.value, **moved)
        print_passages("raised", found.raised)
        print_passages("lowered", found.lowered)
    if LDS.value:
        measured = measure_lds(workdir, **moved)
        print("scores    LDS ± standard error")
        for name, estimate in measured.items():
            print(f"{name:<8}  {estimate.mean:.3f} ± {estimate.standard_error:.3f}")
        print(
            "1: a half's scores order the losses of retrained models exactly; 0: no relation. Of small models, not this run."
        )


def print_passages(what: str, passages: Sequence[Passage]) -> None:
    print(f"{what:>10}  {'position':>10}  passage")
    for passage in passages:
        print(f"{passage.score:>10.2e}  {passage.position:>10}  {passage.text!r}")


if __name__ == "__main__":
    cli.run(main, __doc__)
