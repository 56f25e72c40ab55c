"""Conversations: formats, role markers, packing into rows, and those made from the plays."""

import dataclasses
import gzip
import itertools
import json
import re

import jax
import numpy as np
import pytest
from helpers import assert_raises, assert_says, random_params

from minigpt_jax.config import ChatConfig, ModelConfig
from minigpt_jax.data import chats, corpora, packing, passages
from minigpt_jax.data.conversations import Encoded, Message, RoleMarkers, parse
from minigpt_jax.data.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.files import sha256
from minigpt_jax.models.gpt import GPT

QUESTION, ANSWER = Message("user", "Who's there?"), Message("assistant", "Nay, answer me.")
TURNS = (Message("system", "Be brief."), QUESTION, ANSWER, Message("user", "Long live the king!"), Message("assistant", ""))


# ---- Formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{"role": "user", "content": "Who's there?"}, {"role": "assistant", "content": "Nay, answer me."}]},
        {"prompt": "Who's there?", "completion": "Nay, answer me."},
        {
            "prompt": [{"role": "user", "content": "Who's there?"}],
            "completion": [{"role": "assistant", "content": "Nay, answer me."}],
        },
        [{"role": "user", "content": "Who's there?"}, {"role": "assistant", "content": "Nay, answer me."}],
        {"conversations": [{"from": "human", "value": "Who's there?"}, {"from": "gpt", "value": "Nay, answer me."}]},
        {"id": 7, "messages": [{"role": "user", "content": "Who's there?", "name": "B"}, dataclasses.asdict(ANSWER)]},
    ],
)
def test_every_format_gives_the_same_conversation(value):
    assert parse(value) == (QUESTION, ANSWER)


@pytest.mark.parametrize(
    "value, says",
    [
        ({"text": "To be"}, ["messages", "prompt", "completion", "conversations"]),
        ("To be", ["messages", "prompt", "completion", "conversations"]),
        ({"messages": "To be"}, ["messages"]),
        ([], ["empty"]),
        ({"messages": []}, ["empty"]),
        ([{"role": "user", "content": " "}, {"role": "assistant", "content": ""}], ["empty"]),
        ([{"role": "user", "content": "Who's there?"}], ["assistant"]),
        ([{"role": "asistant", "content": "x"}], ["'asistant'", "'assistant'", "system", "user", "human", "gpt"]),
        ([{"role": "user", "content": 7}], ["7", "content"]),
        ([{"role": "user"}], ["role", "content"]),
        ({"prompt": "a", "completion": None}, ["None"]),
        ({"prompt": "a", "completion": "\ud800"}, ["U+D800"]),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_line_number(value, says, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n\n" + json.dumps(value) + "\n")
    config = ChatConfig(dataset=str(path))
    assert_raises(DataError, chats.read_chats, config, says=("line 3", str(path), *says))


def test_files_without_conversations_are_refused(tmp_path):
    for name, text, says in (("a.txt", "To be", ".jsonl"), ("b.jsonl", "\n", "no"), ("c.jsonl", "{", "line 1")):
        (tmp_path / name).write_text(text)
        assert_raises(
            DataError, chats.read_chats, ChatConfig(dataset=str(tmp_path / name)), says=(str(tmp_path / name), says)
        )
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    one = ChatConfig(dataset=str(tmp_path / "d.jsonl"))
    assert_raises(DataError, chats.read_chats, one, says=(str(tmp_path / "d.jsonl"), "1", "--val_dataset"))
    unknown = ChatConfig(dataset="chat_shakespear")
    assert_raises(DataError, chats.read_chats, unknown, says=("'chat_shakespear'", "'chat_shakespeare'", "qa_shakespeare"))


def test_the_last_tenth_is_for_validation_unless_there_is_a_validation_file(tmp_path):
    lines = [json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) for i in range(20)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:3]))
    config = ChatConfig(dataset=str(tmp_path / "a.jsonl.gz"))
    read = chats.read_chats(config)
    assert [example.conversation[0].content for example in read.val] == ["q18", "q19"]
    assert len(read.train) == 18
    both = chats.read_chats(dataclasses.replace(config, val_dataset=str(tmp_path / "b.jsonl")))
    assert (len(both.train), len(both.val)) == (20, 3)
    assert read.sha256 != both.sha256
    (tmp_path / "other.jsonl").write_text("\n".join(lines).replace("a7", "b7"))
    assert chats.read_chats(ChatConfig(dataset=str(tmp_path / "other.jsonl"))).sha256 != read.sha256
    (tmp_path / "same.jsonl").write_text(
        "\n".join(json.dumps([*map(dataclasses.asdict, e.conversation)]) for e in both.train)
    )
    assert chats.read_chats(ChatConfig(dataset=str(tmp_path / "same.jsonl"))).sha256 == read.sha256


