"""How much of its training text a language model repeats: copied spans, n-grams, and passages learned by heart.

Copies are counted in characters, not in tokens: then they compare across tokenizers, and a copy counts even if the model
splits it into other tokens than the training text has. Texts are compared as UTF-8 bytes, which every tokenizer decodes to.
In UTF-8 a character never matches the end of one character and the start of the next.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minigpt_jax import api
from minigpt_jax.commands import install_command
from minigpt_jax.errors import UsageError
from minigpt_jax.files import local_path
from minigpt_jax.generation import sampling
from minigpt_jax.generation.language_model import MAX_ROWS, LanguageModel
from minigpt_jax.generation.strategy import processors
from minigpt_jax.interop.load import read_run_config
from minigpt_jax.runs import checkpoints
from minigpt_jax.system import logs, streams
from minigpt_jax.tasks import language_modelling
from minigpt_jax.tasks.task import PreviousRun

NUM_SAMPLES, SAMPLE_TOKENS, SEED = 16, 1000, 0  # without a prompt, at temperature 1
NGRAM_LENGTHS = (4, 8, 16, 25, 50)  # characters
PROMPT_LENGTHS = (10, 50, 100, 200, 500)  # tokens; those that fit into the context are used
CONTINUATION = 50  # tokens
NUM_PASSAGES = 256

SEPARATOR = b"\xff"  # not part of any UTF-8 text


# ---- Copies ---------------------------------------------------------------------------------------------------------------


def import_pydivsufsort() -> Any:
    try:
        import pydivsufsort
    except ImportError as error:
        raise UsageError(f"memorisation needs the package pydivsufsort: {install_command('memorisation')}") from error
    return pydivsufsort


def copied_lengths(samples: Sequence[str], text: bytes) -> list[np.ndarray]:
    """For each sample an array with one number per character: how many characters from there on occur verbatim in `text`.

    `text` is UTF-8. One suffix array of the text and all samples gives the answer, in nearly linear time. The suffixes of
    the text that share most with a suffix of a sample are the nearest ones before and after it in the sorted order. What
    two suffixes share is the minimum of what the neighbours from one to the other share (Kasai et al. 2001). Raises
    UsageError if the package pydivsufsort is missing.
    """
    library = import_pydivsufsort()
    encoded = [sample.encode() for sample in samples]
    joint = SEPARATOR.join([text, *encoded])
    starts = library.divsufsort(joint)  # of the suffixes, in sorted order
    shared = library.kasai(joint, starts)  # bytes that each suffix shares with the next one; 0 for the last
    is_text = np.append(starts <= len(text), False)  # index -1 and index N are the missing neighbours of both ends
    ranks = np.flatnonzero(starts > len(text))
    before = running_minimum(shared[ranks - 1], is_text[ranks - 1])
    after = running_minimum(shared[ranks[::-1]], is_text[ranks[::-1] + 1])[::-1]
    longest = np.zeros(len(joint) - len(text), int)
    longest[starts[ranks] - len(text) - 1] = np.maximum(before, after)
    lengths, first = [], 0
    for sample in encoded:
        lengths.append(in_characters(sample, longest[first : first + len(sample)]))
        first += len(sample) + 1
    return lengths


def running_minimum(values: np.ndarray, restarts: np.ndarray) -> np.ndarray:
    """At each index the minimum of the values since the last restart, or 0 before the first one."""
    minima, minimum = [], 0
    for value, is_restart in zip(values.tolist(), restarts.tolist(), strict=True):
        minimum = value if is_restart else min(minimum, value)
        minima.append(minimum)
    return np.array(minima, int)


def in_characters(sample: bytes, longest: np.ndarray) -> np.ndarray:
    """How many whole characters of the sample are in the `longest[i]` bytes from byte i, for each i that starts a character.

    Bytes beyond the sample's end do not count.
    """
    starts = np.flatnonzero((np.frombuffer(sample, np.uint8) & 0xC0) != 0x80)
    ends = np.append(starts[1:], len(sample))
    return np.searchsorted(ends, starts + longest[starts], side="right") - np.arange(len(starts))


def longest_copy(samples: Sequence[str], lengths: Sequence[np.ndarray]) -> str:
    """The longest span of a sample that occurs in the text, given the `copied_lengths` of the samples."""
    firsts = [int(each.argmax()) if len(each) else 0 for each in lengths]
    spans = [sample[i : i + each[i]] for sample, each, i in zip(samples, lengths, firsts, strict=True) if len(each)]
    return max(spans, key=len, default="")


def share_of_ngrams(lengths: Iterable[np.ndarray], n: int) -> float | None:
    """Share of the samples' n-grams of characters that occur in the text, given their `copied_lengths`. None if the samples
    are all shorter than n."""
    is_found = np.concatenate([each[: max(0, len(each) - n + 1)] >= n for each in lengths])
    return float(is_found.mean()) if is_found.size else None


def excerpts(text: str, lengths: Sequence[int]) -> list[str]:
    """Excerpts of these lengths in characters, evenly spaced in the text. A shorter text is one excerpt, each time."""
    firsts = np.linspace(0, max(0, len(text) - max(lengths)), len(lengths)).astype(int)
    return [text[first : first + length] for first, length in zip(firsts, lengths, strict=True)]


# ---- Passages learned by heart --------------------------------------------------------------------------------------------


def passages(ids: np.ndarray, size: int) -> np.ndarray:
    """Up to NUM_PASSAGES evenly spaced windows of `size` token ids, with shape (N, size), int32."""
    firsts = np.linspace(0, len(ids) - size, min(NUM_PASSAGES, len(ids) - size + 1)).astype(int)
    return ids[firsts[:, None] + np.arange(size)].astype(np.int32)


def are_extractable(model: LanguageModel, passages_NT: np.ndarray, prompt_length: int) -> np.ndarray:
    """Whether greedy decoding from the first `prompt_length` tokens of each passage gives exactly the rest: (N,) bools.

    Carlini et al. (2022, arXiv:2202.07646) call such a rest extractable with `prompt_length` tokens of context.
    """
    results = []
    for first in range(0, len(passages_NT), MAX_ROWS):
        prompts, rest_BT = np.split(passages_NT[first : first + MAX_ROWS], [prompt_length], axis=1)
        key_B = sampling.row_keys(jax.random.key(0, impl="threefry2x32"), range(len(prompts)))  # greedy: has no effect
        stream = sampling.stream(
            model.params, list(prompts), rest_BT.shape[1], key_B, processors(greedy=True), model=model.model,
            devices=model.devices,
        )  # fmt: skip
        is_equal_B, position = np.ones(len(prompts), bool), 0
        for sampled in stream:
            end = position + sampled.token.shape[1]
            is_equal_B &= (sampled.token == rest_BT[:, position:end]).all(axis=1)
            position = end
            if not is_equal_B.any():  # most batches are over after a few tokens
                break
        results.append(is_equal_B)
    return np.concatenate(results)


def extractable(model: LanguageModel, splits: dict[str, np.ndarray]) -> dict[str, Any]:
    """For each prompt length the share of each split's passages that is extractable, as values for JSON. All lengths have
    the same continuations. Lengths that do not fit into the context, or into one of the splits, are left out."""
    longest = min(model.config.context_length, *(len(ids) - CONTINUATION for ids in splits.values()))
    lengths = [length for length in PROMPT_LENGTHS if length <= longest]
    cut = {name: passages(ids, lengths[-1] + CONTINUATION) for name, ids in splits.items() if lengths}

    def share(length: int, rows: np.ndarray) -> float:
        return float(are_extractable(model, rows[:, -length - CONTINUATION :], length).mean())

    return {
        "tokens": CONTINUATION,
        "passages": {name: len(rows) for name, rows in cut.items()},
        "by_prompt_tokens": {str(k): {name: share(k, rows) for name, rows in cut.items()} for k in lengths},
    }


# ---- Runs -----------------------------------------------------------------------------------------------------------------


def measure_memorisation(
    workdir: str | Path, *, dataset: str | Path | None = None, val_dataset: str | Path | None = None,
    encoding: str | None = None, data_dir: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a run's best checkpoint repeats of its training text, as values for JSON. `dataset` and so on are those of
    `mg.evaluate`. The same call gives the same result:

      samples         their number, tokens each (at most), seed, and total characters; without a prompt, at temperature 1
      longest_copy    the longest span copied from the training text, in the samples (`samples`) and, as a baseline, in
                      excerpts of the validation text with the same lengths (`val`)
      ngrams_found    by length in characters: the share of the n-grams of both that occur in the training text
      extractable     by length of the prompt in tokens: the share of passages of the training text, and as a baseline of
                      the validation text, that greedy decoding continues exactly for `tokens` tokens

    Raises UsageError for a run of another task than language modelling and without the package pydivsufsort, and DataError
    as `mg.evaluate` does.
    """
    workdir = local_path(workdir)
    moved = {"dataset": dataset, "val_dataset": val_dataset, "encoding": encoding, "data_dir": data_dir}
    config = read_run_config(workdir)
    if config.task != "language_modelling":
        raise UsageError(
            f"{workdir} is a run of the task {config.task}: memorisation is measured for runs of language_modelling, which "
            "generate text like the running text that they are trained on"
        )
    import_pydivsufsort()
    config = config.override({name: value for name, value in moved.items() if value is not None})
    with streams.optional(), logs.shown():
        previous = PreviousRun(workdir, checkpoints.read_info(workdir, checkpoints.best_intact(workdir)).sources)
        splits = {name: part.ids for name, part in language_modelling.prepare(config, previous).splits.items()}
        return measure(api.load(workdir), splits)


