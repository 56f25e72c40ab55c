"""What a model repeats of its training text: copies beside a search at every position, and passages known by heart."""

import sys

import jax
import numpy as np
import pytest
from helpers import assert_raises, assert_says, random_tokens
from hypothesis import example, given
from hypothesis import strategies as st

import minigpt_jax as mg
from minigpt_jax.config import ModelConfig, load_preset
from minigpt_jax.data.tokenizers import CharTokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.experiments import memorisation
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.models.gpt import GPT

pytest.importorskip("pydivsufsort")

# Two of the characters differ only in their last byte.
CHARACTERS = "ab\néè漢🙂"
CONFIG = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=16, context_length=8, vocab_size=len(CHARACTERS))


# ---- Copies ---------------------------------------------------------------------------------------------------------------


def copied_lengths(samples, text):
    return [lengths.tolist() for lengths in memorisation.copied_lengths(samples, text.encode())]


def lengths_by_search(sample, text):
    """The definition, at each position and for each length."""
    return [max(n for n in range(len(sample) - i + 1) if sample[i : i + n] in text) for i in range(len(sample))]


@given(st.text(CHARACTERS, min_size=1, max_size=60), st.lists(st.text(CHARACTERS, max_size=20), max_size=4))
@example("ab", ["ab", "b", "ab"])  # the text ends where a sample ends, and another sample follows
@example("é", ["è", "éè"])
@example("b", ["a", ""])  # sorted before all of the text
@example("a", ["b", "🙂"])  # and after it
def test_lengths_are_those_of_a_search_at_every_position(text, samples):
    assert copied_lengths(samples, text) == [lengths_by_search(sample, text) for sample in samples]


def test_lengths_in_a_longer_text_are_those_of_a_search():
    text, *samples = (
        "".join(CHARACTERS[token] for token in random_tokens(n, vocab_size=4, seed=n)) for n in (3000, 200, 99)
    )
    samples.append(text[1000:1100] + samples[0][:50])
    assert copied_lengths(samples, text) == [lengths_by_search(sample, text) for sample in samples]


def test_a_copied_sample_is_the_longest_copy_and_all_its_ngrams_are_found():
    text, samples = (
        "To be, or not to be: that is the question — naïve 漢字",
        ["?to be? that", "that is the question — naïve 漢", "naïve"],
    )
    lengths = memorisation.copied_lengths(samples, text.encode())
    assert memorisation.longest_copy(samples, lengths) == samples[1]
    assert [memorisation.share_of_ngrams(lengths[1:], n) for n in (1, 4, len(samples[1]))] == [1, 1, 1]
    assert memorisation.longest_copy(samples[:1], lengths[:1]) == "to be"
    assert memorisation.longest_copy(["", "x"], memorisation.copied_lengths(["", "x"], text.encode())) == ""


def test_shares_count_the_ngrams_of_all_samples_and_none_across_two():
    lengths = memorisation.copied_lengths(["abcXdef", "ef", "Xf"], b"abcdef")
    # Of its 7 single characters, "abcXdef" shares 6. Its pairs: ab, bc, de, ef of 6. Its triples: abc, def of 5.
    assert [memorisation.share_of_ngrams(lengths, n) for n in (1, 2, 3)] == [9 / 11, 5 / 8, 2 / 5]
    assert memorisation.share_of_ngrams(lengths, 7) == 0
    assert memorisation.share_of_ngrams(lengths, 8) is None


def test_excerpts_have_the_given_lengths_and_are_spread_over_the_text():
    text = "".join(map(chr, range(100, 200)))
    cut = memorisation.excerpts(text, [10, 20, 0, 5])
    assert [len(excerpt) for excerpt in cut] == [10, 20, 0, 5]
    assert all(excerpt in text for excerpt in cut)
    assert (cut[0][0], cut[1][0], cut[3][0]) == (text[0], text[26], text[80])
    assert memorisation.excerpts("ab", [1, 3]) == ["a", "ab"]


# ---- Passages -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(GPT(CONFIG).init, jax.random.key(0), np.zeros((2, 1), np.int32))["params"]
    params = jax.tree.map(lambda leaf: 0.5 * random.standard_normal(leaf.shape, np.float32), shapes)
    return LanguageModel(CONFIG, CharTokenizer.train(CHARACTERS), params)


