"""The chat task and chatting: loss on answers, exact matches, settings, and a history that fits into the context."""

import dataclasses
import importlib.util
import json
import logging

import jax
import numpy as np
import optax
import pytest
from absl import flags
from helpers import CHAT, assert_equal, assert_raises, assert_says, chat, logged, random_params

from minigpt_jax.api import default_sharding, load, train
from minigpt_jax.config import ChatConfig, Config, DataConfig, ModelConfig, TrainingConfig
from minigpt_jax.data.conversations import Message, RoleMarkers, read_file
from minigpt_jax.data.tokenizers import ByteTokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.generation.chat import ChatModel
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.generation.strategy import processors
from minigpt_jax.interop.load import settings_from
from minigpt_jax.kernels import BLOCKED
from minigpt_jax.models.gpt import GPT
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.evaluation import eval_step, means
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.tasks.task import PreviousRun

COLOURS = {"grass": "green", "sky": "blue", "snow": "white", "coal": "black", "blood": "red"}
PAIRS = [{"prompt": f"What colour is {thing}?", "completion": colour} for thing, colour in COLOURS.items()]


def config_for(folder, rows=PAIRS * 8, **changes):
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        model=ModelConfig(num_layers=1, num_heads=2, embed_dim=16, ff_dim=16, context_length=120),
        training=TrainingConfig(batch_size=2, steps=3),
        data=ChatConfig(dataset=str(folder / "colours.jsonl"), data_dir=str(folder)),
    )
    return config.override(changes)


def params_of(task):
    return random_params(task.objective.model, np.zeros((2, 1), np.int32))


# ---- The task -------------------------------------------------------------------------------------------------------------


def test_each_batch_has_the_answers_of_whole_conversations(tmp_path):
    task = prepare(config_for(tmp_path))
    packs, end = task.splits["train"].packs, len("\n--\n")
    assert sum(len(pack) for pack in packs) == 36  # nine tenths of 40
    assert len(packs) == 18
    assert max(len(one.ids) for pack in packs for one in pack) <= 121
    first = [str(task.batch_at(step)["inputs_BT"]) for step in range(len(packs))]
    assert first[: len(packs) // 2] != first[len(packs) // 2 :]  # each epoch in an order of its own
    seen = []
    for step in range(len(packs) // 2):
        batch = task.batch_at(step)
        assert_equal(batch, task.batch_at(step))
        assert all(array.shape == (2, 120) for array in batch.values())
        for row in range(2):
            text = task.tokenizer.decode(batch["targets_BT"][row][batch["mask_BT"][row]])
            seen += text.split("\n--\n")[:-1]
            assert batch["mask_BT"][row].sum() == len(text)
    assert set(seen) <= set(COLOURS.values())
    assert len(seen) == 2 * (len(packs) // 2) * (36 // len(packs))
    assert task.splits["train"].num_answer_tokens == sum(len(COLOURS[thing]) + end for thing in COLOURS) * 8 - sum(
        len(each.answer) + end for each in task.splits["val"].checks
    )


def test_the_loss_counts_the_answers_only_and_so_does_the_accuracy(tmp_path):
    task = prepare(config_for(tmp_path))
    params, batch = params_of(task), task.batch_at(0)
    total, count, measures = eval_step(params, batch, task.objective)
    logits_BTV = task.objective.logits(params, batch, None)
    mask_BT, targets_BT = batch["mask_BT"], batch["targets_BT"]
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    assert count == mask_BT.sum() < (batch["segments_BT"] > 0).sum()
    np.testing.assert_allclose(total, np.asarray(nats_BT)[mask_BT].sum(), rtol=1e-5)
    assert measures["token_accuracy"] == (np.argmax(logits_BTV, -1) == targets_BT)[mask_BT].sum()


def test_every_conversation_is_evaluated_once_and_limits_spread_over_them(tmp_path):
    task = prepare(config_for(tmp_path, PAIRS * 9, batch_size=3))
    assert len(task.splits["train"].packs) % 3  # so that the last batch has empty rows
    batches = list(task.evaluation_batches("train"))
    assert sum(batch["mask_BT"].sum() for batch in batches) == sum(
        one.is_answer.sum() for pack in task.splits["train"].packs for one in pack
    )
    assert [len(batch["mask_BT"]) for batch in batches] == [3] * len(batches)
    [first] = task.evaluation_batches("train", limit=1)
    packs = task.splits["train"].packs
    for row, pack in ((0, packs[0]), (2, packs[-1])):
        np.testing.assert_array_equal(first["inputs_BT"][row][: len(pack[0].ids) - 1], pack[0].ids[:-1])
    assert task.evaluate(params_of(task)) == means(task.objective, params_of(task), task.evaluation_batches("val"))


def test_blocked_attention_gives_packed_conversations_the_same_loss_and_gradient(tmp_path):
    plain, blocked = (prepare(config_for(tmp_path), **kernels) for kernels in ({}, {"kernels": BLOCKED}))
    params, batch = params_of(plain), plain.batch_at(0)
    (loss, grads), (other, other_grads) = (
        jax.jit(jax.value_and_grad(lambda params, task=task: task.objective.loss(params, batch, None)[0]))(params)
        for task in (plain, blocked)
    )
    assert float(loss) == pytest.approx(float(other), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, other_grads)


def test_long_conversations_are_cut_with_a_count_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO, "minigpt_jax")
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 130}]}
    late = {"prompt": "a" * 130, "completion": "b"}
    task = prepare(config_for(tmp_path, [*PAIRS * 4, long, long, late, *PAIRS * 4]))
    [line] = logged(caplog, "INFO")
    assert_says(line, "train", "38", "2", "120", "1")
    assert max(len(one.ids) for pack in task.splits["train"].packs for one in pack) == 121
    assert_raises(DataError, prepare, config_for(tmp_path, [late] * 20), says=("train", "context_length=120"))


