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
    """The mean loss over next tokens, in nats. See `tasks.Objective`."""

    model: GPT = struct.field(pytree_node=False)
    dropout: float | None = None

    @classmethod
    def of(cls, config: Config, kernels: Kernels = PLAIN) -> "NextToken":
        """The dropout rate is kept outside the model, which is static, so that changing it does not recompile."""
        model = GPT(dataclasses.replace(config.model, dropout=0.0), kernels)
        return cls(model, config.model.dropout or None)

    def init(self, key: jax.Array) -> Any:
        return init_params(key, self.model)

    def loss(self, params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        logits_BTV = self.logits(params, batch, key)
        return *next_token_loss(logits_BTV, batch["targets_BT"], batch["mask_BT"]), {}

    def logits(self, params: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        """logits_BTV. Rows that pack several texts have their `positions_BT` and `segments_BT` in the batch."""
        dropout = None if key is None else self.dropout
        rngs = None if key is None or dropout is None else {"dropout": key}
        packed = {name: batch[name] for name in ("positions_BT", "segments_BT") if name in batch}
        logits_BTV, _ = self.model.apply({"params": params}, batch["inputs_BT"], **packed, dropout=dropout, rngs=rngs)
        return logits_BTV


@struct.dataclass
class NextTokenAndAccuracy(NextToken):
    """The same loss, and how often the most probable token is the right one."""

    def loss(self, params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        logits_BTV, targets_BT, mask_BT = self.logits(params, batch, key), batch["targets_BT"], batch["mask_BT"]
        is_right_BT = (logits_BTV.argmax(axis=-1) == targets_BT) & mask_BT
        return *next_token_loss(logits_BTV, targets_BT, mask_BT), {"token_accuracy": is_right_BT.sum()}
