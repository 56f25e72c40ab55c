"""Turns sampled tokens into text incrementally: never half a character, and nothing after a stop string."""

import codecs
from collections.abc import Iterable

from minigpt_jax.data.tokenizers import Tokenizer


class TextStream:
    """The text of one row. `feed` it tokens until `stopped`; `take` returns new text that can be shown.

    The portions taken always add up to the same text, however often `take` is called. A character spread over several tokens
    is held back until it is complete, and so is the start of a possible stop string. The text ends before the stop string
    that is completed first.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), stop_tokens: tuple[int, ...] = ()):
        self.tokenizer, self.stop, self.stop_tokens = tokenizer, stop, frozenset(stop_tokens)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.num_taken, self.stopped = "", 0, False

    def feed(self, token: int) -> None:
        """Adds the next token of the row."""
        if token in self.stop_tokens:
            self.end()
        else:
            self.append(self.decoder.decode(self.tokenizer.to_bytes([token])))

    def end(self) -> None:
        """Marks the end of the tokens and flushes held-back text."""
        self.append(self.decoder.decode(b"", final=True))
        self.stopped = True

    def append(self, text: str) -> None:
        """Adds text, and cuts it before the first stop string that it completes. Earlier text contains none."""
        searched = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += text
        matches = [(self.text.find(stop, searched), len(stop)) for stop in self.stop]
        if ends := [(start + length, start) for start, length in matches if start >= 0]:
            _, start = min(ends)  # the one that ends first, as if the text had arrived character by character
            self.text, self.stopped = self.text[:start], True

    def take(self) -> str:
        """Returns the text that is final and has not been taken yet."""
        end = len(self.text) if self.stopped else len(self.text) - held_back(self.text, self.stop)
        portion = self.text[self.num_taken : end]
        self.num_taken = max(self.num_taken, end)
        return portion


def held_back(text: str, stop: Iterable[str]) -> int:
    """How many characters at the end of the text may be the start of a stop string."""
    return max((n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])), default=0)
