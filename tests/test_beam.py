"""Beam search, compared with exhaustive search, with greedy decoding, and with a search in plain Python."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from minigpt_jax.config import ModelConfig
from minigpt_jax.generation import beam
from minigpt_jax.generation.beam import beam_search
from minigpt_jax.generation.logits import Processor, greedy
from minigpt_jax.generation.sampling import row_keys, stream
from minigpt_jax.kernels import SPLIT
from minigpt_jax.kernels.partitioned_cache import partitioned
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.kernels import PLAIN

pytestmark = pytest.mark.slow

V = 5
CONFIG = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=16, context_length=12, vocab_size=V)
ROTARY, LEARNED = (GPT(dataclasses.replace(CONFIG, positions=positions), SPLIT) for positions in ("rotary", "learned"))
ROTARY_PLAIN, LEARNED_PLAIN = (GPT(model.config, PLAIN) for model in (ROTARY, LEARNED))
PROMPTS = [np.array(row, np.int32) for row in ([3], [1, 2, 0])]


def describe(model):
    return f"{model.config.positions}, {model.kernels.name}"


@functools.cache
def some_params(model):
    random = np.random.default_rng(4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((2, 1), np.int32))["params"]
    return jax.tree.map(lambda leaf: 0.6 * random.standard_normal(leaf.shape, np.float32), shapes)


def search(model=ROTARY, num_tokens=2, width=V, **options):
    return beam_search(some_params(model), PROMPTS, num_tokens, model=model, width=width, **options)


@functools.cache
def forward(model):
    plain = GPT(model.config, PLAIN)
    return jax.jit(lambda tokens_BT: jax.nn.log_softmax(plain.apply({"params": some_params(model)}, tokens_BT)[0]))


def log_probs_after(model, rows):
    """log p of the next token after each row (all of one length), from the plain model without a cache."""
    tokens_BT = np.zeros((len(rows), CONFIG.context_length), np.int32)
    tokens_BT[:, : len(rows[0])] = rows
    return np.asarray(forward(model)(tokens_BT))[:, len(rows[0]) - 1]


def search_in_python(model, prompt, num_tokens, width, length_penalty=1.0, early_stopping=False, ends=()):
    """Textbook beam search on lists of texts."""
    beams, finished = [((), 0.0)], []
    for length in range(1, num_tokens + 1):
        log_probs_BV = log_probs_after(model, [[*prompt, *tokens] for tokens, _ in beams])
        longer = [
            ((*tokens, v), score + log_probs_V[v])
            for (tokens, score), log_probs_V in zip(beams, log_probs_BV, strict=True)
            for v in range(V)
        ]
        longer.sort(key=lambda text: -text[1])
        ending = [text for text in longer if text[0][-1] in ends][:width]
        beams = [text for text in longer if text[0][-1] not in ends][:width]
        finished += [(tokens, score, score / length**length_penalty) for tokens, score in ending]
        finished = sorted(finished, key=lambda text: -text[2])[:width]
        if len(finished) == width:
            last = num_tokens if length_penalty > 0 else length + 1
            if early_stopping or beams[0][1] / last**length_penalty <= finished[-1][2]:
                return finished
    finished += [(tokens, score, score / num_tokens**length_penalty) for tokens, score in beams]
    return sorted(finished, key=lambda text: -text[2])[:width]


def assert_same(texts, expected):
    assert [text.tokens for text in texts] == [tokens for tokens, *_ in expected]
    np.testing.assert_allclose([text.score for text in texts], [score for _, score, *_ in expected], atol=1e-4)


def test_two_tokens_with_one_beam_per_vocabulary_entry_are_searched_exhaustively():
    for prompt, texts in zip(PROMPTS, search(), strict=True):
        possible = list(itertools.product(range(V), repeat=2))
        first_V = log_probs_after(ROTARY, [prompt])[0]
        second_VV = log_probs_after(ROTARY, [[*prompt, v] for v in range(V)])
        expected = sorted(((text, first_V[text[0]] + second_VV[text]) for text in possible), key=lambda text: -text[1])
        assert_same(texts, expected[:V])


@pytest.mark.parametrize("model", [ROTARY, LEARNED, ROTARY_PLAIN, LEARNED_PLAIN], ids=describe)
def test_width_one_is_greedy_even_past_the_context(model):
    keys = row_keys(jax.random.key(0), range(2))
    pieces = list(stream(some_params(model), PROMPTS, 20, keys, (Processor(greedy),), model=model))
    tokens_BC = np.concatenate([piece.token for piece in pieces], axis=1)
    log_probs_BC = np.concatenate([piece.log_prob for piece in pieces], axis=1)
    for [text], tokens, log_probs in zip(search(model, 20, width=1), tokens_BC, log_probs_BC, strict=True):
        assert text.tokens == tuple(tokens)
        assert text.score == pytest.approx(log_probs.sum(), abs=1e-4)
        np.testing.assert_allclose(text.log_probs, log_probs, atol=1e-4)
        assert not text.ended


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("ends", [(), (1,), (0, 4)])
def test_search_matches_the_textbook(ends, length_penalty, early_stopping):
    results = search(num_tokens=9, width=3, length_penalty=length_penalty, early_stopping=early_stopping, end_tokens=ends)
    for prompt, texts in zip(PROMPTS, results, strict=True):
        assert_same(texts, search_in_python(ROTARY, prompt, 9, 3, length_penalty, early_stopping, ends))
        assert [text.ended for text in texts] == [text.tokens[-1] in ends for text in texts]
        assert all(text.rank == text.score / len(text.tokens) ** length_penalty for text in texts)


def test_results_do_not_depend_on_the_other_prompts():
    together = search(num_tokens=12, width=3, end_tokens=(1,))
    other = [np.array([2, 2, 4, 0, 1], np.int32), PROMPTS[1]]
    mixed = beam_search(some_params(ROTARY), other, 12, model=ROTARY, width=3, end_tokens=(1,))
    assert [text.tokens for text in mixed[1]] == [text.tokens for text in together[1]]


def parts_for_several_rows(batch_size, config):
    return partitioned(batch_size, config, 1 if batch_size == 1 else 4)


def test_partitioned_caches_change_nothing_even_past_the_context():
    """Two prompts start with partitioned caches. A single one starts with one part; its three beams re-anchor with four."""
    in_parts = dataclasses.replace(SPLIT, name="parts", empty_cache=parts_for_several_rows)
    tokens = {}
    for kernels in (in_parts, SPLIT, PLAIN):
        model = GPT(LEARNED.config, kernels)
        together = beam_search(some_params(model), PROMPTS, 30, model=model, width=3)
        tokens[kernels.name] = [[text.tokens for text in texts] for texts in together]
        if kernels is in_parts:
            alone = [beam_search(some_params(model), [prompt], 30, model=model, width=3)[0] for prompt in PROMPTS]
            assert tokens[kernels.name] == [[text.tokens for text in texts] for texts in alone]
    assert tokens[in_parts.name] == tokens[SPLIT.name] == tokens[PLAIN.name]


def test_new_prompts_lengths_or_end_tokens_do_not_recompile():
    search(num_tokens=4, width=3)
    before = beam.prefill_and_extend._cache_size(), beam.extend_chunk._cache_size()
    beam_search(some_params(ROTARY), PROMPTS[::-1], 9, model=ROTARY, width=3, end_tokens=(0, 2), length_penalty=0.3)
    assert (beam.prefill_and_extend._cache_size(), beam.extend_chunk._cache_size()) == before


def test_non_finite_logits_are_an_error():
    params = jax.tree.map(np.copy, some_params(ROTARY))
    params["head"]["kernel"][:, 3] = np.nan
    with pytest.raises(FloatingPointError):
        beam_search(params, PROMPTS, 3, model=ROTARY, width=2)


@pytest.mark.parametrize("length_penalty, can_improve", [(1.0, True), (0.0, False), (-1.0, False)])
def test_a_beam_can_still_win_if_length_is_rewarded_and_tokens_remain(length_penalty, can_improve):
    """At -3 nats after 2 of 10 tokens a beam can reach -0.3 per token, and the text to beat has -1."""
    worst = beam.Hypothesis(tokens=(1,), log_probs=(-1.0,), score=-1.0, rank=-1.0, ended=True)
    search = beam.Search(1, 10, length_penalty, False, [None], finished=[worst], length=2)
    assert search.can_improve(-3.0) == can_improve


def test_if_length_is_penalised_a_beam_still_ends_no_later_than_the_last_step():
    """After its only token the text of -1 is the best, which it would not be with a second token."""
    first = beam.Choice(parent_BW=np.array([0]), token_BW=np.array([5]), score_BW=np.array([-1.0]))
    ended = beam.Choice(parent_BW=np.array([0]), token_BW=np.array([9]), score_BW=np.array([-1.5]))
    search = beam.Search(1, 1, -1.0, False, [None])
    search.step(first, ended)
    assert [text.score for text in search.finished] == [-1.0]
