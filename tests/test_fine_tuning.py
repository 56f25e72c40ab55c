"""Fine-tuning: frozen parameters stay as they are, and a LoRA adapter is trained, saved, resumed and merged exactly."""

import dataclasses
import json
import logging
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KERNELS, assert_close, assert_equal, assert_raises, assert_says, logged, random_params, random_tokens

from minigpt_jax.api import evaluate, load, train
from minigpt_jax.config import Config, DataConfig, FineTuningConfig, ModelConfig, TrainingConfig
from minigpt_jax.errors import DataError, StoppedError, UsageError
from minigpt_jax.interop.load import base_and_adapter, read_run_config, settings_from
from minigpt_jax.interop.load import load as load_model
from minigpt_jax.models import lora
from minigpt_jax.models.dropout import drop
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.patterns import by_path, frozen_mask, matching
from minigpt_jax.runs import checkpoints
from minigpt_jax.tasks import fine_tuning, prepare
from minigpt_jax.tasks.fine_tuning import Adapted, Frozen
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.training.callbacks import Callback
from minigpt_jax.training.optimizer import make_optimizer
from minigpt_jax.training.resume import restore
from minigpt_jax.training.run import new_state
from minigpt_jax.training.state import TrainState
from minigpt_jax.training.step import apply_gradients

MODEL = ModelConfig(
    num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=8, ff_dim=12, context_length=8, vocab_size=7, bias=True,
    activation="swiglu", dropout=0.1,
)  # fmt: skip
RANK, SCALE = 3, 2.0
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def params():
    return random_params(GPT(MODEL), jnp.zeros((1, 1), jnp.int32))


def adapter_of(params, patterns="*attention,*feed_forward,head"):
    """An adapter whose B is not zero, as after training."""
    adapter = lora.init(jax.random.key(1), params, lora.target_layers(params, patterns, RANK), RANK)
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(2), leaf.shape), adapter)


