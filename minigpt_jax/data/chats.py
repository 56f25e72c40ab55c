"""The conversations of a run: the user's own, or made from the plays."""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from minigpt_jax.config import ChatConfig
from minigpt_jax.data import corpora, passages
from minigpt_jax.data.conversations import Conversation, read_conversations
from minigpt_jax.data.splits import TRAIN_FRACTION
from minigpt_jax.data.text_files import find_text
from minigpt_jax.errors import DataError, did_you_mean
from minigpt_jax.files import sha256

MADE_FROM_PLAYS = ("chat_shakespeare", "qa_shakespeare")
NUM_EXAMPLES = 2000  # of the endless questions: to learn tokens from, and to evaluate the training split on
MAX_QUESTIONS = 6  # about a passage in training; a row holds as many as fit


@dataclasses.dataclass(frozen=True)
class Example:
    conversation: Conversation
    kind: str = ""  # of its question
    guess: str = ""  # what to answer without reading, to compare with


@dataclasses.dataclass(frozen=True)
class Chats:
    """Conversations to train on, and others to validate with."""

    train: Sequence[Example]
    val: Sequence[Example]
    sha256: str
    endless: passages.RandomPassages | None = None  # to train on, rather than on `train`
    more_text: Sequence[Conversation] = ()  # for the tokenizer only

    def samples(self, seed: int, row: int) -> Iterator[Conversation]:
        """Endless conversations for a row: questions about passages that no other row has."""
        assert self.endless is not None
        random = np.random.default_rng((seed, row))
        while True:
            passage = self.endless.sample(random)
            yield passages.conversation(passage, passage.ask(MAX_QUESTIONS, random))


def read_chats(config: ChatConfig) -> Chats:
    """Raises DataError for files that cannot be used, with line numbers."""
    if config.dataset in MADE_FROM_PLAYS:
        return from_plays(config)
    name = config.dataset
    if not re.search(r"[./\\*?\[]", name) and not os.path.exists(name):
        raise DataError(
            f"unknown conversations {name!r}{did_you_mean(name, MADE_FROM_PLAYS)}; "
            f"allowed: {', '.join(MADE_FROM_PLAYS)}, or the path of a .jsonl file, a folder or a glob pattern"
        )
    train = list(read_conversations(find_text(name)))
    if config.val_dataset is None:
        end = int(len(train) * TRAIN_FRACTION)
        train, val = train[:end], train[end:]
        if not train:
            raise DataError(f"{name!r} has only {len(val)} conversations: add more, or set --val_dataset")
    else:
        val = list(read_conversations(find_text(config.val_dataset)))
    return Chats(examples(train), examples(val), checksum(train, val))


def examples(conversations: Sequence[Conversation]) -> list[Example]:
    return [Example(conversation) for conversation in conversations]


def checksum(*splits: Sequence[Conversation]) -> str:
    """Hash of the conversations, whatever the format of their files."""
    values = [[[(message.role, message.content) for message in one] for one in split] for split in splits]
    return sha256(json.dumps(values).encode())


def from_plays(config: ChatConfig) -> Chats:
    """Conversations made from the plays. Those of four plays are for validation. Raises DataError."""
    if config.val_dataset is not None:
        raise DataError(f"{config.dataset} has its own validation conversations, held-out plays: omit --val_dataset")
    train, held_out = passages.read_plays(corpora.plays_file(config.data_dir))
    dialogues, of_held_out = list(passages.dialogues(train)), list(passages.dialogues(held_out))
    digest = sha256(f"{config.dataset} {corpora.PLAYS.sha256}".encode())
    if config.dataset == "chat_shakespeare":
        return Chats(examples(dialogues), examples(of_held_out), digest)
    endless = passages.RandomPassages.of(train)
    asked = itertools.islice(questions(endless), NUM_EXAMPLES)
    return Chats(list(asked), list(questions(passages.passages(held_out))), digest, endless, dialogues)


def questions(about: Sequence[passages.Passage] | passages.RandomPassages) -> Iterator[Example]:
    """One question about each passage, always the same."""
    random = np.random.default_rng(0)
    found = (about.sample(random) for _ in itertools.count()) if isinstance(about, passages.RandomPassages) else about
    for passage in found:
        [question] = passage.ask(1, random)
        yield Example(passages.conversation(passage, [question]), question.kind, passage.most_frequent_speaker)
