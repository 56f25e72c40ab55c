"""Chat templates: the texts and ids of transformers, the assistant's tokens marked, and what people write stays text."""

import json

import jax
import numpy as np
import pytest
from helpers import assert_raises, assert_says, chat

from minigpt_jax.api import default_sharding, load, train
from minigpt_jax.config import ChatConfig, Config, ModelConfig, TrainingConfig
from minigpt_jax.data.conversations import Message
from minigpt_jax.data.templates import ChatTemplate
from minigpt_jax.data.tokenizers import BpeTokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.generation.chat import ChatModel
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop import hf_reader, hf_writer
from minigpt_jax.interop.hf_files import read_chat_template
from minigpt_jax.interop.load import settings_from
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.task import PreviousRun

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

# As SmolLM2's, Llama 3's and Zephyr's do it.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind."
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] |"
    " trim + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
LINES = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}"
    "\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% else %}\n"
    "{{ raise_exception('no ' + message['role']) }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<|begin|>")
NAMES = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
CONVERSATIONS = [
    (Message("user", "To be?"),),
    (Message("user", "To be?"), Message("assistant", "Or not to be.")),
    (
        Message("user", "Who\nis there? "),
        Message("assistant", " Nay, answer me."),
        Message("user", "é 🙂"),
        Message("assistant", ""),
    ),
]


@pytest.fixture(scope="module")
def tokenizer():
    values = json.loads(BpeTokenizer.train(["To be, or not to be: who is there? " * 20], 300).definition)
    first = 1 + max(values["model"]["vocab"].values())
    values["added_tokens"] += [
        values["added_tokens"][0] | {"id": first + i, "content": name} for i, name in enumerate(SPECIAL)
    ]
    return BpeTokenizer(json.dumps(values))


@pytest.mark.slow
@pytest.mark.parametrize("source", [CHATML, HEADERS, LINES])
def test_texts_and_ids_are_those_of_transformers(tokenizer, source):
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("tokenizers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library.Tokenizer.from_str(tokenizer.definition), chat_template=source, **NAMES
    )
    ours = ChatTemplate(tokenizer, source, NAMES)
    for conversation in CONVERSATIONS:
        messages = [{"role": message.role, "content": message.content} for message in conversation]
        for start in (False, True):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=start)
            assert ours.text(conversation, start) == text
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.ids(conversation, start).tolist() == expected


@pytest.mark.parametrize("source, end", [(CHATML, "<|im_end|>"), (HEADERS, "<|eot|>"), (LINES, "<|endoftext|>")])
def test_answers_are_marked_with_the_token_that_ends_them(tokenizer, source, end):
    template = ChatTemplate(tokenizer, source, NAMES)
    assert template.end_tokens == (template.special_tokens[end],)
    encoded = template.encode(CONVERSATIONS[2])
    edges = np.flatnonzero(np.diff(encoded.is_answer, prepend=False, append=False))
    answers = [encoded.ids[first:last] for first, last in zip(edges[::2], edges[1::2], strict=True)]
    assert [tokenizer.decode(ids[:-1]).strip() for ids in answers] == ["Nay, answer me.", ""]
    assert [ids[-1] for ids in answers] == [template.special_tokens[end]] * 2


def test_the_name_of_a_special_token_in_a_message_stays_text(tokenizer):
    template = ChatTemplate(tokenizer, CHATML, NAMES)
    ids = template.ids([Message("user", "a<|im_end|>b")]).tolist()
    assert ids.count(template.special_tokens["<|im_end|>"]) == 2  # the system's and the user's
    assert "a<|im_end|>b" in tokenizer.decode(ids)
    changed = ChatTemplate(tokenizer, "{{ messages[0].content | upper }}", NAMES)
    assert_raises(DataError, changed.ids, [Message("user", "<|END|>a<|im_end|>")], says=("special token",))


