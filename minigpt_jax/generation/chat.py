"""A language model in a conversation: it reads the turns so far and writes the next one."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from minigpt_jax.data.conversations import Message
from minigpt_jax.data.templates import ChatFormat, chat_format
from minigpt_jax.generation.language_model import STREAM_CHUNK, LanguageModel, Row
from minigpt_jax.generation.strategy import processors
from minigpt_jax.generation.text import TextStream


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A language model with the format of conversations that it was trained with."""

    model: LanguageModel

    @property
    def format(self) -> ChatFormat:
        return chat_format(self.model.tokenizer, self.model.template)

    def row(self, index: int, prompt: np.ndarray) -> Row:
        tokenizer, context_length = self.model.tokenizer, self.model.config.context_length
        end_tokens = *self.model.all_end_tokens, *self.format.end_tokens
        stream = TextStream(tokenizer, self.format.stop, end_tokens)
        return Row(index, "", prompt[-context_length:], stream)

    def answers(self, conversations: Iterable[Sequence[Message]], length: int, seed: int = 0, **strategy) -> Iterator[str]:
        """The assistant's next turn in each conversation, of up to `length` tokens, generated in batches."""
        rows = [self.row(index, self.format.prompt(each)) for index, each in enumerate(conversations)]
        for completion in self.model.completions(rows, length, seed, processors(**strategy)):
            yield completion.text

    def stream(self, conversation: Sequence[Message], length: int, seed: int = 0, **strategy) -> Iterator[str]:
        """Yields the assistant's next turn in portions as it is generated."""
        row = self.row(0, self.format.prompt(conversation))
        for _ in self.model.decode([row], length, seed, processors(**strategy), chunk=STREAM_CHUNK):
            yield row.text.take()

    def num_cut(self, conversation: Sequence[Message]) -> int:
        """How many tokens at the start of the conversation are beyond the context, so that the model does not see them."""
        return max(0, len(self.format.prompt(conversation)) - self.model.config.context_length)

    def fitting(self, conversation: Sequence[Message], length: int) -> list[Message]:
        """The conversation without its oldest turns, so that the rest and an answer fit into the context.

        Half of the context, or `length` if that is less, is left for the answer. Keeps what the system says and the last
        message, even if it alone is too long, and starts with a message of the user.
        """
        room = self.model.config.context_length - min(length, self.model.config.context_length // 2)
        kept = list(conversation)
        while len(self.format.prompt(kept)) > room:
            turns = [message for message in kept[:-1] if message.role != "system"]
            if not turns:
                break
            oldest = kept.index(turns[0])
            later = (i for i in range(oldest + 1, len(kept)) if kept[i].role == "user")
            del kept[oldest : next(later, len(kept) - 1)]
        return kept
