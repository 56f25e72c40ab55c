"""Talks with a model that was trained on conversations.

python scripts/chat.py --workdir runs/chat_shakespeare
python scripts/chat.py --workdir runs/chat_shakespeare --temperature 0.8 --top_k 40 --length 200
python scripts/chat.py --workdir runs/qa_shakespeare --greedy < questions.txt

Each line is a message; one that ends in a backslash continues on the next line. /help lists the commands. Ctrl-C stops an
answer, or clears the line, and Ctrl-D ends. Only answers go to standard output.
"""

import dataclasses
import json
import logging
import sys
from pathlib import Path

from absl import flags

import minigpt_jax as mg
from minigpt_jax import cli
from minigpt_jax.config import whole_number
from minigpt_jax.data.conversations import Message
from minigpt_jax.data.text_files import read_text_file
from minigpt_jax.errors import DataError, UsageError, did_you_mean
from minigpt_jax.files import local_path, write_text
from minigpt_jax.generation.chat import ChatModel
from minigpt_jax.generation.strategy import DecodingConfig, processors
from minigpt_jax.interop.load import is_huggingface, read_run_config
from minigpt_jax.interop.peft import is_adapter

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "folder of a run of the task chat, or of a Hugging Face model with a chat template (default: the newest under runs/)",
)
LENGTH = flags.DEFINE_integer("length", 200, "maximum number of tokens of an answer")
SEED = flags.DEFINE_integer("seed", 0, "random seed of the first answer; each further one adds 1")
SYSTEM = flags.DEFINE_string("system", None, "what the system says at the start of the conversation")
STRATEGY = cli.define_section_flags(DecodingConfig)
KERNELS = cli.define_kernels_flag()
cli.define_precision_flag()

log = logging.getLogger("minigpt_jax.chat")


def main() -> None:
    strategy = {name: flag.value for name, flag in STRATEGY.items() if flag.value is not None}
    length, seed = whole_number("length", LENGTH.value, 1), whole_number("seed", SEED.value, 0, below=2**32)
    processors(**strategy)
    chat = Session(load_chat(local_path(WORKDIR.value or cli.newest_run())), length, seed, strategy, SYSTEM.value)
    log.info("Type a message, or /help. Ctrl-C stops an answer, Ctrl-D ends.")
    while (line := read_message()) is not None:
        try:
            chat.read(line)
        except (UsageError, DataError) as error:
            log.info("%s", error)


def load_chat(workdir: Path) -> ChatModel:
    """The model in a folder. Raises DataError if it has learned no conversations."""
    is_run = not (is_huggingface(workdir) or is_adapter(workdir))
    if is_run and (task := read_run_config(workdir).task) != "chat":
        raise DataError(f"{workdir} is a run of the task {task}, which learns no conversations: choose one of the task chat")
    model = mg.load(workdir, kernels=KERNELS.value)
    if not is_run and model.template is None:
        raise DataError(
            f"{workdir} has no chat template: choose a run of the task chat, or a model that has a template, usually called "
            "chat or instruct"
        )
    return ChatModel(model)


def read_message() -> str | None:
    """The next message, of one or several lines. None where the input ends."""
    lines = []
    while True:
        if sys.stdin.isatty():
            print("... " if lines else "> ", end="", file=sys.stderr, flush=True)
        try:
            lines.append(input())
        except KeyboardInterrupt:
            print(file=sys.stderr)
            lines = []
            continue
        except (EOFError, OSError):  # OSError: the terminal was closed
            print(file=sys.stderr)
            return None
        if not lines[-1].endswith("\\"):
            return "\n".join(line.removesuffix("\\") for line in lines)


@dataclasses.dataclass
class Session:
    """A conversation and its settings."""

    model: ChatModel
    length: int
    seed: int
    strategy: dict
    system: str | None
    num_left_out: int = 0

    def __post_init__(self):
        self.reset()

    def read(self, line: str) -> None:
        """Answers a message, or runs a command. Raises UsageError for a bad command, DataError for unknown characters."""
        name, _, argument = line.partition(" ")
        if not line.strip():
            return
        if not name.startswith("/"):
            self.answer(line)
        elif name in COMMANDS:
            COMMANDS[name](self, argument.strip())
        else:
            raise UsageError(f"unknown command {name}{did_you_mean(name, COMMANDS)}; allowed: {', '.join(COMMANDS)}")

    def answer(self, text: str) -> None:
        """Prints the answer while it is generated. Remembers it and the message, unless it is empty. Ctrl-C stops it."""
        turns = [*self.turns, Message("user", text)]
        fitting = self.model.fitting(turns, self.length)
        if (num_left_out := len(turns) - len(fitting)) != self.num_left_out:
            size = self.model.model.config.context_length
            log.info("The model no longer sees the %d oldest messages: its context is %d tokens.", num_left_out, size)
        if num_cut := self.model.num_cut(fitting):
            log.info("The message is longer than the context: the model does not see the first %d tokens.", num_cut)
        pieces = []
        try:
            for piece in self.model.stream(fitting, self.length, self.seed, **self.strategy):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            log.info("Stopped.")
        print(flush=True)
        if answer := "".join(pieces):
            self.turns, self.num_left_out = [*turns, Message("assistant", answer)], num_left_out
        self.seed = (self.seed + 1) % 2**32

    def reset(self, _: str = "") -> None:
        """forget the conversation"""
        self.turns, self.num_left_out = [] if self.system is None else [Message("system", self.system)], 0

    def set_seed(self, number: str) -> None:
        """N: the seed of the next answer"""
        self.seed = whole_number("seed", int(number) if number.isdecimal() else number, 0, below=2**32)

    def set_temperature(self, number: str) -> None:
        """X: below 1 more predictable, above 1 more random, 0 greedy"""
        try:
            temperature = float(number)
        except ValueError:
            raise UsageError(f"temperature={number!r} must be a number") from None
        strategy = {name: value for name, value in self.strategy.items() if name != "greedy"} | {"temperature": temperature}
        processors(**strategy)
        self.strategy = strategy

    def save(self, file: str) -> None:
        """FILE: add the conversation to a .jsonl file, which train.py reads"""
        if not file:
            raise UsageError("give the file to save to: /save FILE")
        path = local_path(file)
        try:
            before = read_text_file(path) if path.exists() and path.stat().st_size else ""
            line = json.dumps({"messages": [dataclasses.asdict(turn) for turn in self.turns]}, ensure_ascii=False)
            write_text(path, before + "\n" * bool(before and not before.endswith("\n")) + line + "\n")
        except OSError as error:
            raise DataError(f"cannot write {file}: {error.strerror}") from None
        log.info("Added %d messages to %s.", len(self.turns), file)

    def help(self, _: str) -> None:
        """this list"""
        log.info("%s", "\n".join(f"{name:<14}{command.__doc__}" for name, command in COMMANDS.items()))


COMMANDS = {
    "/help": Session.help,
    "/reset": Session.reset,
    "/seed": Session.set_seed,
    "/temperature": Session.set_temperature,
    "/save": Session.save,
}

if __name__ == "__main__":
    cli.run(main, __doc__)
