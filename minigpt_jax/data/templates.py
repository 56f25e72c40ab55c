"""Conversations in the format that a pretrained model was trained with: its chat template, a Jinja program."""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from minigpt_jax.commands import install_command
from minigpt_jax.data.conversations import Encoded, Message, RoleMarkers
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError, UsageError, one_line, shortened
from minigpt_jax.files import sha256

PLACEHOLDER = "\ue000{}\ue001"  # stands for a message's content while the template runs; private characters


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template in the language Jinja, as in Hugging Face folders, and the tokenizer whose special tokens it writes.

    `names` are the special tokens that it refers to by name, such as eos_token. A template is a program from a file, so it
    runs in a sandbox. What people write stays text, even if it contains the name of a special token.
    """

    tokenizer: Tokenizer
    source: str
    names: Mapping[str, str]

    stop: ClassVar[tuple[str, ...]] = ()  # an answer ends with a token

    def to_json(self) -> dict[str, str]:
        """As a part of tokenizer_config.json."""
        return {**self.names, "chat_template": self.source}

    @property
    def sha256(self) -> str:
        return sha256(json.dumps(self.to_json(), sort_keys=True).encode())

    def text(self, conversation: Sequence[Message], for_answer: bool = False) -> str:
        """The conversation as one text, and with `for_answer` the start of the assistant's next turn. The same as
        `apply_chat_template` of transformers. Raises DataError for a conversation that the template refuses."""
        messages = [dataclasses.asdict(message) for message in conversation]
        try:
            return self._program.render(messages=messages, add_generation_prompt=for_answer, **self.names)
        except Exception as error:  # whatever the template does
            raise DataError(f"the chat template refuses this conversation: {one_line(str(error))}") from None

    def encode(self, conversation: Sequence[Message]) -> Encoded:
        """The tokens, with those marked that the assistant writes: its answers, each with the token that ends it."""
        ids = self.ids(conversation)
        is_answer = np.zeros(len(ids), bool)
        for i, message in enumerate(conversation):
            if message.role == "assistant":
                before, after = self.prompt(conversation[:i]), self.ids(conversation[: i + 1])
                if not (starts_with(ids, before) and starts_with(ids, after)):
                    raise DataError("the chat template changes earlier turns when a later one follows, so it cannot be used")
                ends = np.flatnonzero(np.isin(ids[len(before) : len(after)], self.end_tokens))
                is_answer[len(before) : len(before) + ends[0] + 1 if len(ends) else len(after)] = True
        return Encoded(ids, is_answer)

    def prompt(self, conversation: Sequence[Message]) -> np.ndarray:
        """The tokens after which the assistant's answer follows."""
        return self.ids(conversation, for_answer=True)

    def ids(self, conversation: Sequence[Message], for_answer: bool = False) -> np.ndarray:
        parts, plain = [], ""
        for text, special in self.parts(conversation, for_answer):
            plain += text
            if special is not None:
                parts += [self.tokenizer.encode(plain), np.array([special], np.int32)]
                plain = ""
        return np.concatenate([*parts, self.tokenizer.encode(plain)])

    def parts(self, conversation: Sequence[Message], for_answer: bool) -> Iterator[tuple[str, int | None]]:
        """(text, the special token after it, if there is one)."""
        hidden = [Message(message.role, PLACEHOLDER.format(i)) for i, message in enumerate(conversation)]
        pieces = re.split(PLACEHOLDER.format(r"(\d+)"), self.text(hidden, for_answer))
        pieces[1::2] = [conversation[int(number)].content for number in pieces[1::2]]
        rendered = self.text(conversation, for_answer)
        for contents in (pieces[1::2], [content.strip() for content in pieces[1::2]]):
            pieces[1::2] = contents
            if "".join(pieces) == rendered:
                break
        else:  # it does more with contents than to write them
            pieces = [rendered]
            if any(name in message.content for message in conversation for name in self.special_tokens):
                raise DataError(
                    "a message contains the name of a special token, which this chat template would not keep as text"
                )
        for i, piece in enumerate(pieces):
            if i % 2:
                yield piece, None
                continue
            *texts, last = re.split(self._special, piece) if self.special_tokens else [piece]
            for text, name in zip(texts[::2], texts[1::2], strict=True):
                yield text, self.special_tokens[name]
            yield last, None

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the added tokens, by name."""
        added = json.loads(self.tokenizer.to_huggingface()).get("added_tokens") or ()
        return {token["content"]: token["id"] for token in added}

    @functools.cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """The special token that the template writes after an answer, if there is one."""
        turns = Message("user", "a"), Message("assistant", PLACEHOLDER.format(1))
        _, _, after = self.text(turns).rpartition(turns[1].content)
        return tuple(self.special_tokens[name] for name in re.findall(self._special, after)[:1] if name)

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))) + ")")

    @functools.cached_property
    def _program(self) -> Any:
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise UsageError(f"chat templates need the package jinja2: {install_command('hf')}") from error

        def refuse(reason: str) -> None:
            raise jinja2.TemplateError(reason)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template is not valid Jinja: {shortened(one_line(str(error)))}") from None


def starts_with(ids: np.ndarray, start: np.ndarray) -> bool:
    return np.array_equal(ids[: len(start)], start)


ChatFormat = RoleMarkers | ChatTemplate  # how a model reads and writes conversations


def chat_format(tokenizer: Tokenizer, template: ChatTemplate | None) -> ChatFormat:
    """A model's own template, or else the roles as plain text."""
    return RoleMarkers(tokenizer) if template is None else template