def batch():
    tokens_BT = random_tokens(2, 9, vocab_size=MODEL.vocab_size)
    return {"inputs_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:], "mask_BT": np.ones((2, 8), np.float32)}


def adapted(params, adapter, dropout=None, **changes):
    model = dataclasses.replace(MODEL, dropout=0.0, remat=changes.pop("remat", False))
    layers = tuple(lora.layers_of(adapter))
    return Adapted(NextToken(GPT(model, **changes), None), params, SCALE, dropout, layers, RANK)


# ---- Patterns -------------------------------------------------------------------------------------------------------------

PATHS = ["embedding/tokens/embedding", "block_0/attention/query/kernel", "block_1/attention/query/kernel", "head/kernel"]


@pytest.mark.parametrize(
    "patterns, numbers",
    [
        ("embedding", [0]),
        ("*block_0", [1]),
        ("*query", [1, 2]),
        ("*kernel, embedding/*", [0, 1, 2, 3]),
        ("block_?/attention/query/kernel", [1, 2]),
        ("head,block_1", [2, 3]),
    ],
)
def test_a_pattern_selects_a_path_or_all_below_its_start(patterns, numbers):
    assert matching(PATHS, patterns, "freeze") == [PATHS[number] for number in numbers]


@pytest.mark.parametrize("pattern", ["ead", "Head", "", "query", "embedding/"])
def test_a_pattern_that_selects_nothing_is_answered_with_what_the_model_has(pattern):
    says = (f"freeze={pattern!r}", "embedding/tokens/embedding", "block_*/attention/query/kernel", "head/kernel")
    message = assert_raises(UsageError, matching, PATHS, f"head,{pattern}", "freeze", says=says)
    assert message.count("query") == 1 + (pattern == "query")


# ---- LoRA as pure functions -----------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_has_two_matrices_per_target(params):
    layers = lora.target_layers(params, "*query,*up", RANK)
    assert layers == tuple(
        f"transformer/block_{i}/{layer}" for i in (0, 1) for layer in ("attention/query", "feed_forward/up")
    )
    adapter = lora.init(jax.random.key(0), params, layers, RANK)
    shapes = {path: leaf.shape for path, leaf in by_path(adapter).items()}
    assert {path: shape for path, shape in shapes.items() if "block_1" in path} == {
        "transformer/block_1/attention/query/lora_A": (8, RANK), "transformer/block_1/attention/query/lora_B": (RANK, 8),
        "transformer/block_1/feed_forward/up/lora_A": (8, RANK), "transformer/block_1/feed_forward/up/lora_B": (RANK, 12),
    }  # fmt: skip
    assert_equal(lora.merge(params, adapter, SCALE), params)
    every_a = [np.asarray(leaf) for path, leaf in by_path(adapter).items() if path.endswith("lora_A")]
    assert len({leaf.tobytes() for leaf in every_a}) == len(every_a) == 4
    assert 0.8 < max(np.abs(leaf).max() for leaf in every_a) * 8**0.5 <= 1


def test_merging_adds_the_scaled_product_to_the_adapted_kernels_alone(params):
    adapter = adapter_of(params, "*block_0*query")
    merged, before = by_path(lora.merge(params, adapter, SCALE)), by_path(params)
    path = "transformer/block_0/attention/query"
    a_DR, b_RF = by_path(adapter)[f"{path}/lora_A"], by_path(adapter)[f"{path}/lora_B"]
    np.testing.assert_allclose(
        merged[f"{path}/kernel"] - before[f"{path}/kernel"], SCALE * a_DR @ b_RF, rtol=1e-4, atol=1e-5
    )
    assert_equal({**merged, f"{path}/kernel": 0}, {**before, f"{path}/kernel": 0})


@pytest.mark.parametrize(
    "kernels, remat", [("PLAIN", False), ("SPLIT", True), pytest.param("PLAIN", True, marks=pytest.mark.slow)]
)
def test_training_and_merged_weights_give_the_same_loss_and_gradients(params, kernels, remat):
    adapter = adapter_of(params)
    objective = adapted(params, adapter, kernels=KERNELS[kernels], remat=remat)
    plain = NextToken(GPT(dataclasses.replace(MODEL, dropout=0.0)))
    both = [
        jax.jit(jax.value_and_grad(loss))(adapter)
        for loss in (
            lambda adapter: objective.loss(adapter, batch(), None)[0],
            lambda adapter: plain.loss(lora.merge(params, adapter, SCALE), batch(), None)[0],
        )
    ]
    assert_close(*both, rtol=1e-4, atol=1e-4)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(both[0][1]))  # every target is reached


def test_the_dtype_of_a_layer_is_kept():
    layer = lora.AdaptableDense(4, use_bias=False, dtype=jnp.bfloat16)
    params = {"kernel": jnp.zeros((8, 4)), "lora_A": jnp.ones((8, 2)), "lora_B": jnp.ones((2, 4))}
    y_BTF = layer.apply({"params": params}, jnp.ones((2, 3, 8)))
    assert y_BTF.dtype == jnp.bfloat16
    assert (y_BTF == 16).all()


def test_dropout_drops_inputs_of_each_adapter_on_its_own(params):
    key, adapter = jax.random.key(3), adapter_of(params, "*query,*key")
    attached = by_path(lora.attach(params, adapter, SCALE, 0.4, key))
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
    outputs = []
    for number, path in enumerate(lora.layers_of(adapter)):
        layer = {name.rpartition("/")[2]: leaf for name, leaf in attached.items() if name.startswith(f"{path}/")}
        dropped_ND = drop(x_BTD.reshape(-1, 8), 0.4, jax.random.fold_in(key, number))
        a_DR, b_RF = by_path(adapter)[f"{path}/lora_A"], by_path(adapter)[f"{path}/lora_B"]
        outputs.append(lora.low_rank(x_BTD, layer))
        np.testing.assert_allclose(outputs[-1].reshape(10, -1), dropped_ND @ a_DR @ (SCALE * b_RF), rtol=1e-4, atol=1e-4)
        assert (dropped_ND == 0).any()
    assert len(outputs) == 4


