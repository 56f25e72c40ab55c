"""Chat and question answering: a GPT learns the assistant's turns of conversations."""

import collections
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_jax.commands import command
from minigpt_jax.config import ChatConfig, Config
from minigpt_jax.data import batches, packing
from minigpt_jax.data.chats import Chats, Example, read_chats
from minigpt_jax.data.conversations import Encoded, Message, RoleMarkers
from minigpt_jax.data.templates import ChatFormat, ChatTemplate, chat_format
from minigpt_jax.data.tokenizers import Tokenizer, make_tokenizer
from minigpt_jax.data.tokenizers.base import json_text
from minigpt_jax.errors import DataError, UsageError, require_choice
from minigpt_jax.generation.chat import ChatModel
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop.hf_files import TOKENIZER_CONFIG
from minigpt_jax.interop.load import read_run_template, read_template
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.tasks.evaluation import means
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.tasks.task import PreviousRun
from minigpt_jax.tasks.text import TextTask, read_same, steps_of, tokenizer_for, warn_of_copies

log = logging.getLogger(__name__)

MAX_ANSWER = 64  # tokens; questions with longer answers are not checked word for word
MAX_CHECKED = 512  # questions answered for an exact match
PREVIEW_LENGTH = 100  # tokens


@dataclasses.dataclass(frozen=True)
class Check:
    """A question with a short answer on one line."""

    question: Sequence[Message]
    answer: str
    kind: str
    guess: str


@dataclasses.dataclass(frozen=True)
class Split:
    """Conversations in rows, and the questions to check word for word if all the first answers are short."""

    packs: list[list[Encoded]]
    checks: list[Check]

    @property
    def num_answer_tokens(self) -> int:
        return sum(int(one.is_answer.sum()) for pack in self.packs for one in pack)


@dataclasses.dataclass(frozen=True, eq=False)
class Chat(TextTask):
    """See `tasks.Task`."""

    splits: dict[str, Split]  # train, val
    chats: Chats
    template: ChatTemplate | None  # the base model's

    @property
    def format(self) -> ChatFormat:
        return chat_format(self.tokenizer, self.template)

    @property
    def files(self) -> dict[str, str]:
        return super().files | ({TOKENIZER_CONFIG: json_text(self.template.to_json())} if self.template else {})

    def batch_at(self, step: int) -> batches.Batch:
        B, T, seed = self.config.training.batch_size, self.config.model.context_length, self.config.training.seed
        if self.chats.endless is None:
            packs = self.splits["train"].packs
            return packing.batch([packs[i] for i in batches.shuffled_rows(len(packs), B, seed, step)], T)
        samples = (self.chats.samples(seed, row) for row in range(step * B, (step + 1) * B))
        return packing.batch([next(packing.pack(map(self.format.encode, row), T)) for row in samples], T)

    def evaluate(self, params: Any, limit: int | None = None) -> dict[str, float]:
        return means(self.objective, params, self.evaluation_batches("val", limit))

    def evaluation_batches(self, split: str, limit: int | None = None) -> Iterator[batches.Batch]:
        packs, B = self.splits[split].packs, self.config.training.batch_size
        for rows, mask_B in batches.evaluation_rows(len(packs), B, limit):
            selected = [packs[i] if is_used else () for i, is_used in zip(rows, mask_B, strict=True)]
            yield packing.batch(selected, self.config.model.context_length)

    def measures(self, params: Any, split: str = "val", stride: int | None = None) -> dict[str, float]:
        """The loss on answers, their tokens' accuracy and, if all the first answers are short, how many are matched exactly:
        in all and by kind of question, beside what guessing gives."""
        require_choice("split", split, self.splits)
        if stride is not None:
            raise UsageError(f"stride={stride} is for running texts: omit it for conversations")
        measured = means(self.objective, params, self.evaluation_batches(split))
        return measured | self.exact_matches(params, self.splits[split].checks)

    def exact_matches(self, params: Any, checks: Sequence[Check]) -> dict[str, float]:
        chosen = [checks[i] for i in np.linspace(0, len(checks) - 1, min(len(checks), MAX_CHECKED)).astype(int)]
        answers = self.model(params).answers((check.question for check in chosen), MAX_ANSWER, greedy=True)
        outcomes = collections.defaultdict(list)  # (is the answer right, is the guess right), by measure
        for check, answer in zip(chosen, answers, strict=True):
            for kind in dict.fromkeys(("", check.kind)):
                outcomes[f"_{kind}" if kind else ""].append((answer == check.answer, check.guess == check.answer))
        measured: dict[str, float] = {"questions": len(chosen)} if chosen else {}
        for kind, pairs in outcomes.items():
            exact, guessed = np.mean(pairs, axis=0).tolist()
            measured[f"exact_match{kind}"] = exact
            if any(check.guess for check in chosen):
                measured[f"guess{kind}"] = guessed
        return measured

    def model(self, params: Any) -> ChatModel:
        kernels = self.objective.model.kernels
        return ChatModel(LanguageModel(self.config.model, self.tokenizer, params, kernels, template=self.template))

    def preview(self, params: Any) -> str:
        """The answer to the first message of the validation conversations."""
        first = self.chats.val[0].conversation
        question = first[: [message.role for message in first].index("assistant")]
        [answer] = self.model(params).answers([question], PREVIEW_LENGTH, greedy=True)
        said = [f"{RoleMarkers.marker(message.role)}{message.content}" for message in question]
        return "\n".join([*said, f"{RoleMarkers.marker('assistant')}{answer}"])

    def describe_data(self) -> str:
        split = self.splits["train"]
        if self.chats.endless is not None:
            return f"{chat_config(self.config).dataset}, new questions in each step"
        return f"{chat_config(self.config).dataset}, {split.num_answer_tokens:,} tokens of answers to train on"

    def describe_result(self, measures: Mapping[str, float]) -> str:
        parts = {name.replace("_", " "): value for name, value in measures.items()}
        exact = [f"{name} {value:.1%}" for name, value in parts.items() if name.startswith(("exact", "guess"))]
        right = f"{measures['token_accuracy']:.1%} of tokens right"
        return ", ".join([f"{measures['loss']:.4f} nats per token of an answer", right, *exact])

    def next_command(self, workdir: Path) -> str:
        return f"Talk to it: {command('chat')} --workdir {workdir}"


