"""The engine against the page: equal logits, gradients, training steps and texts for every preset and setting."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import KERNELS, random_params, random_tokens
from settings import BASE, CONTEXTS, LOOP_SETTINGS, MODEL_CHANGES, TRAINING, TRAINING_CHANGES

from minigpt_jax import kernels, reference
from minigpt_jax.config import Config, ModelConfig, TrainingConfig, load_preset, preset_names
from minigpt_jax.generation import logits
from minigpt_jax.generation.logits import Processor
from minigpt_jax.generation.sampling import row_keys, stream
from minigpt_jax.kernels.partitioned_cache import partitioned
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.models.kernels import PLAIN
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.training.optimizer import make_optimizer
from minigpt_jax.training.state import TrainState
from minigpt_jax.training.step import train_step

pytestmark = pytest.mark.slow

CPU = jax.devices("cpu")[0]


def test_each_setting_of_the_model_is_covered():
    covered = {name for change in MODEL_CHANGES for name in change}
    assert covered == {field.name for field in dataclasses.fields(ModelConfig)} - {"context_length"}
    assert {field.name for field in dataclasses.fields(TrainingConfig)} > LOOP_SETTINGS


def tuned(config):
    """The kernels for a CPU, but with a cache in parts, which these models are too small for otherwise."""
    return dataclasses.replace(kernels.select(config, CPU), name="tuned", empty_cache=two_part_cache)


def two_part_cache(batch_size, config):
    return partitioned(batch_size, config, 2)


@functools.cache
def some_params(config):
    """Random parameters, with biases and scales that all affect the result."""
    config = dataclasses.replace(config, remat=False)
    return random_params(GPT(config), np.zeros((2, 1), np.int32), scale=config.embed_dim**-0.5)


def some_batch(config, seed=0):
    """Some rows end early."""
    tokens_BN = random_tokens(4, config.context_length + 1, vocab_size=config.vocab_size, seed=seed)
    ends_B = np.array([config.context_length, config.context_length // 2, config.context_length, 3])
    mask_BT = np.arange(config.context_length)[None, :] < ends_B[:, None]
    return {"inputs_BT": tokens_BN[:, :-1], "targets_BT": tokens_BN[:, 1:], "mask_BT": mask_BT}


@pytest.fixture(autouse=True)
def same_dropout(monkeypatch):
    """Page and engine use different dropout keys, so here the dropout mask depends on the shape alone."""

    def bernoulli(key, p, shape):
        return (np.arange(np.prod(shape)) * 2654435761 % 1009 < 1009 * p).reshape(shape)

    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)


def tolerance(config):
    return 1e-5 if config.dtype == "float32" else 3e-2  # the page has no 16-bit types


def assert_near(actual, expected, limit):
    """Each leaf agrees within `limit` times its largest value, or times 3e-2 if that is larger."""

    def check(path, a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        scale = max(3e-2, np.abs(b).max())
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, actual, expected)


# ---- Logits and gradients -------------------------------------------------------------------------------------------------


def page_function(config):
    def run(params, batch, key):
        logits_BTV = reference.gpt(params, batch["inputs_BT"], config)
        return logits_BTV, jax.value_and_grad(reference.loss)(params, batch, config, key)

    return run


def engine_function(config, kernels):
    model, objective = GPT(config, kernels), NextToken.of(Config(config), kernels)

    def loss(params, batch, key):
        total, count, _ = objective.loss(params, batch, key)
        return total / count

    def run(params, batch, key):
        logits_BTV, _ = model.apply({"params": params}, batch["inputs_BT"])
        return logits_BTV, jax.value_and_grad(loss)(params, batch, key)

    return run


def some_key(config):
    return jax.random.key(1) if config.dropout else None


@pytest.mark.parametrize("context_length", CONTEXTS)
@pytest.mark.parametrize("change", MODEL_CHANGES, ids=str)
def test_engine_matches_the_logits_and_gradients_of_the_page(change, context_length):
    config = dataclasses.replace(BASE, context_length=context_length, **change)
    inputs = some_params(config), some_batch(config), some_key(config)
    page = jax.jit(page_function(config))(*inputs)
    for kernel_set in (PLAIN, tuned(config)):
        engine = jax.jit(engine_function(config, kernel_set))(*inputs)
        assert_near(engine, page, tolerance(config))
    _, (_, grads) = page
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(grads))  # otherwise the test would prove nothing


@pytest.mark.parametrize("context_length", CONTEXTS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.usefixtures("fake_cudnn")
def test_every_set_of_kernels_matches_the_logits_and_gradients_of_the_page(name, context_length):
    """Including those for accelerators, under jit."""
    config = dataclasses.replace(BASE, context_length=context_length)
    inputs = some_params(config), some_batch(config), None
    page, engine = (jax.jit(run)(*inputs) for run in (page_function(config), engine_function(config, KERNELS[name])))
    assert_near(engine, page, 1e-5)


def test_sequences_longer_than_the_context_agree():
    """Each position attends to the last `context_length` positions."""
    config = dataclasses.replace(BASE, context_length=24)
    tokens_BT, params = random_tokens(2, 100, vocab_size=17), some_params(config)
    expected_BTV = jax.jit(reference.gpt, static_argnums=2)(params, tokens_BT, config)
    for kernel_set in (PLAIN, kernels.BLOCKED, kernels.SPLIT):
        logits_BTV, _ = jax.jit(GPT(config, kernel_set).apply)({"params": params}, tokens_BT)
        assert_near(logits_BTV, expected_BTV, 1e-5)


@functools.cache
def losses(config, is_init):
    """The losses of engine and page, with random or with initial parameters."""
    params = init_params(jax.random.key(0), GPT(config)) if is_init else some_params(config)
    batch = some_batch(dataclasses.replace(config, vocab_size=BASE.vocab_size))
    total, count, _ = jax.jit(NextToken.of(Config(config)).loss)(params, batch, some_key(config))
    return float(total / count), float(jax.jit(reference.loss, static_argnums=2)(params, batch, config, some_key(config)))


@pytest.mark.parametrize(
    "change", [change for change in MODEL_CHANGES if not set(change) & {"remat", "vocab_multiple"}][1:], ids=str
)
def test_each_setting_changes_the_loss(change):
    """A setting that page or engine ignored would leave its loss unchanged."""

    is_init = "init" in change
    engine, page = np.abs(np.subtract(losses(BASE, is_init), losses(dataclasses.replace(BASE, **change), is_init)))
    assert engine > 1e-5
    assert page > 1e-5 or "dtype" in change


FIELDS_WITH_CHOICES = [field.name for field in dataclasses.fields(ModelConfig) if field.metadata["choices"]]


@pytest.mark.parametrize("name", FIELDS_WITH_CHOICES)
def test_each_choice_gives_different_logits(name):
    """A choice that page or engine ignored would give the same logits as another one."""
    values = next(field.metadata["choices"] for field in dataclasses.fields(ModelConfig) if field.name == name)
    batch = some_batch(BASE)
    configs = [dataclasses.replace(BASE, **{name: value}) for value in values]
    params = [init_params(jax.random.key(0), GPT(config)) if name == "init" else some_params(config) for config in configs]
    params = jax.tree.map(lambda leaf: 2 * leaf, params)  # gelu and gelu_exact differ most at larger numbers
    pairs = list(zip(configs, params, strict=True))
    engine = [jax.jit(GPT(config).apply)({"params": params}, batch["inputs_BT"])[0] for config, params in pairs]
    page = [jax.jit(reference.gpt, static_argnums=2)(params, batch["inputs_BT"], config) for config, params in pairs]
    for logits_of_choices in (engine,) if name == "dtype" else (engine, page):
        for one, other in itertools.combinations(logits_of_choices, 2):
            assert np.abs(np.asarray(one) - np.asarray(other)).max() > 1e-4


@pytest.mark.parametrize("positions", ModelConfig.__dataclass_fields__["positions"].metadata["choices"])
def test_token_order_changes_the_logits(positions):
    config = dataclasses.replace(BASE, positions=positions)
    tokens_BT = np.array([[1, 2, 3, 4], [2, 1, 3, 4]], np.int32)
    for logits_BTV in (
        jax.jit(GPT(config).apply)({"params": some_params(config)}, tokens_BT)[0],
        jax.jit(reference.gpt, static_argnums=2)(some_params(config), tokens_BT, config),
    ):
        assert np.abs(logits_BTV[0, -1] - logits_BTV[1, -1]).max() > 1e-3


# ---- Training -------------------------------------------------------------------------------------------------------------


def page_after(config, num_steps=3):
    state = reference.init_state(some_params(config.model))
    for step in range(num_steps):
        batch = some_batch(config.model, seed=step)
        state, loss = reference.train_step(state, batch, config, 10, some_key(config.model))
    return comparable(state, some_params(config.model)), loss


def comparable(state, initial):
    """The state, with root mean squares, which have the scale of gradients; and the changes of the parameters."""
    changes = {name: jax.tree.map(jnp.subtract, state[name], initial) for name in ("params", "average")}
    return state | {"square": jax.tree.map(jnp.sqrt, state["square"])}, changes


def assert_same_states(actual, expected, limit):
    """Adam turns the rounding error of a tiny gradient into a large step, so changes are compared by their norm."""
    (state, changes), loss = actual
    (expected_state, expected_changes), expected_loss = expected
    squares, paths = flatten_dict(expected_state["square"]), flatten_dict(state["square"])
    assert len(paths) > 3
    expected_state = expected_state | {"square": unflatten_dict({path: squares[path] for path in paths})}  # Muon has none
    assert_near((state, loss), (expected_state, expected_loss), limit)
    for name in changes:
        difference = jax.tree.map(jnp.subtract, changes[name], expected_changes[name])
        assert optax.tree.norm(difference) < 100 * limit * optax.tree.norm(expected_changes[name])


def merged(trees):
    """One tree from those that different optimizers keep of their own parameters."""
    leaves = [(path, leaf) for _, tree in trees for path, leaf in flatten_dict(tree).items() if isinstance(leaf, jax.Array)]
    return unflatten_dict(dict(leaves))


def engine_after(config, kernels, num_steps=3):
    """The engine's state in the page's terms."""
    optimizer, params = make_optimizer(config.training, 10), jax.tree.map(jnp.array, some_params(config.model))
    average = jax.tree.map(jnp.array, params) if config.training.ema else None
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.chain.init(params), average)
    kwargs = {"objective": NextToken.of(config, kernels), "optimizer": optimizer, "ema": config.training.ema}
    kwargs |= {"grad_accumulation": config.training.grad_accumulation}
    for step in range(num_steps):
        state, metrics = train_step(state, some_batch(config.model, seed=step), jax.random.key(0), **kwargs)
    mean, square = (merged(optax.tree_utils.tree_get_all_with_path(state.opt_state, name)) for name in ("mu", "nu"))
    final = {"step": state.step, "params": state.params, "mean": mean, "square": square, "average": state.eval_params}
    return comparable(final, some_params(config.model)), metrics["loss"]


@pytest.mark.parametrize("change", MODEL_CHANGES, ids=str)
def test_three_training_steps_of_the_engine_match_the_page(change):
    config = Config(dataclasses.replace(BASE, **change), TRAINING)
    expected = page_after(config)
    for kernel_set in (PLAIN, tuned(config.model)):
        assert_same_states(engine_after(config, kernel_set), expected, tolerance(config.model))


@functools.cache
def unchanged_engine():
    return engine_after(Config(BASE, TRAINING), PLAIN)[0][0]


@pytest.mark.parametrize("change", TRAINING_CHANGES, ids=str)
def test_each_training_setting_has_the_same_effect_on_the_page(change):
    config = Config(BASE, dataclasses.replace(TRAINING, **change))
    actual = engine_after(config, PLAIN)
    assert_same_states(actual, page_after(config), 1e-5)
    if "grad_accumulation" not in change:
        unchanged = unchanged_engine()
        differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), actual[0][0]["average"], unchanged["average"])
        assert max(jax.tree.leaves(differences)) > 1e-6


# ---- Texts ----------------------------------------------------------------------------------------------------------------


def text_of_page(config, prompt_BN, num_tokens, process):
    tokens_BN = reference.sample(some_params(config), prompt_BN, num_tokens, jax.random.key(3), config, process)
    return tokens_BN[:, prompt_BN.shape[1] :].tolist()


def text_of_engine(config, kernel_set, prompt_BN, num_tokens, processors):
    keys = row_keys(jax.random.key(3), range(len(prompt_BN)))
    chunks = stream(some_params(config), list(prompt_BN), num_tokens, keys, processors, model=GPT(config, kernel_set))
    return np.concatenate([chunk.token for chunk in chunks], axis=1).tolist()


def keep_most_probable(logits_BV, tokens_BN):
    return np.where(logits_BV == logits_BV.max(axis=-1, keepdims=True), 0.0, -np.inf)


def assert_texts_agree(config, num_tokens, prompt_length, kernel_sets):
    prompt_BN = random_tokens(2, prompt_length, vocab_size=config.vocab_size)
    expected = text_of_page(config, prompt_BN, num_tokens, keep_most_probable)
    for kernel_set in kernel_sets:
        assert text_of_engine(config, kernel_set, prompt_BN, num_tokens, (Processor(logits.greedy),)) == expected
    assert expected[0] != expected[1]


@pytest.mark.parametrize("context_length", CONTEXTS)
@pytest.mark.parametrize("change", [change for change in MODEL_CHANGES if "dtype" not in change], ids=str)
def test_greedy_text_with_a_cache_matches_recomputing_everything(change, context_length):
    """Also beyond the context, where models with learned or sinusoidal positions re-anchor and rotary ones slide."""
    config = dataclasses.replace(BASE, context_length=context_length, **change)
    assert_texts_agree(config, 10, context_length - 5, (PLAIN, tuned(config)))


@pytest.mark.parametrize("positions", ModelConfig.__dataclass_fields__["positions"].metadata["choices"])
def test_sampled_text_matches_the_page(positions):
    """Row i samples with row_key = fold_in(key, i), and its token n with fold_in(row_key, n)."""
    config = dataclasses.replace(BASE, positions=positions, num_heads=2)
    prompt_BN = random_tokens(3, 4, vocab_size=17)
    sampled = text_of_engine(config, PLAIN, prompt_BN, 30, (Processor(logits.temperature, 0.7),))
    assert sampled == text_of_page(config, prompt_BN, 30, lambda logits_BV, tokens_BN: logits_BV / 0.7)


# ---- Presets --------------------------------------------------------------------------------------------------------------


def presets():
    """Each preset with two layers, the same vocabulary, and float32 as on the page. Those that are wider than 256 have two
    heads and a context of 80, since a CPU is slow at their sizes. Presets that differ only in the tokenizer are merged."""
    names_of = {}
    for name in preset_names():
        preset = load_preset(name)
        model = preset.model
        if model.embed_dim > 256:
            width = 2 * model.head_size
            sizes = {"num_heads": 2, "embed_dim": width, "ff_dim": model.ff_dim // model.embed_dim * width}
            model = dataclasses.replace(model, context_length=80, **sizes)
        model = dataclasses.replace(model, num_layers=2, vocab_size=65, dtype="float32")
        training = dataclasses.replace(preset.training, steps=None, grad_accumulation=1)
        names_of.setdefault(Config(model, training), []).append(name)
    return [pytest.param(config, id=", ".join(names)) for config, names in names_of.items()]


@pytest.mark.parametrize("config", presets())
def test_presets_agree_between_page_and_engine(config):
    kernel_set = kernels.select(config.model, CPU)
    inputs = some_params(config.model), some_batch(config.model), some_key(config.model)
    functions = page_function(config.model), engine_function(config.model, kernel_set)
    page, engine = (jax.jit(function)(*inputs) for function in functions)
    assert_near(engine, page, 1e-5)
    assert_same_states(engine_after(config, kernel_set), page_after(config), 1e-5)
    assert_texts_agree(config.model, 6, config.model.context_length - 4, (kernel_set,))


def test_the_page_runs_as_a_program(capsys, monkeypatch, tmp_path):
    text = tmp_path / "plays.txt"
    text.write_text("KING: To be, or not to be, that is the question.\n" * 40, encoding="utf-8")
    open_text = reference.corpora.open_text
    monkeypatch.setattr(reference.corpora, "open_text", lambda name: open_text(str(text)))
    reference.main(num_steps=100)
    step, sample = capsys.readouterr().out.split("nats per character\n")
    assert step.startswith("step 100/100  loss ")
    assert float(step.split()[-1]) < 1.0  # uniform guessing would be above 3
    assert sample.startswith("KING")
    assert len(sample) == len("KING") + 200 + 1
