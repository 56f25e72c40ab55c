"""The optimizer: one Optax chain of gradient clipping, AdamW or Muon, and the learning-rate schedule."""

from types import SimpleNamespace

import jax
import optax
from flax import struct

from minigpt_jax.config import TrainingConfig
from minigpt_jax.models.patterns import frozen_mask
from minigpt_jax.training.muon import muon_or
from minigpt_jax.training.schedule import learning_rate_schedule

NUMBERS = "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "beta1", "beta2", "grad_clip"


@struct.dataclass
class Optimizer:
    """Clips the gradient by its global norm, then applies AdamW (Loshchilov & Hutter 2019) or, to matrices of blocks, Muon.
    Only matrices are decayed. The numbers are pytree leaves, not compile-time constants: runs that differ only in them share
    a compiled step and can be stacked under vmap."""

    numbers: dict[str, float]  # the fields of TrainingConfig named above, and num_steps
    kind: str = struct.field(pytree_node=False)  # adamw or muon
    schedule: str = struct.field(pytree_node=False)
    freeze: str | None = struct.field(pytree_node=False, default=None)  # patterns of parameters that stay as they are

    @property
    def chain(self) -> optax.GradientTransformation:
        c = SimpleNamespace(**self.numbers, schedule=self.schedule)
        adam = optax.scale_by_adam(c.beta1, c.beta2)
        direction = adam if self.kind == "adamw" else muon_or(adam, c.beta1)
        decay = optax.add_decayed_weights(c.weight_decay, mask=lambda tree: jax.tree.map(lambda x: x.ndim >= 2, tree))
        rate = optax.scale_by_learning_rate(learning_rate_schedule(c, c.num_steps))
        chain = optax.chain(optax.clip_by_global_norm(c.grad_clip), optax.chain(direction, decay, rate))
        if (freeze := self.freeze) is None:
            return chain
        return optax.partition({False: chain, True: optax.set_to_zero()}, lambda tree: frozen_mask(tree, freeze))


def make_optimizer(config: TrainingConfig, num_steps: int, freeze: str | None = None) -> Optimizer:
    numbers: dict[str, float] = {name: getattr(config, name) for name in NUMBERS}
    return Optimizer(numbers | {"num_steps": num_steps}, config.optimizer, config.schedule, freeze)
