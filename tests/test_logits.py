"""Processors, each compared with a few lines of NumPy, on logits with ties, removed tokens and a single token left."""

import dataclasses
import functools
import inspect

import jax
import numpy as np
import pytest
from helpers import assert_raises, normal, random_tokens
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minigpt_jax.config import setting_type
from minigpt_jax.errors import UsageError
from minigpt_jax.generation import logits
from minigpt_jax.generation.logits import Processor, process
from minigpt_jax.generation.seen import Seen
from minigpt_jax.generation.strategy import DecodingConfig, processors

RepetitionPenalty, FrequencyPenalty, PresencePenalty, Temperature, TopK, TopP, MinP, TypicalP, Greedy = constructors = [
    functools.partial(Processor, function)
    for function in (
        logits.repetition_penalty, logits.frequency_penalty, logits.presence_penalty, logits.temperature,
        logits.top_k, logits.top_p, logits.min_p, logits.typical_p, logits.greedy,
    )
]  # fmt: skip


def describe(value):
    return f"{value.function.__name__} {value.number}" if isinstance(value, Processor) else str(value)


INF = np.inf
process_jitted = jax.jit(process)

# Few distinct values, so that there are ties, and -inf. At least one value per row is finite. One shape per vocabulary size
# keeps compilation short.
ROW_VALUES = st.one_of(st.sampled_from([-INF, -1.0, 0.0, 0.5, 2.0]), st.floats(-20, 20, width=16))
ROW = st.sampled_from([2, 7]).flatmap(lambda V: st.lists(ROW_VALUES, min_size=V, max_size=V)).filter(lambda r: max(r) > -INF)
FRACTION = st.one_of(st.sampled_from([1e-30, 1e-6, 0.5, 1.0]), st.floats(0.01, 1.0))
TOP_K = st.integers(1, 9)
many = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def run(chosen, row):
    """The row after the processors, in a batch with another row that must not affect it."""
    logits_BV = np.array([row, np.roll(row, 1)], np.float32)
    processed_BV = np.asarray(process_jitted(chosen, logits_BV, np.zeros_like(logits_BV)))
    return processed_BV[0]


def kept(chosen, row):
    """Which tokens are kept. Checks that their logits are unchanged."""
    processed = run(chosen, row)
    is_kept = processed > -INF
    np.testing.assert_array_equal(processed[is_kept], np.float32(row)[is_kept])
    assert is_kept.any()
    return is_kept.tolist()


def softmax(row):
    exponentials = np.exp(np.float64(row) - np.max(row))
    return exponentials / exponentials.sum()


def cheapest_until_mass(row, cost, mass):
    """Tokens in order of their cost until their probability reaches `mass`, including ties with the last of them."""
    probs, total, last = softmax(row), 0.0, None
    for token in np.argsort(cost, kind="stable"):
        if probs[token] == 0 and mass < 1:
            break
        assume(mass >= 1 or abs(total - mass) > 1e-5)  # so close that float32 may decide differently
        if total >= mass and mass < 1:
            break
        total, last = total + probs[token], cost[token]
    return ((cost <= last) & (np.asarray(row) > -INF)).tolist()


# ---- Which tokens are kept ------------------------------------------------------------------------------------------------


@many
@given(row=ROW, k=TOP_K)
def test_top_k_keeps_the_k_highest_and_ties_with_the_last(row, k):
    lowest = sorted(row, reverse=True)[min(k, len(row)) - 1]
    assert kept((TopK(k),), row) == [lowest <= logit and logit > -INF for logit in row]


@many
@given(row=ROW, p=FRACTION)
def test_top_p_keeps_the_most_probable_until_their_mass_reaches_p(row, p):
    assert kept((TopP(p),), row) == cheapest_until_mass(row, -np.array(row), p)


@many
@given(row=ROW, p=FRACTION)
def test_min_p_keeps_tokens_at_least_p_times_as_probable_as_the_best(row, p):
    probs = softmax(row)
    ratio = probs / probs.max()
    assume((np.abs(ratio / p - 1)[ratio < 1] > 1e-4).all())
    assert kept((MinP(p),), row) == ((ratio >= p) & (np.array(row) > -INF)).tolist()