# ---- Tokens ---------------------------------------------------------------------------------------------------------------


def tokenizer_of(kind):
    pieces = list(RoleMarkers.pieces(TURNS))
    return ByteTokenizer() if kind == "byte" else {"char": CharTokenizer, "word": WordTokenizer}[kind].train(pieces)


@pytest.mark.parametrize("kind", ["byte", "char", "word"])
def test_only_the_assistants_tokens_are_answers(kind):
    markers = RoleMarkers(tokenizer_of(kind))
    encoded, decode = markers.encode(TURNS), markers.tokenizer.decode
    end = "<|endoftext|>" if kind == "word" else "\n--\n"
    assert decode(encoded.ids[encoded.is_answer]) == f"Nay, answer me.{end}{end}"
    assert encoded.is_answer.sum() == len(markers.tokenizer.encode(ANSWER.content)) + 2 * (1 if kind == "word" else 4)
    assert decode(encoded.ids).startswith(
        f"System:\nBe brief.{end}User:\nWho's there?{end}Assistant:\nNay, answer me.{end}U"
    )
    prompt = markers.prompt(TURNS[:2])
    np.testing.assert_array_equal(encoded.ids[: len(prompt)], prompt)
    assert encoded.is_answer[: len(prompt) + 1].tolist() == [False] * len(prompt) + [True]
    assert decode(markers.prompt([])) == "Assistant:\n"
    assert markers.stop == (() if kind == "word" else (end,))


def encoded(size, answer_from, seed=0):
    ids = np.random.default_rng((seed, size)).integers(0, 17, size, dtype=np.int32)
    return Encoded(ids, np.arange(size) >= answer_from)


def test_conversations_that_are_too_long_are_cut_and_counted():
    conversations = [encoded(5, 2), encoded(9, 2), encoded(9, 8), encoded(6, 5), encoded(9, 5)]
    fitting, num_cut, num_dropped = packing.fit(conversations, context_length=5)
    assert [len(one.ids) for one in fitting] == [5, 6, 6, 6]  # a row has 5 inputs and 5 targets
    assert (num_cut, num_dropped) == (2, 1)
    np.testing.assert_array_equal(fitting[1].ids, conversations[1].ids[:6])


def test_rows_hold_as_many_conversations_as_fit_in_order():
    conversations = [encoded(size, 1) for size in (3, 4, 6, 2, 5, 6)]  # 2, 3, 5, 1, 4 and 5 columns
    packs = list(packing.pack(conversations, context_length=5))
    assert [[len(one.ids) for one in pack] for pack in packs] == [[3, 4], [6], [2, 5], [6]]
    assert list(packing.pack([], 5)) == []


def test_a_packed_row_has_shifted_targets_restarting_positions_and_the_answers_mask():
    first, second = Encoded(np.array([1, 2, 3, 4]), np.array([0, 0, 1, 1], bool)), encoded(3, 1)
    batch = packing.batch([[first, second], []], context_length=7)
    assert batch["inputs_BT"][0].tolist() == [1, 2, 3, *second.ids[:2], 0, 0]
    assert batch["targets_BT"][0].tolist() == [2, 3, 4, *second.ids[1:], 0, 0]
    assert batch["positions_BT"][0].tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert batch["segments_BT"][0].tolist() == [1, 1, 1, 2, 2, 0, 0]
    assert batch["mask_BT"][0].tolist() == [False, True, True, True, True, False, False]
    assert not any(array[1].any() for array in batch.values())
    assert sum(int(one.is_answer[1:].sum()) for one in (first, second)) == batch["mask_BT"].sum()