def test_a_changed_file_is_refused_and_the_tokenizer_is_kept(tmp_path):
    config = config_for(tmp_path)
    first = prepare(config)
    (tmp_path / "tokenizer.json").write_text(first.tokenizer.to_json())
    previous = PreviousRun(tmp_path, first.sources)
    assert prepare(config, previous).tokenizer == first.tokenizer
    moved = ("colours.jsonl", "--dataset", "--overwrite")
    assert_raises(DataError, prepare, config_for(tmp_path, PAIRS * 9), previous, says=moved)
    (tmp_path / "colours.jsonl").unlink()
    assert_raises(DataError, prepare, config, previous, says=("colours.jsonl", "--dataset"))


def test_conversations_on_both_sides_of_the_split_are_warned_of(tmp_path, caplog):
    new = [{"prompt": f"What is {i} + 1?", "completion": str(i + 1)} for i in range(40)]
    prepare(config_for(tmp_path, new))
    assert logged(caplog, "WARNING") == []
    prepare(config_for(tmp_path, [*new, *new[:3]]))  # three of the last five are copies
    [line] = logged(caplog, "WARNING")
    assert_says(line, "60%", "colours.jsonl", "--val_dataset")


def test_epochs_become_steps_and_a_stride_is_refused(tmp_path):
    task = prepare(config_for(tmp_path, epochs=3))
    assert task.num_steps == -(-3 * len(task.splits["train"].packs) // 2)
    assert_raises(UsageError, task.measures, None, stride=8, says=("stride=8",))
    assert_raises(UsageError, task.measures, None, "test", says=("'test'", "train", "val"))


class Answering:
    """In place of a model: answers from a table."""

    def __init__(self, answers):
        self.table = answers

    def answers(self, questions, length, **strategy):
        assert strategy == {"greedy": True}
        return (self.table(question[-1].content) for question in questions)


def test_exact_matches_are_counted_by_kind_beside_guesses(tmp_path, monkeypatch):
    task = prepare(config_for(tmp_path))
    checks = task.splits["val"].checks
    assert [(check.question[-1].content, check.answer) for check in checks] == [
        (row["prompt"], row["completion"]) for row in (PAIRS * 8)[-4:]
    ]
    monkeypatch.setattr(type(task), "model", lambda self, params: Answering(lambda text: "blue"))
    assert task.exact_matches(None, checks) == {"questions": 4, "exact_match": 0.25}
    kinds = [dataclasses.replace(check, kind=kind, guess="red") for check, kind in zip(checks, "aabb", strict=True)]
    expected = {"questions": 4, "exact_match": 0.25, "guess": 0.25}
    expected |= {"exact_match_a": 0.5, "guess_a": 0.0, "exact_match_b": 0.0, "guess_b": 0.5}
    assert task.exact_matches(None, kinds) == expected
    assert task.exact_matches(None, []) == {}


@pytest.mark.parametrize("answer", ["two\nlines", "x" * 64])
def test_long_answers_are_not_checked_word_for_word(tmp_path, answer):
    rows = [*PAIRS * 8, {"prompt": "a", "completion": answer}]
    task = prepare(config_for(tmp_path, rows, context_length=140))
    assert task.splits["val"].checks == []
    assert len(task.splits["train"].checks) == 36


# ---- Chatting -------------------------------------------------------------------------------------------------------------

USER = [Message("user", text) for text in ("Hello", "How are you?", "Bye")]
SYSTEM, REPLY = Message("system", "Be kind."), Message("assistant", "Well.")
HISTORY = [SYSTEM, USER[0], REPLY, USER[1], REPLY, USER[2]]


def chat_model(context_length):
    config = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=8, vocab_size=256, context_length=context_length)
    return ChatModel(LanguageModel(config, ByteTokenizer(), random_params(GPT(config), np.zeros((2, 1), np.int32))))