@pytest.mark.e2e
def test_what_greedy_decoding_generates_is_extractable_and_nothing_else(lm, monkeypatch):
    monkeypatch.setattr(memorisation, "MAX_ROWS", 3)  # the last batch is smaller
    prompts = [lm.tokenizer.decode(row) for row in random_tokens(7, 4, vocab_size=len(CHARACTERS))]
    passages_NT = np.stack([lm.tokenizer.encode(lm.generate(prompt, 12, greedy=True)) for prompt in prompts])
    assert memorisation.are_extractable(lm, passages_NT, 4).tolist() == [True] * 7
    for row, column in {1: 4, 2: -1, 5: 9}.items():  # the first and the last generated token, and one between them
        passages_NT[row, column] = (passages_NT[row, column] + 1) % len(CHARACTERS)
    assert memorisation.are_extractable(lm, passages_NT, 4).tolist() == [True, False, False, True, True, False, True]


@pytest.mark.parametrize("num_val, lengths", [(1000, [2, 5, 8]), (15, [2, 5, 8]), (12, [2, 5]), (6, [])])
def test_prompts_that_fit_are_compared_before_the_same_continuations(lm, monkeypatch, num_val, lengths):
    monkeypatch.setattr(memorisation, "PROMPT_LENGTHS", (2, 5, 8, 9))  # the context has 8 tokens
    monkeypatch.setattr(memorisation, "CONTINUATION", 7)
    monkeypatch.setattr(memorisation, "NUM_PASSAGES", 20)
    calls = []

    def are_extractable(model, passages_NT, prompt_length):
        calls.append((prompt_length, passages_NT))
        return np.arange(len(passages_NT)) < prompt_length

    monkeypatch.setattr(memorisation, "are_extractable", are_extractable)
    splits = {"train": np.arange(1000, dtype=np.uint16), "val": 1000 + np.arange(num_val, dtype=np.uint16)}
    result = memorisation.extractable(lm, splits)
    num_passages = {name: min(20, len(ids) - lengths[-1] - 6) for name, ids in splits.items() if lengths}
    assert result == {
        "tokens": 7,
        "passages": num_passages,
        "by_prompt_tokens": {str(k): {name: min(1, k / n) for name, n in num_passages.items()} for k in lengths},
    }
    for length, passages_NT in calls:
        assert passages_NT.shape[1] == length + 7
        assert (np.diff(passages_NT) == 1).all()
        ids = splits["train" if passages_NT[0, 0] < 1000 else "val"]
        assert (passages_NT[0, -1], passages_NT[-1, -1]) == (ids[lengths[-1] + 6], ids[-1])
    assert [length for length, _ in calls] == [length for length in lengths for _ in splits]


# ---- Models and runs ------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_model_whose_samples_are_its_training_text_copies_all_of_it(lm, monkeypatch):
    for name, value in {"NUM_SAMPLES": 3, "SAMPLE_TOKENS": 60, "CONTINUATION": 4, "PROMPT_LENGTHS": (2, 8)}.items():
        monkeypatch.setattr(memorisation, name, value)
    samples = [completion.text for completion in lm.complete([""], 60, num_samples=3)]
    val = "".join(CHARACTERS[token] for token in random_tokens(500, vocab_size=len(CHARACTERS)))
    splits = {"train": lm.tokenizer.encode("".join(samples)), "val": lm.tokenizer.encode(val)}
    result = memorisation.measure(lm, splits)
    assert result == memorisation.measure(lm, splits)
    assert result["samples"] == {"number": 3, "tokens": 60, "seed": 0, "characters": 180}
    assert result["longest_copy"]["samples"] == {"characters": 60, "text": samples[0]}
    baseline = result["longest_copy"]["val"]
    assert baseline["characters"] == len(baseline["text"]) < 20
    assert baseline["text"] in val
    assert baseline["text"] in "".join(samples)
    found = result["ngrams_found"]
    assert list(found) == ["4", "8", "16", "25", "50"]
    assert {share["samples"] for share in found.values()} == {1.0}
    assert 1 > found["4"]["val"] > found["50"]["val"] == 0
    assert list(result["extractable"]["by_prompt_tokens"]) == ["2", "8"]


@pytest.mark.parametrize("preset", ["chat_shakespeare", "bert_shakespeare", "bert_play", "vit_digits"])
def test_runs_of_other_tasks_are_refused(tmp_path, preset):
    config = load_preset(preset)
    (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8")
    message = assert_raises(UsageError, mg.measure_memorisation, tmp_path, dataset="text.txt")
    assert_says(message, str(tmp_path), config.task, "language_modelling")


def test_a_folder_without_a_run_is_refused(tmp_path):
    assert_raises(DataError, mg.measure_memorisation, tmp_path, says=[str(tmp_path), "config.json"])


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    (tmp_path / "config.json").write_text(load_preset("debug").to_json(), encoding="utf-8")
    says = ["pydivsufsort", "python -m pip install -e '.[memorisation]'"]
    assert_raises(UsageError, mg.measure_memorisation, tmp_path, says=says)
