"""Image classification: batches, loss, measures, checks of the settings, and the trained classifier."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_equal, assert_raises, assert_says, random_params, small_digits

from minigpt_jax.api import load, load_image_classifier, train
from minigpt_jax.config import Config, ImageConfig, ModelConfig, TrainingConfig
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.interop.load import read_run_config
from minigpt_jax.models.flops import flops_per_token
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.augmentation import augment
from minigpt_jax.tasks.classification import class_loss
from minigpt_jax.tasks.plots import draw_attention, draw_confusion
from minigpt_jax.tasks.task import Classifier, PreviousRun

MODEL = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, ff_dim=12, context_length=17, positions="learned")
TRAINING = TrainingConfig(batch_size=12, steps=3, sample_every=0)


@pytest.fixture
def config(tmp_path, monkeypatch):
    return Config(MODEL, TRAINING, ImageConfig(patch_size=7, **small_digits(tmp_path, monkeypatch)))


@pytest.fixture
def task(config):
    return prepare(config)


@pytest.fixture
def params(task):
    return random_params(task.objective.model, np.zeros((1, 28, 28, 1), np.float32), scale=0.2)


def test_class_loss_is_a_sum_over_unmasked_rows():
    logits_BC = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 5.0], [3.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    labels_B, mask_B = jnp.array([0, 1, 0, 0]), jnp.array([True, True, True, False])
    total, count, measures = class_loss(logits_BC, labels_B, mask_B)
    probs_BC = jax.nn.softmax(logits_BC)
    assert_close(total, -np.log(probs_BC[0, 0] * probs_BC[1, 1] * probs_BC[2, 0]), rtol=1e-5)
    assert (count, measures) == (3, {"accuracy": 2})


def test_each_epoch_has_every_training_image_once(task):
    """40 images in batches of 12: ten batches are three epochs."""
    seen = np.concatenate([task.batch_at(step)["images_BHWC"][:, :, :, 0] for step in range(10)]).reshape(3, 40, -1)
    train = {row.tobytes() for row in task.splits["train"].images_NHWC.reshape(40, -1)}
    assert all({row.tobytes() for row in epoch} == train for epoch in seen)
    assert not np.array_equal(seen[0], seen[1])


def test_a_batch_is_a_function_of_seed_and_step(task, config):
    assert_equal(task.batch_at(2), prepare(config).batch_at(2))
    other = prepare(config.override(seed=1))
    assert not np.array_equal(task.batch_at(2)["labels_B"], other.batch_at(2)["labels_B"])
    assert {name: (array.dtype, array.shape) for name, array in task.batch_at(2).items()} == {
        "images_BHWC": (np.uint8, (12, 28, 28, 1)), "labels_B": (np.int32, (12,)), "mask_B": (bool, (12,)),
    }  # fmt: skip


def test_evaluation_counts_every_validation_image_once(task, params):
    val = task.splits["val"]
    assert len(val) == 10
    uneven = dataclasses.replace(task, config=task.config.override(batch_size=4))
    logits_NV = task.objective.logits(params, {"images_BHWC": val.images_NHWC})
    nats_N = optax.softmax_cross_entropy_with_integer_labels(logits_NV, val.labels_N)
    accuracy = float((logits_NV.argmax(axis=-1) == val.labels_N).mean())
    for each in (task, uneven):
        measures = each.measures(params)
        assert measures == {
            "loss": pytest.approx(float(nats_N.mean()), rel=1e-5),
            "accuracy": pytest.approx(accuracy),
            "images": 10,
        }
    spaced = uneven.evaluate(params, limit=1)
    assert spaced["loss"] == pytest.approx(float(nats_N[jnp.array([0, 3, 6, 9])].mean()), rel=1e-5)
    assert task.measures(params, "train")["images"] == 40
    assert_raises(UsageError, task.measures, params, "test", says=("split='test'", "train", "val"))
    assert_raises(UsageError, task.measures, params, stride=3, says=("stride=3",))


def test_training_varies_the_images_and_smooths_the_labels(task, params):
    objective, batch = task.objective, task.batch_at(0)
    batch["mask_B"] = np.arange(12) < 9
    augment_key, _ = jax.random.split(jax.random.key(3))
    images_BHWC = augment(augment_key, batch["images_BHWC"].astype(np.float32), 2.0, 12.0, 0.1)
    logits_BV = objective.logits(params, {"images_BHWC": images_BHWC})
    targets_BV = 0.9 * jax.nn.one_hot(batch["labels_B"], 10) + 0.1 / 10
    expected = optax.softmax_cross_entropy(logits_BV, targets_BV)[:9].sum()
    total, count, measures = objective.loss(params, batch, jax.random.key(3))
    assert_close(total, expected, rtol=1e-5)
    assert (count, measures["accuracy"]) == (9, (logits_BV.argmax(axis=-1) == batch["labels_B"])[:9].sum())
    plain = objective.replace(shift=0.0, rotation=0.0, scale=0.0, label_smoothing=0.0)
    assert_close(plain.loss(params, batch, jax.random.key(3))[0], objective.loss(params, batch, None)[0], rtol=1e-5)


def test_dropout_is_used_in_training_only(config):
    objective = prepare(config.override(dropout=0.5, shift=0.0, rotation=0.0, scale=0.0, label_smoothing=0.0)).objective
    batch = prepare(config).batch_at(0)
    params = objective.init(jax.random.key(0))
    still = objective.loss(params, batch, None)[0]
    assert still == objective.loss(params, batch, None)[0]
    dropped = [float(objective.loss(params, batch, jax.random.key(seed))[0]) for seed in (1, 2)]
    assert len({float(still), *dropped}) == 3


def test_pixels_are_centred(task):
    """Black becomes -1 and white 1."""
    seen = []
    model = type("Spy", (), {"apply": lambda self, variables, images_BHWC: seen.append(images_BHWC)})()
    task.objective.replace(model=model).logits({}, {"images_BHWC": np.array([[[[0], [255]]]], np.uint8)})
    assert np.ravel(seen[0]).tolist() == [-1, 1]


def test_confusion_counts_true_against_predicted_classes(task, params):
    assert isinstance(task, Classifier)
    counts_CC = task.confusion(params, "train")
    logits_NV = task.objective.logits(params, {"images_BHWC": task.splits["train"].images_NHWC})
    expected_CC = np.zeros((10, 10), int)
    for label, guess in zip(task.splits["train"].labels_N, np.asarray(logits_NV.argmax(axis=-1)), strict=True):
        expected_CC[label, guess] += 1
    assert_equal(counts_CC, expected_CC)
    assert counts_CC.sum() == 40
    assert task.measures(params, "train")["accuracy"] == pytest.approx(counts_CC.trace() / 40)
    assert_raises(UsageError, task.confusion, params, "test", says=("split='test'",))


def test_the_preview_names_a_guess_for_each_class(task, params):
    params = jax.tree.map(lambda leaf: 10 * leaf, params)  # so that guesses differ between images
    lines = task.preview(params).splitlines()
    assert len(lines) == 10
    val = task.splits["val"]
    probs_NV = jax.nn.softmax(task.objective.logits(params, {"images_BHWC": val.images_NHWC}))  # one image of each class
    for name, line, probs_V in zip(task.classes, lines, np.asarray(probs_NV), strict=True):
        assert_says(line, name, str(probs_V.argmax()), f"{probs_V.max():.0%}")
    assert len({line.split(" for ")[1] for line in lines}) > 1


def test_flops_are_those_of_gpt_without_the_causal_half_and_its_vocabulary(task):
    trunk = dataclasses.replace(MODEL, context_length=2 * 17, vocab_size=1)  # a causal mask covers half
    edges = 6 * 8 * (28 * 28 + 10)
    assert task.flops_per_step == 12 * (17 * (flops_per_token(trunk) - 6 * 8) + edges)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"positions": "rotary"}, ["positions='rotary'", "'learned'"]),
        ({"patch_size": 4}, ["context_length=17", "50", "patch_size=4", "49", "image_size=28"]),
        ({"vocab_size": 10}, ["vocab_size=10"]),
        ({"vocab_multiple": 8}, ["vocab_multiple=8"]),
        ({"tie_embeddings": True}, ["tie_embeddings=True"]),
    ],
)
def test_settings_that_do_not_fit_images_are_refused(config, changes, says):
    assert_raises(UsageError, prepare, config.override(changes), says=says)


def test_a_patch_divides_the_image():
    assert_raises(UsageError, ImageConfig, patch_size=5, says=("image_size=28", "patch_size=5"))


def test_initial_weights_are_refused(config):
    changes = {"init_from": "runs/other"}
    assert_raises(UsageError, config.override, changes, says=("init_from=runs/other", "image_classification"))


def test_another_set_of_images_is_not_resumed(config, task, tmp_path, monkeypatch):
    assert prepare(config, PreviousRun(tmp_path, task.sources)).sources == task.sources
    small_digits(tmp_path, monkeypatch, per_class=4)
    says = ("digits", "--dataset", "--workdir", "--overwrite")
    assert_raises(DataError, prepare, config, PreviousRun(tmp_path, task.sources), says=says)


@pytest.mark.parametrize("epochs, steps", [(1.0, 4), (2.5, 9)])
def test_epochs_become_steps(config, epochs, steps):
    assert prepare(config.override(epochs=epochs)).num_steps == steps


# ---- The trained classifier -----------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_run_is_loaded_as_a_classifier(config, task, tmp_path, capsys):
    workdir = tmp_path / "run"
    train(config, workdir)
    assert "image_classification" in assert_raises(DataError, load, workdir, says=(str(workdir),))
    classifier = load_image_classifier(workdir)
    assert classifier.classes == task.classes
    assert classifier.brightness == pytest.approx(task.splits["train"].images_NHWC.mean(), abs=0.06)
    image_HWC = task.splits["val"].images_NHWC[0]
    probabilities = classifier.probabilities(image_HWC)
    logits_BV = task.objective.logits(classifier.params, {"images_BHWC": image_HWC[None]})
    expected = dict(zip(task.classes, jax.nn.softmax(logits_BV)[0].tolist(), strict=True))
    assert probabilities == pytest.approx(expected, rel=1e-4)
    assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
    weights_LHN = classifier.attention(image_HWC)
    assert weights_LHN.shape == (2, 2, 16)
    _, state = task.objective.logits(classifier.params, {"images_BHWC": image_HWC[None]}, mutable=["intermediates"])
    [weights_BHTS] = state["intermediates"]["transformer"]["block_1"]["attention"]["weights_BHTS"]
    assert_close(weights_LHN[1], weights_BHTS[0, :, 0, 1:], rtol=1e-4)
    assert (weights_LHN > 0).all()
    assert (weights_LHN.sum(axis=-1) < 1).all()

    path = workdir / "classes.json"
    changed = json.loads(path.read_text()) | {"brightness": 0}
    path.write_text(json.dumps(changed))
    assert_raises(DataError, load_image_classifier, workdir, says=(str(path),))
    path.unlink()
    assert_raises(DataError, load_image_classifier, workdir, says=(str(path), "No such file"))
    assert read_run_config(workdir) == config


def test_a_run_of_another_task_is_not_a_classifier(tmp_path):
    (tmp_path / "config.json").write_text(Config().to_json())
    assert_raises(DataError, load_image_classifier, tmp_path, says=(str(tmp_path), "language_modelling"))


# ---- Plots ----------------------------------------------------------------------------------------------------------------


def test_the_plot_of_a_confusion_matrix_has_its_counts_and_names():
    pytest.importorskip("matplotlib")
    counts_CC = np.array([[7, 0], [2, 11]])
    axes, *_ = draw_confusion(counts_CC, ["a$b$", "_c"]).axes
    counts = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert counts == {(0, 0): "7", (1, 0): "2", (1, 1): "11"}  # by row and column
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["a$b$", "_c"]
    assert_says(axes.get_title(loc="left"), "18", "20", "90.0%")
    assert_says(axes.get_xlabel(), "predicted")
    assert_says(axes.get_ylabel(), "true")
    assert_close(axes.images[0].get_array() ** 2, counts_CC / [[7], [13]])


def test_the_plot_of_attention_has_the_image_and_a_panel_for_each_layer():
    pytest.importorskip("matplotlib")
    image_HWC = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    weights_LHN = np.random.default_rng(0).random((3, 2, 4)) / 4
    first, *others = draw_attention(image_HWC, weights_LHN, "seven").axes[:4]
    assert first.get_title() == "seven"
    assert_equal(np.asarray(first.images[0].get_array()), image_HWC[:, :, 0])
    for axes, weights_HN in zip(others, weights_LHN, strict=True):
        grey, shown = axes.images
        assert grey.get_array().shape == (4, 4)
        assert_close(np.asarray(shown.get_array()), weights_HN.mean(axis=0).reshape(2, 2))
        assert shown.get_extent() == [-0.5, 3.5, 3.5, -0.5]