@many
@given(row=ROW, p=FRACTION)
def test_typical_p_keeps_tokens_with_surprisal_near_the_entropy_until_their_mass_reaches_p(row, p):
    probs = softmax(row)
    with np.errstate(divide="ignore"):
        surprisal = -np.log(probs)
    entropy = sum(probability * nats for probability, nats in zip(probs, surprisal, strict=True) if probability > 0)
    cost = np.abs(surprisal - entropy)
    gaps = np.diff(np.unique(cost[np.isfinite(cost)]))
    assume((gaps > 1e-3).all())  # rounding would decide between tokens equally far from the entropy
    assert kept((TypicalP(p),), row) == cheapest_until_mass(row, cost, p)


@many
@given(row=ROW)
def test_greedy_keeps_the_first_of_the_best(row):
    assert np.flatnonzero(kept((Greedy(),), row)).tolist() == [int(np.argmax(row))]


@pytest.mark.parametrize(
    "processor, row, expected",
    [
        (TopK(1), [1.0, 3.0, 2.0], [0, 1, 0]),
        (TopK(2), [1.0, 3.0, 2.0], [0, 1, 1]),
        (TopK(1), [3.0, 3.0, 2.0], [1, 1, 0]),
        (TopK(99), [1.0, 3.0, 2.0], [1, 1, 1]),
        (TopK(2), [-INF, 3.0, -INF], [0, 1, 0]),
        (TopP(1.0), [0.0, -1e4, 3.0], [1, 1, 1]),  # including tokens of negligible probability
        (TopP(1e-30), [1.0, 3.0, 2.0], [0, 1, 0]),
        (TopP(1e-50), [1.0, 3.0, 2.0], [0, 1, 0]),  # 0 in float32
        (TopP(0.5), [0.0, 0.0, -9.0], [1, 1, 0]),
        (MinP(1.0), [1.0, 3.0, 3.0], [0, 1, 1]),
        (MinP(1e-30), [1.0, 3.0, -INF], [1, 1, 0]),
        (TypicalP(1.0), [1.0, 3.0, -INF], [1, 1, 0]),
        (TypicalP(0.2), np.log([0.4, 0.3, 0.3]).tolist(), [0, 1, 1]),  # not the most probable one
        (Greedy(), [1.0, 3.0, 3.0], [0, 1, 0]),
    ],
    ids=describe,
)
def test_tokens_kept_in_small_examples(processor, row, expected):
    assert kept((processor,), row) == [bool(keep) for keep in expected]


def test_a_vocabulary_of_one_token_keeps_it():
    for processor in (TopK(3), TopP(0.5), MinP(0.5), TypicalP(0.5), Greedy(), Temperature(0.1)):
        assert run((processor,), [0.0]).tolist() == [0.0]


@many
@given(row=ROW, k=TOP_K, top_p=FRACTION, min_p=FRACTION, typical_p=FRACTION, temperature=st.floats(0.05, 5))
def test_all_processors_together_keep_some_of_the_top_k(row, k, top_p, min_p, typical_p, temperature):
    is_kept = run((Temperature(temperature), TopK(k), TopP(top_p), MinP(min_p), TypicalP(typical_p)), row) > -INF
    assert is_kept.any()
    assert not (is_kept & ~np.array(kept((TopK(k),), row))).any()


# ---- How logits change ----------------------------------------------------------------------------------------------------

SEEN = Seen(np.array([[0, 1, 3, 2], [5, 0, 0, 1]], np.float32), np.array([[2, 3, 1], [0, 0, 3]], np.int32))
LOGITS_BV = np.array([[2.0, 2.0, -1.0, -INF], [0.0, -3.0, 4.0, 1.0]], np.float32)


@pytest.mark.parametrize(
    "processor, expected_BV",
    [
        (Temperature(0.5), 2 * (LOGITS_BV - [[2.0], [4.0]])),  # shifted so that the largest logit is 0
        (RepetitionPenalty(2.0), [[2.0, 1.0, -2.0, -INF], [0.0, -3.0, 4.0, 0.5]]),
        (RepetitionPenalty(0.5), [[2.0, 4.0, -0.5, -INF], [0.0, -3.0, 4.0, 2.0]]),
        (FrequencyPenalty(0.5), [[2.0, 1.5, -2.5, -INF], [-2.5, -3.0, 4.0, 0.5]]),
        (PresencePenalty(0.5), [[2.0, 1.5, -1.5, -INF], [-0.5, -3.0, 4.0, 0.5]]),
        (PresencePenalty(-0.5), [[2.0, 2.5, -0.5, -INF], [0.5, -3.0, 4.0, 1.5]]),
    ],
    ids=describe,
)
def test_penalties_and_temperature_follow_their_equations(processor, expected_BV):
    np.testing.assert_allclose(process_jitted((processor,), LOGITS_BV, SEEN), expected_BV, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-30])
