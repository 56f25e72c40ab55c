"""The sampling loop, against loops that recompute everything for each token, and against exact probabilities."""

import dataclasses
import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from minigpt_jax.config import ModelConfig
from minigpt_jax.generation import sampler
from minigpt_jax.generation.logits import Greedy, PresencePenalty, Temperature, TopK, process
from minigpt_jax.generation.sampler import row_keys, stream
from minigpt_jax.models.gpt import GPT
from minigpt_jax.training.report import Compilations

CONFIG = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=16, context_length=8, vocab_size=13)
ROTARY = GPT(dataclasses.replace(CONFIG, positions="rotary"))
LEARNED = GPT(dataclasses.replace(CONFIG, positions="learned"))
SINUSOIDAL = GPT(dataclasses.replace(CONFIG, positions="sinusoidal", context_length=7))  # whose half is rounded down
# These have a context of their own, by which the fixture below knows that their caches are to be in parts.
PARTS = {12: 2, 16: 4, 80: 4}
ROTARY_IN_PARTS = GPT(dataclasses.replace(CONFIG, positions="rotary", context_length=12))
LEARNED_IN_PARTS = GPT(dataclasses.replace(CONFIG, positions="learned", context_length=16))
PROMPTS = [np.array(row, np.int32) for row in ([5], [1, 2, 0], [12, 7, 7, 0, 4, 9, 11])]

# Few combinations of processors, since each compiles; their numbers are free.
GREEDY = (PresencePenalty(0.0), Greedy())
SAMPLING = (Temperature(0.9), TopK(10))


@pytest.fixture(scope="module", autouse=True)
def in_parts():
    """All models here are too small for it to be worth while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "suited_parts", lambda config, batch_size, device: PARTS.get(config.context_length, 1))
        yield


@functools.cache
def some_params(model):
    """Parameters far from their initial values, so that logits differ, without the compilation that drawing them takes."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((2, 1), np.int32))["params"]
    return jax.tree.map(lambda leaf: 0.7 * random.standard_normal(leaf.shape, np.float32), shapes)


def pieces(model, prompts, num_tokens, seed=0, processors=SAMPLING, params=None, **how):
    """tokens_BC, piece by piece."""
    key_B = row_keys(jax.random.key(seed), range(len(prompts)))
    for piece in stream(params or some_params(model), prompts, num_tokens, key_B, processors, model=model, **how):
        yield piece.token


def sampled(*what, **how):
    """All the pieces' tokens, row by row."""
    return np.concatenate(list(pieces(*what, **how)), axis=1).tolist()


# ---- Against loops that recompute everything ------------------------------------------------------------------------------


@functools.cache
def next_token(model, num_columns):
    """Compiled once: which token the model thinks most likely after the first `length` of a padded row."""

    @jax.jit
    def run(tokens_BT, length):
        logits_BTV, _ = model.apply({"params": some_params(model)}, tokens_BT)
        return logits_BTV[0, length - 1].argmax()

    def after(tokens):
        tokens_BT = np.zeros((2, num_columns), np.int32)
        tokens_BT[0, : len(tokens)] = tokens
        return int(run(tokens_BT, len(tokens)))

    return after


