"""How long it takes to learn: our default preset and nanoGPT's setting, to the same validation loss on tiny Shakespeare."""

import itertools
from typing import Any

import jax

from minigpt_jax.api import choose_kernels
from minigpt_jax.benchmarks.baselines import use_gpu
from minigpt_jax.benchmarks.interleave import interleave, present
from minigpt_jax.config import load_preset
from minigpt_jax.data import batches
from minigpt_jax.system.heap import retain_heap
from minigpt_jax.tasks.language_modelling import LanguageModelling, prepare
from minigpt_jax.training.run import new_state, step_arguments
from minigpt_jax.training.step import train_step

ROUNDS = 1
TARGETS = 2.5, 2.0, 1.91, 1.88  # nats per character; the last is what nanoGPT states for this setting
STEPS_PER_TURN = 50


def prepared(preset: str, dataset: str) -> LanguageModelling:
    config = load_preset(preset).override({"dataset": dataset})
    return prepare(config, kernels=choose_kernels(config.model))


class OurRun:
    """Our default preset."""

    name, needs, preset = "minigpt_jax, shakespeare_char", "jax", "shakespeare_char"

    def __init__(self, dataset: str):
        retain_heap()
        self.task = task = prepared(self.preset, dataset)
        self.key, self.arguments = jax.random.key(task.config.training.seed), step_arguments(task)
        self.state, self.step = new_state(task), 0

    def run(self) -> None:
        for _ in range(STEPS_PER_TURN):
            batch = self.task.batch_at(self.step)
            self.state, _ = train_step(self.state, batch, self.key, **self.arguments)
            self.step += 1
        jax.block_until_ready(self.state)

    def tell(self) -> dict[str, float]:
        return {"val_loss": self.task.evaluate(self.state.eval_params)["loss"]}


class TorchRun:
    """nanoGPT's setting in the PyTorch twin."""

    name, needs, preset = "PyTorch eager, nanogpt_cpu", "torch", "nanogpt_cpu"

    def __init__(self, dataset: str):
        import torch

        from minigpt_jax.compare import torch_gpt

        wait = use_gpu()
        torch.manual_seed(0)
        self.task, self.step = prepared(self.preset, dataset), 0
        settings = self.task.config.training
        self.model = torch_gpt.GPT(self.task.config.model)
        optimizer, schedule = torch_gpt.make_optimizer(settings, self.model, self.task.num_steps)

        def run():
            for _ in range(STEPS_PER_TURN):
                batch = self.task.batch_at(self.step)
                inputs_BT, targets_BT = (torch.tensor(batch[name], dtype=torch.long) for name in ("inputs_BT", "targets_BT"))
                torch_gpt.train_step(self.model, optimizer, schedule, inputs_BT, targets_BT, settings)
                self.step += 1
            wait()

        self.run = run

    def tell(self) -> dict[str, float]:
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


def seconds_to(target: float, answers: list[dict]) -> float | None:
    """Seconds of training until the loss was first at most the target, the first run with its compilation included."""
    seconds = list(itertools.accumulate(answer["seconds"] for answer in answers))
    reached = [spent for spent, answer in zip(seconds, answers, strict=True) if answer["val_loss"] <= target]
    return reached[0] if reached else None


def measure(rounds: int, dataset: str) -> dict:
    """Prints a table of the seconds to each loss, and returns the figures."""
    candidates = present((OurRun, TorchRun))
    num_turns = prepared(OurRun.preset, dataset).num_steps // STEPS_PER_TURN
    print(f"{dataset}, whole validation split, seconds of training to a loss of at most\n"
          f"{'':<32}{''.join(f'{target:10.2f}' for target in TARGETS)}   all steps   last loss")  # fmt: skip
    figures = {"races": []}
    for _ in range(rounds):
        answers = interleave(candidates, (dataset,), num_turns - 1)
        for name, told in answers.items():
            reached = [seconds_to(target, told) for target in TARGETS]
            shown = "".join(f"{'never' if seconds is None else f'{seconds:.1f}':>10}" for seconds in reached)
            print(f"{name:<32}{shown}{sum(answer['seconds'] for answer in told):12.1f}{told[-1]['val_loss']:12.4f}")
        figures["races"].append(answers)
    return figures


def draw(figures: dict, axes_of: Any) -> None:
    """Validation loss over seconds of training."""
    axes = axes_of("Validation loss over seconds of training, nats per character")
    for answers in figures["races"]:
        for number, (name, told) in enumerate(answers.items()):
            seconds = list(itertools.accumulate(answer["seconds"] for answer in told))
            axes.plot(seconds, [answer["val_loss"] for answer in told], color=f"C{number}", label=name)
    axes.axhline(TARGETS[-1], color="0.3", linestyle=":", label=f"{TARGETS[-1]}, which nanoGPT states")
    axes.legend(frameon=False, fontsize=8)
