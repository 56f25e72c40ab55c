"""Attribution: TracIn beside a loop over gradients, a copied text finds its passage, and the LDS of known scores."""

import dataclasses
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_raises, assert_says, logged, random_params, random_tokens
from scipy import stats

from minigpt_jax.api import train
from minigpt_jax.config import ModelConfig, TrainingConfig, load_preset
from minigpt_jax.data import batches
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.experiments import attribution, lds, stacked
from minigpt_jax.experiments.attribution import Passages, attribute, tracin
from minigpt_jax.experiments.lds import estimate_lds
from minigpt_jax.models import lora
from minigpt_jax.models.gpt import GPT
from minigpt_jax.runs import checkpoints
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.fine_tuning import Adapted, Frozen
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.training.callbacks import summary

T, V = 6, 7
MODEL = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=12, context_length=T, vocab_size=V)
SECOND = {
    "norm": "layernorm", "activation": "gelu", "positions": "learned", "tie_embeddings": True, "bias": True,
    "remat": True, "num_kv_heads": 1, "token_shift": True,
}  # fmt: skip
IDS = random_tokens(60, vocab_size=V)
STARTS = np.array([0, 3, 17, 30, 53])  # the last window ends with the text
PASSAGES = Passages(IDS, STARTS, T, batch_size=2)


def make_params(model, seed):
    params = random_params(GPT(model), jnp.zeros((1, 1), jnp.int32))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(seed), leaf.shape), params)


def frozen():
    return Frozen(NextToken(GPT(MODEL)), "embedding,*query"), [make_params(MODEL, seed) for seed in (0, 1)]


def adapted():
    """An adapter whose two factors are not zero."""
    base = make_params(MODEL, 0)
    layers = lora.target_layers(base, "*attention,*feed_forward", 2)
    adapter = lora.init(jax.random.key(1), base, layers, 2)
    models = [jax.tree.map(lambda leaf, seed=seed: leaf + 0.2 * (seed + 1), adapter) for seed in (0, 1)]
    return Adapted(NextToken(GPT(MODEL)), base, 2.0, None, tuple(layers), 2), models


def whole(**changes):
    model = dataclasses.replace(MODEL, **changes)
    return NextToken(GPT(model)), [make_params(model, seed) for seed in (0, 1)]


# ---- TracIn ---------------------------------------------------------------------------------------------------------------


def mean_loss(params, tokens, objective):
    """Of a text on its own, without padding."""
    batch = {"inputs_BT": tokens[None, :-1], "targets_BT": tokens[None, 1:], "mask_BT": np.ones((1, len(tokens) - 1))}
    total, count, _ = objective.loss(params, batch, None)
    return total / count