POSITIONS = [{"positions": "rotary"}, {"positions": "learned"}, {"positions": "sinusoidal"}]


def test_a_row_is_filled_with_the_next_conversations_until_one_does_not_fit():
    sizes = (30, 5, 12, 9, 2)  # 4, 11, 8 and 1 columns of 16; the first is too long for any row

    def endless():
        yield from (encoded(size, 1) for size in sizes)
        raise AssertionError("read beyond the first that does not fit")

    assert [len(one.ids) for one in next(packing.pack(endless(), 16))] == [5, 12]


@pytest.mark.parametrize("changes", [*POSITIONS, {"token_shift": True}], ids=str)
def test_packed_conversations_get_the_logits_that_each_gets_alone(changes):
    config = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, ff_dim=8, context_length=16, vocab_size=17, **changes)
    model, pack = GPT(config), [encoded(6, 1), encoded(8, 1, seed=1), encoded(4, 1, seed=2)]
    params = random_params(model, np.zeros((2, 1), np.int32))
    run = jax.jit(lambda *inputs, **packed: model.apply({"params": params}, *inputs, **packed)[0])
    batch = packing.batch([pack, pack[::-1]], 16)
    logits_BTV = run(batch["inputs_BT"], positions_BT=batch["positions_BT"], segments_BT=batch["segments_BT"])
    start = 0
    for one in pack:
        stop = start + len(one.ids) - 1
        alone_BTV = run(np.stack([one.ids[:-1]] * 2))
        np.testing.assert_allclose(logits_BTV[0, start:stop], alone_BTV[0], rtol=1e-4, atol=1e-5)
        start = stop


# ---- From the plays -------------------------------------------------------------------------------------------------------

SPEECHES = [
    ["BERNARDO", "Who is there, I ask?"],
    ["FRANCISCO", "Nay, answer me at once.", "Now unfold yourself here.", "Long live!"],
    ["BERNARDO", "Long live the king!"],
    ["HORATIO", "Who is there, I ask?"],
]
PASSAGE = passages.Passage("Hamlet", SPEECHES)


def test_questions_have_one_right_answer_and_quote_a_line_of_the_passage():
    assert [(q.text, q.answer) for q in PASSAGE.questions("who")] == [
        ("Who says:\nNay, answer me at once.", "FRANCISCO"),
        ("Who says:\nNow unfold yourself here.", "FRANCISCO"),
        ("Who says:\nLong live the king!", "BERNARDO"),  # the other line occurs twice, and another has two words
    ]
    assert [(q.text.split("\n")[1], q.answer) for q in PASSAGE.questions("next")] == [
        ("Nay, answer me at once.", "Now unfold yourself here."),
        ("Now unfold yourself here.", "Long live!"),
    ]
    assert [q.answer for q in PASSAGE.questions("play")] == ["Hamlet"]
    assert PASSAGE.most_frequent_speaker == "BERNARDO"
    assert all(f"\n{q.text.split(chr(10))[1]}\n" in PASSAGE.text for q in PASSAGE.questions("who"))


def test_a_passage_is_asked_different_questions_and_then_answers_them():
    asked = PASSAGE.ask(99, np.random.default_rng(0))
    assert sorted(q.kind for q in asked) == ["next", "next", "play", "who", "who", "who"]
    turns = passages.conversation(PASSAGE, asked)
    assert [turn.role for turn in turns] == ["user", "assistant"] * 6
    assert turns[0].content == f"{PASSAGE.text}\n\n{asked[0].text}"
    assert PASSAGE.text.startswith("Hamlet\n\nBERNARDO:\nWho is there, I ask?\n\nFRANCISCO:\nNay")
    assert [turn.content for turn in turns[1::2]] == [q.answer for q in asked]