def greedy_by_recomputation(model, prompt, num_tokens):
    """For rotary positions the model on the whole text, which sees no further back than its context. For a table of
    positions: a window that, each time that it is full, is cut down to its last half.
    """
    S = model.config.context_length
    text, window = list(prompt), list(prompt)
    for _ in range(num_tokens):
        if model.config.positions == "rotary":
            token = next_token(model, 4 * S)(text)
        else:
            token = next_token(model, S)(window)
            window = [*window[len(window) - S // 2 :], token] if len(window) == S else [*window, token]
        text.append(token)
    return text[len(prompt) :]


LONGER = GPT(dataclasses.replace(CONFIG, positions="learned", context_length=40))  # prompts run through it in two pieces


@pytest.mark.parametrize(
    ("model", "num_tokens"),
    [(ROTARY, 20), (LEARNED, 20), (SINUSOIDAL, 20), (LONGER, 70), (ROTARY_IN_PARTS, 40), (LEARNED_IN_PARTS, 40)],
    ids=["rotary", "learned", "sinusoidal", "longer", "rotary in parts", "learned in parts"],
)
def test_greedy_text_is_that_of_recomputing_the_whole_context_for_each_token(model, num_tokens):
    """For prompts of different lengths in one batch, and far past the context."""
    expected = [greedy_by_recomputation(model, prompt, num_tokens) for prompt in PROMPTS]
    assert sampled(model, PROMPTS, num_tokens, processors=GREEDY) == expected
    assert len(set(map(tuple, expected))) == 3
    assert len(set(itertools.chain(*expected))) > 3  # it does not just repeat itself


@pytest.mark.parametrize("context_length", [48, 80])
@pytest.mark.parametrize("lengths", [(1, 3), (24, 2), (25, 24), (48, 47)], ids=str)
def test_prefill_in_pieces_gives_the_logits_after_each_prompt(lengths, context_length):
    """For prompts of one piece and of several, up to the whole context, which the pieces divide, as they do the cache's
    parts."""
    model = GPT(dataclasses.replace(CONFIG, context_length=context_length))
    assert 24 < sampler.PREFILL_PIECE < 40
    tokens_BS = np.random.default_rng(0).integers(13, size=(2, 48))
    prompts_BS = sampler.padded([row[:length] for row, length in zip(tokens_BS, lengths, strict=True)], context_length)
    state, logits_BV = sampler.prefill(some_params(model), prompts_BS, np.array(lengths), model=model)
    assert len(state.cache[0].k_parts) == PARTS.get(context_length, 1)
    uncached = jax.jit(lambda params, tokens_BS: model.apply({"params": params}, tokens_BS)[0])
    expected_BSV = uncached(some_params(model), tokens_BS)
    np.testing.assert_allclose(logits_BV, expected_BSV[np.arange(2), np.array(lengths) - 1], atol=1e-4)
    assert state.position_B.tolist() == [length - 1 for length in lengths]


def test_penalties_count_the_prompt_and_what_was_generated_and_no_padding():
    """With a penalty that forbids what was seen, all other tokens come once, token 0 among them."""
    prompts = [np.array(row, np.int32) for row in ([3, 4, 3], [3, 8], [1, 2])]
    rows = sampled(ROTARY, prompts, 11, processors=(PresencePenalty(1e6), Greedy()))
    for row, prompt in zip(rows, prompts, strict=True):
        assert sorted([*row, *set(prompt.tolist())]) == list(range(13))


# ---- Randomness -----------------------------------------------------------------------------------------------------------


def test_text_follows_its_key_and_rows_have_randomness_of_their_own():
    same_prompts = [PROMPTS[1]] * 3
    first, again, other = (sampled(ROTARY, same_prompts, 12, seed) for seed in (0, 0, 1))
    assert first == again
    assert len({tuple(row) for row in first + other}) == 6
    assert len({row[0] for row in first + other}) > 1


@pytest.mark.parametrize("model", [ROTARY, LEARNED, LEARNED_IN_PARTS], ids=["rotary", "learned", "learned in parts"])
def test_a_row_is_the_same_whatever_stands_beside_it(model):
    """Wherever the contexts of the others end."""
    expected = sampled(model, PROMPTS, 20)
    for others in (PROMPTS[2], PROMPTS[0]):
        assert sampled(model, [others, PROMPTS[1], others], 20)[1] == expected[1]


@pytest.mark.parametrize("model", [ROTARY, LEARNED], ids=lambda model: model.config.positions)
def test_where_the_pieces_are_cut_changes_nothing(model):
    expected = sampled(model, PROMPTS, 20)
    for chunk in (1, 3, 19):
        cut = list(pieces(model, PROMPTS, 20, chunk=chunk))
        assert np.concatenate(cut, axis=1).tolist() == expected
        assert max(piece_BC.shape[1] for piece_BC in cut) <= chunk
    assert [sampled(model, PROMPTS, n) for n in (1, 2, 9)] == [[row[:n] for row in expected] for n in (1, 2, 9)]


def test_pieces_stay_as_they_were_handed_out():
    """The loop goes on with the memory of its state; what it yielded must not lie there."""
    kept = [(piece_BC, piece_BC.copy()) for piece_BC in pieces(ROTARY, PROMPTS, 20, chunk=4)]
    for piece_BC, then_BC in kept:
        np.testing.assert_array_equal(piece_BC, then_BC)


def test_two_calls_do_not_see_each_other():
    """Also when they take turns."""
    one = functools.partial(pieces, ROTARY, PROMPTS, 20, chunk=5)
    other = functools.partial(pieces, ROTARY, PROMPTS[::-1], 20, seed=5, chunk=5)
    alone = [np.concatenate(list(make()), axis=1) for make in (one, other, one)]
    np.testing.assert_array_equal(alone[0], alone[2])
    in_turn = zip(*zip(one(), other(), strict=True), strict=True)
    for cut, expected in zip(in_turn, alone, strict=False):
        np.testing.assert_array_equal(np.concatenate(cut, axis=1), expected)


def test_tokens_come_as_often_as_their_probability_says():
    """The first two tokens after a prompt, jointly, against the product of exact softmaxes after the processors."""
    V, num_rows = 5, 4000
    model = GPT(dataclasses.replace(CONFIG, vocab_size=V))
    params, processors = some_params(model), (Temperature(2.0), TopK(4))
    prompt = np.array([3, 1], np.int32)

    @jax.jit
    def probabilities(tokens_BT):
        logits_BTV, _ = model.apply({"params": params}, tokens_BT)
        processed_BV = process(processors, logits_BTV[:, -2:].reshape(-1, V), np.zeros((2 * len(tokens_BT), V)))
        return jax.nn.softmax(processed_BV).reshape(-1, 2, V)

    # Row i has the prompt and then token i: the first token's distribution stands before it, the second's after it.
    both_BTV = np.asarray(probabilities(np.array([[*prompt, token] for token in range(V)])))
    expected_VV = both_BTV[0, 0][:, None] * both_BTV[:, 1]
    tokens_BT = sampled(model, [prompt] * num_rows, 2, processors=processors)
    found_VV = np.zeros((V, V))
    np.add.at(found_VV, tuple(np.transpose(tokens_BT)), 1)

    possible = expected_VV > 0
    assert possible.sum() == 16
    assert not found_VV[~possible].any()
    statistic = np.sum(np.square(found_VV - num_rows * expected_VV)[possible] / (num_rows * expected_VV[possible]))
    assert scipy.stats.chi2.sf(statistic, df=possible.sum() - 1) > 0.01


# ---- Compilation ----------------------------------------------------------------------------------------------------------


def vary(model, num_rows):
    """Samples with other prompts, lengths, seeds and numbers; the longest prompt fills the context."""
    for length in range(1, 9):
        prompts = [np.arange(length, dtype=np.int32), PROMPTS[0], np.ones(length, np.int32), PROMPTS[1]][:num_rows]
        processors = (Temperature(0.1 * length), TopK(length))
        sampled(model, prompts, 1 + 3 * length, seed=length, processors=processors, chunk=length)


@pytest.mark.parametrize("model", [ROTARY, LEARNED], ids=lambda model: model.config.positions)
def test_nothing_compiles_again_for_other_prompts_lengths_seeds_or_numbers(model):
    def compiled():
        return [function._cache_size() for function in (sampler.start, sampler.go_on, sampler.reanchor)]

    sampled(model, PROMPTS, 20)
    before = compiled()
    vary(model, num_rows=3)
    assert compiled() == before
    assert min(before[:2]) > 0


@pytest.mark.parametrize("model", [ROTARY, LEARNED], ids=lambda model: model.config.positions)
def test_nothing_compiles_again_where_rows_are_divided_among_devices(model):
    """Of compilations, since jit keeps another entry for a state that comes from `go_on`, of the same program."""
    sampled(model, [*PROMPTS, PROMPTS[0]], 20)
    with Compilations() as compilations:
        vary(model, num_rows=4)
    assert not compilations.programs


# ---- Several devices ------------------------------------------------------------------------------------------------------


def places(array):
    """Where the pieces of an array lie in memory, and of which shape each is."""
    return [(shard.data.unsafe_buffer_pointer(), shard.data.shape) for shard in array.addressable_shards]


@pytest.mark.parametrize("num_rows", [2, 16])
def test_rows_are_divided_among_devices_which_share_the_parameters(num_rows):
    params = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    placed, (rows,) = sampler.on_devices(params, (np.arange(num_rows * 5).reshape(-1, 5),))
    addresses, shapes = zip(*places(rows), strict=True)
    assert shapes == ((num_rows // 2, 5),) * 2
    assert len(set(addresses)) == 2
    assert places(placed["kernel"]) == [(params["kernel"].unsafe_buffer_pointer(), (2, 3))] * 2
    np.testing.assert_array_equal(rows, np.arange(num_rows * 5).reshape(-1, 5))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_rows_that_cannot_be_divided_stay_where_they_are(num_rows):
    params, rows = {"kernel": np.ones(2)}, (np.ones((num_rows, 5)),)
    assert sampler.on_devices(params, rows) == (params, rows)


def test_accelerators_are_left_to_who_put_the_parameters_there(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(platform="gpu")] * 2)
    params, rows = {"kernel": np.ones(2)}, (np.ones((2, 5)),)
    assert sampler.on_devices(params, rows) == (params, rows)


@pytest.mark.parametrize("model", [ROTARY, LEARNED], ids=lambda model: model.config.positions)
def test_a_row_is_the_same_on_whatever_device(monkeypatch, model):
    divided_among = []

    def watched(params, state, *others, **how):
        k_NPK = state.decode.cache[0].k_parts[0]
        divided_among.append(len(k_NPK) // k_NPK.sharding.shard_shape(k_NPK.shape)[0])
        return go_on(params, state, *others, **how)

    go_on = sampler.go_on
    monkeypatch.setattr(sampler, "go_on", watched)
    alone = sampled(model, PROMPTS, 20)
    assert set(divided_among) == {1}
    divided_among.clear()
    divided = sampled(model, [*PROMPTS, PROMPTS[0]], 20)
    assert set(divided_among) == {2}
    assert divided[:3] == alone
    assert divided[3] != alone[0]  # it has a key of its own


def test_devices_need_not_wait_for_each_other_in_the_loop():
    rows = np.ones((4, 16), np.int32), np.full(4, 3), row_keys(jax.random.key(0), range(4))
    params, rows = sampler.on_devices(some_params(LEARNED_IN_PARTS), rows)
    strategy = (PresencePenalty(0.1), *SAMPLING)
    state, _ = sampler.start(params, *rows, strategy, model=LEARNED_IN_PARTS)
    assert state.decode.token_B.sharding.shard_shape((4,)) == (2,)
    program = sampler.go_on.lower(params, state, strategy, 5, model=LEARNED_IN_PARTS).compile().as_text()
    assert "num_partitions=2" in program
    assert " conditional(" in program
    assert not re.search(r"all-|collective|reduce-scatter", program)


# ---- What cannot be sampled from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("processors", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_logits_that_are_not_finite_are_an_error(value, processors):
    """Even if it is only one of them, which processors would remove."""
    params = jax.tree.map(np.copy, some_params(ROTARY))
    params["head"]["kernel"][:, 3] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        sampled(ROTARY, PROMPTS, 5, processors=processors, params=params)


def test_processors_that_leave_nothing_to_sample_from_are_an_error():
    with pytest.raises(FloatingPointError, match="not finite"):
        sampled(ROTARY, PROMPTS, 5, processors=(Temperature(0.0), TopK(10)))


def test_logits_that_become_infinite_on_the_way_are_an_error():
    """The prompt is fine; the token that it leads to is not."""
    prompts = [PROMPTS[1]] * 3
    first = sampled(ROTARY, prompts, 1, processors=GREEDY)[0][0]
    assert first not in prompts[0]
    params = jax.tree.map(np.copy, some_params(ROTARY))
    params["embedding"]["tokens"]["embedding"][first] = np.nan
    cut = pieces(ROTARY, prompts, 5, processors=GREEDY, params=params)
    assert next(cut).tolist() == [[first]] * 3
    with pytest.raises(FloatingPointError, match="not finite"):
        next(cut)