def chat_config(config: Config) -> ChatConfig:
    assert isinstance(config.data, ChatConfig)  # guaranteed by `config.task`, which is derived from its type
    return config.data


def prepare(config: Config, previous: PreviousRun | None = None, kernels: Kernels = PLAIN) -> Chat:
    """Reads and tokenizes the conversations, with the tokenizer of the previous run or a newly trained one."""
    data, T = chat_config(config), config.model.context_length
    chats = read_same(lambda: read_chats(data), config, previous)
    tokenizer = tokenizer_for(previous, lambda: train_tokenizer(data, config.model.vocab_size, chats))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    template = template_for(config, previous, tokenizer)
    form = chat_format(tokenizer, template)
    splits = {name: split(name, each, form, T) for name, each in (("train", chats.train), ("val", chats.val))}
    if previous is None:
        trained = {example.conversation for example in chats.train}
        warn_of_copies(float(np.mean([example.conversation in trained for example in chats.val])), data.dataset)
    num_steps = steps_of(config.training, len(splits["train"].packs))
    sources = {"text": chats.sha256, "tokenizer": tokenizer.sha256} | ({"template": template.sha256} if template else {})
    objective = NextToken.of(config, kernels, with_accuracy=True)
    return Chat(config, tokenizer, splits, sources, num_steps, objective, chats, template)


def template_for(config: Config, previous: PreviousRun | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of the previous run or, for a new run, of the model that it starts from."""
    if previous is not None:
        return read_run_template(previous.workdir, previous.sources, tokenizer)
    return None if config.training.init_from is None else read_template(config.training.init_from, tokenizer)


def train_tokenizer(data: ChatConfig, vocab_size: int | None, chats: Chats) -> Tokenizer:
    """Learns words and merges from the training conversations only. Characters come from all, so that each has an id."""
    examples = [*chats.train, *(chats.val if data.tokenizer == "char" else [])]
    conversations = [*(example.conversation for example in examples), *chats.more_text]
    return make_tokenizer(data.tokenizer, (text for one in conversations for text in RoleMarkers.pieces(one)), vocab_size)


def split(name: str, examples: Sequence[Example], form: ChatFormat, context_length: int) -> Split:
    """The examples in rows. Logs how many were too long. Raises DataError if no answer fits."""
    encoded = [form.encode(example.conversation) for example in examples]
    fitting, num_cut, num_dropped = packing.fit(encoded, context_length)
    if not fitting:
        raise DataError(
            f"no answer of the {name} conversations fits into context_length={context_length}: "
            "a longer context or shorter conversations are needed"
        )
    if num_cut or num_dropped:
        log.info(
            "%s: of %d conversations, %d are longer than context_length=%d and lose their end, and %d are left out because "
            "their first answer does not fit.", name, len(examples), num_cut, context_length, num_dropped,
        )  # fmt: skip
    return Split(list(packing.pack(fitting, context_length)), checks(examples, form.tokenizer))


def checks(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Check]:
    """The first question of each conversation, if all of them have short answers, else none."""
    found = []
    for example in examples:
        turns = example.conversation
        first = [message.role for message in turns].index("assistant")
        answer = turns[first].content
        if "\n" in answer or len(tokenizer.encode(answer)) >= MAX_ANSWER:
            return []
        found.append(Check(turns[:first], answer, example.kind, example.guess))
    return found