def test_dropout_keeps_the_mean():
    values, counts = np.unique(drop(jnp.ones(4000), 0.25, jax.random.key(0)), return_counts=True)
    np.testing.assert_allclose(values, [0, 4 / 3], rtol=1e-6)
    assert 900 < counts[0] < 1100


def test_dropout_is_active_only_with_a_key(params):
    adapter = adapter_of(params)
    loss = jax.jit(lambda objective, key: objective.loss(adapter, batch(), key)[0])
    with_dropout, without = adapted(params, adapter, 0.4), adapted(params, adapter)
    assert loss(with_dropout, None) == loss(without, None) == loss(without, jax.random.key(0))
    keyed = [float(loss(with_dropout, jax.random.key(seed))) for seed in (0, 0, 1)]
    assert keyed[0] == keyed[1] != keyed[2]
    assert float(loss(with_dropout, None)) not in keyed


def test_a_rank_above_full_rank_and_targets_without_a_kernel_are_refused(params):
    assert lora.target_layers(params, "*query", 8)
    path = "transformer/block_0/attention/key/kernel"  # 8 × 4: grouped queries
    assert_raises(UsageError, lora.target_layers, params, "*attention", 5, says=("lora_rank=5", "4", path, "8 × 4"))
    for pattern in ("*norm", "embedding", "nothing"):
        says = (f"lora_targets={pattern!r}", "head", "transformer/block_*/attention/query")
        message = assert_raises(UsageError, lora.target_layers, params, pattern, 1, says=says)
        assert "norm," not in message


# ---- Frozen parameters ----------------------------------------------------------------------------------------------------

FREEZE = "embedding,*block_0,*norm"


def test_frozen_parameters_have_no_gradient_and_the_others_the_same(params):
    plain = NextToken(GPT(dataclasses.replace(MODEL, dropout=0.0)))
    grads, expected = (
        by_path(jax.jit(jax.grad(lambda params, loss=objective.loss: loss(params, batch(), None)[0]))(params))
        for objective in (Frozen(plain, FREEZE), plain)
    )
    for path, is_frozen in by_path(frozen_mask(params, FREEZE)).items():
        np.testing.assert_allclose(grads[path], 0 if is_frozen else expected[path], atol=1e-5)
        assert np.any(expected[path])
        assert is_frozen == (path.startswith(("embedding", "transformer/block_0/")) or "norm/" in path)


def test_the_optimizer_leaves_frozen_parameters_and_their_average_exactly_as_they_are():
    """And treats the others as if they were alone: the clipping norm is theirs, and frozen ones have no moments."""
    config = TrainingConfig(learning_rate=0.1, warmup_steps=0, grad_clip=0.5)
    params = {name: jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32) for name in ("a", "b", "c")}
    grads = jax.tree.map(lambda leaf: 3 * leaf + 1, params)
    frozen = make_optimizer(config, 10, freeze="a,b")
    state = TrainState(jnp.int32(50), params, frozen.chain.init(params), params)
    new = jax.jit(lambda state: apply_gradients(state, grads, frozen, 0.99))(state)
    for name in ("a", "b"):
        assert_equal((new.params[name], new.average[name]), (params[name], params[name]))
    alone, chain = {"c": params["c"]}, make_optimizer(config, 10).chain
    updates, _ = chain.update({"c": grads["c"]}, chain.init(alone), alone)
    assert_close(new.params["c"], optax.apply_updates(alone, updates)["c"], rtol=1e-6)
    assert np.abs(new.params["c"] - params["c"]).min() > 0
    assert [leaf.shape for leaf in jax.tree.leaves(new.opt_state) if leaf.ndim] == [(3, 4), (3, 4)]  # both moments of c


def test_freezing_everything_is_refused(params):
    assert_raises(UsageError, frozen_mask, params, "*", says=("freeze=*", str(len(jax.tree.leaves(params)))))


# ---- Settings -------------------------------------------------------------------------------------------------------------