def plays(num_plays=14):
    def scene(play, number):
        return [[f"NAME {play} {i % 3}", f"Line {i} of scene {number} in {play},", "and no more."] for i in range(5)]

    return [{"title": f"Play {p}", "scenes": [scene(p, number) for number in range(2)]} for p in range(num_plays)]


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A folder with plays of their own in place of Shakespeare's."""

    def make(path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text)

    text = "".join(json.dumps(play) + "\n" for play in plays()).encode()
    monkeypatch.setattr(corpora, "PLAYS", corpora.Corpus(sha256(text), make))
    return str(tmp_path)


def test_held_out_plays_are_not_trained_on(data_dir):
    for dataset in chats.MADE_FROM_PLAYS:
        read = chats.read_chats(ChatConfig(dataset=dataset, data_dir=data_dir))
        sampled = list(itertools.islice(read.samples(0, 0), 60)) if read.endless else []
        trained = [*(example.conversation for example in read.train[:300]), *read.more_text, *sampled]
        for number in range(14):
            name = f"in {number},"
            assert any(name in turn.content for one in trained for turn in one) == (number not in (5,))
            assert any(name in turn.content for one in read.val for turn in one.conversation) == (number in (5,))


def test_the_questions_of_a_row_depend_on_seed_and_row_alone(data_dir):
    config = ChatConfig(dataset="qa_shakespeare", data_dir=data_dir)
    read, again = chats.read_chats(config), chats.read_chats(config)
    rows = [tuple(itertools.islice(read.samples(seed, row), 3)) for seed in (0, 1) for row in range(9)]
    assert rows[-1] == tuple(itertools.islice(again.samples(1, 8), 3))
    assert len({one for row in rows for one in row}) == 18 * 3
    assert read.val == again.val
    assert {example.kind for example in read.val} <= set(passages.KINDS)
    assert all(len(example.conversation) == 2 and example.guess in example.conversation[0].content for example in read.val)


def test_passages_to_train_on_have_random_titles_and_half_of_them_are_of_speeches_that_follow_each_other():
    source, random = passages.RandomPassages.of(plays(3)), np.random.default_rng(0)
    sampled = [source.sample(random) for _ in range(400)]
    following = [passage.speeches for passage in passages.passages(plays(3))]
    assert 0.4 < np.mean([passage.speeches in following for passage in sampled]) < 0.6
    assert {len(passage.speeches) for passage in sampled} == {1, 2, 3}
    assert all(passage.is_suitable for passage in sampled)
    lines = {line for play in plays(3) for scene in play["scenes"] for _, *lines in scene for line in lines}
    titles = [re.fullmatch(r"(.*?)(, Part \d)?", passage.title) for passage in sampled]
    assert all(any(title[1].lower() in line.lower() for line in lines) for title in titles)
    assert {len(title[1].split()) for title in titles} == {1, 2, 3, 4, 5}
    assert 0.2 < np.mean([title[2] is not None for title in titles]) < 0.3
    assert 0.4 < np.mean([title[1] == title[1].title() for title in titles]) < 0.7  # some words and numbers are already
    assert {title[2] for title in titles} == {None, *(f", Part {number}" for number in range(1, 10))}


def test_dialogues_are_speeches_that_follow_each_other():
    [one, *_] = found = list(passages.dialogues(plays(1)))
    assert [len(dialogue) for dialogue in found] == [4, 4]  # of five speeches, the last has no answer
    assert [turn.role for turn in one] == ["user", "assistant"] * 2
    assert one[1].content == "Line 1 of scene 0 in 0,\nand no more."


def test_plays_have_their_own_validation_conversations(data_dir):
    config = ChatConfig(dataset="qa_shakespeare", data_dir=data_dir, val_dataset="x.jsonl")
    message = assert_raises(DataError, chats.read_chats, config)
    assert_says(message, "qa_shakespeare", "--val_dataset")
