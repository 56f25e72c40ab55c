"""Conversations: how they are written in JSON Lines, and how they become tokens, with the answers marked."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_jax.data.text_files import JSON_LINES, Text, json_lines
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.data.tokenizers.base import utf8
from minigpt_jax.errors import DataError, did_you_mean, shortened

# Names of the roles in the common formats. ShareGPT calls them human and gpt.
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
FORMATS = (
    '{"messages": [{"role": "user", "content": "..."}, ...]}, {"prompt": "...", "completion": "..."}, '
    '[{"role": "user", "content": "..."}, ...] or {"conversations": [{"from": "human", "value": "..."}, ...]}'
)


@dataclasses.dataclass(frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: str


Conversation = tuple[Message, ...]


# ---- From JSON ------------------------------------------------------------------------------------------------------------


def read_conversations(text: Text) -> Iterator[Conversation]:
    """Yields the conversations in JSON Lines files. Raises DataError, with file and line number, for an unusable one."""
    for path in text.paths:
        if not path.name.lower().removesuffix(".gz").endswith(JSON_LINES):
            raise DataError(f"{str(path)!r} is not a file of conversations: they are read from {', '.join(JSON_LINES)}")
        yield from read_file(path)


def read_file(path: Path) -> Iterator[Conversation]:
    is_empty = True
    for where, value in json_lines(path):
        is_empty = False
        try:
            yield parse(value)
        except DataError as error:
            raise DataError(f"{where} {error}") from None
    if is_empty:
        raise DataError(f"{str(path)!r} has no conversations")


def parse(value: Any) -> Conversation:
    """The conversation in a JSON value, in one of FORMATS. Raises DataError if it cannot be used for training."""
    messages = tuple(_messages(value))
    if not any(message.content.strip() for message in messages):
        raise DataError("is an empty conversation")
    if all(message.role != "assistant" for message in messages):
        raise DataError("has no turn of the assistant, so there is nothing to learn")
    return messages


def _messages(value: Any) -> Iterator[Message]:
    match value:
        case {"messages": list(rows)} | {"conversations": list(rows)} | list(rows):
            for row in rows:
                yield _message(row)
        case {"prompt": prompt, "completion": completion}:
            for part, role in ((prompt, "user"), (completion, "assistant")):
                yield from _messages(part) if isinstance(part, list) else [_message({"role": role, "content": part})]
        case _:
            raise DataError(f"is not a conversation: write {FORMATS}")


def _message(row: Any) -> Message:
    match row:
        case {"role": str(name), "content": str(content)} | {"from": str(name), "value": str(content)}:
            if name not in ROLES:
                raise DataError(f"has an unknown role {name!r}{did_you_mean(name, ROLES)}; allowed: {', '.join(ROLES)}")
            utf8(content)
            return Message(ROLES[name], content)
    raise DataError(f"has a message that is not text with a role: {shortened(row)}; write {FORMATS}")


# ---- To tokens ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation's tokens. The assistant's are marked, including the token or line that ends an answer."""

    ids: np.ndarray
    is_answer: np.ndarray


@dataclasses.dataclass(frozen=True)
class RoleMarkers:
    """Roles as plain text, which any tokenizer has: a line with the role, the content, the end.

        User:                   User:
        Who's there?<|end|>     Who's there?
        Assistant:              --
        Nay, answer me.<|end|>  Assistant:
                                Nay, answer me.
                                --

    A turn ends with the end-of-text token of the tokenizer (left) or, if it has none, with a line of two dashes (right).
    Markers and contents are tokenized separately, so that a marker has the same tokens everywhere.
    """

    tokenizer: Tokenizer

    END_LINE = "\n--\n"

    @staticmethod
    def marker(role: str) -> str:
        return f"{role.capitalize()}:\n"

    @classmethod
    def pieces(cls, conversation: Conversation) -> Iterator[str]:
        """The texts to train a tokenizer on."""
        for message in conversation:
            yield from (cls.marker(message.role), message.content, cls.END_LINE)

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return () if self.end_tokens else (self.END_LINE,)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        end = self.tokenizer.end_of_text
        return () if end is None else (end,)

    def encode(self, conversation: Sequence[Message]) -> Encoded:
        """Raises DataError for a character that is not in the vocabulary."""
        parts = [text for message in conversation for text in (self.marker(message.role), message.content)]
        encoded = self.tokenizer.encode_batch(parts)
        end = np.array(self.end_tokens or self.tokenizer.encode(self.END_LINE), np.int32)
        ids, is_answer = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
        for message, marker, content in zip(conversation, encoded[::2], encoded[1::2], strict=True):
            ids += [marker, content, end]
            is_answer += [np.zeros(len(marker), bool), np.full(len(content) + len(end), message.role == "assistant")]
        return Encoded(np.concatenate(ids), np.concatenate(is_answer))

    def prompt(self, conversation: Sequence[Message]) -> np.ndarray:
        """The tokens after which the assistant's answer follows."""
        return np.concatenate([self.encode(conversation).ids, self.tokenizer.encode(self.marker("assistant"))])