def test_what_a_template_may_not_do_is_one_line(tokenizer):
    turns = CONVERSATIONS[0]
    for source, words in [
        ("{{ messages", ["Jinja"]),
        (LINES.replace("'user'", "'person'"), ["no user"]),
        ("{{ messages.__class__.__mro__ }}", ["refuses"]),
        ("{{ nothing.of.this }}", ["refuses"]),
    ]:
        assert_raises(DataError, ChatTemplate(tokenizer, source, NAMES).text, turns, says=words)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    template = ChatTemplate(tokenizer, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert_raises(DataError, template.encode, CONVERSATIONS[1], says=("earlier turns",))


# ---- From a Hugging Face folder to a run and back -------------------------------------------------------------------------


@pytest.fixture
def pretrained(tokenizer, tmp_path):
    """A Llama that has a chat template."""
    llama = {"activation": "swiglu", "qk_norm": False, "init": "gpt2"}
    config = ModelConfig(
        num_layers=1, num_heads=2, embed_dim=8, ff_dim=8, context_length=96, vocab_size=tokenizer.vocab_size, **llama
    )
    params = init_params(jax.random.key(0), GPT(config))
    model = LanguageModel(config, tokenizer, params, template=ChatTemplate(tokenizer, CHATML, NAMES))
    hf_writer.write(model, tmp_path / "pretrained")
    return tmp_path / "pretrained"


def tuned_config(pretrained, **changes):
    rows = [{"prompt": "To be?", "completion": "Or not to be."}] * 20
    (pretrained.parent / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ChatConfig(dataset=str(pretrained.parent / "chats.jsonl"), data_dir=str(pretrained.parent))
    config = Config(ModelConfig(), TrainingConfig(batch_size=2, steps=2, sample_every=0, checkpoint_every=1), data)
    return config.override(settings_from(str(pretrained)) | changes)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}])
def test_the_base_models_template_is_used_in_training_and_stays_with_the_run(pretrained, tmp_path, changes):
    template = hf_reader.read(pretrained).template
    assert template is not None
    assert (template.source, template.names["eos_token"]) == (CHATML, "<|endoftext|>")
    config = tuned_config(pretrained, **changes)
    task = prepare(config, sharding=default_sharding())
    expected = template.encode([Message("user", "To be?"), Message("assistant", "Or not to be.")])
    [inputs, *_] = task.batch_at(0)["inputs_BT"]
    assert inputs[: len(expected.ids) - 1].tolist() == expected.ids[:-1].tolist()

    train(config.override(steps=1), tmp_path / "run")
    resumed = prepare(config, PreviousRun(tmp_path / "run", task.sources), sharding=default_sharding())
    assert resumed.template.sha256 == template.sha256
    tuned = load(tmp_path / "run")
    answer = ChatModel(tuned).row(0, ChatModel(tuned).format.prompt([Message("user", "To be?")]))
    answer.text.feed(template.special_tokens["<|im_end|>"])
    assert answer.text.stopped
    again = settings_from(str(tmp_path / "run"))
    if not changes:
        assert prepare(tuned_config(pretrained).override(again)).template.sha256 == template.sha256
        hf_writer.write(tuned, tmp_path / "exported")
        exported = load(tmp_path / "exported")
        assert exported.template.source == CHATML
        assert template.special_tokens["<|im_end|>"] in exported.end_tokens

    path = tmp_path / "run" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("Be kind", "Be rude"))
    for read in (load, lambda run: prepare(config, PreviousRun(run, task.sources), sharding=default_sharding())):
        assert_raises(DataError, read, tmp_path / "run", says=("tokenizer_config.json", "chat template"))


@pytest.mark.slow
@pytest.mark.e2e
def test_one_chats_with_a_folder_that_has_a_template(pretrained):
    process = chat(pretrained, "To be?\n", "--greedy", "--length", "3")
    assert process.returncode == 0, process.stderr
    values = json.loads((pretrained / "tokenizer_config.json").read_text())
    del values["chat_template"]
    (pretrained / "tokenizer_config.json").write_text(json.dumps(values))
    process = chat(pretrained, "To be?\n", "--greedy", "--length", "3")
    assert process.returncode == 1
    [line] = process.stderr.splitlines()
    assert_says(line, "error:", str(pretrained), "no chat template", "instruct")


@pytest.mark.parametrize(
    "files, source",
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": None}}, None),
        ({"tokenizer_config.json": {"chat_template": "a", "eos_token": {"content": "</s>"}, "add_bos_token": True}}, "a"),
        ({"tokenizer_config.json": {"chat_template": "a", "eos_token": "</s>"}, "chat_template.jinja": "b"}, "b"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "a"}]}}, None),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "c"}],
                    "eos_token": "</s>",
                }
            },
            "c",
        ),
    ],
)
def test_templates_are_found_where_folders_have_them(tokenizer, tmp_path, files, source):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    template = read_chat_template(tmp_path, tokenizer)
    assert template == (None if source is None else ChatTemplate(tokenizer, source, {"eos_token": "</s>"}))


@pytest.mark.parametrize("content", ['{"chat_template": 3}', "[]", "{"])
def test_a_template_that_is_not_text_is_refused(tokenizer, tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert_raises(DataError, read_chat_template, tmp_path, tokenizer, says=("tokenizer_config.json",))
