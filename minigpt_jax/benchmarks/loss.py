"""Training time to a validation loss: our default preset, and nanoGPT's CPU setting in PyTorch, on the same text."""

import itertools
from typing import Any

import jax

from minigpt_jax.api import choose_kernels
from minigpt_jax.benchmarks.baselines import use_gpu
from minigpt_jax.benchmarks.interleave import installed, interleave
from minigpt_jax.config import load_preset
from minigpt_jax.data import batches
from minigpt_jax.system.heap import retain_heap
from minigpt_jax.tasks.language_modelling import LanguageModelling, prepare
from minigpt_jax.training.run import new_state, train_step_kwargs
from minigpt_jax.training.step import train_step

ROUNDS = 1
TARGETS = 2.5, 2.0, 1.91, 1.88  # nats per character; nanoGPT reports the last for its setting
STEPS_PER_ROUND = 50


def prepare_task(preset: str, dataset: str) -> LanguageModelling:
    config = load_preset(preset).override({"dataset": dataset})
    return prepare(config, kernels=choose_kernels(config.model))


class TaskRun:
    """A training run of a task, without files and logs."""

    def __init__(self, task: LanguageModelling):
        retain_heap()
        self.task = task
        self.key, self.arguments = jax.random.key(task.config.training.seed), train_step_kwargs(task)
        self.state, self.step = new_state(task), 0

    def run(self) -> None:
        for _ in range(STEPS_PER_ROUND):
            batch = self.task.batch_at(self.step)
            self.state, _ = train_step(self.state, batch, self.key, **self.arguments)
            self.step += 1
        jax.block_until_ready(self.state)

    def report(self) -> dict[str, float]:
        return {"val_loss": self.task.evaluate(self.state.eval_params)["loss"]}


class OurRun(TaskRun):
    """Our default preset."""

    name, needs, preset = "minigpt_jax, shakespeare_char", "jax", "shakespeare_char"

    def __init__(self, dataset: str):
        super().__init__(prepare_task(self.preset, dataset))


class TorchRun:
    """nanoGPT's CPU setting in the PyTorch twin."""

    name, needs, preset = "PyTorch eager, nanogpt_cpu", "torch", "nanogpt_cpu"

    def __init__(self, dataset: str):
        import torch

        from minigpt_jax.compare import torch_gpt

        wait = use_gpu()
        torch.manual_seed(0)
        self.task, self.step = prepare_task(self.preset, dataset), 0
        settings = self.task.config.training
        self.model = torch_gpt.GPT(self.task.config.model)
        optimizer, schedule = torch_gpt.make_optimizer(settings, self.model, self.task.num_steps)

        def run():
            for _ in range(STEPS_PER_ROUND):
                batch = self.task.batch_at(self.step)
                inputs_BT, targets_BT = (torch.tensor(batch[name], dtype=torch.long) for name in ("inputs_BT", "targets_BT"))
                torch_gpt.train_step(self.model, optimizer, schedule, inputs_BT, targets_BT, settings)
                self.step += 1
            wait()

        self.run = run

    def report(self) -> dict[str, float]:
        import torch
        from torch.nn import functional as F  # noqa: N812

        ids, T = self.task.splits["val"].ids, self.task.config.model.context_length
        total = count = 0
        with torch.no_grad():
            for batch in batches.evaluation_batches(ids, T, 64):
                inputs_BT, mask_BT = torch.tensor(batch["inputs_BT"], dtype=torch.long), torch.tensor(batch["mask_BT"])
                targets = torch.tensor(batch["targets_BT"], dtype=torch.long)[mask_BT]
                logits = self.model(inputs_BT)[mask_BT]
                total, count = total + float(F.cross_entropy(logits, targets, reduction="sum")), count + len(targets)
        return {"val_loss": total / count}


def seconds_to(target: float, results: list[dict]) -> float | None:
    """Seconds of training until the loss first reached the target, including compilation. None if it never did."""
    seconds = list(itertools.accumulate(result["seconds"] for result in results))
    reached = [elapsed for elapsed, result in zip(seconds, results, strict=True) if result["val_loss"] <= target]
    return reached[0] if reached else None


def measure(rounds: int, dataset: str) -> dict:
    """Prints a table of the seconds to each target loss, and returns the figures."""
    candidates = installed((OurRun, TorchRun))
    num_rounds = prepare_task(OurRun.preset, dataset).num_steps // STEPS_PER_ROUND
    print(f"{dataset}, full validation split: seconds of training to a loss of\n"
          f"{'':<32}{''.join(f'{target:10.2f}' for target in TARGETS)}   all steps  final loss")  # fmt: skip
    figures = {"races": []}
    for _ in range(rounds):
        results = interleave(candidates, (dataset,), num_rounds - 1)
        for name, runs in results.items():
            reached = [seconds_to(target, runs) for target in TARGETS]
            columns = "".join(f"{'never' if seconds is None else f'{seconds:.1f}':>10}" for seconds in reached)
            print(f"{name:<32}{columns}{sum(run['seconds'] for run in runs):12.1f}{runs[-1]['val_loss']:12.4f}")
        figures["races"].append(results)
    return figures


def draw(figures: dict, axes_of: Any) -> None:
    """Validation loss against seconds of training."""
    axes = axes_of("Validation loss, nats per character, against seconds of training")
    for results in figures["races"]:
        for number, (name, runs) in enumerate(results.items()):
            seconds = list(itertools.accumulate(run["seconds"] for run in runs))
            axes.plot(seconds, [run["val_loss"] for run in runs], color=f"C{number}", label=name)
    axes.axhline(TARGETS[-1], color="0.3", linestyle=":", label=f"{TARGETS[-1]}, as nanoGPT reports")
    axes.legend(frameon=False, fontsize=8)
