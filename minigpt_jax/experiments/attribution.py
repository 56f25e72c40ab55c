"""Which passages of its training text most raised the probability of a text under a language model: TracIn.

A step of gradient descent on a passage z, with learning rate η, lowers the loss of a text q by about η ∇loss(z) · ∇loss(q).
TracIn (Pruthi et al. 2020, arXiv:2002.08484, section 3.3) adds this up over the checkpoints of a run. It leaves out what
AdamW does to a gradient, and what happens between two checkpoints; `lds.py` measures how far it can be trusted.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minigpt_jax.api import default_sharding
from minigpt_jax.config import TrainingConfig, whole_number
from minigpt_jax.data import batches
from minigpt_jax.data.batches import Batch
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.files import local_path
from minigpt_jax.interop.load import read_run_config
from minigpt_jax.runs import checkpoints
from minigpt_jax.system import logs, streams
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.task import PreviousRun
from minigpt_jax.training.schedule import learning_rate_schedule

log = logging.getLogger(__name__)


# ---- TracIn ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Passages:
    """N windows of a text: `context_length` tokens and their targets, from each of `starts_N` on."""

    ids: np.ndarray  # of the text's tokens
    starts_N: np.ndarray
    context_length: int
    batch_size: int

    def batches(self) -> Iterator[Batch]:
        """Yields batches. The last one is padded with copies of the first passage."""
        for rows, _ in batches.evaluation_rows(len(self.starts_N), self.batch_size):
            yield batches.windows(self.ids, self.context_length, self.starts_N[rows])


@jax.jit
def losses(params: Any, batch: Batch, objective: Any) -> jax.Array:
    """losses_B: the mean loss over the targets of each row, without dropout."""

    def loss(row: Batch) -> jax.Array:
        total, num_targets, _ = objective.loss(params, jax.tree.map(lambda leaf: leaf[None], row), None)
        return total / num_targets

    return jax.vmap(loss)(batch)


@jax.jit
def gradient(params: Any, batch: Batch, objective: Any) -> Any:
    """The gradient of the mean of `losses`."""
    return jax.grad(lambda params: losses(params, batch, objective).mean())(params)


@jax.jit
def gradient_products(params: Any, direction: Any, batch: Batch, objective: Any) -> jax.Array:
    """products_B: the gradient of each row's loss, times `direction`, a tree like `params`.

    That is the derivative of the losses in this direction. Forward mode computes it for all rows at once, in the memory of
    two forward passes, where the gradients themselves would take B times that of the parameters. The objective's kernels
    must be the plain ones: those with gradients of their own have no forward mode.
    """
    return jax.jvp(lambda params: losses(params, batch, objective), (params,), (direction,))[1]


def tracin(models: Iterable[tuple[Any, float]], text: Batch, passages: Passages, objective: Any) -> np.ndarray:
    """scores_N of the passages: the sum of η ∇loss(passage) · ∇loss(text) over `models`, (parameters, η)
    of each checkpoint.

    `text` is a batch; the loss is the mean of its rows'. Losses are per token, so scores are in nats per token: by how much
    one step on the passage alone would lower the loss of the text, to first order, summed over the checkpoints.
    """
    scores_N = np.zeros(len(passages.starts_N))
    for params, learning_rate in models:
        direction = gradient(params, text, objective)
        products = [gradient_products(params, direction, batch, objective) for batch in passages.batches()]
        scores_N += learning_rate * np.concatenate(jax.device_get(products))[: len(scores_N)]
    return scores_N


# ---- Runs -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage of the training text, and its score for a text."""

    score: float
    position: int  # of its first token in the training text
    text: str


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What `attribute` returns."""

    raised: list[Passage]  # the highest scores above 0, highest first
    lowered: list[Passage]  # the lowest scores below 0, lowest first
    num_passages: int  # that were compared
    steps: list[int]  # of the checkpoints


def attribute(
    workdir: str | Path, text: str, num_passages: int = 5, *, dataset: str | Path | None = None,
    val_dataset: str | Path | None = None, encoding: str | None = None, data_dir: str | Path | None = None,
) -> Attribution:  # fmt: skip
    """The `num_passages` passages of a run's training text that most raised the probability of `text`, and as many that
    most lowered it, by TracIn over all kept checkpoints.

    Passages are the windows that the run was trained on, without repetitions in later epochs. `dataset` and so on are those
    of `mg.evaluate`. Corrupt checkpoints are skipped with a warning.

    Raises UsageError for a run of another task than language modelling, and for a text of less than two tokens or more than
    fit into the context; DataError for a text that cannot be encoded, and as `mg.evaluate` does.
    """
    num_passages = whole_number("num_passages", num_passages, at_least=1)
    moved = {"dataset": dataset, "val_dataset": val_dataset, "encoding": encoding, "data_dir": data_dir}
    with streams.optional(), logs.shown():
        workdir, sharding = local_path(workdir), default_sharding()
        steps, task = read_run(workdir, moved, sharding)
        settings, T = task.config.training, task.config.model.context_length
        tokens = encoded(text, task.tokenizer, T)
        ids, batch_size = task.splits["train"].ids, settings.batch_size // settings.grad_accumulation
        passages = Passages(ids, first_epoch(ids, T, settings, steps[-1]), T, batch_size)
        log.info("Comparing %d passages at %s.", len(passages.starts_N), described(steps))
        like = jax.eval_shape(task.objective.init, jax.random.key(0))

        def restored() -> Iterator[tuple[Any, float]]:
            """Not their moving average: training stepped from the parameters themselves."""
            for step, rate in zip(steps, mean_rates(settings, task.num_steps, steps), strict=True):
                log.info("Checkpoint of step %d, mean learning rate %.1e", step, rate)
                yield checkpoints.restore_eval_params(workdir, step, False, like, sharding), rate

        scores_N = tracin(restored(), batches.windows(tokens, T, np.zeros(1, int)), passages, task.objective)

    def passage(index: int) -> Passage:
        start = int(passages.starts_N[index])
        return Passage(float(scores_N[index]), start, task.tokenizer.decode(ids[start : start + T + 1]))

    order = np.argsort(-scores_N, kind="stable")
    raised = [passage(index) for index in order[:num_passages] if scores_N[index] > 0]
    lowered = [passage(index) for index in order[::-1][:num_passages] if scores_N[index] < 0]
    return Attribution(raised, lowered, len(scores_N), steps)


def read_run(workdir: Path, moved: Mapping[str, Any], sharding: jax.sharding.Sharding) -> tuple[list[int], Any]:
    """The steps of a run's intact checkpoints, in ascending order, and its task, with plain kernels.

    Raises UsageError for another task than language modelling, and DataError as `mg.evaluate` does.
    """
    config = read_run_config(workdir)
    if config.task != "language_modelling":
        raise UsageError(
            f"{workdir} is a run of the task {config.task}: texts are attributed to passages for runs of language_modelling"
        )
    config = config.override({name: value for name, value in moved.items() if value is not None})
    steps = checkpoints.all_intact(workdir)
    previous = PreviousRun(workdir, checkpoints.read_info(workdir, steps[-1]).sources)
    return steps, prepare(config, previous, sharding=sharding)


def described(steps: Sequence[int]) -> str:
    """The checkpoints, for the log."""
    if len(steps) == 1:
        return f"one checkpoint only, step {steps[0]}; a run trained with --keep_checkpoints N has more"
    return f"{len(steps)} checkpoints: steps {', '.join(map(str, steps))}"


def encoded(text: str, tokenizer: Tokenizer, context_length: int) -> np.ndarray:
    """The text's token ids. Raises UsageError for less than two or more than fit into the context, DataError for a text that
    cannot be encoded."""
    try:
        tokens = tokenizer.encode(text)
    except DataError as error:
        raise DataError(f"text: {error}") from error
    if not 2 <= len(tokens) <= context_length + 1:
        raise UsageError(
            f"the text has {len(tokens)} tokens, but must have at least 2, since the first is not predicted, and at most "
            f"{context_length + 1}, which fill the context: give another part of it"
        )
    if num_unknown := np.count_nonzero(tokens == tokenizer.unknown):
        log.warning("The text has words outside the vocabulary: the model sees them as <unk> (%d times).", num_unknown)
    return tokens


def first_epoch(ids: np.ndarray, context_length: int, settings: TrainingConfig, num_steps: int) -> np.ndarray:
    """starts_N of the windows that a run visits in its first `num_steps` steps, up to the end of its first epoch. Later
    epochs visit the same text again, with other boundaries."""
    num_rows = min(num_steps * settings.batch_size, batches.num_windows(ids, context_length))
    return np.array([batches.window_start(len(ids), context_length, settings.seed, row) for row in range(num_rows)])


def mean_rates(settings: TrainingConfig, num_steps: int, steps: Sequence[int]) -> list[float]:
    """For each checkpoint the mean learning rate of the steps since the previous one: that of its own step may be 0."""
    rates = np.asarray(learning_rate_schedule(settings, num_steps)(np.arange(steps[-1])))
    return [float(rates[first:last].mean()) for first, last in itertools.pairwise([0, *steps])]
