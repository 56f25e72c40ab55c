"""From sampled tokens to text, as they come: never half a character, and nothing after a stop string."""

import codecs
from collections.abc import Iterable

from minigpt_jax.data.tokenizers import Tokenizer


class TextStream:
    """The text of one row. `feed` it tokens until `stopped`; `take` what can be shown so far.

    What is taken, in whatever portions, adds up to the same text. A character whose bytes are spread over several tokens is
    held back until it is whole, and so is the beginning of what may become a stop string. The text ends before the stop
    string that is complete first.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), stop_tokens: tuple[int, ...] = ()):
        self.tokenizer, self.stop, self.stop_tokens = tokenizer, stop, frozenset(stop_tokens)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.num_taken, self.stopped = "", 0, False

    def feed(self, token: int) -> None:
        """The next token of the row."""
        if token in self.stop_tokens:
            self.end()
        else:
            self.append(self.decoder.decode(self.tokenizer.to_bytes([token])))

    def end(self) -> None:
        """Says that no token follows: what was held back is text after all."""
        self.append(self.decoder.decode(b"", final=True))
        self.stopped = True

    def append(self, text: str) -> None:
        """More text, which ends before the first stop string that it completes. Earlier text holds none."""
        searched = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += text
        places = [(self.text.find(stop, searched), len(stop)) for stop in self.stop]
        if found := [(place + length, place) for place, length in places if place >= 0]:
            _, place = min(found)  # of the one that ends first, as if the text had come character by character
            self.text, self.stopped = self.text[:place], True

    def take(self) -> str:
        """The text that has not been taken yet and is certain."""
        end = len(self.text) if self.stopped else len(self.text) - held_back(self.text, self.stop)
        portion = self.text[self.num_taken : end]
        self.num_taken = max(self.num_taken, end)
        return portion


def held_back(text: str, stop: Iterable[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return max((n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])), default=0)