def measure(model: LanguageModel, splits: dict[str, np.ndarray]) -> dict[str, Any]:
    """The result of `measure_memorisation` for the token ids of the splits `train` and `val`."""
    completions = model.complete("", SAMPLE_TOKENS, num_samples=NUM_SAMPLES, seed=SEED, temperature=1.0)
    samples = [completion.text for completion in completions]
    baseline = excerpts(model.tokenizer.decode(splits["val"]), [len(sample) for sample in samples])
    lengths = copied_lengths([*samples, *baseline], model.tokenizer.to_bytes(splits["train"]))
    compared = {"samples": (samples, lengths[:NUM_SAMPLES]), "val": (baseline, lengths[NUM_SAMPLES:])}
    copies = {name: longest_copy(*each) for name, each in compared.items()}
    return {
        "samples": {
            "number": NUM_SAMPLES,
            "tokens": SAMPLE_TOKENS,
            "seed": SEED,
            "characters": sum(map(len, samples)),
        },
        "longest_copy": {name: {"characters": len(copy), "text": copy} for name, copy in copies.items()},
        "ngrams_found": {
            str(n): {name: share_of_ngrams(each, n) for name, (_, each) in compared.items()} for n in NGRAM_LENGTHS
        },
        "extractable": extractable(model, splits),
    }
