"""Text classification: labelled texts, passages, the classifier and its measures."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import assert_equal, assert_raises, assert_says, logged, random_params, random_tokens
from settings import BASE

from minigpt_jax.api import load_text_classifier, train
from minigpt_jax.config import Config, LabelledTextConfig, MaskedDataConfig, ModelConfig, TrainingConfig
from minigpt_jax.data import labelled
from minigpt_jax.data.labelled import Document, cut, genre, plays, read_documents
from minigpt_jax.data.tokenizers import CharTokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.interop.load import settings_from
from minigpt_jax.models.bert import BERT, TextClassifier
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.text_classification import ClassOfText

# ---- Labelled texts -------------------------------------------------------------------------------------------------------


def written(folder, lines, name="labelled.jsonl"):
    path = folder / name
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def line(text, label):
    return {"text": text, "label": label}


def config_for(folder, lines, **data):
    return LabelledTextConfig(dataset=written(folder, lines), data_dir=str(folder), **data)


def test_every_tenth_line_is_for_validation(tmp_path):
    documents = read_documents(config_for(tmp_path, [line(f"text {n}", n % 2) for n in range(25)]))
    assert documents.val == [Document("text 9", "1"), Document("text 19", "1")]
    assert len(documents.train) == 23
    assert documents.classes == ("0", "1")


def test_a_validation_file_leaves_all_lines_for_training(tmp_path):
    val = written(tmp_path, [line("held out", "b")], "val.jsonl")
    documents = read_documents(config_for(tmp_path, [line("x", "a"), line("y", "b")], val_dataset=val))
    assert (len(documents.train), documents.val) == (2, [Document("held out", "b")])
    other = read_documents(config_for(tmp_path, [line("x", "b"), line("y", "a")], val_dataset=val))
    assert documents.sha256 != other.sha256


GOOD = [line("x", "a"), line("y", "b")] * 10


@pytest.mark.parametrize(
    "lines, says",
    [
        ([*GOOD, "no JSON\n"], ("line 21 of",)),
        ([*GOOD, {"text": "z"}], ("line 21 of", '"label"')),
        ([*GOOD, {"text": 3, "label": "a"}], ("line 21 of", '"text"')),
        ([*GOOD, {"text": " ", "label": "a"}], ("line 21 of",)),
        ([*GOOD, ["z", "a"]], ("line 21 of",)),
        ([line("x", "a")] * 20, ("'a'", "two")),
        ([], ("no labels", "two")),
        (GOOD[:9], ("10", "--val_dataset")),
        ([*GOOD[:9], line("z", "c")], ("'c'",)),
    ],
    ids=str,
)
def test_texts_that_cannot_be_used_are_refused_with_the_line(tmp_path, lines, says):
    assert_raises(DataError, read_documents, config_for(tmp_path, lines), says=says)


def test_an_unknown_dataset_is_answered_with_what_is_allowed():
    config = LabelledTextConfig(dataset="shakespeare_genre")
    assert_raises(DataError, read_documents, config, says=("'shakespeare_genre'", "'shakespeare_genres'", ".jsonl"))


def test_genres_follow_the_titles():
    titles = {"Hamlet": "tragedy", "Henry VI, Part 2": "history", "King John": "history", "King Lear": "tragedy"}
    assert {title: genre(title) for title in titles} == titles
    assert genre("Twelfth Night") == "comedy"


def test_plays_are_held_out_of_each_genre_and_nobody_is_named(tmp_path):
    titles = [*labelled.TRAGEDIES[:5], *(f"Henry {n}" for n in range(5)), *(f"Comedy {n}" for n in range(8))]
    scenes = {title: [[["NAME", f"{title}, first line,", "second line."], ["NAME", "Answer."]]] for title in titles}
    path = written(tmp_path, [{"title": title, "scenes": scenes[title]} for title in titles], "plays.jsonl")
    train, val = plays(path)
    assert [document.text.split(",")[0] for document in val] == ["Comedy 2", "Comedy 7", "Henry 2", titles[2]]
    assert [document.label for document in val] == ["comedy", "comedy", "history", "tragedy"]
    assert len(train) + len(val) == len(titles)
    assert val[0].text == "Comedy 2, first line,\nsecond line.\n\nAnswer."


def test_documents_are_cut_into_passages_with_their_class():
    passages = cut([Document("abcab", "y"), Document("c", "x")], ("x", "y"), CharTokenizer("abc"), context_length=3)
    assert passages.tokens_NT.tolist() == [[0, 1, 2], [0, 1, 0], [2, 0, 0]]
    assert passages.is_token_NT.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert passages.labels_N.tolist() == [1, 1, 0]


# ---- The classifier and its task ------------------------------------------------------------------------------------------


def test_padding_does_not_change_the_class():
    tokens_BT, is_token_BT = random_tokens(3, 12, vocab_size=17), np.broadcast_to(np.arange(12) < 7, (3, 12))
    model = TextClassifier(dataclasses.replace(BASE, bias=True), num_classes=4)
    params = random_params(model, tokens_BT)
    run = jax.jit(model.apply)
    logits_BC = run({"params": params}, tokens_BT, is_token_BT)
    assert logits_BC.shape == (3, 4)
    np.testing.assert_allclose(logits_BC, run({"params": params}, tokens_BT[:, :7]), atol=1e-5)
    assert np.abs(logits_BC - run({"params": params}, tokens_BT)).max() > 1e-3
    bert = random_params(BERT(dataclasses.replace(BASE, bias=True)), tokens_BT)
    assert_equal(*({part: tree[part] for part in ("embedding", "transformer")} for tree in (params, bert)))


MODEL = ModelConfig(num_layers=1, num_heads=2, embed_dim=16, ff_dim=16, context_length=8)
TRAINING = TrainingConfig(batch_size=4, steps=2, sample_every=0, warmup_steps=0)


def task_for(folder, lines, **data):
    return prepare(Config(MODEL, TRAINING, config_for(folder, lines, **data)))


@pytest.mark.e2e
def test_measures_are_means_over_all_passages_beside_the_most_frequent_class(tmp_path):
    val = written(tmp_path, [line("be or", "b"), line("to to to to to", "b"), line("to", "a")], "val.jsonl")
    task = task_for(tmp_path, [line("to be", "a"), line("or be", "b"), line("to to to to to to", "b")], val_dataset=val)
    params = random_params(task.objective.model, np.zeros((1, 8), np.int32))
    passages = task.splits["val"]
    assert passages.labels_N.tolist() == [1, 1, 1, 0]  # the second text has nine tokens, more than the context
    logits_NC = task.objective.model.apply({"params": params}, passages.tokens_NT, passages.is_token_NT)
    log_probs_NC = jax.nn.log_softmax(logits_NC)
    measures = task.measures(params)
    assert measures["loss"] == pytest.approx(
        -np.mean([log_probs_NC[n, c] for n, c in enumerate(passages.labels_N)]), rel=1e-4
    )
    assert measures["accuracy"] == (np.argmax(logits_NC, axis=-1) == passages.labels_N).mean()
    assert measures["majority_accuracy"] == 3 / 4
    assert task.confusion(params).sum() == measures["passages"] == 4
    assert np.trace(task.confusion(params)) == 4 * measures["accuracy"]
    assert_raises(UsageError, task.measures, params, "val", 2, says=("stride=2",))
    assert_raises(UsageError, task.measures, params, "test", says=("split='test'", "train", "val"))


@pytest.mark.e2e
def test_dropout_applies_in_training_only(tmp_path):
    task = task_for(tmp_path, GOOD)
    objective = ClassOfText.of(task.config.override({"dropout": 0.5}), 2)
    params, batch = random_params(objective.model, np.zeros((1, 8), np.int32)), task.batch_at(0)
    loss = jax.jit(lambda key: objective.loss(params, batch, key)[0])
    assert loss(jax.random.key(0)) != loss(jax.random.key(1))
    without, plain = (jax.jit(each.loss)(params, batch, None)[0] for each in (objective, task.objective))
    assert without == plain


@pytest.mark.slow
@pytest.mark.e2e
def test_training_starts_from_the_encoder_of_a_masked_language_model(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 50)
    text = {"dataset": str(tmp_path / "text.txt"), "data_dir": str(tmp_path), "tokenizer": "word"}
    train(Config(MODEL, TRAINING, MaskedDataConfig(**text)), tmp_path / "masked")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    config = Config(MODEL, TRAINING, config_for(tmp_path, GOOD)).override(settings_from(str(tmp_path / "masked")))
    params = prepare(config).initial_params(sharding)
    new = prepare(config).objective.init(jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, new)
    assert_equal(params["classes"], new["classes"])
    assert np.abs(params["transformer"]["final_norm"]["scale"] - 1).max() > 0  # trained
    train(config, tmp_path / "further")
    assert_raises(
        DataError, train, config.override({"init_from": str(tmp_path / "further")}), tmp_path / "new",
        says=("text_classification", "masked_language_modelling"),
    )  # fmt: skip


# ---- The trained classifier -----------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_run_is_loaded_as_a_classifier_of_texts(tmp_path, caplog):
    lines = [line(text, label) for text, label in (("to be to be", "b"), ("or not", "a"), ("or", "c"))] * 10
    config = Config(MODEL, TRAINING, config_for(tmp_path, lines, tokenizer="word"))
    train(config, workdir := tmp_path / "run")
    classifier, task = load_text_classifier(workdir), prepare(config)
    assert classifier.classes == ("a", "b", "c")
    text = "to be or not to be"  # 11 tokens, more than the context
    passages = cut([Document(text, "a")], classifier.classes, task.tokenizer, MODEL.context_length)
    assert len(passages.labels_N) == 2
    logits_NC = task.objective.model.apply({"params": classifier.params}, passages.tokens_NT, passages.is_token_NT)
    expected = dict(zip("abc", jax.nn.softmax(logits_NC).mean(axis=0).tolist(), strict=True))
    caplog.clear()
    probabilities = classifier.probabilities(text)
    assert logged(caplog) == []
    assert probabilities == pytest.approx(expected, rel=1e-4)
    assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
    classifier.probabilities("to win or win")
    assert_says(logged(caplog)[-1], "<unk>", "2 times")
    assert_raises(DataError, classifier.probabilities, "", says=("empty",))

    path = workdir / "classes.json"
    path.write_text(path.read_text().replace('"a"', '"A"'))
    assert_raises(DataError, load_text_classifier, workdir, says=(str(path),))


def test_a_run_of_another_task_is_not_a_classifier_of_texts(tmp_path):
    (tmp_path / "config.json").write_text(Config().to_json())
    assert_raises(DataError, load_text_classifier, tmp_path, says=(str(tmp_path), "language_modelling"))