def test_settings_that_do_not_fit_together_are_refused():
    assert_raises(
        UsageError, FineTuningConfig, freeze="head", lora_rank=2, says=("freeze=head", "lora_rank=2", "lora_targets")
    )
    without_base = Config(fine_tuning=FineTuningConfig(lora_rank=2))
    assert_raises(UsageError, prepare, without_base, says=("lora_rank=2", "init_from"))
    for name, value in {"lora_alpha": 3.0, "lora_dropout": 0.5, "lora_targets": "head"}.items():
        assert_raises(UsageError, prepare, Config().override({name: value}), says=(f"{name}={value}", "lora_rank"))
    assert_raises(UsageError, FineTuningConfig, lora_rank=0, says=("lora_rank=0", "1"))
    assert FineTuningConfig(lora_rank=4).lora_scale == 4.0


def test_a_config_of_an_earlier_version_trains_all_parameters():
    values = json.loads(Config().to_json())
    del values["fine_tuning"]
    assert Config.from_json(json.dumps(values)) == Config()


# ---- Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Contains a text, the run `base`, and the run `lora`, which adapts it."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    (folder / "text.txt").write_text("abcab\ncab" * 30)
    train(preset(folder), folder / "base")
    train(lora_config(folder), folder / "lora")
    return folder


def preset(folder):
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, embed_dim=16, ff_dim=64, context_length=8, dropout=0.1),
        training=TrainingConfig(
            batch_size=4, grad_accumulation=2, ema=0.8, steps=6, warmup_steps=1, learning_rate=1e-2, sample_every=0,
            eval_batches=1, eval_every=3, log_every=2,
        ),
        data=DataConfig(dataset=str(folder / "text.txt"), data_dir=str(folder)),
    )  # fmt: skip


def lora_config(folder, **changes):
    settings = {"lora_rank": 1, "lora_dropout": 0.2, "learning_rate": 0.1, "init_from": str(folder / "base")}
    return preset(folder).override(settings_from(str(folder / "base")) | settings | changes)


def state_at(config, workdir, step=6):
    task = prepare(config, sharding=SHARDING)
    return restore(workdir, step, jax.eval_shape(lambda: new_state(task)), SHARDING)


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Interrupt(Callback):
    def after_step(self, run):
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.e2e
def test_a_run_trains_and_saves_only_the_adapter_of_its_unchanged_base(folder):
    config, base = lora_config(folder), load(folder / "base")
    state, rank = state_at(config, folder / "lora"), config.fine_tuning.lora_rank
    assert {path.rpartition("/")[2] for path in by_path(state.params)} == {"lora_A", "lora_B"}
    shapes = {path: leaf.shape for path, leaf in by_path(state.params).items()}
    assert shapes["transformer/block_0/feed_forward/down/lora_B"] == (rank, 16)
    assert jax.tree.structure(state.average) == jax.tree.structure(state.params)
    assert all(leaf.any() for leaf in jax.tree.leaves(state.params))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    saved = {name: folder / name / "checkpoints" / "6" / "params" for name in ("base", "lora")}
    assert bytes_of(saved["lora"]) < bytes_of(saved["base"])
    config = read_run_config(folder / "lora")
    _, loaded_base, adapter = base_and_adapter(folder / "lora", config, 6, SHARDING, load_model)
    assert_equal(loaded_base, base.params)
    assert_equal(adapter, state.average)


@pytest.mark.e2e
def test_the_loaded_model_is_the_merged_one_and_evaluates_as_in_training(folder, caplog):
    config = lora_config(folder)
    step = checkpoints.best_intact(folder / "lora")
    _, base, adapter = base_and_adapter(folder / "lora", config, step, SHARDING, load_model)
    merged = lora.merge(base, adapter, config.fine_tuning.lora_scale)
    assert_equal(load(folder / "lora").params, merged)
    rows = [json.loads(line) for line in (folder / "lora" / "metrics.jsonl").read_text().splitlines()]
    [recorded] = [row["val_loss"] for row in rows if row["step"] == step and "val_loss" in row]
    task = prepare(config, sharding=SHARDING)
    assert task.task.evaluate(merged, limit=1)["loss"] == task.evaluate(adapter, limit=1)["loss"] == recorded
    whole = evaluate(folder / "lora")["loss"]
    assert whole == task.measures(adapter)["loss"] == task.task.measures(merged)["loss"] != evaluate(folder / "base")["loss"]
    assert len(load(folder / "lora").generate("ab", 5)) == 7
    assert task.preview(adapter) == task.task.preview(merged) != task.task.preview(base)