def dot(tree, other):
    return sum(jnp.vdot(*leaves) for leaves in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("case", [whole, lambda: whole(**SECOND), frozen, adapted])
@pytest.mark.parametrize("length", [2, T + 1])
def test_scores_are_the_products_of_gradients_in_a_loop(case, length):
    objective, models = case()
    text, rates = random_tokens(length, vocab_size=V, seed=3), (0.3, 0.7)
    expected = np.zeros(len(STARTS))
    gradient = jax.jit(jax.grad(mean_loss))
    for params, rate in zip(models, rates, strict=True):
        of_text = gradient(params, text, objective)
        for index, start in enumerate(STARTS):
            of_passage = gradient(params, IDS[start : start + T + 1], objective)
            expected[index] += rate * dot(of_passage, of_text)
    batch = batches.windows(text, T, np.zeros(1, int))
    scores = tracin(zip(models, rates, strict=True), batch, PASSAGES, objective)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
    assert len(np.unique(np.abs(expected).round(4))) == len(STARTS)


def test_forward_mode_gives_the_products_of_per_example_gradients_by_vmap():
    objective, [params, direction] = whole()
    windows = IDS[STARTS[:, None] + np.arange(T + 1)]
    gradients = jax.vmap(jax.grad(mean_loss), in_axes=(None, 0, None))(params, windows, objective)
    expected = jax.vmap(dot, in_axes=(0, None))(gradients, direction)
    products = attribution.gradient_products(params, direction, batches.windows(IDS, T, STARTS), objective)
    assert_close(products, expected, rtol=1e-4, atol=1e-6)


def test_a_score_is_the_decrease_of_the_loss_per_learning_rate_of_a_small_step():
    objective, [params, _] = whole()
    text, rate = random_tokens(5, vocab_size=V, seed=3), 1e-3
    scores = tracin([(params, rate)], batches.windows(text, T, np.zeros(1, int)), PASSAGES, objective)
    for score, start in zip(scores, STARTS, strict=True):
        gradient = jax.grad(mean_loss)(params, IDS[start : start + T + 1], objective)
        after = jax.tree.map(lambda leaf, slope: leaf - rate * slope, params, gradient)
        decrease = mean_loss(params, text, objective) - mean_loss(after, text, objective)
        assert decrease == pytest.approx(score, rel=0.1, abs=2e-5)


def test_passages_are_the_windows_of_the_first_epoch_in_the_order_of_training():
    settings = TrainingConfig(batch_size=4, seed=5, steps=9)
    for num_steps in (1, 2, 9):  # an epoch has 9 windows
        starts = attribution.first_epoch(IDS, T, settings, num_steps)
        trained_on = np.concatenate(
            [batches.batch_at(IDS, T, 4, settings.seed, step)["inputs_BT"] for step in range(num_steps)]
        )
        np.testing.assert_array_equal(batches.windows(IDS, T, starts)["inputs_BT"], trained_on[:9])
        assert len(starts) == len(set(starts.tolist())) == min(4 * num_steps, 9)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_rates_are_those_of_the_steps_between_checkpoints(schedule):
    settings = TrainingConfig(steps=20, warmup_steps=5, learning_rate=0.1, min_learning_rate=0, schedule=schedule)
    rates = attribution.mean_rates(settings, 20, [5, 19, 20])
    assert rates[0] == pytest.approx(0.06)  # 0.02 to 0.1
    assert rates[2] == pytest.approx(0.1 if schedule == "constant" else 0)
    assert rates[1] == pytest.approx(0.1) if schedule == "constant" else 0.03 < rates[1] < 0.07
    assert attribution.mean_rates(settings, 20, [20])[0] == pytest.approx(np.dot(rates, [5, 14, 1]) / 20)


# ---- Runs -----------------------------------------------------------------------------------------------------------------

WORDS = "the and of in with for not his her from they would king Lord sweet night heart question naught, thou; speak! Rome?"
TEXT = " ".join(np.random.default_rng(0).choice(WORDS.split(), 250))[:1200]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the preset `debug`, which has dropout, that has seen its small text several times."""
    folder = tmp_path_factory.mktemp("attribution")
    (folder / "text.txt").write_text(TEXT)
    often = {"checkpoint_every": 40, "keep_checkpoints": 3, "sample_every": 0, "eval_every": 1000, "ema": 0.9}
    settings = {"steps": 120, "learning_rate": 1e-2, "seed": 3}
    data = {"dataset": str(folder / "text.txt"), "data_dir": str(folder)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(summary.hardware, "matmul_rate", lambda *_: 1e15)
        train(load_preset("debug").override(data | settings | often), folder / "run")
    return folder / "run"


@pytest.mark.e2e
def test_a_copied_passage_ranks_itself_first(workdir, caplog):
    starts = attribution.first_epoch(np.zeros(int(0.9 * len(TEXT))), 16, TrainingConfig(seed=3, batch_size=4), 1000)
    for start in starts[[0, 11, -1]].tolist():
        with caplog.at_level(logging.INFO):
            result = attribute(workdir, TEXT[start : start + 17], 3)
        assert (result.raised[0].position, result.raised[0].text) == (start, TEXT[start : start + 17])
        assert (result.steps, result.num_passages) == ([40, 80, 120], len(starts))
        assert_says(logged(caplog)[0], str(len(starts)), "40", "80", "120")
        scores = [passage.score for passage in result.raised]
        assert scores == sorted(scores, reverse=True)
        assert min(scores) > 0
        scores = [passage.score for passage in result.lowered]
        assert scores == sorted(scores)
        assert max(scores) < 0
        assert len(result.raised) == len(result.lowered) == 3
        caplog.clear()


@pytest.mark.e2e
def test_scores_of_a_run_are_those_of_its_parameters_and_rates(workdir):
    """Of the parameters, not of their average. The rates are those of the run's schedule."""
    task = prepare(attribution.read_run_config(workdir))
    text, objective = TEXT[:9], task.objective
    like = jax.eval_shape(objective.init, jax.random.key(0))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    result = attribute(workdir, text, 1)
    passage, expected = result.raised[0], 0.0
    for step, rate in zip((40, 80, 120), attribution.mean_rates(task.config.training, 120, [40, 80, 120]), strict=True):
        params = checkpoints.restore_eval_params(workdir, step, False, like, sharding)
        gradients = [
            jax.grad(mean_loss)(params, np.asarray(task.tokenizer.encode(part)), objective) for part in (text, passage.text)
        ]
        expected += rate * float(dot(*gradients))
    assert passage.score == pytest.approx(expected, rel=1e-3)


@pytest.mark.e2e
def test_one_checkpoint_is_enough_and_corrupt_ones_are_skipped(workdir, tmp_path, caplog):
    copy = shutil.copytree(workdir, tmp_path / "run")
    for step in (40, 80):
        path = copy / "checkpoints" / str(step) / "checkpoint.json"
        path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.INFO):
        result = attribute(copy, TEXT[:10], 2)
    assert result.steps == [120]
    assert [message.split()[0] for message in logged(caplog, "WARNING")] == ["Skipping", "Skipping"]
    assert_says("".join(logged(caplog, "INFO")), "one", "120", "--keep_checkpoints")


