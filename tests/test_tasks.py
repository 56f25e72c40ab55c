"""The task interface: a task unrelated to text, defined in this file, is trained by the same loop."""

import dataclasses
import json
import logging
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import struct
from helpers import assert_equal, assert_raises, assert_says, logged

from minigpt_jax import config, tasks
from minigpt_jax.api import load, train
from minigpt_jax.config import Config, ModelConfig, Section, TrainingConfig, setting
from minigpt_jax.errors import DataError, StoppedError, UsageError
from minigpt_jax.interop.load import read_run_config, settings_from
from minigpt_jax.models.layers import TokenAndPosition
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.transformer import Transformer
from minigpt_jax.runs import checkpoints
from minigpt_jax.tasks.evaluation import means
from minigpt_jax.training.callbacks import Callback
from minigpt_jax.training.resume import restore
from minigpt_jax.training.run import new_state

# ---- The task: sort a row of digits ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SortingConfig(Section):
    digits: int = setting(4, "digits in a row", at_least=1)


class Sorter(nn.Module):
    """An encoder: every position attends to all the others."""

    config: ModelConfig

    @nn.compact
    def __call__(self, digits_BT, dropout=None):
        positions_BT = jnp.broadcast_to(jnp.arange(digits_BT.shape[1]), digits_BT.shape)
        x_BTD = TokenAndPosition(self.config, name="embedding")(digits_BT, positions_BT)
        x_BTD, _ = Transformer(self.config, name="encoder")(x_BTD, Mask(), positions_BT, None, dropout)
        return nn.Dense(10, name="head")(x_BTD)


@struct.dataclass
class Sorted:
    model: Sorter = struct.field(pytree_node=False)
    dropout: float | None = None

    def init(self, key):
        return self.model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def loss(self, params, batch, key):
        dropout, rngs = (None, {}) if key is None else (self.dropout, {"dropout": key})
        logits_BTV = self.model.apply({"params": params}, batch["digits_BT"], dropout, rngs=rngs)
        nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["sorted_BT"])
        correct_BT = logits_BTV.argmax(axis=-1) == batch["sorted_BT"]
        return nats_BT.sum(), jnp.asarray(nats_BT.size), {"accuracy": correct_BT.sum()}


@dataclasses.dataclass(frozen=True, eq=False)
class Sorting:
    config: Config
    objective: Sorted
    sources: dict
    num_steps: int
    unit = "digits"
    flops_per_step = 1e6
    files = {"digits.txt": "0123456789\n"}  # noqa: RUF012

    @property
    def units_per_step(self):
        return self.config.training.batch_size * self.config.data.digits

    def initial_params(self, sharding):
        return None

    def rows(self, *seed):
        shape = self.config.training.batch_size, self.config.data.digits
        digits_BT = np.random.default_rng(seed).integers(10, size=shape, dtype=np.int32)
        return {"digits_BT": digits_BT, "sorted_BT": np.sort(digits_BT, axis=1)}

    def batch_at(self, step):
        return self.rows(0, self.config.training.seed, step)

    def evaluate(self, params, limit=None):
        return means(self.objective, params, (self.rows(1, n) for n in range(limit or 8)))

    def measures(self, params, split="val", stride=None):
        return self.evaluate(params)

    def next_command(self, workdir):
        return f"Sort digits: sort {workdir}"

    def preview(self, params):
        digits_BT = self.rows(2)["digits_BT"][:1]
        output_BT = self.objective.model.apply({"params": params}, digits_BT).argmax(axis=-1)
        return f"{''.join(map(str, digits_BT[0]))} becomes {''.join(map(str, output_BT[0].tolist()))}"

    def describe_data(self):
        return f"rows of {self.config.data.digits} digits"

    def data_facts(self):
        return {}

    def describe_result(self, means):
        return f"{means['loss']:.4f} nats per digit, accuracy {means['accuracy']:.1%}"


def prepare(config, earlier=None, kernels=None):
    if earlier is not None and earlier.sources != {"digits": "decimal"}:
        raise DataError("other digits")
    model = dataclasses.replace(config.model, vocab_size=10, dropout=0.0)
    objective = Sorted(Sorter(model), config.model.dropout or None)
    return Sorting(config, objective, {"digits": "decimal"}, config.training.steps or 20)


# ---- The tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def register_the_task(monkeypatch):
    monkeypatch.setitem(config.TASKS, "sorting", SortingConfig)
    monkeypatch.setitem(tasks.TASKS, "sorting", __name__)


