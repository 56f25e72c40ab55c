"""The encoder: it is the GPT's transformer without the causal mask, sees no padding, and predicts what is hidden."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_raises, assert_says, logged, normal, random_params, random_tokens
from settings import BASE

from minigpt_jax.config import ModelConfig
from minigpt_jax.data.tokenizers import CharTokenizer, WordTokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.generation.masked_language_model import MaskedLanguageModel
from minigpt_jax.kernels import BLOCKED, SPLIT, TUNED
from minigpt_jax.models.bert import BERT, mask_token
from minigpt_jax.models.flops import flops_per_token
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.kernels import PLAIN
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.transformer import Transformer

TOKENS_BT = random_tokens(3, 12, vocab_size=17)
IS_TOKEN_BT = np.arange(12)[None, :] < np.array([12, 7, 1])[:, None]


def shapes(model):
    return jax.tree.map(jnp.shape, jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)["params"])


# ---- The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True, "norm_placement": "post", "bias": True}, {"vocab_multiple": 8}], ids=str
)
def test_gpt_and_bert_have_the_same_parameters_but_for_the_row_of_the_mask(changes):
    config = dataclasses.replace(BASE, **changes)
    gpt, bert = shapes(GPT(config)), shapes(BERT(config))
    assert bert["transformer"] == gpt["transformer"]
    gpt["embedding"]["tokens"]["embedding"] = (mask_token(config) + 1, config.embed_dim)
    assert bert == gpt
    logits_BTV = jax.eval_shape(lambda: BERT(config).init_with_output(jax.random.key(0), TOKENS_BT)[0])
    assert logits_BTV.shape == (3, 12, config.vocab_size)  # neither padding nor [MASK]


@pytest.mark.parametrize("kernels", [PLAIN, SPLIT, BLOCKED, TUNED], ids=lambda kernels: kernels.name)
def test_every_token_sees_both_sides_but_neither_padding_nor_other_rows(kernels):
    """The gradients of the logits at each position by the embeddings of all."""
    config = dataclasses.replace(BASE, positions="learned")
    model = BERT(config, kernels)
    params = random_params(model, TOKENS_BT)
    embedded_BTD = params["embedding"]["tokens"]["embedding"][TOKENS_BT]

    def logits(x_BTD):
        """With rows of the table of their own for each token."""
        tokens_BT = jnp.arange(x_BTD[..., 0].size).reshape(TOKENS_BT.shape)
        wide = dataclasses.replace(config, vocab_size=tokens_BT.size)
        table = jnp.concatenate([x_BTD.reshape(-1, config.embed_dim), jnp.zeros((1, config.embed_dim))])
        head = {"kernel": normal(config.embed_dim, tokens_BT.size)}
        changed = params | {"embedding": params["embedding"] | {"tokens": {"embedding": table}}, "head": head}
        return BERT(wide, kernels).apply({"params": changed}, tokens_BT, IS_TOKEN_BT)[..., 0]

    depends_BTBT = (jax.jit(jax.jacrev(logits))(embedded_BTD) != 0).any(axis=-1)
    same_row_BTBT = np.eye(3, dtype=bool)[:, None, :, None]
    itself_TBT = np.eye(12, dtype=bool)[:, None, :]  # a padded position still has its own residual stream
    np.testing.assert_array_equal(depends_BTBT, same_row_BTBT & (IS_TOKEN_BT[None, None] | itself_TBT[None]))


def test_padding_changes_no_logits_of_tokens():
    model = BERT(BASE)
    params = random_params(model, TOKENS_BT)
    run = jax.jit(model.apply)
    short_BTV = run({"params": params}, TOKENS_BT[:, :7])
    padded_BTV = run({"params": params}, TOKENS_BT, np.broadcast_to(np.arange(12) < 7, (3, 12)))
    np.testing.assert_allclose(padded_BTV[:, :7], short_BTV, atol=1e-5)
    assert np.abs(run({"params": params}, TOKENS_BT)[:, :7] - short_BTV).max() > 1e-2


def test_hidden_states_are_those_of_the_transformer_without_a_mask():
    config = dataclasses.replace(BASE, tie_embeddings=True)
    params = random_params(BERT(config), TOKENS_BT)

    @jax.jit
    def by_hand(params):
        table_VD = params["embedding"]["tokens"]["embedding"]
        positions_BT = jnp.broadcast_to(jnp.arange(12), (3, 12))
        x_BTD, _ = Transformer(config).apply({"params": params["transformer"]}, table_VD[TOKENS_BT], Mask(), positions_BT)
        return (x_BTD @ table_VD.T)[..., :-1]

    assert_close(jax.jit(BERT(config).apply)({"params": params}, TOKENS_BT), by_hand(params), rtol=1e-5, atol=1e-5)


def test_attention_to_both_sides_costs_twice_the_operations():
    config = ModelConfig(num_layers=3, embed_dim=8, num_heads=1, ff_dim=8, context_length=32, vocab_size=9)
    # A token's query meets 32 keys rather than 16, in scores and sums, with a multiplication and an addition each, forward
    # and twice backward.
    assert flops_per_token(config, causal=False) - flops_per_token(config) == 3 * 16 * 8 * 2 * 2 * 3


# ---- Filling in -----------------------------------------------------------------------------------------------------------


CONFIG = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=8, context_length=9, vocab_size=5)


def masked_model(tokenizer, **changes):
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size, **changes)
    return MaskedLanguageModel(config, tokenizer, random_params(BERT(config), TOKENS_BT % 5))


@pytest.mark.parametrize("changes", [{}, {"vocab_multiple": 4, "tie_embeddings": True}], ids=str)
def test_candidates_are_the_most_probable_tokens_in_order(changes):
    model = masked_model(CharTokenizer("abcde"), **changes)
    first, second = model.fill("ab[MASK]d[MASK]", num_best=3)
    M = mask_token(model.config)
    logits_BTV = BERT(model.config).apply({"params": model.params}, np.array([[0, 1, M, 3, M]]))
    for candidates, p_V in zip((first, second), jax.nn.softmax(logits_BTV[0, [2, 4]]), strict=True):
        best = np.argsort(-p_V)[:3]
        assert [candidate.text for candidate in candidates] == ["abcde"[token] for token in best]
        np.testing.assert_allclose([candidate.probability for candidate in candidates], p_V[best], rtol=1e-4)


def test_an_unknown_word_is_never_a_candidate():
    model = masked_model(WordTokenizer((*WordTokenizer.SPECIAL, "be")))
    [candidates] = model.fill("be [MASK]", num_best=100)
    words = {candidate.text for candidate in candidates if candidate.probability}
    assert words == {*WordTokenizer.SPECIAL, "be"} - {"<unk>"}


def test_unknown_words_of_a_prompt_are_counted_in_the_log(caplog):
    model = masked_model(WordTokenizer((*WordTokenizer.SPECIAL, "be")))
    model.fill("be [MASK]")
    assert logged(caplog) == []
    model.fill("not be [MASK] not")
    [line] = logged(caplog)
    assert_says(line, "<unk>", "2 times")


def test_texts_that_cannot_be_filled_in_are_refused():
    model = masked_model(CharTokenizer("abcde"))
    assert_raises(UsageError, model.fill, "abc", says=("[MASK]",))
    assert_raises(UsageError, model.fill, "ab[mask]c", says=("[MASK]",))
    assert_raises(DataError, model.fill, "abcdeabcd[MASK]", says=("10", "9"))
    assert_raises(DataError, model.fill, "xyz[MASK]", says=("'x'",))
    assert len(model.fill("[MASK]" * 9)) == 9