@pytest.mark.e2e
def test_a_text_that_has_moved_is_named_and_another_one_is_refused(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    path = copy / "config.json"
    path.write_text(path.read_text().replace("text.txt", "missing.txt"))
    assert_raises(DataError, attribute, copy, "lord", says=["missing.txt", "--dataset"])
    moved = attribute(copy, "lord", dataset=str(workdir.parent / "text.txt"))
    assert moved == attribute(workdir, "lord")


@pytest.mark.e2e
@pytest.mark.parametrize(
    "text, kind, words",
    [
        ("", UsageError, ["0", "2", "17"]),
        ("a", UsageError, ["1", "2", "17"]),
        ("lord" * 5, UsageError, ["20", "2", "17"]),
        ("lorz", DataError, ["text", "'z'", "tokenizer.json"]),
    ],
)
def test_a_text_that_does_not_fit_is_refused(workdir, text, kind, words):
    assert_raises(kind, attribute, workdir, text, says=words)


@pytest.mark.parametrize("preset", ["chat_shakespeare", "bert_shakespeare", "bert_play", "vit_digits"])
def test_runs_of_other_tasks_are_refused(tmp_path, preset):
    config = load_preset(preset)
    (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8")
    for function in (lambda: attribute(tmp_path, "text"), lambda: lds.measure_lds(tmp_path)):
        assert_raises(UsageError, function, says=[str(tmp_path), config.task, "language_modelling"])


def test_folders_without_a_run_or_checkpoint_and_bad_numbers_are_refused(tmp_path):
    assert_raises(DataError, attribute, tmp_path, "text", says=[str(tmp_path), "config.json"])
    (tmp_path / "config.json").write_text(load_preset("debug").to_json(), encoding="utf-8")
    assert_raises(DataError, attribute, tmp_path, "text", says=[str(tmp_path), "checkpoint", "scripts/train.py"])
    assert_raises(UsageError, attribute, tmp_path, "text", 0, says=["num_passages=0", "1"])


# ---- The LDS --------------------------------------------------------------------------------------------------------------


def random_halves(num_models, num_passages):
    random = np.random.default_rng(0)
    return np.array([random.permutation(num_passages) < num_passages // 2 for _ in range(num_models)])


def test_ranks_and_correlations_are_those_of_scipy():
    random = np.random.default_rng(1)
    values, others = random.integers(0, 8, (2, 50))  # with ties
    np.testing.assert_array_equal(
        lds.ranks(values) - lds.ranks(values).min(), stats.rankdata(values) - stats.rankdata(values).min()
    )
    assert lds.spearman(values, others) == pytest.approx(stats.spearmanr(values, others).statistic)


def test_the_lds_of_perfect_scores_is_1_of_reversed_ones_minus_1_and_of_random_ones_near_0():
    halves_MN = random_halves(100, 40)
    scores_QN, other_QN = np.random.default_rng(2).standard_normal((2, 6, 40))
    losses_MQ = 5 - (halves_MN @ scores_QN.T) ** 3  # the more a half helps, the lower is its loss
    perfect, reversed, random = (estimate_lds(each, halves_MN, losses_MQ) for each in (scores_QN, -scores_QN, other_QN))
    assert (perfect.mean, perfect.standard_error) == (pytest.approx(1), pytest.approx(0))
    assert reversed.mean == pytest.approx(-1)
    assert abs(random.mean) < 3 * random.standard_error
    assert 0.5 < random.standard_error * 600**0.5 < 2.5  # of 600 independent pairs, it would be about 1 / √600


def test_the_lds_is_the_mean_over_texts():
    halves_MN = random_halves(20, 10)
    scores_QN = np.random.default_rng(3).standard_normal((2, 10))
    losses_MQ = halves_MN @ scores_QN.T * [-1, 1]  # the scores of the second text are reversed
    estimate = estimate_lds(scores_QN, halves_MN, losses_MQ)
    assert estimate.mean == pytest.approx(0)
    assert estimate.standard_error > 0.5  # two texts that disagree say little about others


@pytest.fixture
def task(workdir, monkeypatch):
    """Of a small model for few steps."""
    monkeypatch.setattr(lds, "SETTINGS", lds.SETTINGS | {"num_layers": 1, "batch_size": 4, "steps": 6})
    monkeypatch.setattr(lds, "NUM_PASSAGES", 33)
    monkeypatch.setattr(lds, "NUM_TEXTS", 3)
    return lds.on_passages(prepare(attribution.read_run_config(workdir)))


def texts_of(task):
    ids = task.splits["val"].ids
    return Passages(ids, lds.spread(ids, 3, 16), 16, batch_size=1)


@pytest.mark.e2e
def test_passages_are_spread_over_the_text_and_an_epoch_visits_each(task):
    starts = task.starts_N
    assert (len(starts), starts[0], starts[-1]) == (33, 0, 66 * 16)  # of 67 windows in 1,080 tokens
    assert np.diff(starts).min() >= 16
    half = dataclasses.replace(task, starts_N=starts[::4])
    inputs = np.concatenate([half.batch_at(step)["inputs_BT"] for step in range(9)])  # 36 rows: four epochs of 9
    expected = batches.windows(task.splits["train"].ids, 16, starts[::4])["inputs_BT"]
    assert sorted(inputs.tolist()) == sorted(expected.tolist() * 4)


@pytest.mark.e2e
def test_each_model_is_trained_on_its_half_alone_with_its_own_seed(task, monkeypatch):
    """In stacks of two; the third model is alone."""
    monkeypatch.setattr(lds, "STACK", 2)
    halves_MN, texts, device = random_halves(3, 33), texts_of(task), jax.devices()[0]
    losses_MQ = lds.retrain(task, halves_MN, texts, device)
    for seed, (half_N, losses_Q) in enumerate(zip(halves_MN, losses_MQ, strict=True), 1):
        config, starts = task.config.override(seed=seed), task.starts_N[half_N]
        alone = stacked.Stack([dataclasses.replace(task, config=config, starts_N=starts)], device)
        for _ in range(6):
            alone.advance()
        params = alone.eval_params(0)
        expected = [mean_loss(params, texts.ids[start : start + 17], task.objective) for start in texts.starts_N]
        np.testing.assert_allclose(losses_Q, expected, rtol=1e-4)
    assert len({float(row[0]) for row in losses_MQ}) == 3


@pytest.mark.e2e
def test_the_scores_are_those_of_checkpoints_of_a_model_of_all_passages(task, monkeypatch):
    monkeypatch.setattr(lds, "NUM_CHECKPOINTS", 2)
    texts, device = texts_of(task), jax.devices()[0]
    scores_QN = lds.score(task, texts, device)
    run, models = stacked.Stack([task], device), []
    for step in range(1, 7):
        run.advance()
        if step in (3, 6):
            models.append(jax.device_get(run.eval_params(0)))
    rates = attribution.mean_rates(task.config.training, 6, [3, 6])
    passages = Passages(task.splits["train"].ids, task.starts_N, 16, 33)
    text = batches.windows(texts.ids, 16, texts.starts_N[1:2])
    expected = tracin(zip(models, rates, strict=True), text, passages, NextToken.of(task.config))
    np.testing.assert_allclose(scores_QN[1], expected, rtol=1e-4, atol=1e-7)
    assert scores_QN.shape == (3, 33)


@pytest.mark.e2e
def test_a_text_without_enough_passages_is_refused(workdir, monkeypatch):
    monkeypatch.setattr(lds, "MIN_PASSAGES", 68)
    assert_raises(DataError, lds.measure_lds, workdir, says=["67", "16", "68"])
