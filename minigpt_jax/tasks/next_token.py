"""The objective of language modelling: predict each next token of a text."""

import dataclasses
from typing import Any

import jax
import optax
from flax import struct

from minigpt_jax.config import Config
from minigpt_jax.data.batches import Batch
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.models.kernels import PLAIN, Kernels


def next_token_loss(logits_BTV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the next token, in nats: the *sum* over the unmasked targets, and their number. Sums over
    micro-batches add up to the sum over the batch; means over micro-batches with different numbers of targets would not."""
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return (nats_BT * mask_BT).sum(), mask_BT.sum()


@struct.dataclass
class NextToken:
    """The mean loss over next tokens, in nats, and `token_accuracy`, how often the most probable one is right, if that is
    wanted. See `tasks.Objective`.

    A field says whether it is, not a class of its own: jax 0.10 takes classes with equal fields for the same tree, and jit
    may call what it compiled for the other one.
    """

    model: GPT = struct.field(pytree_node=False)
    dropout: float | None = None
    with_accuracy: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, config: Config, kernels: Kernels = PLAIN, with_accuracy: bool = False) -> "NextToken":
        """The dropout rate is kept outside the model, which is static, so that changing it does not recompile."""
        model = GPT(dataclasses.replace(config.model, dropout=0.0), kernels)
        return cls(model, config.model.dropout or None, with_accuracy)

    def init(self, key: jax.Array) -> Any:
        return init_params(key, self.model)

    def loss(self, params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        logits_BTV, targets_BT, mask_BT = self.logits(params, batch, key), batch["targets_BT"], batch["mask_BT"]
        loss = next_token_loss(logits_BTV, targets_BT, mask_BT)
        if not self.with_accuracy:
            return *loss, {}
        is_right_BT = (logits_BTV.argmax(axis=-1) == targets_BT) & mask_BT
        return *loss, {"token_accuracy": is_right_BT.sum()}

    def logits(self, params: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        """logits_BTV. Rows that pack several texts have their `positions_BT` and `segments_BT` in the batch."""
        dropout = None if key is None else self.dropout
        rngs = None if key is None or dropout is None else {"dropout": key}
        packed = {name: batch[name] for name in ("positions_BT", "segments_BT") if name in batch}
        logits_BTV, _ = self.model.apply({"params": params}, batch["inputs_BT"], **packed, dropout=dropout, rngs=rngs)
        return logits_BTV