@pytest.mark.parametrize(
    "room, kept",
    [
        (500, HISTORY),
        (121, HISTORY),
        (120, [SYSTEM, USER[1], REPLY, USER[2]]),
        (86, [SYSTEM, USER[1], REPLY, USER[2]]),
        (85, [SYSTEM, USER[2]]),
        (20, [SYSTEM, USER[2]]),
    ],
)
def test_the_oldest_turns_are_dropped_until_the_rest_and_an_answer_fit(room, kept):
    model = chat_model(room + 10)
    assert len(model.format.prompt(HISTORY)) == 121
    assert model.fitting(HISTORY, 10) == kept
    assert HISTORY[1] == USER[0]  # unchanged


def test_at_most_half_of_the_context_is_left_for_an_answer():
    assert chat_model(242).fitting(HISTORY, 1000) == HISTORY
    assert chat_model(240).fitting(HISTORY, 1000) != HISTORY


@pytest.mark.e2e
def test_answers_follow_the_prompts_tokens_and_end_at_the_end_line():
    chat = chat_model(64)
    [first, second] = chat.answers([[USER[0]], [USER[1]]], 12, greedy=True)
    alone = "".join(chat.stream([USER[0]], 12, greedy=True))
    assert first == alone
    prompt = chat.format.prompt([USER[0]])
    row = chat.row(0, prompt)
    for _ in chat.model.decode([row], 12, 0, processors(greedy=True)):
        pass
    tokens = np.array([[*prompt, *(step.token for step in row.steps)]] * 2)
    logits_BTV, _ = chat.model.model.apply({"params": chat.model.params}, tokens[:, :-1])
    assert tokens[0, len(prompt) :].tolist() == np.argmax(logits_BTV[0], axis=-1)[len(prompt) - 1 :].tolist()
    assert first == row.text.text != second
    assert chat.row(0, prompt).text.stop == ("\n--\n",)


def test_markers_of_a_tokenizer_with_an_end_of_text_token_need_no_stop_string(tmp_path):
    task = prepare(config_for(tmp_path, tokenizer="word"))
    chat = task.model(None)
    assert chat.row(0, np.arange(3)).text.stop_tokens == {task.tokenizer.end_of_text}
    assert RoleMarkers(task.tokenizer).stop == ()
    assert isinstance(task.objective, NextToken)
    assert task.objective.with_accuracy


# ---- The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def session():
    """The script's `Session`, with a model that answers a message by what it sees and how it was asked."""
    spec = importlib.util.spec_from_file_location("chat_script", CHAT)
    script = importlib.util.module_from_spec(spec)
    before = set(flags.FLAGS)
    spec.loader.exec_module(script)
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    session = script.Session(Echo(), 100, 7, {}, None)
    session.commands, session.read_message = script.COMMANDS, script.read_message
    return session


class Echo(ChatModel):
    def __init__(self):
        object.__setattr__(self, "model", chat_model(264).model)

    def stream(self, conversation, length, seed, **strategy):
        if conversation[-1].content == "at once":
            raise KeyboardInterrupt
        yield f"{len(conversation)} messages, "
        if conversation[-1].content == "long":
            raise KeyboardInterrupt
        yield f"seed {seed}, {strategy}"


def answer_to(session, line, capsys):
    session.read(line)
    return capsys.readouterr().out


def test_the_conversation_grows_and_commands_change_how_it_continues(session, capsys):
    assert answer_to(session, "Hello", capsys) == "1 messages, seed 7, {}\n"
    assert answer_to(session, "Hello again", capsys) == "3 messages, seed 8, {}\n"
    assert answer_to(session, "/seed 40", capsys) == answer_to(session, "/temperature 0.5", capsys) == ""
    assert answer_to(session, "And again", capsys) == "5 messages, seed 40, {'temperature': 0.5}\n"
    session.read("/reset")
    assert answer_to(session, "Hello", capsys) == "1 messages, seed 41, {'temperature': 0.5}\n"
    assert answer_to(session, " ", capsys) == ""
    assert [turn.role for turn in session.turns] == ["user", "assistant"]


def test_a_stopped_answer_keeps_what_was_printed(session, capsys):
    assert answer_to(session, "long", capsys) == "1 messages, \n"
    assert session.turns == [Message("user", "long"), Message("assistant", "1 messages, ")]
    assert answer_to(session, "at once", capsys) == "\n"
    assert answer_to(session, "Hello", capsys) == "3 messages, seed 9, {}\n"