@pytest.mark.e2e
def test_a_killed_and_resumed_lora_run_equals_an_uninterrupted_one(folder, tmp_path, caplog):
    config = lora_config(folder)
    with caplog.at_level(logging.INFO), pytest.raises(StoppedError):
        train(config, tmp_path / "run", callbacks=[Interrupt()])
    task = prepare(config, sharding=SHARDING)
    trained = sum(leaf.size for leaf in jax.tree.leaves(task.objective.init(jax.random.key(0))))
    total = trained + sum(leaf.size for leaf in jax.tree.leaves(load(folder / "base").params))
    assert_says(logged(caplog)[0], f"{trained:,}", f"{total:,}", str(folder / "base"))
    train(read_run_config(tmp_path / "run"), tmp_path / "run")
    assert_equal(state_at(config, tmp_path / "run"), state_at(config, folder / "lora"))


@pytest.mark.e2e
def test_a_missing_or_changed_base_is_named(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    workdir = shutil.copytree(folder / "lora", tmp_path / "lora")
    config = workdir / "config.json"
    config.write_text(config.read_text().replace(str(folder / "base"), str(base)))
    assert_equal(load(workdir).params, load(folder / "lora").params)  # the same base elsewhere is fine
    shutil.rmtree(base)
    longer = read_run_config(workdir).override({"steps": 8})
    for use in (lambda: load(workdir), lambda: evaluate(workdir), lambda: train(longer, workdir)):
        assert_raises(DataError, use, says=(str(base), "init_from", "config.json"))
    train(preset(folder).override({"seed": 1, "steps": 1}), base)
    for use in (lambda: load(workdir), lambda: evaluate(workdir), lambda: train(longer, workdir)):
        assert_raises(DataError, use, says=(f"init_from={base}", "config.json"))
    assert checkpoints.steps(workdir)[-1] == 6


@pytest.mark.e2e
def test_frozen_parameters_of_a_run_are_those_it_started_with(folder, tmp_path, caplog):
    config = preset(folder).override(settings_from(str(folder / "base")) | {"freeze": "embedding,*attention"})
    with caplog.at_level(logging.INFO):
        train(config, tmp_path / "run")
    before, state = by_path(load(folder / "base").params), state_at(config, tmp_path / "run")
    trained = 0
    for tree in (state.params, state.average):
        for path, leaf in by_path(tree).items():
            if path.startswith("embedding") or "/attention/" in path:
                np.testing.assert_array_equal(leaf, before[path])
            else:
                assert np.abs(leaf - before[path]).max() > 0
                trained += leaf.size
    assert_says(logged(caplog)[0], f"{trained // 2:,}", f"{sum(leaf.size for leaf in before.values()):,}")
    assert_equal(load(tmp_path / "run").params["embedding"], load(folder / "base").params["embedding"])
    assert_raises(UsageError, prepare, config.override({"freeze": "nothing"}), says=("freeze='nothing'", "head/kernel"))


@pytest.mark.e2e
def test_the_sizes_of_an_adapter_are_not_settings_that_may_change(folder):
    for changes in ({"lora_rank": 2}, {"lora_alpha": 3.0}, {"lora_targets": "head"}):
        [(name, value)] = changes.items()
        assert_raises(DataError, train, lora_config(folder, **changes), folder / "lora", says=(f"{value}", name))


def test_only_lora_saves_the_gradients_of_the_weights(params):
    task = fine_tuning.FineTuned(type("Any", (), {"flops_per_step": 6.0})(), adapted(params, adapter_of(params)), {})
    assert task.flops_per_step == 4.0
    assert dataclasses.replace(task, objective=Frozen(None, "head")).flops_per_step == 6.0