def test_very_low_temperatures_pick_the_best_token(temperature):
    """With logits like those of a model: no round numbers, so that their quotients are rounded."""
    logits_BV = np.array(jax.random.normal(jax.random.key(0), (4, 65)))
    softmax = jax.jit(lambda chosen, logits_BV: jax.nn.softmax(process(chosen, logits_BV, None)))
    probs_BV = softmax(processors(temperature=temperature), logits_BV)
    np.testing.assert_array_equal(probs_BV, jax.nn.one_hot(logits_BV.argmax(axis=-1), 65))


def test_processors_run_in_sequence():
    """With temperature 10 first, the best token has less mass, so top-p keeps more tokens."""
    row = [4.0, 2.0, 1.0, 0.0]
    assert sum(run((TopP(0.8), Temperature(10.0)), row) > -INF) == 1
    assert sum(run((Temperature(10.0), TopP(0.8)), row) > -INF) == 4


# ---- From settings to processors ------------------------------------------------------------------------------------------


def test_processor_order_does_not_depend_on_the_order_of_the_settings():
    chosen = processors(
        typical_p=0.9, min_p=0.05, top_p=0.8, top_k=3, temperature=0.7,
        presence_penalty=0.1, frequency_penalty=0.2, repetition_penalty=1.3,
    )  # fmt: skip
    assert chosen == (
        RepetitionPenalty(1.3), FrequencyPenalty(0.2), PresencePenalty(0.1),
        Temperature(0.7), TopK(3), TopP(0.8), MinP(0.05), TypicalP(0.9),
    )  # fmt: skip


def test_no_settings_give_no_processors():
    assert processors() == ()
    assert process((), LOGITS_BV, SEEN) is LOGITS_BV


@pytest.mark.parametrize("greedy_settings", [{"greedy": True}, {"temperature": 0}, {"temperature": 0.0, "greedy": True}])
def test_greedy_drops_the_samplers_and_keeps_the_penalties(greedy_settings):
    assert processors(top_k=5, top_p=0.3, repetition_penalty=2.0, **greedy_settings) == (RepetitionPenalty(2.0), Greedy())


@pytest.mark.parametrize(
    "name, values",
    [
        ("temperature", [-0.1, INF, np.nan]),
        ("top_k", [-1, 2.5]),
        ("top_p", [0, -0.1, 1.1, np.nan]),
        ("min_p", [-0.1, 1.1, np.nan]),
        ("typical_p", [0, 1.1, np.nan]),
        ("repetition_penalty", [0, -1, INF, np.nan]),
        ("frequency_penalty", [INF, np.nan]),
        ("presence_penalty", [-INF, np.nan]),
    ],
)
def test_invalid_values_are_named(name, values):
    for value in values:
        assert_raises(UsageError, processors, **{name: value}, says=(f"{name}={value}",))


def test_an_unknown_setting_is_named_with_a_suggestion():
    names = [field.name for field in dataclasses.fields(DecodingConfig)]
    assert_raises(UsageError, processors, topk=3, says=("topk", "top_k", *names))


@pytest.mark.parametrize("field", dataclasses.fields(DecodingConfig), ids=lambda field: field.name)
def test_every_setting_has_a_processor_that_changes_the_distribution(field):
    value = {float: 0.5, int: 2, bool: True}[setting_type(field)]
    [chosen] = processors(**{field.name: value})
    assert chosen == Processor(getattr(logits, field.name), None if field.name == "greedy" else value)
    rows_BS = random_tokens(8, 12, vocab_size=3)  # with repeated tokens and repeated pairs of tokens
    logits_BV, seen = normal(8, 4), Seen.of(rows_BS, np.full(8, 12), vocab_size=4)
    probs_BV, before_BV = jax.nn.softmax(process((chosen,), logits_BV, seen)), jax.nn.softmax(logits_BV)
    assert np.abs(probs_BV - before_BV).max() > 1e-3


