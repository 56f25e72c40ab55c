"""The objective of masked language modelling: predict tokens of a text that are hidden from the model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from minigpt_jax.config import Config, ModelConfig
from minigpt_jax.data.batches import Batch
from minigpt_jax.models.bert import BERT, mask_token
from minigpt_jax.models.initial import init_params
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.tasks.classification import class_loss

CHOSEN = 0.15  # share of the tokens to predict
MASKED, RANDOM = 0.8, 0.1  # of these, the shares that [MASK] or a random token replaces; the rest stay


def mask_tokens(
    key: jax.Array, tokens_BT: jax.Array, is_token_BT: jax.Array, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """(inputs_BT, is_chosen_BT): the tokens with some replaced, and which ones to predict (Devlin et al. 2019, section 3.1).

    Each token is chosen with probability CHOSEN, and in every row at least one. A model has to predict chosen tokens even
    where it sees them, or sees a wrong one, because in use the other tokens are not [MASK] either.
    """
    choice_key, action_key, token_key = jax.random.split(key, 3)
    draws_BT = jnp.where(is_token_BT, jax.random.uniform(choice_key, tokens_BT.shape), 1.0)
    is_chosen_BT = is_token_BT & (draws_BT <= jnp.maximum(CHOSEN, draws_BT.min(axis=1, keepdims=True)))
    random_BT = jax.random.randint(token_key, tokens_BT.shape, 0, config.known_vocab_size)
    actions_BT = jax.random.uniform(action_key, tokens_BT.shape)
    replaced_BT = jnp.where(actions_BT < MASKED + RANDOM, random_BT, tokens_BT)
    replaced_BT = jnp.where(actions_BT < MASKED, mask_token(config), replaced_BT)
    return jnp.where(is_chosen_BT, replaced_BT, tokens_BT), is_chosen_BT


@struct.dataclass
class MaskedToken:
    """The mean loss over chosen tokens, in nats, and the accuracy of the most probable ones. See `tasks.Objective`."""

    model: BERT = struct.field(pytree_node=False)
    dropout: float | None = None

    @classmethod
    def of(cls, config: Config, kernels: Kernels = PLAIN) -> "MaskedToken":
        return cls(BERT(dataclasses.replace(config.model, dropout=0.0), kernels), config.model.dropout or None)

    def init(self, key: jax.Array) -> Any:
        return init_params(key, self.model)

    def loss(self, params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        """Without a key, the choice of tokens depends on the batch alone, so that all evaluations hide the same ones."""
        tokens_BT, is_token_BT = batch["inputs_BT"], batch["mask_BT"]
        dropout = None if key is None else self.dropout
        key = jax.random.fold_in(jax.random.key(0), tokens_BT.sum()) if key is None else key
        mask_key, dropout_key = jax.random.split(key)
        inputs_BT, is_chosen_BT = mask_tokens(mask_key, tokens_BT, is_token_BT, self.model.config)
        is_seen_BT = is_token_BT.at[:, 0].set(True)  # rows past the end of the text need a token, too
        rngs = None if dropout is None else {"dropout": dropout_key}
        logits_BTV: Any = self.model.apply({"params": params}, inputs_BT, is_seen_BT, dropout, rngs=rngs)
        return class_loss(logits_BTV, tokens_BT, is_chosen_BT)
