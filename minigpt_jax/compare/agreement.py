"""Checks that the JAX model and its PyTorch twin agree: same weights, same batches, a few training steps compared."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch

from minigpt_jax.compare import torch_gpt
from minigpt_jax.config import Config
from minigpt_jax.data.batches import Batch
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.training.optimizer import make_optimizer
from minigpt_jax.training.schedule import learning_rate_schedule
from minigpt_jax.training.state import init_state
from minigpt_jax.training.step import accumulate_gradients, train_step

LOGITS_LIMIT = 1e-5  # absolute, in float32
GRADIENT_LIMIT = 1e-5  # per element, relative to the norm of its parameter's gradient
NOISE = 1e-6  # a parameter's gradient below this share of the global norm is rounding error
PARAMETER_LIMIT = 1e-4  # absolute, after each compared step


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much one quantity differs between the twins."""

    quantity: str
    absolute: float  # maximum over all elements
    relative: float  # `absolute` over the norm of the quantity, or over the global norm if a gradient is noise
    limit: float
    is_relative: bool  # whether the limit applies to the relative difference

    @property
    def measured(self) -> float:
        return self.relative if self.is_relative else self.absolute

    @property
    def is_within_limit(self) -> bool:
        return self.measured <= self.limit  # False for NaN


WEIGHTS: dict[str, str] = dict.fromkeys(("kernel", "scale", "embedding"), "weight")  # Linen's name → PyTorch's


def torch_name(path: tuple) -> str:
    """PyTorch's name for a parameter of the Linen model, such as `transformer.blocks.0.attention.query.weight`."""
    *modules, leaf = [str(key.key) for key in path]
    modules = [name.replace("block_", "blocks.") for name in modules]
    return ".".join([*modules, WEIGHTS.get(leaf, leaf)])


def by_torch_name(tree: Any) -> dict[str, np.ndarray]:
    """Parameters or gradients with PyTorch's names and layout: kernels are transposed."""
    return {
        torch_name(path): np.asarray(leaf).T if path[-1].key == "kernel" else np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def make_twin(config: Config, params: Any) -> torch_gpt.GPT:
    """The PyTorch model with the Linen model's parameters."""
    twin = torch_gpt.GPT(config.model)
    weights = {name: torch.tensor(array) for name, array in by_torch_name(params).items()}
    if config.model.tie_embeddings:
        weights["head.weight"] = weights["embedding.tokens.weight"]
    twin.load_state_dict(weights)  # strict: raises for missing and unexpected names
    return twin


def to_tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets in the types that PyTorch's embedding and loss need. The batch must not mask any target."""
    inputs_BT, targets_BT = (torch.tensor(batch[name], dtype=torch.long) for name in ("inputs_BT", "targets_BT"))
    return inputs_BT, targets_BT


def compare(config: Config, batches: Sequence[Batch], kernels: Kernels = PLAIN) -> list[Difference]:
    """The differences of one forward and backward pass, and of one training step per batch.

    The config must have a vocabulary size, no dropout and float32: the twins draw different random numbers and round
    bfloat16 differently. After training steps, parameters without effect on the loss are not compared. An example is the
    bias of keys without rotary positions and QK-norm, which shifts all scores of a query equally. Its gradient is rounding
    noise, which Adam scales up to full-sized steps.
    """
    num_steps = len(batches)
    objective, optimizer = NextToken.of(config, kernels), make_optimizer(config.training, num_steps)
    params = objective.init(jax.random.key(config.training.seed))
    twin = make_twin(config, params)
    twin_optimizer, twin_schedule = torch_gpt.make_optimizer(config.training, twin, num_steps)
    differences = []

    def record(quantity: str, ours: Any, theirs: Any, limit: float, *, relative: bool = False, norm: float = 0.0) -> None:
        theirs = torch.as_tensor(theirs, dtype=torch.float64).detach().cpu().numpy()  # may be on a GPU
        ours = np.asarray(ours, np.float64)
        absolute = float(np.abs(ours - theirs).max())
        norm = max(norm, float(np.linalg.norm(theirs)))
        differences.append(Difference(quantity, absolute, absolute / norm if norm else absolute, limit, relative))

    batch = batches[0]
    inputs_BT, targets_BT = to_tensors(batch)
    logits_BTV, _ = objective.model.apply({"params": params}, batch["inputs_BT"])
    record("logits", logits_BTV, twin(inputs_BT), LOGITS_LIMIT)
    key = jax.random.key(config.training.seed)
    loss, grads = accumulate_gradients(params, batch, key, objective.loss, num_parts=config.training.grad_accumulation)
    twin_loss = torch_gpt.accumulate_gradients(twin, inputs_BT, targets_BT, config.training)
    record("loss", loss, twin_loss, LOGITS_LIMIT)
    twin_grads = {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}
    noise = NOISE * float(torch.nn.utils.get_total_norm(twin_grads.values()))
    without_effect = {name for name, grad in twin_grads.items() if grad.norm() < noise}
    for name, grad in by_torch_name(grads).items():
        norm = noise / NOISE if name in without_effect else 0.0
        record(f"gradient of {name}", grad, twin_grads[name], GRADIENT_LIMIT, relative=True, norm=norm)

    ema = config.training.ema
    twin_average = make_twin(config, params) if ema else None
    options = {"objective": objective, "optimizer": optimizer}
    state = init_state(key, params, **options, has_average=ema > 0)
    options |= {"ema": ema, "grad_accumulation": config.training.grad_accumulation}
    schedule = learning_rate_schedule(config.training, num_steps)
    for step, batch in enumerate(batches, 1):
        state, metrics = train_step(state, batch, key, **options)
        twin_lr = twin_schedule.get_last_lr()[0]
        twin_loss, twin_norm = torch_gpt.train_step(
            twin, twin_optimizer, twin_schedule, *to_tensors(batch), config.training, twin_average
        )
        if step in (1, 5, num_steps):
            record(f"step {step}: learning rate", schedule(step - 1), twin_lr, 1e-6, relative=True)
            record(f"step {step}: loss", metrics["loss"], twin_loss, PARAMETER_LIMIT)
            record(f"step {step}: gradient norm", metrics["grad_norm"], twin_norm, PARAMETER_LIMIT, relative=True)
            twin_params = dict(twin.named_parameters())
            for name, array in by_torch_name(state.params).items():
                if name not in without_effect:
                    record(f"step {step}: {name}", array, twin_params[name], PARAMETER_LIMIT)
            if twin_average is not None:
                averages = dict(twin_average.named_parameters())
                for name, array in by_torch_name(state.average).items():
                    if name not in without_effect:
                        record(f"step {step}: average of {name}", array, averages[name], PARAMETER_LIMIT)
    return differences
