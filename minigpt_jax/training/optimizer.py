"""The optimizer: one Optax chain of gradient clipping, AdamW and the learning-rate schedule."""

from types import SimpleNamespace

import jax
import optax
from flax import struct

from minigpt_jax.config import TrainingConfig
from minigpt_jax.models.patterns import frozen_mask
from minigpt_jax.training.schedule import learning_rate_schedule

NUMBERS = "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "beta1", "beta2", "grad_clip"


@struct.dataclass
class ClippedAdamW:
    """Clips the gradient by its global norm, then applies AdamW (Loshchilov & Hutter 2019). Only matrices are decayed.

    The numbers are pytree leaves, not compile-time constants: runs that differ only in them share a compiled step and can be
    stacked under vmap."""

    numbers: dict[str, float]  # the fields of TrainingConfig named above, and num_steps
    schedule: str = struct.field(pytree_node=False)
    freeze: str | None = struct.field(pytree_node=False, default=None)  # patterns of parameters that stay as they are

    @property
    def chain(self) -> optax.GradientTransformation:
        c = SimpleNamespace(**self.numbers, schedule=self.schedule)
        schedule, is_matrix = learning_rate_schedule(c, c.num_steps), lambda tree: jax.tree.map(lambda x: x.ndim >= 2, tree)
        adamw = optax.adamw(schedule, c.beta1, c.beta2, weight_decay=c.weight_decay, mask=is_matrix)
        chain = optax.chain(optax.clip_by_global_norm(c.grad_clip), adamw)
        if (freeze := self.freeze) is None:
            return chain
        return optax.partition({False: chain, True: optax.set_to_zero()}, lambda tree: frozen_mask(tree, freeze))


def make_optimizer(config: TrainingConfig, num_steps: int, freeze: str | None = None) -> ClippedAdamW:
    numbers: dict[str, float] = {name: getattr(config, name) for name in NUMBERS}
    return ClippedAdamW(numbers | {"num_steps": num_steps}, config.schedule, freeze)
