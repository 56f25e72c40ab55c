"""Exceptions for user errors, and for stopping on a signal.

Every user error raises UsageError or DataError, with a one-line message that says what is wrong and what is allowed. The
scripts print that line and exit with `exit_status`; Python callers get an ordinary ValueError.
"""

import difflib
from collections.abc import Collection, Iterable


class OneLineError(Exception):
    """Notebooks show the message of such an exception without a traceback."""

    def _render_traceback_(self) -> list[str]:  # called by IPython
        return [f"{type(self).__name__}: {self}"]


class UsageError(OneLineError, ValueError):
    """The command or call itself is invalid, whatever the files contain: an unknown flag, an indivisible width."""

    exit_status = 2


class DataError(OneLineError, ValueError):
    """A file, folder, text or run cannot be used: it is missing, corrupt, too short or has the wrong shape."""

    exit_status = 1


class StoppedError(OneLineError):
    """Raised after SIGINT, SIGTERM or SIGHUP, once the step is checkpointed."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_status = 128 + signal_number  # as in a shell


def require_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raises UsageError if `value` is not one of `allowed`."""
    if value not in allowed:
        raise UsageError(f"{name}={value!r}{did_you_mean(value, allowed)} must be one of: {', '.join(allowed)}")


# What other libraries (transformers, nanoGPT, OpenAI's API, scikit-learn) call our settings.
OUR_NAMES = {
    theirs: ours
    for ours, names in {
        "length": "max_new_tokens max_tokens max_length num_tokens n_tokens max_completion_tokens",
        "num_samples": "num_return_sequences n num_texts best_of",
        "beam_width": "num_beams n_beams beam_size",
        "stop": "stop_strings stop_sequences stop_words stop_string",
        "stop_tokens": "eos_token_id stop_token_ids stop_token eos_token stop_ids",
        "seed": "random_seed random_state rng_seed key rng",
        "temperature": "temp",
        "num_layers": "n_layer n_layers num_hidden_layers depth",
        "num_heads": "n_head n_heads num_attention_heads",
        "num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads",
        "embed_dim": "n_embd d_model hidden_size hidden_dim width",
        "ff_dim": "n_inner d_ff intermediate_size mlp_dim",
        "context_length": "block_size seq_len n_ctx n_positions max_seq_len max_position_embeddings sequence_length",
        "tie_embeddings": "tie_word_embeddings tie_weights",
        "remat": "gradient_checkpointing",
        "steps": "max_iters max_steps num_steps n_steps iters num_iters num_train_steps",
        "epochs": "num_epochs n_epochs max_epochs num_train_epochs",
        "learning_rate": "lr max_lr",
        "min_learning_rate": "min_lr",
        "warmup_steps": "warmup_iters warmup num_warmup_steps",
        "grad_accumulation": "gradient_accumulation_steps grad_accum accumulate_grad_batches",
        "grad_clip": "max_grad_norm clip_grad_norm gradient_clip_val",
        "eval_every": "eval_interval eval_steps",
        "eval_batches": "eval_iters",
        "log_every": "log_interval logging_steps",
        "checkpoint_every": "save_every save_steps save_interval checkpoint_interval",
    }.items()
    for theirs in names.split()
}


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'rotary'?)` with our word for a name from another library, or the closest match in `allowed`.

    An empty string if there is neither.
    """
    allowed = list(allowed)
    if OUR_NAMES.get(name) in allowed:
        return f" (it is called {OUR_NAMES[name]!r} here)"
    matches = difflib.get_close_matches(name, allowed, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def shortened(value: object, length: int = 80) -> str:
    """The value as Python writes it, on one line, cut where it would make a message unreadable."""
    return one_line(repr(value), length)


def one_line(text: str, length: int = 200) -> str:
    """The text on one line, cut where it would make a message unreadable. Libraries quote whole files in their errors."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + "…"
