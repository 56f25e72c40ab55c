"""The sampling loop, compared with loops that recompute everything for each token, and with exact probabilities."""

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
from minigpt_jax.generation import context, decode, sampling
from minigpt_jax.generation.devices import shard_rows
from minigpt_jax.generation.logits import Processor, greedy, presence_penalty, process, temperature, top_k
from minigpt_jax.generation.sampling import row_keys, stream
from minigpt_jax.kernels import BLOCKED, SPLIT
from minigpt_jax.kernels.partitioned_cache import PartitionedCache, partitioned
from minigpt_jax.models.cache import KVCache
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.kernels import PLAIN
from minigpt_jax.training.compilations import Compilations

pytestmark = pytest.mark.slow


def two_parts(batch_size, config):
    return partitioned(batch_size, config, 2)


def four_parts(batch_size, config):
    return partitioned(batch_size, config, 4)


def in_parts(kernels, empty_cache):
    """The caches in these tests are too small for the kernels to partition them on their own."""
    return dataclasses.replace(kernels, name=f"{kernels.name}, {empty_cache.__name__}", empty_cache=empty_cache)


CONFIG = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=16, context_length=8, vocab_size=13)
ROTARY_CONFIG = dataclasses.replace(CONFIG, positions="rotary")
LEARNED_CONFIG = dataclasses.replace(CONFIG, positions="learned")
SINUSOIDAL_CONFIG = dataclasses.replace(CONFIG, positions="sinusoidal", context_length=7)  # odd: half of it is rounded down
ROTARY, LEARNED, SINUSOIDAL = (GPT(config, SPLIT) for config in (ROTARY_CONFIG, LEARNED_CONFIG, SINUSOIDAL_CONFIG))
ROTARY_PLAIN, LEARNED_PLAIN, SINUSOIDAL_PLAIN = (GPT(model.config, PLAIN) for model in (ROTARY, LEARNED, SINUSOIDAL))
ROTARY_IN_PARTS = GPT(dataclasses.replace(ROTARY_CONFIG, context_length=12), in_parts(SPLIT, two_parts))
LEARNED_IN_PARTS = GPT(dataclasses.replace(LEARNED_CONFIG, context_length=16), in_parts(SPLIT, four_parts))
LONGER = GPT(dataclasses.replace(LEARNED_CONFIG, context_length=40), SPLIT)  # prompts are prefilled in two chunks
LONGER_PLAIN = GPT(LONGER.config, PLAIN)
IN_BLOCKS = GPT(dataclasses.replace(ROTARY_CONFIG, context_length=80), in_parts(BLOCKED, four_parts))
PROMPTS = [np.array(row, np.int32) for row in ([5], [1, 2, 0], [12, 7, 7, 0, 4, 9, 11])]

# Few combinations of processors, since each is compiled once. Other numbers in them do not recompile.
GREEDY = (Processor(presence_penalty, 0.0), Processor(greedy))
SAMPLING = (Processor(temperature, 0.9), Processor(top_k, 10))


def describe(model):
    return f"{model.config.positions} {model.config.context_length}, {model.kernels.name}"


def for_each(*models):
    return pytest.mark.parametrize("model", models, ids=describe)


@functools.cache
def some_params(model):
    """Parameters far from their initial values, so that logits differ. Unlike `model.init`, this needs no compilation."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((2, 1), np.int32))["params"]
    return jax.tree.map(lambda leaf: 0.7 * random.standard_normal(leaf.shape, np.float32), shapes)


def pieces(model, prompts, num_tokens, seed=0, processors=SAMPLING, params=None, **options):
    """Yields tokens_BC, piece by piece."""
    key_B = row_keys(jax.random.key(seed), range(len(prompts)))
    for piece in stream(params or some_params(model), prompts, num_tokens, key_B, processors, model=model, **options):
        yield piece.token


def sampled(*args, **options):
    """The tokens of all pieces, row by row."""
    return np.concatenate(list(pieces(*args, **options)), axis=1).tolist()


# ---- Compared with loops that recompute everything ------------------------------------------------------------------------


@functools.cache
def next_token(config, num_columns):
    """A function, compiled once, that returns the plain model's most probable token after a text."""
    model = GPT(config, PLAIN)

    @jax.jit
    def run(tokens_BT, length):
        logits_BTV, _ = model.apply({"params": some_params(model)}, tokens_BT)
        return logits_BTV[0, length - 1].argmax()

    def after(tokens):
        tokens_BT = np.zeros((2, num_columns), np.int32)
        tokens_BT[0, : len(tokens)] = tokens
        return int(run(tokens_BT, len(tokens)))

    return after


