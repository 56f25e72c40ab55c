"""The language-modelling task: splits, training the tokenizer, and the loss in every unit."""

import dataclasses
import functools
import gzip
import json
import math
import re

import jax
import numpy as np
import pytest
from helpers import assert_raises, assert_says, logged, random_params, random_tokens
from settings import BASE, TRAINING, TRAINING_CHANGES

from minigpt_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from minigpt_jax.data import overlap as overlaps
from minigpt_jax.data.tokenizers import CharTokenizer, WordTokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.evaluation import eval_step
from minigpt_jax.tasks.language_modelling import loss_in_other_units
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.tasks.task import PreviousRun

TEXT = "".join(np.random.default_rng(0).choice(["to ", "be ", "naïve ", "漢字 ", "not\n"], 60)) + "zz only at the end"


def config_for(folder, text=TEXT, **data):
    (folder / "text.txt").write_bytes(text.encode())
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=8, context_length=4),
        training=TrainingConfig(batch_size=2, steps=3),
        data=DataConfig(**{"dataset": str(folder / "text.txt"), "data_dir": str(folder / "data")} | data),
    )


# ---- The texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_the_last_tenth_of_the_characters_is_for_validation_with_any_tokenizer(tmp_path, kind):
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    task = prepare(config_for(tmp_path, tokenizer=kind))
    end = int(0.9 * len(TEXT))
    for name, text in (("train", TEXT[:end]), ("val", TEXT[end:])):
        part = task.splits[name]
        assert part.num_characters == len(text)
        assert part.num_bytes == len(text.encode())
        np.testing.assert_array_equal(part.ids, task.tokenizer.encode(text))
    assert task.config.model.vocab_size == task.tokenizer.vocab_size


def test_words_are_learned_from_the_training_text_only_and_characters_from_both(tmp_path):
    task = prepare(config_for(tmp_path, tokenizer="word"))
    assert "zz" not in task.tokenizer.words
    assert task.splits["train"].num_unknown == 0
    assert task.splits["val"].num_unknown > 0
    assert "z" in prepare(config_for(tmp_path)).tokenizer.characters
    assert "z" not in TEXT[: int(0.9 * len(TEXT))]


def test_with_a_validation_text_all_of_the_dataset_is_for_training(tmp_path):
    (tmp_path / "val.txt").write_text("held out: Q\n" * 3)
    task = prepare(config_for(tmp_path, val_dataset=str(tmp_path / "val.txt")))
    assert task.tokenizer.decode(task.splits["train"].ids) == TEXT
    assert task.tokenizer.decode(task.splits["val"].ids) == "held out: Q\n" * 3
    checksums = {task.sources["text"], prepare(config_for(tmp_path)).sources["text"]}
    for text in ("held out: R\n" * 3, TEXT):
        (tmp_path / "val.txt").write_text(text)
        checksums.add(prepare(config_for(tmp_path, val_dataset=str(tmp_path / "val.txt"))).sources["text"])
    assert len(checksums) == 4


def test_documents_in_a_folder_are_separated_even_without_a_line_break_in_the_text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"abba" * 9))
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": "cab " * 9}) for _ in range(9)))
    task = prepare(config_for(tmp_path, dataset=str(folder)))
    assert task.tokenizer.characters == "\n abc"
    assert task.tokenizer.decode(task.splits["train"].ids).startswith("abba" * 9 + "\n" + "cab " * 9 + "\n")
    task = prepare(config_for(tmp_path, dataset=str(folder / "*"), tokenizer="word"))
    # Ten documents, of which the last tenth of the characters is for validation.
    assert task.splits["train"].ids.tolist().count(task.tokenizer.end_of_text) == 8


def test_what_is_skipped_is_logged_in_one_line(tmp_path, caplog):
    caplog.set_level("INFO", "minigpt_jax")
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.TXT"):
        (folder / name).write_text(TEXT)
    for name in (".a.txt", "cover.jpg", "empty.txt"):
        (folder / name).touch()
    prepare(config_for(tmp_path, dataset=str(folder), val_dataset=str(tmp_path / "text.txt")))
    [line] = logged(caplog, "INFO")
    assert_says(line, str(folder), "3", "1", "1", "1", ".jpg")