def test_messages_that_are_left_out_are_counted_in_the_log(session, caplog):
    caplog.set_level(logging.INFO, "minigpt_jax")
    for _ in range(3):
        session.read("a" * 50)
    for line, number in zip(logged(caplog), ("2", "4"), strict=True):
        assert_says(line, number, "264")
    session.read("/help")
    assert_says(logged(caplog)[-1], *session.commands)


def test_a_message_that_is_longer_than_the_context_is_said_to_be_cut(session, caplog):
    caplog.set_level(logging.INFO, "minigpt_jax")
    session.read("a" * 200)
    assert logged(caplog) == []
    session.read("/reset")
    session.read("a" * 300)
    prompt = session.model.format.prompt([Message("user", "a" * 300)])
    [line] = logged(caplog)
    assert_says(line, "longer than the context", f"{len(prompt) - 264} tokens")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_ctrl_c_clears_the_message_and_prompts_are_for_terminals(session, monkeypatch, capsys, is_terminal):
    inputs = iter(["one \\", KeyboardInterrupt, "two \\", "three", EOFError])

    def read():
        if isinstance(line := next(inputs), str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: is_terminal, raising=False)
    assert session.read_message() == "two \nthree"
    assert session.read_message() is None
    assert capsys.readouterr().err == ("> ... \n> ... > \n" if is_terminal else "\n\n")


def test_a_saved_conversation_can_be_trained_on(session, tmp_path):
    for text in ("Hello", "How are you?"):
        session.read(text)
        session.read(f"/save {tmp_path / 'saved.jsonl'}")
    one, two = read_file(tmp_path / "saved.jsonl")
    assert two == tuple(session.turns)
    assert one == two[:2]


@pytest.mark.parametrize(
    "line, says",
    [
        ("/sed 3", ["/sed", "'/seed'", "/help", "/reset", "/temperature", "/save"]),
        ("/seed -1", ["seed", "-1"]),
        ("/seed", ["seed"]),
        ("/temperature hot", ["temperature", "'hot'"]),
        ("/temperature -1", ["temperature", "-1.0"]),
        ("/save", ["file"]),
    ],
)
def test_bad_commands_are_refused_and_change_nothing(session, line, says):
    before = dataclasses.asdict(dataclasses.replace(session, model=None))
    assert_raises(UsageError, session.read, line, says=says)
    assert dataclasses.asdict(dataclasses.replace(session, model=None)) == before


@pytest.mark.slow
@pytest.mark.e2e
def test_a_model_that_learned_its_answers_gives_them_in_a_pipe(tmp_path):
    config = config_for(
        tmp_path, PAIRS * 20, batch_size=8, steps=150, learning_rate=1e-2, sample_every=0, embed_dim=32, num_layers=2
    )
    train(config, tmp_path / "run")
    things = ["grass", "snow", "coal"]
    lines = "".join(f"What colour is {thing}?\n/reset\n" for thing in things)
    process = chat(tmp_path / "run", lines + "two \\\nlines\nÖ\n", "--greedy")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[:3] == [COLOURS[thing] for thing in things]
    assert "Traceback" not in process.stderr
    assert "'Ö'" in process.stderr  # not in the vocabulary


@pytest.mark.slow
@pytest.mark.e2e
def test_a_language_model_can_be_trained_further_to_chat_but_does_not_chat_itself(tmp_path):
    markers = "".join(f"{role}:\n--\n" for role in ("System", "User", "Assistant"))
    (tmp_path / "text.txt").write_text(f"{markers}What colour is grass? green blue white black red\n" * 20)
    data = DataConfig(dataset=str(tmp_path / "text.txt"), data_dir=str(tmp_path))
    model = ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=8, context_length=64)
    train(Config(model, TrainingConfig(steps=1, sample_every=0), data), tmp_path / "run")
    process = chat(tmp_path / "run", "Hello\n")
    assert (process.returncode, process.stdout) == (1, "")
    assert_says(process.stderr, "error:", str(tmp_path / "run"), "language_modelling", "chat")
    assert len(process.stderr.splitlines()) == 1

    pretrained, chats = load(tmp_path / "run"), config_for(tmp_path, steps=1, sample_every=0)
    tuned = chats.override(settings_from(str(tmp_path / "run")))
    assert (tuned.task, tuned.model) == ("chat", pretrained.config)
    task = prepare(tuned)
    assert task.tokenizer == pretrained.tokenizer
    assert_equal(task.initial_params(default_sharding()), pretrained.params)
    other = config_for(tmp_path, [{"prompt": "Ö", "completion": "a"}] * 20).override(settings_from(str(tmp_path / "run")))
    assert_raises(DataError, prepare, other, says=("'Ö'", "vocabulary"))
