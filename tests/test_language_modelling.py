"""What follows from a config and its texts: the parts, the tokenizer and what it learnt from, and a loss in every unit."""

import dataclasses
import functools
import gzip
import json
import math
import re

import jax
import numpy as np
import pytest
from helpers import error_message, random_params, random_tokens
from settings import BASE, TRAINING, TRAINING_CHANGES

from minigpt_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from minigpt_jax.data.tokenizers import CharTokenizer, WordTokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.evaluation import eval_step
from minigpt_jax.tasks.language_modelling import in_every_unit
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.tasks.task import Earlier

TEXT = "".join(np.random.default_rng(0).choice(["to ", "be ", "naïve ", "漢字 ", "not\n"], 60)) + "zz of the end only"


def config_for(folder, text=TEXT, **data):
    (folder / "text.txt").write_bytes(text.encode())
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=8, context_length=4),
        training=TrainingConfig(batch_size=2, steps=3),
        data=DataConfig(**{"dataset": str(folder / "text.txt"), "data_dir": str(folder / "data")} | data),
    )


# ---- The texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_whatever_the_tokenizer_the_last_tenth_of_the_characters_is_for_validation(tmp_path, kind):
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    made = prepare(config_for(tmp_path, tokenizer=kind))
    end = int(0.9 * len(TEXT))
    for name, text in (("train", TEXT[:end]), ("val", TEXT[end:])):
        part = made.splits[name]
        assert part.num_characters == len(text)
        assert part.num_bytes == len(text.encode())
        np.testing.assert_array_equal(part.ids, made.tokenizer.encode(text))
    assert made.config.model.vocab_size == made.tokenizer.vocab_size


def test_words_are_learnt_from_training_text_alone_and_characters_from_all(tmp_path):
    words = prepare(config_for(tmp_path, tokenizer="word"))
    assert "zz" not in words.tokenizer.words
    assert words.splits["train"].num_unknown == 0
    assert words.splits["val"].num_unknown > 0
    assert "z" in prepare(config_for(tmp_path)).tokenizer.characters
    assert "z" not in TEXT[: int(0.9 * len(TEXT))]


def test_a_text_for_validation_leaves_all_of_the_other_for_training(tmp_path):
    (tmp_path / "val.txt").write_text("of what is not there: Q\n" * 3)
    made = prepare(config_for(tmp_path, val_dataset=str(tmp_path / "val.txt")))
    assert made.tokenizer.decode(made.splits["train"].ids) == TEXT
    assert made.tokenizer.decode(made.splits["val"].ids) == "of what is not there: Q\n" * 3
    sums = {made.sources["text"], prepare(config_for(tmp_path)).sources["text"]}
    for text in ("of what is not there: R\n" * 3, TEXT):
        (tmp_path / "val.txt").write_text(text)
        sums.add(prepare(config_for(tmp_path, val_dataset=str(tmp_path / "val.txt"))).sources["text"])
    assert len(sums) == 4


def test_documents_from_a_folder_are_kept_apart_also_where_no_character_does_it(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"abba" * 9))
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": "cab " * 9}) for _ in range(9)))
    made = prepare(config_for(tmp_path, dataset=str(folder)))
    assert made.tokenizer.characters == "\n abc"
    assert made.tokenizer.decode(made.splits["train"].ids).startswith("abba" * 9 + "\n" + "cab " * 9 + "\n")
    words = prepare(config_for(tmp_path, dataset=str(folder / "*"), tokenizer="word"))
    assert (
        words.splits["train"].ids.tolist().count(words.tokenizer.end_of_text) == 8
    )  # nine documents, a tenth for validation


def test_another_encoding_is_that_of_both_texts(tmp_path):
    config = config_for(tmp_path, encoding="cp1252", val_dataset=str(tmp_path / "val.txt"))
    for name in ("text", "val"):
        (tmp_path / f"{name}.txt").write_bytes("naïve €\n".encode("cp1252") * 9)
    made = prepare(config)
    assert made.tokenizer.characters == "\n aenvï€"
    assert made.splits["val"].num_bytes == 9 * len("naïve €\n".encode())


def test_the_tokenizer_of_a_run_is_kept_and_its_text_must_be_the_same(tmp_path):
    config = config_for(tmp_path, tokenizer="word")
    first = prepare(config)
    other = WordTokenizer((*first.tokenizer.words[:-1], "never"))
    (tmp_path / "tokenizer.json").write_text(other.to_json())
    earlier = Earlier(tmp_path, {"text": first.sources["text"], "tokenizer": other.sha256})
    again = prepare(config, earlier)
    assert again.tokenizer == other
    assert again.splits["train"].num_unknown > 0
    other_text = config_for(tmp_path, TEXT + "!", tokenizer="word")
    error_message(DataError, prepare, other_text, earlier, says=(str(tmp_path / "text.txt"), "--overwrite"))