@pytest.mark.parametrize("kind", ["char", "word"])
def test_copies_on_both_sides_of_the_split_are_warned_of(tmp_path, caplog, kind):
    words = np.random.default_rng(1).choice(["to", "be", "or", "not", "that", "is"], (2, 1000))
    text, other = (" ".join(row) + "\n" for row in words)
    folder = tmp_path / "texts"
    folder.mkdir()
    config = config_for(tmp_path, dataset=str(folder), tokenizer=kind)
    (folder / "a.txt").write_text(text)
    prepare(config)
    assert logged(caplog, "WARNING") == []
    (folder / "a copy.txt").write_text(text)
    first = prepare(config)
    (tmp_path / "tokenizer.json").write_text(first.tokenizer.to_json())
    prepare(config, PreviousRun(tmp_path, first.sources))  # says nothing: it was said when the run started
    [line] = logged(caplog, "WARNING")
    assert_says(line, "100%", str(folder), "--val_dataset")
    (folder / "a copy.txt").unlink()
    caplog.clear()
    (tmp_path / "val.txt").write_text(text[: len(text) // 2] + other)  # a third of it
    prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, val_dataset=str(tmp_path / "val.txt"))))
    [line] = logged(caplog, "WARNING")
    assert 30 < int(re.search(r"(\d+)%", line)[1]) < 37


def test_the_overlap_agrees_with_its_definition(monkeypatch):
    monkeypatch.setattr(overlaps, "LENGTH", 8)
    monkeypatch.setattr(overlaps, "CHUNK", 16)
    for seed in range(30):
        random = np.random.default_rng(seed)
        train, val = (random.integers(2, size=size, dtype=np.uint16) for size in (random.integers(8, 200), 40))
        found = {tuple(train[i : i + 8]) for i in range(len(train) - 7)}
        expected = np.mean([tuple(val[i : i + 8]) in found for i in range(len(val) - 7)])
        assert overlaps.overlap(train, val) == expected
    assert overlaps.overlap(train, train[:3]) == overlaps.overlap(train[:3], train) == 0.0
    assert overlaps.overlap(train, train[4:9]) == 1.0


def test_the_encoding_applies_to_both_texts(tmp_path):
    config = config_for(tmp_path, encoding="cp1252", val_dataset=str(tmp_path / "val.txt"))
    for name in ("text", "val"):
        (tmp_path / f"{name}.txt").write_bytes("naïve €\n".encode("cp1252") * 9)
    task = prepare(config)
    assert task.tokenizer.characters == "\n aenvï€"
    assert task.splits["val"].num_bytes == 9 * len("naïve €\n".encode())


def test_resuming_keeps_the_tokenizer_of_the_run_and_refuses_a_changed_text(tmp_path):
    config = config_for(tmp_path, tokenizer="word")
    first = prepare(config)
    other = WordTokenizer((*first.tokenizer.words[:-1], "never"))
    (tmp_path / "tokenizer.json").write_text(other.to_json())
    earlier = PreviousRun(tmp_path, {"text": first.sources["text"], "tokenizer": other.sha256})
    resumed = prepare(config, earlier)
    assert resumed.tokenizer == other
    assert resumed.splits["train"].num_unknown > 0
    other_text = config_for(tmp_path, TEXT + "!", tokenizer="word")
    assert_raises(DataError, prepare, other_text, earlier, says=(str(tmp_path / "text.txt"), "--dataset", "--overwrite"))


def test_the_same_text_under_another_name_format_or_encoding_is_the_same(tmp_path):
    config = config_for(tmp_path)
    sources = prepare(config).sources
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "Moved.TXT.GZ").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "row.jsonl").write_text(json.dumps({"text": TEXT}))
    (tmp_path / "wide.txt").write_bytes(TEXT.encode("utf-16"))
    for change in ({"dataset": "folder"}, {"dataset": "row.jsonl"}, {"dataset": "wide.txt", "encoding": "utf-16"}):
        moved = config.override(change | {"dataset": str(tmp_path / change["dataset"])})
        assert prepare(moved).sources == sources
    (tmp_path / "text.txt").unlink()
    earlier = PreviousRun(tmp_path, sources)
    assert_raises(DataError, prepare, config, earlier, says=(str(tmp_path / "text.txt"), "--dataset", "--val_dataset"))


@pytest.mark.parametrize(
    "text, context_length, split, num_tokens, longest",
    [
        ("ab" * 50, 10, "val", 10, [9]),
        ("ab" * 50, 200, "train", 90, [9]),
        ("ab" * 6, 4, "val", 2, [1]),
        ("a", 1, "train", 0, []),  # too short for any context
    ],
)
def test_the_error_for_a_split_shorter_than_a_window_gives_the_longest_context(
    tmp_path, text, context_length, split, num_tokens, longest
):
    config = config_for(tmp_path, text).override({"context_length": context_length})
    message = assert_raises(DataError, prepare, config, says=(split, f"context_length={context_length}"))
    numbers = [num_tokens, context_length, context_length + 1, *longest]
    assert sorted(map(int, re.findall(r"\d+", message))) == sorted(numbers)


def test_characters_that_only_the_validation_text_has_get_ids(tmp_path):
    (tmp_path / "val.txt").write_text("ÄÖÜ" * 9)
    task = prepare(config_for(tmp_path, val_dataset=str(tmp_path / "val.txt")))
    assert set("ÄÖÜ") <= set(task.tokenizer.characters)


