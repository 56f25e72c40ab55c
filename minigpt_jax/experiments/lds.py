"""How far attribution scores can be trusted: the linear datamodeling score, LDS (Park et al. 2023, arXiv:2303.14186).

Models of the size of the preset `debug` are trained on random halves of some passages. If scores were right, the sum of the
scores of a half's passages would order the halves as their models' losses of a text do. The LDS is Spearman's rank
correlation of the two, averaged over texts: 1 is the right order, and 0 no relation.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from minigpt_jax.api import choose_kernels, default_sharding, first_device
from minigpt_jax.config import load_preset
from minigpt_jax.data import batches
from minigpt_jax.data.batches import Batch
from minigpt_jax.errors import DataError
from minigpt_jax.experiments import stacked
from minigpt_jax.experiments.attribution import Passages, losses, mean_rates, read_run, tracin
from minigpt_jax.files import local_path
from minigpt_jax.system import logs, streams
from minigpt_jax.system.heap import retain_heap
from minigpt_jax.tasks.language_modelling import LanguageModelling
from minigpt_jax.tasks.next_token import NextToken

log = logging.getLogger(__name__)

NUM_MODELS, NUM_PASSAGES, NUM_TEXTS = 128, 512, 32
SETTINGS = {
    "batch_size": 16, "steps": 250, "warmup_steps": 12, "learning_rate": 3e-3, "min_learning_rate": 3e-4, "dropout": 0.0
}  # fmt: skip
NUM_CHECKPOINTS = 4  # of the model whose scores are measured
STACK = 32  # models trained side by side
BATCH = 128  # passages whose gradients are compared at once
MIN_PASSAGES = 32  # fewer make no halves worth comparing
NUM_RESAMPLED = 200  # for the standard errors


# ---- The score ------------------------------------------------------------------------------------------------------------


def ranks(values_M: np.ndarray) -> np.ndarray:
    """The ranks of values; equal ones share their mean rank."""
    in_order = np.sort(values_M)
    return (np.searchsorted(in_order, values_M, "left") + np.searchsorted(in_order, values_M, "right")) / 2


def spearman(values_M: np.ndarray, others_M: np.ndarray) -> float:
    """Spearman's rank correlation."""
    return float(np.corrcoef(ranks(values_M), ranks(others_M))[0, 1])


def lds(predicted_MQ: np.ndarray, losses_MQ: np.ndarray) -> float:
    """The mean over Q texts of the rank correlation, over M models, of what the scores predict with the negative loss."""
    return float(np.mean([spearman(*pair) for pair in zip(predicted_MQ.T, -losses_MQ.T, strict=True)]))


@dataclasses.dataclass(frozen=True)
class Estimate:
    mean: float
    standard_error: float


def estimate_lds(scores_QN: np.ndarray, halves_MN: np.ndarray, losses_MQ: np.ndarray) -> Estimate:
    """The LDS of scores, given for each model which passages it was trained on, and its losses of the texts.

    The standard error is the bootstrap's, of models and texts at once: the texts share their models, so they are not
    independent.
    """
    predicted_MQ, random = halves_MN @ scores_QN.T, np.random.default_rng(0)
    M, Q = losses_MQ.shape
    resampled = []
    for _ in range(NUM_RESAMPLED):
        chosen = np.ix_(random.integers(M, size=M), random.integers(Q, size=Q))
        resampled.append(lds(predicted_MQ[chosen], losses_MQ[chosen]))
    return Estimate(lds(predicted_MQ, losses_MQ), float(np.std(resampled)))


# ---- The models -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class OnPassages(LanguageModelling):
    """Language modelling on some windows of the training text, in a shuffled order."""

    starts_N: np.ndarray

    def batch_at(self, step: int) -> Batch:
        settings, T = self.config.training, self.config.model.context_length
        rows = batches.shuffled_rows(len(self.starts_N), settings.batch_size, settings.seed, step)
        return batches.windows(self.splits["train"].ids, T, self.starts_N[rows])


def on_passages(run: LanguageModelling) -> OnPassages:
    """A task for a model of the size of `debug`, on up to NUM_PASSAGES passages of a run's training text, spread over it.
    Raises DataError if there are too few."""
    preset, ids = load_preset("debug"), run.splits["train"].ids
    T = min(preset.model.context_length, run.config.model.context_length)
    settings = SETTINGS | {"context_length": T, "vocab_size": run.tokenizer.vocab_size}
    config, starts_N = dataclasses.replace(preset.override(settings), data=run.config.data), spread(ids, NUM_PASSAGES, T)
    if len(starts_N) < MIN_PASSAGES:
        raise DataError(
            f"the training text has {len(starts_N)} passages of {T} tokens, but measuring the LDS needs {MIN_PASSAGES}: "
            "choose a run with a longer text"
        )
    objective = NextToken.of(config, choose_kernels(config.model))
    return OnPassages(config, run.tokenizer, run.splits, run.sources, SETTINGS["steps"], objective, starts_N)