CONFIG = Config(
    model=ModelConfig(
        num_layers=1, num_heads=2, embed_dim=16, ff_dim=32, positions="learned", context_length=4, dropout=0.1
    ),
    training=TrainingConfig(
        batch_size=8, grad_accumulation=2, ema=0.9, steps=20, eval_every=5, eval_batches=2, checkpoint_every=4, log_every=3,
        sample_every=10, warmup_steps=2, learning_rate=1e-2,
    ),
    data=SortingConfig(),
)  # fmt: skip


def rows(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row.keys() - {"seconds", "digits_per_second"}} for row in lines]


def state_at(workdir, step):
    task = prepare(CONFIG)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return restore(workdir, step, jax.eval_shape(lambda: new_state(task)), sharding)


class Interrupt(Callback):
    def after_step(self, run):
        if run.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.e2e
def test_another_task_trains_evaluates_previews_and_resumes_bit_for_bit(tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO):
        train(CONFIG, tmp_path / "straight")
    assert_says(logged(caplog)[0], str(tmp_path / "straight"), "rows of 4 digits", "20", "32", "digits")
    assert " nats per digit, accuracy " in caplog.text
    assert capsys.readouterr().out.count(" becomes ") == 2
    assert (tmp_path / "straight" / "digits.txt").read_text() == "0123456789\n"
    assert read_run_config(tmp_path / "straight") == CONFIG
    with pytest.raises(StoppedError):
        train(CONFIG, tmp_path / "killed", callbacks=[Interrupt()])
    assert checkpoints.steps(tmp_path / "killed")[-1] == 7
    train(read_run_config(tmp_path / "killed"), tmp_path / "killed")
    assert_equal(state_at(tmp_path / "killed", 20), state_at(tmp_path / "straight", 20))
    metrics = rows(tmp_path / "straight")
    assert rows(tmp_path / "killed") == metrics
    evaluations = [row for row in metrics if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [5, 10, 15, 20]
    assert all(set(row) == {"step", "val_loss", "val_accuracy"} for row in evaluations)
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    assert_raises(DataError, load, tmp_path / "straight", says=(str(tmp_path / "straight"), "sorting"))


@pytest.mark.e2e
def test_resuming_checks_the_sources_and_settings_of_the_task(tmp_path):
    with pytest.raises(StoppedError):
        train(CONFIG, tmp_path, callbacks=[Interrupt()])
    assert_raises(DataError, train, CONFIG.override({"digits": 5}), tmp_path, says=(str(tmp_path), "digits=4", "5"))
    path = tmp_path / "checkpoints" / "7" / "checkpoint.json"
    assert json.loads(path.read_text())["sources"] == {"digits": "decimal"}
    text = dataclasses.replace(CONFIG, data=config.DataConfig())
    assert_raises(DataError, train, text, tmp_path, says=(str(tmp_path), "task=sorting", "language_modelling"))


def test_a_run_cannot_start_from_a_run_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    assert_raises(DataError, settings_from, str(tmp_path), says=(str(tmp_path), "sorting", "tokenizer"))


def test_a_setting_belongs_only_to_its_task():
    assert CONFIG.override({"digits": 6}).data.digits == 6
    assert Config.from_json(CONFIG.to_json()) == CONFIG
    assert_raises(UsageError, CONFIG.override, {"dataset": "shakespeare"}, says=("dataset", "sorting"))
    assert_raises(UsageError, Config().override, {"digits": 6}, says=("digits",))


def test_both_tables_of_tasks_have_the_same_names():
    assert config.TASKS.keys() == tasks.TASKS.keys()
    assert tasks.TASKS["language_modelling"] == "minigpt_jax.tasks.language_modelling"


@pytest.mark.e2e
def test_a_measure_is_a_mean_over_the_targets_of_all_batches():
    task = prepare(CONFIG)
    params = task.objective.init(jax.random.key(0))
    batches = [task.rows(1, n) for n in range(3)]
    digits_NT, sorted_NT = (np.concatenate([batch[name] for batch in batches]) for name in ("digits_BT", "sorted_BT"))
    logits_NTV = task.objective.model.apply({"params": params}, digits_NT)
    measured = task.evaluate(params, limit=3)
    assert measured["accuracy"] == pytest.approx((np.argmax(logits_NTV, axis=-1) == sorted_NT).mean())
    assert list(measured) == ["loss", "accuracy"]
