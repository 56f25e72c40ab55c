"""Every task trains, evaluates, previews and resumes bit for bit with the same loop, files and commands."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from helpers import assert_equal, small_digits

from minigpt_jax.api import evaluate, train
from minigpt_jax.config import (
    TASKS,
    ChatConfig,
    Config,
    DataConfig,
    ImageConfig,
    LabelledTextConfig,
    MaskedDataConfig,
    ModelConfig,
    TrainingConfig,
)
from minigpt_jax.errors import StoppedError
from minigpt_jax.interop.load import read_run_config
from minigpt_jax.runs import checkpoints, plots
from minigpt_jax.runs.metrics import read_metrics
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.task import PreviousRun, trained_params
from minigpt_jax.training.callbacks import Callback
from minigpt_jax.training.resume import restore
from minigpt_jax.training.run import new_state

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

STEPS, KILLED_AT = 9, 5
MODEL = ModelConfig(num_layers=1, num_heads=2, embed_dim=16, ff_dim=16, context_length=40, dropout=0.1, positions="learned")
TRAINING = TrainingConfig(
    batch_size=4, grad_accumulation=2, ema=0.9, steps=STEPS, eval_every=3, eval_batches=2, checkpoint_every=4, log_every=3,
    sample_every=4, warmup_steps=2,
)  # fmt: skip


def text_in(folder):
    path = folder / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(["to ", "be ", "or ", "not\n"], 200)))
    return {"dataset": str(path), "data_dir": str(folder / "data")}


def labelled_text_in(folder):
    path, random = folder / "labelled.jsonl", np.random.default_rng(0)
    lines = [(label, " ".join(random.choice(words, 5))) for label, words in (("a", ["to", "be"]), ("b", ["or", "not"])) * 20]
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for label, text in lines))
    return {"dataset": str(path), "data_dir": str(folder / "data")}


def conversations_in(folder):
    path = folder / "conversations.jsonl"
    rows = [{"prompt": f"{i} +", "completion": str(i)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"dataset": str(path), "data_dir": str(folder / "data")}


# By task: its settings for data in a folder, written or patched there, and the measures of its evaluations.
CASES = {
    "language_modelling": (lambda folder, patch: DataConfig(**text_in(folder)), {"loss"}),
    "chat": (lambda folder, patch: ChatConfig(**conversations_in(folder)), {"loss", "token_accuracy"}),
    "masked_language_modelling": (lambda folder, patch: MaskedDataConfig(**text_in(folder)), {"loss", "accuracy"}),
    "text_classification": (
        lambda folder, patch: LabelledTextConfig(**labelled_text_in(folder)),
        {"loss", "accuracy"},
    ),
    "image_classification": (
        lambda folder, patch: ImageConfig(patch_size=14, **small_digits(folder, patch)),
        {"loss", "accuracy"},
    ),
}


def test_every_task_is_a_case():
    assert set(CASES) == set(TASKS)


class Interrupt(Callback):
    def after_step(self, run):
        if run.step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGTERM)


def without_times(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.endswith(("seconds", "_per_second"))} for row in rows]


@pytest.mark.parametrize("name", CASES)
def test_a_task_trains_evaluates_previews_and_resumes_bit_for_bit(name, tmp_path, monkeypatch, capsys):
    data, measures = CASES[name]
    config, sharding = (
        Config(MODEL, TRAINING, data(tmp_path, monkeypatch)),
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    assert config.task == name
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(config, straight, profile=True)
    previews = capsys.readouterr().out
    assert len(previews.strip()) > 10
    with pytest.raises(StoppedError):
        train(config, killed, callbacks=[Interrupt()])
    assert checkpoints.steps(killed)[-1] == KILLED_AT
    train(read_run_config(killed), killed)

    task = prepare(config, PreviousRun(killed, checkpoints.read_info(killed, STEPS).sources))
    like = jax.eval_shape(lambda: new_state(task))
    assert_equal(*(restore(workdir, STEPS, like, sharding) for workdir in (straight, killed)))
    assert without_times(killed) == without_times(straight)
    assert capsys.readouterr().out == previews
    evaluations = [row for row in without_times(straight) if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [3, 6, 9]
    assert all(set(row) - {"step"} == {f"val_{measure}" for measure in measures} for row in evaluations)

    result = evaluate(straight)
    params = trained_params(task, straight, checkpoints.best_intact(straight), sharding)
    assert result == evaluate(killed) == task.measures(params)
    assert measures <= set(result)
    assert json.dumps(result)
    assert task.preview(params) == task.preview(params)
    assert "loss" in evaluate(straight, "train")
    assert list((straight / "profile").rglob("*.xplane.pb"))
    assert plots.series(read_metrics(straight / "metrics.jsonl"), "_per_second")[0] == [3, 6, 9]
    assert dataclasses.asdict(read_run_config(straight)) == dataclasses.asdict(task.config)