def test_every_strategy_has_a_setting():
    strategies = [
        name
        for name, function in inspect.getmembers(logits, inspect.isfunction)
        if list(inspect.signature(function).parameters)[:2] == ["logits_BV", "seen"]
    ]
    assert sorted(strategies) == sorted(field.name for field in dataclasses.fields(DecodingConfig))


def test_greedy_and_temperature_are_mutually_exclusive():
    for temperature in (0.8, 1.0):
        assert_raises(
            UsageError, processors, greedy=True, temperature=temperature, says=("greedy", f"temperature={temperature}")
        )


def test_k_may_exceed_the_vocabulary_size():
    assert kept(processors(top_k=2**40), [1.0, 2.0, 3.0]) == [True] * 3


# ---- Against Hugging Face -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_settings_give_the_same_distribution_as_hugging_face():
    """Uses the `generate` of transformers, which builds and orders its own processors."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    V, B, S = 40, 3, 6
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=V, initializer_range=0.5)
    ).train(False)
    prompts_BS = torch.randint(V, (B, S))
    seen = Seen.of(prompts_BS.numpy(), np.full(len(prompts_BS), prompts_BS.shape[1]), V)
    for chosen in [
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.6},
        {"repetition_penalty": 1.8},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.7, "repetition_penalty": 1.3},
        {"temperature": 2.5, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.8},
        {"temperature": 0.4, "top_k": 30, "top_p": 0.99, "min_p": 0.001, "typical_p": 0.95, "repetition_penalty": 0.8},
    ]:
        generated = model.generate(
            prompts_BS,
            attention_mask=torch.ones_like(prompts_BS),
            **{"top_k": 0, **chosen},
            do_sample=True,
            max_new_tokens=1,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
        expected_BV = torch.softmax(generated.scores[0], dim=-1).numpy()
        processed_BV = process(processors(**chosen), generated.logits[0].numpy(), seen)
        np.testing.assert_allclose(jax.nn.softmax(processed_BV), expected_BV, atol=1e-5, err_msg=str(chosen))


def test_no_two_processors_have_the_same_structure():
    """Otherwise jit would mistake one for the other."""
    *others, greedy = constructors
    structures = [jax.tree.structure(processor) for processor in (*(make(1.0) for make in others), greedy())]
    assert all((a == b) == (i == j) for i, a in enumerate(structures) for j, b in enumerate(structures))


# ---- Seen tokens ----------------------------------------------------------------------------------------------------------


def test_seen_counts_the_whole_row_and_keeps_its_last_tokens():
    """Compared with lists, for prompts of different lengths and more tokens than `recent_BS` holds."""
    prompts = [[4, 4, 1], [2], [0, 3, 0, 2]]
    prompts_BS = np.array([[9] * (4 - len(prompt)) + prompt for prompt in prompts])  # padding is not a token
    seen = Seen.of(prompts_BS, np.array([len(prompt) for prompt in prompts]), vocab_size=5)
    for token_B in [(1, 2, 3), (0, 0, 4), (4, 1, 1)]:
        seen = seen.append(np.array(token_B))
        prompts = [[*row, token] for row, token in zip(prompts, token_B, strict=True)]
        np.testing.assert_array_equal(seen.counts_BV, [np.bincount(row, minlength=5) for row in prompts])
        np.testing.assert_array_equal(seen.recent_BS, [([-1] * 4 + row)[-4:] for row in prompts])


# ---- Compilation ----------------------------------------------------------------------------------------------------------


def test_new_numbers_do_not_recompile_but_new_processors_do():
    run = jax.jit(lambda chosen, logits_BV: process(chosen, logits_BV, SEEN))
    for temperature, top_k, top_p in [(0.5, 3, 0.9), (2, 1, 1e-9), (1e-3, 50, 0.5)]:
        run(processors(temperature=temperature, top_k=top_k, top_p=top_p), LOGITS_BV)
    assert run._cache_size() == 1
    run(processors(temperature=0.5, top_k=3), LOGITS_BV)
    assert run._cache_size() == 2