# ---- The loss -------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens_BT):
    logits_BTV, _ = model.apply({"params": params}, tokens_BT)
    return logits_BTV


def log_probs_of(task, params, ids):
    """log p of each id but the first, with the log-softmax computed in NumPy."""
    logits_BTV = run(task.objective.model, params, np.asarray(ids, np.int32)[None, :-1])
    logits_TV = np.asarray(logits_BTV, np.float64)[0]
    log_probs_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
    return log_probs_TV[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize(
    "kind, stride",
    [
        ("word", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("char", 1), ("char", 4), ("byte", 3), ("bpe", 3))),
    ],
)
def test_the_loss_in_every_unit_agrees_with_its_definition(tmp_path, kind, stride):
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    task = prepare(config_for(tmp_path, tokenizer=kind))
    params = task.objective.init(jax.random.key(1))
    text, T = TEXT[int(0.9 * len(TEXT)) :], 4
    ids = task.tokenizer.encode(text)
    nats, hits = [], []  # of each token after the first, given as many previous tokens as the stride leaves
    for target in range(1, len(ids)):
        # Start of the window that counts this target: the first window counts T targets, each later one `stride` more.
        start = max(0, -(-(target - T) // stride)) * stride
        nats.append(-log_probs_of(task, params, ids[start : target + 1])[-1])
        hits.append(np.argmax(run(task.objective.model, params, ids[None, start:target])[0, -1]) == ids[target])
        assert T - stride < target - start <= T or start == 0
    measures = task.measures(params, stride=stride)
    loss = measures["loss"]
    assert loss == pytest.approx(np.mean(nats), rel=1e-5)
    assert measures["token_accuracy"] == pytest.approx(np.mean(hits))

    measures = loss_in_other_units(task, "val", loss)
    first = task.tokenizer.to_bytes(ids[:1])
    num_characters, bits = len(text) - len(first.decode(errors="replace")), sum(nats) / math.log(2)
    assert measures["bits_per_char"] == pytest.approx(bits / num_characters, rel=1e-5)
    assert measures["bits_per_byte"] == pytest.approx(bits / (len(text.encode()) - len(first)), rel=1e-5)
    assert measures["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert measures["tokens"] == len(ids) - 1
    assert measures["tokens_per_char"] == pytest.approx(measures["tokens"] / num_characters)
    assert measures["unknown_share"] == (ids.tolist().count(1) / len(ids) if kind == "word" else 0)
    assert (measures["unknown_share"] > 0) == (kind == "word")


def test_a_smaller_stride_changes_the_loss_and_the_default_is_the_context_length(tmp_path):
    task = prepare(config_for(tmp_path))
    params = task.objective.init(jax.random.key(1))
    losses = [task.measures(params, stride=stride) for stride in (None, 4, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_model_has_the_requested_vocab_size(tmp_path):
    config = config_for(tmp_path, tokenizer="word").override({"vocab_size": 8})
    task = prepare(config)
    assert task.tokenizer.vocab_size == task.config.model.vocab_size == 8
    assert task.splits["train"].unknown_share > 0.1
    assert isinstance(prepare(config_for(tmp_path)).tokenizer, CharTokenizer)
    assert dataclasses.replace(task.config, model=config.model) == config


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
def test_the_evaluation_loss_does_not_depend_on_training_settings(change):
    """Otherwise the losses of two runs could not be compared."""
    assert loss_in_evaluation(dataclasses.replace(TRAINING, **change)) == loss_in_evaluation(TRAINING)


def test_short_documents_on_both_sides_of_the_split_are_warned_of(tmp_path, caplog):
    words = np.random.default_rng(1).choice(["to", "be", "or", "not", "that", "is"], (500, 9))
    rows = [json.dumps({"text": " ".join(row)}) for row in words]
    # Every other one is a copy. All are shorter than a window, so that no window consists of copies alone.
    own, copies = rows[:450], [row for pair in zip(rows[:25], rows[450:475], strict=True) for row in pair]
    config = config_for(tmp_path, dataset=str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("\n".join(own))
    (tmp_path / "val.jsonl").write_text("\n".join(rows[450:]))
    with_copies = config.override({"val_dataset": str(tmp_path / "val.jsonl")})
    prepare(with_copies)
    assert logged(caplog, "WARNING") == []
    (tmp_path / "val.jsonl").write_text("\n".join(copies))
    prepare(with_copies)
    [line] = logged(caplog, "WARNING")
    assert 45 < int(re.search(r"(\d+)%", line)[1]) < 55
    caplog.clear()
    (tmp_path / "rows.jsonl").write_text("\n".join(own + copies))  # 50 of 500: the last tenth, but for a few characters
    prepare(config)
    [line] = logged(caplog, "WARNING")
    assert 40 < int(re.search(r"(\d+)%", line)[1]) < 60
