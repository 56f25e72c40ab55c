"""Texts with a class for each: the plays with their genres, or the user's own. They are read into memory."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minigpt_jax.config import LabelledTextConfig
from minigpt_jax.data import corpora
from minigpt_jax.data.text_files import json_lines
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError, did_you_mean, shortened
from minigpt_jax.files import local_path, sha256

GENRES_OF_PLAYS = "shakespeare_genres"
HELD_OUT = slice(2, None, 5)  # of the plays of each genre, in the order of the corpus
VAL_LINES = slice(9, None, 10)  # of the user's own texts

# Genres as in the First Folio (1623). Two plays are not in it: Pericles, a comedy, and Edward III, a history.
TRAGEDIES = (
    "Antony and Cleopatra", "Coriolanus", "Cymbeline", "Hamlet", "Julius Caesar", "King Lear", "Macbeth", "Othello",
    "Romeo and Juliet", "Timon of Athens", "Titus Andronicus", "Troilus and Cressida",
)  # fmt: skip
KINGS = ("Edward", "Henry", "King John", "Richard")  # how the titles of histories start


@dataclasses.dataclass(frozen=True)
class Document:
    text: str
    label: str


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents to train on, and others to validate with."""

    train: Sequence[Document]
    val: Sequence[Document]

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels of the training documents, in alphabetical order."""
        return tuple(sorted({document.label for document in self.train}))

    @property
    def sha256(self) -> str:
        return sha256(json.dumps([[dataclasses.astuple(each) for each in part] for part in (self.train, self.val)]).encode())


@dataclasses.dataclass(frozen=True)
class Passages:
    """Pieces of documents with at most T tokens each, padded, and the numbers of their documents' classes."""

    tokens_NT: np.ndarray
    is_token_NT: np.ndarray
    labels_N: np.ndarray


def read_documents(config: LabelledTextConfig) -> Documents:
    """Raises DataError for files that cannot be used, with line numbers, and for fewer than two classes."""
    if config.dataset == GENRES_OF_PLAYS:
        train, val = plays(corpora.plays_file(config.data_dir))
    else:
        train = read_lines(config.dataset)
        val = train[VAL_LINES]
        if config.val_dataset is None:
            train = [document for n, document in enumerate(train) if n % VAL_LINES.step != VAL_LINES.start]
    if config.val_dataset is not None:
        val = read_lines(config.val_dataset)
    documents = Documents(train, val)
    if len(documents.classes) < 2:
        found = f"only the label {shortened(documents.classes[0])}" if documents.classes else "no labels"
        raise DataError(f"{config.dataset} has {found} to train on: it needs at least two")
    if not val:
        raise DataError(f"{config.dataset} has no text for validation: it needs at least 10 lines, or a --val_dataset")
    if unknown := {document.label for document in val} - set(documents.classes):
        raise DataError(f"the validation texts have the label {min(unknown)!r}, which no training text has")
    return documents


def read_lines(dataset: str) -> list[Document]:
    """The documents of a JSON Lines file."""
    path, documents = local_path(dataset), []
    if not path.exists():
        raise DataError(
            f"no labelled texts {dataset!r}{did_you_mean(dataset, [GENRES_OF_PLAYS])}; allowed: {GENRES_OF_PLAYS}, or the "
            'path of a .jsonl file with a "text" and a "label" in each line'
        )
    for where, value in json_lines(path):
        try:
            document = Document(value["text"], str(value["label"]))
            is_text = isinstance(document.text, str) and bool(document.text.strip())
        except (KeyError, TypeError):
            is_text = False
        if not is_text:
            raise DataError(f'{where} must be a JSON object with a text and its class: {{"text": "...", "label": "..."}}')
        documents.append(document)
    return documents


def plays(path: Path) -> tuple[list[Document], list[Document]]:
    """(plays to train on, plays held out), labelled comedy, history or tragedy. The texts are without the titles."""
    documents = [Document(text_of(play["scenes"]), genre(play["title"])) for _, play in json_lines(path)]
    by_genre = {label: [each for each in documents if each.label == label] for label in ("comedy", "history", "tragedy")}
    held_out = [document for each in by_genre.values() for document in each[HELD_OUT]]
    return [document for document in documents if document not in held_out], held_out


def text_of(scenes: list[list[list[str]]]) -> str:
    """What is said in a play, without the names of the speakers: a king who speaks would give the histories away."""
    return "\n\n".join("\n".join(lines) for scene in scenes for _, *lines in scene)


def genre(title: str) -> str:
    return "tragedy" if title in TRAGEDIES else "history" if title.startswith(KINGS) else "comedy"


def cut(documents: Sequence[Document], classes: Sequence[str], tokenizer: Tokenizer, context_length: int) -> Passages:
    """Cuts each document into passages of `context_length` tokens. The last one of a document may be shorter."""
    pieces = [
        (ids[start : start + context_length], classes.index(document.label))
        for document in documents
        for ids in (tokenizer.encode(document.text),)
        for start in range(0, len(ids), context_length)
    ]
    tokens_NT = np.zeros((len(pieces), context_length), np.int32)
    is_token_NT = np.zeros(tokens_NT.shape, bool)
    for n, (ids, _) in enumerate(pieces):
        tokens_NT[n, : len(ids)], is_token_NT[n, : len(ids)] = ids, True
    return Passages(tokens_NT, is_token_NT, np.array([label for _, label in pieces], np.int32))
