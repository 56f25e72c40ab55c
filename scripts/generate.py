"""Generates text with a trained model and prints it on standard output.

python scripts/generate.py --prompt "To be or not to be" --length 200
python scripts/generate.py --workdir runs/mini_gpt --temperature 0.8 --top_k 40 --num_samples 3
python scripts/generate.py --prompts questions.txt --format jsonl --stop $'\\n'
python scripts/generate.py --beam_width 4 --length 80
python scripts/generate.py --interactive
"""

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Iterator

from absl import flags

import minigpt_jax as mg
from minigpt_jax import cli
from minigpt_jax.data.text_files import decode_text, read_text_file
from minigpt_jax.errors import DataError, UsageError, require_choice
from minigpt_jax.files import local_path
from minigpt_jax.generation.language_model import BeamText, Completion, LanguageModel
from minigpt_jax.generation.strategy import BeamConfig, DecodingConfig, checked, processors
from minigpt_jax.system import devices

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
PROMPT = flags.DEFINE_string(
    "prompt", "", "text to continue (default: a line break, or the first token of a vocabulary without one)"
)
PROMPTS = flags.DEFINE_string("prompts", None, "file with one prompt per line; -: standard input")
LENGTH = flags.DEFINE_integer("length", 200, "number of tokens to generate")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "number of texts per prompt")
SEED = flags.DEFINE_integer("seed", 0, "random seed: the same seed gives the same text")
STOP = flags.DEFINE_multi_string("stop", [], "text that ends a sample, not included in the output; can be repeated")
STOP_TOKENS = flags.DEFINE_multi_integer("stop_tokens", [], "token id that ends a sample; can be repeated")
STRATEGY = cli.define_section_flags(DecodingConfig)
BEAM = cli.define_section_flags(BeamConfig)
FORMAT = flags.DEFINE_string("format", "text", "output format: text | jsonl")
STREAM = flags.DEFINE_bool("stream", False, "print the text while it is generated")
INTERACTIVE = flags.DEFINE_bool("interactive", False, "read prompts one after another; Ctrl-C stops a text, Ctrl-D quits")
EXPLAIN = flags.DEFINE_bool(
    "explain", False, "print the probabilities that each token was sampled with to standard error (jsonl: in each line)"
)

KERNELS = cli.define_kernels_flag()
cli.define_precision_flag()

log = logging.getLogger("minigpt_jax.generate")


def main() -> None:
    strategy, beam = given(STRATEGY), given(BEAM)
    check(strategy, beam)
    if (PROMPTS.value or NUM_SAMPLES.value > 1) and not beam:
        devices.use_two_cpu_devices()
    prompts = read_prompts()
    model = mg.load(WORKDIR.value or cli.newest_run(), kernels=KERNELS.value)
    stops = {"stop": STOP.value, "stop_tokens": STOP_TOKENS.value}
    settings = {"seed": SEED.value, **stops, **strategy}
    if INTERACTIVE.value:
        converse(model, settings)
    elif STREAM.value:
        print_stream(model, prompts[0], settings)
    else:
        print_texts(model, texts(model, prompts, settings, beam | stops if beam else {}))


def given(group: dict[str, flags.FlagHolder]) -> dict:
    return {name: flag.value for name, flag in group.items() if flag.value is not None}


def check(strategy: dict, beam: dict) -> None:
    """Raises UsageError for flags that cannot be combined. Reads no files."""
    processors(**strategy)
    checked(BeamConfig, beam)
    require_choice("format", FORMAT.value, ("text", "jsonl"))
    if beam and "beam_width" not in beam:
        raise UsageError(f"{next(iter(beam))} only applies to beam search: give --beam_width too")
    one_at_a_time = STREAM.value or INTERACTIVE.value
    conflicts = [
        (beam and strategy, f"beam search does not sample: give either --beam_width or --{next(iter(strategy), '')}"),
        (
            beam and (one_at_a_time or EXPLAIN.value),
            "beam search only returns complete texts: omit --stream, --interactive, --explain",
        ),
        (beam and NUM_SAMPLES.value > 1, "beam search already returns --beam_width texts: omit --num_samples"),
        (STREAM.value and INTERACTIVE.value, "--interactive always streams: omit --stream"),
        (
            one_at_a_time and (PROMPTS.value or NUM_SAMPLES.value > 1),
            "--stream and --interactive generate one text at a time: omit --prompts, --num_samples",
        ),
        (
            one_at_a_time and (FORMAT.value != "text" or EXPLAIN.value),
            "--stream and --interactive print plain text: omit --format, --explain",
        ),
        (PROMPTS.value and PROMPT.value, "give either --prompt or --prompts"),
        (INTERACTIVE.value and PROMPT.value, "--interactive reads prompts from standard input: omit --prompt"),
    ]
    for condition, message in conflicts:
        if condition:
            raise UsageError(message)