def greedy_by_recomputation(config, prompt, num_tokens):
    """With rotary positions the plain model runs on the whole text and looks back no further than its context. With a
    position table it runs on a window, which is cut to its last half whenever it is full.
    """
    S = config.context_length
    text, window = list(prompt), list(prompt)
    for _ in range(num_tokens):
        if config.positions == "rotary":
            token = next_token(config, 4 * S)(text)
        else:
            token = next_token(config, S)(window)
            window = [*window[len(window) - S // 2 :], token] if len(window) == S else [*window, token]
        text.append(token)
    return text[len(prompt) :]


NUM_TOKENS = {
    ROTARY: 20, LEARNED: 20, SINUSOIDAL: 20, LONGER: 70, ROTARY_IN_PARTS: 40, LEARNED_IN_PARTS: 40, IN_BLOCKS: 100,
    ROTARY_PLAIN: 20, LEARNED_PLAIN: 20, SINUSOIDAL_PLAIN: 20, LONGER_PLAIN: 70,
}  # fmt: skip


@for_each(*NUM_TOKENS)
def test_greedy_text_matches_recomputing_the_whole_context_for_each_token(model):
    """For prompts of different lengths in one batch, far past the context."""
    num_tokens = NUM_TOKENS[model]
    expected = [greedy_by_recomputation(model.config, prompt, num_tokens) for prompt in PROMPTS]
    assert sampled(model, PROMPTS, num_tokens, processors=GREEDY) == expected
    assert len(set(map(tuple, expected))) == 3
    assert len(set(itertools.chain(*expected))) > 3  # the text does not just repeat itself


@pytest.mark.parametrize(
    ("context_length", "kernels"),
    [(48, PLAIN), (48, SPLIT), (80, BLOCKED), (80, in_parts(BLOCKED, four_parts))],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("lengths", [(1, 3), (24, 2), (25, 24), (48, 47)], ids=str)
def test_chunked_prefill_gives_the_logits_after_each_prompt(lengths, context_length, kernels):
    """For prompts of one chunk and of several, up to the whole context. The chunk size divides the context and the parts
    of the cache."""
    model = GPT(dataclasses.replace(CONFIG, context_length=context_length), kernels)
    assert 24 < decode.PREFILL_CHUNK < 40
    tokens_BS = np.random.default_rng(0).integers(13, size=(2, 48))
    prompts_BS = context.padded([row[:length] for row, length in zip(tokens_BS, lengths, strict=True)], context_length)
    state, logits_BV = decode.prefill(some_params(model), prompts_BS, np.array(lengths), model=model)
    if kernels is PLAIN:
        assert isinstance(state.cache[0].kv, KVCache)
    else:
        assert isinstance(state.cache[0].kv, PartitionedCache)
        assert len(state.cache[0].kv.k_parts) == (4 if kernels.empty_cache is four_parts else 1)
    uncached = jax.jit(lambda params, tokens_BS: model.apply({"params": params}, tokens_BS)[0])
    expected_BSV = uncached(some_params(model), tokens_BS)
    np.testing.assert_allclose(logits_BV, expected_BSV[np.arange(2), np.array(lengths) - 1], atol=1e-4)
    assert state.position_B.tolist() == [length - 1 for length in lengths]


def test_penalties_count_prompt_and_generated_tokens_but_not_padding():
    """With a penalty that rules out seen tokens, every other token appears once, including token 0."""
    prompts = [np.array(row, np.int32) for row in ([3, 4, 3], [3, 8], [1, 2])]
    rows = sampled(ROTARY, prompts, 11, processors=(Processor(presence_penalty, 1e6), Processor(greedy)))
    for row, prompt in zip(rows, prompts, strict=True):
        assert sorted([*row, *set(prompt.tolist())]) == list(range(13))


# ---- Randomness -----------------------------------------------------------------------------------------------------------


def test_text_depends_on_its_key_and_rows_have_their_own_randomness():
    same_prompts = [PROMPTS[1]] * 3
    first, again, other = (sampled(ROTARY, same_prompts, 12, seed) for seed in (0, 0, 1))
    assert first == again
    assert len({tuple(row) for row in first + other}) == 6
    assert len({row[0] for row in first + other}) > 1


@for_each(ROTARY, LEARNED, LEARNED_IN_PARTS, ROTARY_PLAIN, LEARNED_PLAIN)
def test_a_row_does_not_depend_on_the_other_rows(model):
    """Wherever the other rows reach the end of their context."""
    expected = sampled(model, PROMPTS, 20)
    for others in (PROMPTS[2], PROMPTS[0]):
        assert sampled(model, [others, PROMPTS[1], others], 20)[1] == expected[1]


@for_each(ROTARY, LEARNED, LEARNED_PLAIN)
def test_the_size_of_the_pieces_does_not_change_the_tokens(model):
    expected = sampled(model, PROMPTS, 20)
    for chunk in (1, 3, 19):
        yielded = list(pieces(model, PROMPTS, 20, chunk=chunk))
        assert np.concatenate(yielded, axis=1).tolist() == expected
        assert max(piece_BC.shape[1] for piece_BC in yielded) <= chunk
    assert [sampled(model, PROMPTS, n) for n in (1, 2, 9)] == [[row[:n] for row in expected] for n in (1, 2, 9)]


def test_yielded_pieces_are_never_overwritten():
    """The loop reuses the memory of its state, which yielded pieces must not share."""
    kept = [(piece_BC, piece_BC.copy()) for piece_BC in pieces(ROTARY, PROMPTS, 20, chunk=4)]
    for piece_BC, copy_BC in kept:
        np.testing.assert_array_equal(piece_BC, copy_BC)


def test_two_streams_are_independent():
    """Even when they are interleaved."""
    one = functools.partial(pieces, ROTARY, PROMPTS, 20, chunk=5)
    other = functools.partial(pieces, ROTARY, PROMPTS[::-1], 20, seed=5, chunk=5)
    alone = [np.concatenate(list(make()), axis=1) for make in (one, other, one)]
    np.testing.assert_array_equal(alone[0], alone[2])
    interleaved = zip(*zip(one(), other(), strict=True), strict=True)
    for yielded, expected in zip(interleaved, alone, strict=False):
        np.testing.assert_array_equal(np.concatenate(yielded, axis=1), expected)


def test_token_frequencies_match_their_probabilities():
    """The first two tokens after a prompt, jointly, compared with the product of exact softmaxes after the processors."""
    V, num_rows = 5, 4000
    model = GPT(dataclasses.replace(CONFIG, vocab_size=V), SPLIT)
    params, processors = some_params(model), (Processor(temperature, 2.0), Processor(top_k, 4))
    prompt = np.array([3, 1], np.int32)

    @jax.jit
    def probabilities(tokens_BT):
        logits_BTV, _ = model.apply({"params": params}, tokens_BT)
        processed_BV = process(processors, logits_BTV[:, -2:].reshape(-1, V))
        return jax.nn.softmax(processed_BV).reshape(-1, 2, V)

    # Row i is the prompt and token i. It gives the distribution of the first token and that of the second after token i.
    both_BTV = np.asarray(probabilities(np.array([[*prompt, token] for token in range(V)])))
    expected_VV = both_BTV[0, 0][:, None] * both_BTV[:, 1]
    tokens_BT = sampled(model, [prompt] * num_rows, 2, processors=processors, devices=jax.local_devices())
    counts_VV = np.zeros((V, V))
    np.add.at(counts_VV, tuple(np.transpose(tokens_BT)), 1)

    possible = expected_VV > 0
    assert possible.sum() == 16
    assert not counts_VV[~possible].any()
    statistic = np.sum(np.square(counts_VV - num_rows * expected_VV)[possible] / (num_rows * expected_VV[possible]))
    assert scipy.stats.chi2.sf(statistic, df=possible.sum() - 1) > 0.01


# ---- Compilation ----------------------------------------------------------------------------------------------------------


def vary(model, num_rows, **options):
    """Samples with various prompts, lengths, seeds and numbers. The longest prompt fills the context."""
    for length in range(1, 9):
        prompts = [np.arange(length, dtype=np.int32), PROMPTS[0], np.ones(length, np.int32), PROMPTS[1]][:num_rows]
        processors = (Processor(temperature, 0.1 * length), Processor(top_k, length))
        sampled(model, prompts, 1 + 3 * length, seed=length, processors=processors, chunk=length, **options)


@for_each(ROTARY, LEARNED, LEARNED_PLAIN)
def test_new_prompts_lengths_seeds_or_numbers_do_not_recompile(model):
    jitted = decode.prefill_and_sample, decode.decode_chunk, context.reanchor

    def cache_sizes():
        return [function._cache_size() for function in jitted]

    sampled(model, PROMPTS, 20)
    before = cache_sizes()
    vary(model, num_rows=3)
    assert cache_sizes() == before
    assert min(before[:2]) > 0


@for_each(ROTARY, LEARNED, LEARNED_PLAIN)
def test_sharded_rows_do_not_recompile(model):
    """Counts compilations, since jit caches a second entry, of the same program, for a state from `decode_chunk`."""
    sampled(model, [*PROMPTS, PROMPTS[0]], 20, devices=jax.local_devices())
    with Compilations() as compilations:
        vary(model, num_rows=4, devices=jax.local_devices())
    assert not compilations.programs


# ---- Several devices ------------------------------------------------------------------------------------------------------


def shards(array):
    """The memory address and shape of each shard of an array."""
    return [(shard.data.unsafe_buffer_pointer(), shard.data.shape) for shard in array.addressable_shards]


@pytest.mark.parametrize("num_rows", [2, 16])
def test_rows_are_sharded_over_devices_that_share_the_parameters(num_rows):
    params = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    devices = tuple(jax.local_devices())
    placed, (rows,) = shard_rows(params, (np.arange(num_rows * 5).reshape(-1, 5),), devices)
    addresses, shapes = zip(*shards(rows), strict=True)
    assert shapes == ((num_rows // 2, 5),) * 2
    assert len(set(addresses)) == 2
    assert shards(placed["kernel"]) == [(params["kernel"].unsafe_buffer_pointer(), (2, 3))] * 2
    np.testing.assert_array_equal(rows, np.arange(num_rows * 5).reshape(-1, 5))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_rows_that_do_not_divide_evenly_are_not_sharded(num_rows):
    params, rows = {"kernel": np.ones(2)}, (np.ones((num_rows, 5)),)
    assert shard_rows(params, rows, jax.local_devices()) == (params, rows)


def test_without_devices_nothing_is_sharded():
    params, rows = {"kernel": np.ones(2)}, (np.ones((2, 5)),)
    assert shard_rows(params, rows, ()) == (params, rows)


def test_rows_are_not_sharded_over_accelerators():
    params, rows = {"kernel": np.ones(2)}, (np.ones((2, 5)),)
    assert shard_rows(params, rows, [types.SimpleNamespace(platform="gpu")] * 2) == (params, rows)


@for_each(ROTARY, LEARNED, LEARNED_PLAIN)
def test_a_row_does_not_depend_on_its_device(monkeypatch, model):
    shard_counts = []

    def counting(params, state, *others, **options):
        keys = jax.tree.leaves(state.decode.cache[0])[0]
        shard_counts.append(len(keys) // keys.sharding.shard_shape(keys.shape)[0])
        return decode_chunk(params, state, *others, **options)

    decode_chunk = sampling.decode_chunk
    monkeypatch.setattr(sampling, "decode_chunk", counting)
    alone = sampled(model, PROMPTS, 20, devices=jax.local_devices())
    assert set(shard_counts) == {1}
    shard_counts.clear()
    sharded = sampled(model, [*PROMPTS, PROMPTS[0]], 20, devices=jax.local_devices())
    assert set(shard_counts) == {2}
    assert sharded[:3] == alone
    assert sharded[3] != alone[0]  # it has its own key


@for_each(LEARNED_IN_PARTS, GPT(LEARNED_IN_PARTS.config, PLAIN))
def test_sharded_decoding_needs_no_communication(model):
    rows = np.ones((4, 16), np.int32), np.full(4, 3), row_keys(jax.random.key(0), range(4))
    params, rows = shard_rows(some_params(model), rows, jax.local_devices())
    strategy = (Processor(presence_penalty, 0.1), *SAMPLING)
    state, _ = decode.prefill_and_sample(params, *rows, strategy, model=model)
    assert state.decode.token_B.sharding.shard_shape((4,)) == (2,)
    program = decode.decode_chunk.lower(params, state, strategy, 5, model=model).compile().as_text()
    assert "num_partitions=2" in program
    assert (" conditional(" in program) == (model is LEARNED_IN_PARTS)
    assert not re.search(r"all-|collective|reduce-scatter", program)


# ---- Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("processors", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_non_finite_logits_are_an_error(value, processors):
    """Even if there is only one, which the processors would remove."""
    params = jax.tree.map(np.copy, some_params(ROTARY))
    params["head"]["kernel"][:, 3] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        sampled(ROTARY, PROMPTS, 5, processors=processors, params=params)


def test_processors_that_remove_every_token_are_an_error():
    with pytest.raises(FloatingPointError, match="not finite"):
        sampled(ROTARY, PROMPTS, 5, processors=(Processor(temperature, 0.0), Processor(top_k, 10)))


def test_logits_that_become_non_finite_later_are_an_error():
    """The logits after the prompt are finite; those after the first sampled token are not."""
    prompts = [PROMPTS[1]] * 3
    first = sampled(ROTARY, prompts, 1, processors=GREEDY)[0][0]
    assert first not in prompts[0]
    params = jax.tree.map(np.copy, some_params(ROTARY))
    params["embedding"]["tokens"]["embedding"][first] = np.nan
    yielded = pieces(ROTARY, prompts, 5, processors=GREEDY, params=params)
    assert next(yielded).tolist() == [[first]] * 3
    with pytest.raises(FloatingPointError, match="not finite"):
        next(yielded)