def spread(ids: np.ndarray, count: int, context_length: int) -> np.ndarray:
    """The starts of up to `count` windows, evenly spread over the text, that do not overlap."""
    adjacent = np.arange(batches.num_windows(ids, context_length)) * context_length
    return adjacent[np.linspace(0, len(adjacent) - 1, min(count, len(adjacent))).astype(int)]


def train(tasks: Sequence[OnPassages], device: Any, steps: Sequence[int]) -> list[list[Any]]:
    """Trains models side by side. Returns the parameters of all of them, at each of these steps."""
    runs, kept = stacked.Stack(tasks, device), []
    while runs.step < tasks[0].num_steps:
        runs.advance()
        if runs.step in steps:
            # Copied: a step donates its state, which a single run's parameters are part of.
            kept.append([jax.tree.map(jnp.copy, runs.eval_params(index)) for index in range(len(tasks))])
    return kept


# ---- Measuring ------------------------------------------------------------------------------------------------------------


def measure_lds(
    workdir: str | Path, *, dataset: str | Path | None = None, val_dataset: str | Path | None = None,
    encoding: str | None = None, data_dir: str | Path | None = None,
) -> dict[str, Estimate]:  # fmt: skip
    """The LDS of TracIn (`tracin`) and of random scores (`random`), on passages of a run's training text.

    The texts are passages of its validation text. `dataset` and so on, and exceptions, are those of `attribution.attribute`;
    also DataError for a training text that is too short.
    """
    moved = {"dataset": dataset, "val_dataset": val_dataset, "encoding": encoding, "data_dir": data_dir}
    retain_heap()
    with streams.optional(), logs.shown():
        _, run = read_run(local_path(workdir), moved, default_sharding())
        task, device, random = on_passages(run), first_device(), np.random.default_rng(0)
        val_ids, T, N = run.splits["val"].ids, task.config.model.context_length, len(task.starts_N)
        texts = Passages(val_ids, spread(val_ids, NUM_TEXTS, T), T, batch_size=1)
        halves_MN = np.array([random.permutation(N) < N // 2 for _ in range(NUM_MODELS)])
        losses_MQ = retrain(task, halves_MN, texts, device)
        scores_QN = {
            "tracin": score(task, texts, device),
            "random": random.standard_normal((len(texts.starts_N), N)),
        }
        return {name: estimate_lds(scores, halves_MN, losses_MQ) for name, scores in scores_QN.items()}


def retrain(task: OnPassages, halves_MN: np.ndarray, texts: Passages, device: Any) -> np.ndarray:
    """losses_MQ: the losses of the texts, after training a model on each half of the task's passages, with its own seed."""
    (M, N), start, losses_MQ = halves_MN.shape, time.monotonic(), []
    tasks = [
        dataclasses.replace(task, config=task.config.override(seed=number), starts_N=task.starts_N[half_N])
        for number, half_N in enumerate(halves_MN, 1)
    ]
    size = stacked.num_fitting(task, device, STACK, None)
    log.info("Training %d models of the size of `debug`, %d side by side, each on half of %d passages of %d tokens.",
             M, size, N, texts.context_length)  # fmt: skip
    for first in range(0, M, size):
        [models] = train(tasks[first : first + size], device, [task.num_steps])
        losses_MQ += [text_losses(params, texts, task.objective) for params in models]
        left = (time.monotonic() - start) / len(losses_MQ) * (M - len(losses_MQ))
        log.info("%d/%d models  %s left", len(losses_MQ), M, tqdm.format_interval(left))
    return np.array(losses_MQ)


def text_losses(params: Any, texts: Passages, objective: Any) -> np.ndarray:
    """The loss of each text."""
    return np.asarray(losses(params, batches.windows(texts.ids, texts.context_length, texts.starts_N), objective))


def score(task: OnPassages, texts: Passages, device: Any) -> np.ndarray:
    """scores_QN of TracIn for each text, from NUM_CHECKPOINTS checkpoints of a model that is trained on all passages."""
    steps = np.linspace(0, task.num_steps, NUM_CHECKPOINTS + 1).astype(int)[1:].tolist()
    models, rates = train([task], device, steps), mean_rates(task.config.training, task.num_steps, steps)
    weighted = [(params, rate) for [params], rate in zip(models, rates, strict=True)]
    passages = Passages(task.splits["train"].ids, task.starts_N, texts.context_length, BATCH)
    return np.stack([tracin(weighted, text, passages, NextToken.of(task.config)) for text in texts.batches()])