def read_prompts() -> list[str]:
    if PROMPTS.value is None:
        return [PROMPT.value]
    path = PROMPTS.value
    text = decode_text(standard_input(), "standard input") if path == "-" else read_text_file(local_path(path))
    prompts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if "" in prompts:
        raise DataError(f"line {prompts.index('') + 1} of {path!r} is empty: each line must be a prompt")
    return prompts


def standard_input() -> bytes:
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise DataError(f"cannot read standard input: {error.strerror or error}") from error


def texts(model: LanguageModel, prompts: list[str], settings: dict, beam: dict) -> Iterator[Completion | BeamText]:
    if beam:
        for beams in model.beam_search(prompts, LENGTH.value, **beam):
            yield from beams if FORMAT.value == "jsonl" else beams[:1]
    else:
        yield from model.complete(prompts, LENGTH.value, num_samples=NUM_SAMPLES.value, **settings)


def print_texts(model: LanguageModel, results: Iterator[Completion | BeamText]) -> None:
    for number, result in enumerate(results, 1):
        if FORMAT.value == "jsonl":
            print(json_line(record(result)), flush=True)
            continue
        if number > 1:
            log.info("--- text %d", number)
        print(result.text, flush=True)
        if EXPLAIN.value:
            log.info("%s", table(model, result))


def json_line(values: dict) -> str:
    """One line of JSON. If standard output's encoding lacks a character, all are ASCII, with the escapes of JSON."""
    line = json.dumps(values, ensure_ascii=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(values)
    return line


def record(result: Completion | BeamText) -> dict:
    """One line of JSONL. `log_probs` and `score` are natural logarithms."""
    if isinstance(result, BeamText):
        hypothesis = result.hypothesis
        return {
            "prompt": result.prompt,
            "text": result.text,
            "tokens": hypothesis.tokens,
            "log_probs": hypothesis.log_probs,
            "score": hypothesis.score,
            "rank": hypothesis.rank,
            "reason": "stop" if hypothesis.ended else "length",
        }
    return {
        "prompt": result.prompt,
        "text": result.text,
        "tokens": [step.token for step in result.steps],
        "log_probs": [step.log_prob for step in result.steps],
        "reason": result.reason,
        "seed": result.seed,
        "index": result.index,
    } | ({"explain": [dataclasses.asdict(step) for step in result.steps]} if EXPLAIN.value else {})


def table(model: LanguageModel, result: Completion) -> str:
    """The probabilities that each token was sampled with, in aligned columns."""
    lines = ["token       p(model)   p(drawn)  kept  mass kept  entropy"]
    for step in result.steps:
        piece, prob = repr(model.tokenizer.decode([step.token])), math.exp(step.log_prob)
        lines.append(
            f"{piece:<10} {prob:9.4f}  {step.prob:9.4f} {step.num_kept:5d}  {step.mass_kept:9.4f}  {step.entropy:7.3f}"
        )
    return "\n".join(lines)


def print_stream(model: LanguageModel, prompt: str, settings: dict) -> None:
    for piece in model.stream(prompt, LENGTH.value, **settings):
        print(piece, end="", flush=True)
    print()


def converse(model: LanguageModel, settings: dict) -> None:
    """Reads a prompt and streams its text, until the input ends. Logs errors in a prompt and continues."""
    while True:
        try:
            print("> ", end="", file=sys.stderr, flush=True)
            prompt = input()
        except (EOFError, OSError, KeyboardInterrupt):  # OSError: the terminal was closed
            print(file=sys.stderr)
            return
        try:
            print_stream(model, prompt, settings)
        except KeyboardInterrupt:
            print()
        except DataError as error:
            log.info("%s", error)
        settings["seed"] += 1  # so that repeating a prompt gives another text


if __name__ == "__main__":
    cli.run(main, __doc__)
