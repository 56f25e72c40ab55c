"""Conversations made from the plays: questions about a passage, and speeches that answer each other."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_jax.data.conversations import Conversation, Message
from minigpt_jax.data.text_files import json_lines

Play = dict[str, Any]  # a line of `shakespeare.plays_to_json_lines`: its title and scenes
Speech = list[str]  # the speaker's name, then the lines
HELD_OUT = slice(5, None, 9)  # The Merry Wives of Windsor, Henry VI Part 3, Troilus and Cressida, Hamlet

TURNS = 4  # speeches in a dialogue
SPEECHES = 3  # speeches in a passage
MAX_LINES = 6  # of a passage
MIN_WORDS = 3  # of a quoted line
MAX_TITLE = 5  # words of a title in training
KINDS = ("who", "next", "play")


def read_plays(path: Path) -> tuple[list[Play], list[Play]]:
    """(plays to train on, plays held out)."""
    plays = [play for _, play in json_lines(path)]
    held_out = plays[HELD_OUT]
    return [play for play in plays if play not in held_out], held_out


# ---- Who answers whom -----------------------------------------------------------------------------------------------------


def dialogues(plays: Sequence[Play]) -> Iterator[Conversation]:
    """Speeches that follow each other: the first is the user's, the next one the assistant's answer, and so on."""
    roles = ("user", "assistant") * (TURNS // 2)
    for play in plays:
        for scene in play["scenes"]:
            texts = ["\n".join(lines) for _, *lines in scene]
            for start in range(0, len(texts) // 2 * 2, TURNS):
                part = texts[start : start + TURNS]
                yield tuple(Message(*turn) for turn in zip(roles, part[: len(part) // 2 * 2], strict=False))


# ---- Questions about a passage --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
    kind: str  # one of KINDS
    text: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Passage:
    """A play's title and a few speeches."""

    title: str
    speeches: Sequence[Speech]

    @property
    def text(self) -> str:
        return "\n\n".join([self.title, *("\n".join([f"{name}:", *lines]) for name, *lines in self.speeches)])

    @property
    def most_frequent_speaker(self) -> str:
        """The first of them, if there are several."""
        return collections.Counter(name for name, *_ in self.speeches).most_common(1)[0][0]

    @property
    def is_suitable(self) -> bool:
        """Whether it is short, and nobody speaks twice, so that naming one speaker is often wrong."""
        speakers, num_lines = {name for name, *_ in self.speeches}, sum(len(lines) for _, *lines in self.speeches)
        return num_lines <= MAX_LINES and len(speakers) == len(self.speeches)

    def questions(self, kind: str) -> list[Question]:
        """All questions of this kind with one right answer. A quoted line has a line of its own, as in the passage, so that
        it consists of the same tokens."""
        if kind == "play":
            return [Question(kind, "Which play is this?", self.title)]
        counts = collections.Counter(line for _, *lines in self.speeches for line in lines)
        quotable = [
            (line, name, following)
            for name, *lines in self.speeches
            for line, following in itertools.zip_longest(lines, lines[1:])
            if counts[line] == 1 and len(line.split()) >= MIN_WORDS
        ]
        if kind == "who":
            return [Question(kind, f"Who says:\n{line}", name) for line, name, _ in quotable]
        return [Question(kind, f"What is next:\n{line}", following) for line, _, following in quotable if following]

    def ask(self, number: int, random: np.random.Generator) -> list[Question]:
        """Up to `number` different questions, each of a random kind."""
        left, chosen = {kind: self.questions(kind) for kind in KINDS}, []
        while len(chosen) < number and any(left.values()):
            kind = KINDS[random.integers(len(KINDS))]
            if left[kind]:
                chosen.append(left[kind].pop(int(random.integers(len(left[kind])))))
        return chosen


def conversation(passage: Passage, questions: Sequence[Question]) -> Conversation:
    """The passage with the first question, its answer, and then the other questions with theirs."""
    texts = [f"{passage.text}\n\n{questions[0].text}", *(question.text for question in questions[1:])]
    pairs = zip(texts, questions, strict=True)
    return tuple(message for text, q in pairs for message in (Message("user", text), Message("assistant", q.answer)))


def passages(plays: Sequence[Play]) -> list[Passage]:
    """All suitable passages of speeches that follow each other in a scene."""
    return [
        passage
        for play in plays
        for scene in play["scenes"]
        for start in range(len(scene) - SPEECHES + 1)
        if (passage := Passage(play["title"], scene[start : start + SPEECHES])).is_suitable
    ]


@dataclasses.dataclass(frozen=True)
class RandomPassages:
    """Passages to train on. Half of them are speeches that follow each other. There are too few of these, and in the others
    nothing but reading helps: one to SPEECHES short speeches of any plays, the shortest of which are learned first. For the
    same reason the title is a few words of any line, half of them written as real titles are."""

    passages: Sequence[Passage]
    speeches: Sequence[Speech]  # of up to three lines

    @classmethod
    def of(cls, plays: Sequence[Play]) -> "RandomPassages":
        speeches = [speech for play in plays for scene in play["scenes"] for speech in scene if len(speech) <= 1 + 3]
        return cls(passages(plays), speeches)

    def sample(self, random: np.random.Generator) -> Passage:
        def speeches(number: int) -> list[Speech]:
            return [self.speeches[i] for i in random.integers(len(self.speeches), size=number).tolist()]

        [[_, line, *_]] = speeches(1)
        words = line.split()
        start, size = int(random.integers(len(words))), 1 + int(random.integers(MAX_TITLE))
        title, form = " ".join(words[start : start + size]), int(random.integers(4))
        title = title.title() if form < 2 else title
        title = f"{title}, Part {random.integers(1, 10)}" if form == 0 else title  # digits are rare in the plays
        if random.integers(2):
            return Passage(title, self.passages[int(random.integers(len(self.passages)))].speeches)
        while not (passage := Passage(title, speeches(1 + int(random.integers(SPEECHES))))).is_suitable:
            pass
        return passage