@pytest.mark.parametrize(
    "text, context_length, split, has, longest",
    [
        ("ab" * 50, 10, "val", 10, [9]),
        ("ab" * 50, 200, "train", 90, [9]),
        ("ab" * 6, 4, "val", 2, [1]),
        ("a", 1, "train", 0, []),  # no context is short enough
    ],
)
def test_a_part_shorter_than_a_window_is_told_with_the_longest_context(tmp_path, text, context_length, split, has, longest):
    config = config_for(tmp_path, text).override({"context_length": context_length})
    message = error_message(DataError, prepare, config, says=(split, f"context_length={context_length}"))
    assert sorted(map(int, re.findall(r"\d+", message))) == sorted([has, context_length, context_length + 1, *longest])


def test_a_text_for_validation_with_a_character_of_its_own_has_an_id_for_it(tmp_path):
    (tmp_path / "val.txt").write_text("ÄÖÜ" * 9)
    made = prepare(config_for(tmp_path, val_dataset=str(tmp_path / "val.txt")))
    assert set("ÄÖÜ") <= set(made.tokenizer.characters)


# ---- The loss -------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens_BT):
    logits_BTV, _ = model.apply({"params": params}, tokens_BT)
    return logits_BTV


def log_probs_of(made, params, ids):
    """log p of each id but the first, by the model on whole windows, as NumPy would have it."""
    logits_BTV = run(made.objective.model, params, np.asarray(ids, np.int32)[None, :-1])
    logits_TV = np.asarray(logits_BTV, np.float64)[0]
    log_probs_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
    return log_probs_TV[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize(
    "kind, stride",
    [
        ("char", 4),
        ("word", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("char", 1), ("byte", 3), ("bpe", 3))),
    ],
)
def test_a_loss_in_every_unit_is_what_one_computes_by_hand(tmp_path, kind, stride):
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    made = prepare(config_for(tmp_path, tokenizer=kind))
    params = made.objective.init(jax.random.key(1))
    text, T = TEXT[int(0.9 * len(TEXT)) :], 4
    ids = made.tokenizer.encode(text)
    nats = []  # of each token after the first, with as many before it as the stride leaves
    for target in range(1, len(ids)):
        # The window that has it among its new targets: 0 has T, each one after it `stride` more.
        start = max(0, -(-(target - T) // stride)) * stride
        nats.append(-log_probs_of(made, params, ids[start : target + 1])[-1])
        assert T - stride < target - start <= T or start == 0
    means = made.measures(params, stride=stride)
    loss = means["loss"]
    assert loss == pytest.approx(np.mean(nats), rel=1e-5)

    found = in_every_unit(made, "val", loss)
    first = made.tokenizer.to_bytes(ids[:1])
    bits = sum(nats) / math.log(2)
    assert found["bits_per_char"] == pytest.approx(bits / (len(text) - len(first.decode(errors="replace"))), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(bits / (len(text.encode()) - len(first)), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert found["tokens"] == len(ids) - 1
    assert found["tokens_per_char"] == pytest.approx(found["tokens"] / (len(text) - len(first.decode(errors="replace"))))
    assert found["unknown_share"] == (ids.tolist().count(1) / len(ids) if kind == "word" else 0)
    assert (found["unknown_share"] > 0) == (kind == "word")


def test_more_context_changes_the_loss_and_a_whole_window_is_the_default(tmp_path):
    made = prepare(config_for(tmp_path))
    params = made.objective.init(jax.random.key(1))
    losses = [made.measures(params, stride=stride) for stride in (None, 4, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_vocabulary_that_was_asked_for_is_the_models(tmp_path):
    config = config_for(tmp_path, tokenizer="word").override({"vocab_size": 8})
    made = prepare(config)
    assert made.tokenizer.vocab_size == made.config.model.vocab_size == 8
    assert made.splits["train"].unknown_share > 0.1
    assert isinstance(prepare(config_for(tmp_path)).tokenizer, CharTokenizer)
    assert dataclasses.replace(made.config, model=config.model) == config


@functools.cache
def loss_in_evaluation(training):
    objective = NextToken.of(Config(BASE, training))
    params = random_params(objective.model, np.zeros((2, 1), np.int32))
    batch = {
        "inputs_BT": random_tokens(2, 8, vocab_size=17),
        "targets_BT": random_tokens(2, 8, vocab_size=17, seed=1),
        "mask_BT": np.ones((2, 8), bool),
    }
    total, count, _ = eval_step(params, batch, objective)
    return float(total / count)


@pytest.mark.parametrize("change", TRAINING_CHANGES, ids=str)
def test_what_evaluation_measures_depends_on_nothing_that_is_for_training(change):
    """Else the losses of two runs could not be compared."""
    assert loss_in_evaluation(dataclasses.replace(TRAINING, **change)) == loss_in_evaluation(TRAINING)
