"""The configuration of a run: frozen dataclasses, validated on construction, with presets, overrides and JSON.

Each setting is declared once, as a field below. Its help text, allowed values and command-line flag are derived from that.
Precedence: the defaults here < a preset in `configs/` < flags on the command line.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt_jax.commands import CONFIGS_DIR
from minigpt_jax.errors import DataError, UsageError, did_you_mean, require_choice, shortened


def setting(
    default: Any, help: str, *, choices: tuple[str, ...] = (), at_least: float | None = None, at_most: float | None = None,
    above: float | None = None, below: float | None = None, may_change: bool = False, from_data: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field with its help text and allowed values.

    `at_least` and `at_most` are inclusive bounds, `above` and `below` exclusive ones. `may_change` marks settings that may
    differ when a run is resumed; of these, only those in AFFECT_RESULTS affect the results. `from_data` marks settings that
    are derived from the data if they are None.
    """
    rules = {"help": help, "choices": choices, "at_least": at_least, "at_most": at_most, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=rules | {"may_change": may_change, "from_data": from_data})


def setting_type(field: dataclasses.Field) -> type:
    """The plain type of a setting: `int` for a field declared `int | None`."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in typing.get_args(field.type) if kind is not type(None))
    assert isinstance(field.type, type)  # not a string annotation
    return field.type


def plain(value: Any) -> Any:
    """Python's number, bool or string in place of a scalar of NumPy, JAX or PyTorch. Anything else is returned as it is."""
    if getattr(value, "ndim", None) != 0:
        return value
    try:
        return value.item()
    except (NotImplementedError, AttributeError):  # a random key of JAX, a dtype
        return value


def whole_number(name: str, value: Any, at_least: int | None = None, below: int | None = None) -> int:
    """The value as Python's int. Raises UsageError, naming what is allowed, if it is not an integer in this range."""
    number = plain(value)
    if type(number) is not int:
        raise UsageError(f"{name}={shortened(value)} must be an integer")
    if (at_least is not None and number < at_least) or (below is not None and number >= below):
        raise UsageError(f"{name}={number} must be at least {at_least}{'' if below is None else f' and below {below}'}")
    return number


def check_setting(field: dataclasses.Field, value: Any) -> None:
    """Raises UsageError, naming what is allowed, if `value` is invalid for `field`."""
    name, rules, kind = field.name, field.metadata, setting_type(field)
    if field.type != kind and value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number if kind is float else type(value) is kind):
        raise UsageError(f"{name}={shortened(value)} must be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{name}={value} must be a finite number")
    if rules["choices"]:
        require_choice(name, str(value), rules["choices"])
    if rules["at_least"] is not None and value < rules["at_least"]:
        raise UsageError(f"{name}={value} must be at least {rules['at_least']}")
    if rules["at_most"] is not None and value > rules["at_most"]:
        raise UsageError(f"{name}={value} must be at most {rules['at_most']}")
    if rules["above"] is not None and value <= rules["above"]:
        raise UsageError(f"{name}={value} must be greater than {rules['above']}")
    if rules["below"] is not None and value >= rules["below"]:
        raise UsageError(f"{name}={value} must be less than {rules['below']}")


@dataclasses.dataclass(frozen=True)
class Section:
    """Base class of the groups of settings. Validates each field on construction.

    Scalars of NumPy and JAX become Python's, and paths become strings, so that a config can always be saved as JSON.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name))
            if isinstance(value, os.PathLike) and setting_type(field) is str and not field.metadata["choices"]:
                value = os.fspath(value)
            check_setting(field, value)
            object.__setattr__(self, field.name, value)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The architecture: everything that determines the parameters' shapes or the forward pass."""

    num_layers: int = setting(4, "number of transformer blocks", at_least=1)
    num_heads: int = setting(4, "number of attention (query) heads", at_least=1)
    num_kv_heads: int | None = setting(
        None, "number of key/value heads; fewer than num_heads: grouped-query attention (default: num_heads)", at_least=1
    )
    embed_dim: int = setting(128, "model width, the size of the residual stream", at_least=1)
    ff_dim: int = setting(512, "hidden width of the feed-forward network", at_least=1)
    context_length: int = setting(64, "maximum sequence length, in tokens", at_least=1)
    vocab_size: int | None = setting(
        None,
        "vocabulary size (default: determined by the text, at most 10,000 for word and 4,096 for bpe)",
        at_least=1,
        from_data=True,
    )
    vocab_multiple: int = setting(
        1, "pad the embedding table to a multiple of this size, for speed; the padding is never a token", at_least=1
    )
    dropout: float = setting(
        0.0, "dropout probability, for the embeddings and each sub-layer's output", at_least=0.0, below=1.0
    )
    bias: bool = setting(False, "bias terms in the blocks' dense layers and in LayerNorm")
    positions: str = setting("rotary", "position encoding", choices=("sinusoidal", "learned", "rotary"))
    norm: str = setting("rmsnorm", "type of norm", choices=("layernorm", "rmsnorm"))
    norm_epsilon: float = setting(1e-5, "added to the variance or mean square that a norm divides by", above=0.0)
    norm_placement: str = setting(
        "pre", "norm before each sub-layer, or after the residual addition", choices=("pre", "post")
    )
    activation: str = setting(
        "relu2",
        "activation function of the feed-forward network; gelu is GPT-2's approximation",
        choices=("gelu", "gelu_exact", "relu", "relu2", "swiglu"),
    )
    qk_norm: bool = setting(True, "RMS-normalise queries and keys before the dot product")
    qk_scale: bool = setting(False, "learned scales of the normalised queries and keys, one per feature of a head")
    token_shift: bool = setting(False, "half of the features that a sub-layer reads are those of the previous position")
    init: str = setting(
        "fan_in",
        "standard deviation of initial weights, 0.02 as in GPT-2 or 1/sqrt(fan-in) with larger embeddings",
        choices=("gpt2", "fan_in"),
    )
    tie_embeddings: bool = setting(False, "use the transposed token embedding as the output layer")
    dtype: str = setting(
        "float32", "dtype of the computation (parameters are always float32)", choices=("float32", "bfloat16")
    )
    remat: bool = setting(False, "recompute blocks in the backward pass: less memory, more time")

    def __post_init__(self):
        super().__post_init__()
        if self.embed_dim % self.num_heads:
            raise UsageError(f"embed_dim={self.embed_dim} must be divisible by num_heads={self.num_heads}")
        if self.qk_scale and not self.qk_norm:
            raise UsageError("qk_scale=True is the scale of normalised queries and keys: set qk_norm too")
        if self.num_heads % self.kv_heads:
            raise UsageError(f"num_heads={self.num_heads} must be divisible by num_kv_heads={self.kv_heads}")
        if self.positions == "rotary" and self.head_size % 2:
            raise UsageError(
                f"positions=rotary rotates pairs of features, so embed_dim/num_heads={self.head_size} must be even: "
                "change num_heads, or set positions to learned or sinusoidal"
            )

    @property
    def head_size(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def known_vocab_size(self) -> int:
        """`vocab_size`, which must be set by the time a model is built."""
        assert self.vocab_size is not None
        return self.vocab_size

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding table, and columns of an output layer: the vocabulary and its padding."""
        return -(-self.known_vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def can_slide(self) -> bool:
        """Whether a text may exceed the context: positions are relative, not looked up in a table."""
        return self.positions not in ("learned", "sinusoidal")


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Section):
    """Optimisation, and how often to evaluate, save, sample and log."""

    batch_size: int = setting(12, "sequences per optimizer step", at_least=1)
    steps: int | None = setting(None, "number of optimizer steps (or set epochs)", at_least=1, below=2**31, may_change=True)
    epochs: float | None = setting(None, "passes over the training data (or set steps)", above=0.0, may_change=True)
    grad_accumulation: int = setting(1, "micro-batches per optimizer step: same result, less memory", at_least=1)
    optimizer: str = setting("adamw", "adamw, or muon for the matrices of the blocks", choices=("adamw", "muon"))
    learning_rate: float = setting(1e-3, "peak learning rate", above=0.0)
    min_learning_rate: float = setting(1e-4, "learning rate at the last step", at_least=0.0)
    warmup_steps: int = setting(100, "steps of linear warmup to the peak learning rate, at most all steps", at_least=0)
    schedule: str = setting("cosine", "learning-rate decay after the warmup", choices=("cosine", "linear", "constant"))
    weight_decay: float = setting(0.1, "decoupled weight decay, applied to matrices only", at_least=0.0)
    beta1: float = setting(0.9, "decay rate of the mean gradient", at_least=0.0, below=1.0)
    beta2: float = setting(0.99, "AdamW: decay rate of the mean squared gradient", at_least=0.0, below=1.0)
    grad_clip: float = setting(1.0, "maximum global norm of the gradient", above=0.0)
    ema: float = setting(
        0.0,
        "decay of a moving average of the parameters, used for evaluation and generation; 0: no average",
        at_least=0.0,
        below=1.0,
    )
    seed: int = setting(  # JAX uses only 32 bits
        0, "random seed for initial weights, batch order and dropout", at_least=0, below=2**32
    )
    init_from: str | None = setting(
        None, "folder of a run, or of a Hugging Face GPT-2 or Llama, to load initial weights from (default: random weights)"
    )
    eval_every: int = setting(250, "steps between evaluations", at_least=1, may_change=True)
    eval_batches: int = setting(40, "validation batches per evaluation, always the same ones", at_least=1)
    checkpoint_every: int = setting(
        500, "steps between checkpoints, in addition to one at each new lowest validation loss", at_least=1, may_change=True
    )
    sample_every: int = setting(250, "steps between printed samples; 0: no samples", at_least=0, may_change=True)
    log_every: int = setting(50, "steps between rows of training metrics", at_least=1, may_change=True)
    patience: int = setting(
        0, "stop after this many evaluations in a row without a lower loss; 0: never", at_least=0, may_change=True
    )
    max_bad_steps: int = setting(
        10, "give up after this many steps in a row with a non-finite loss or gradient", at_least=1, may_change=True
    )
    keep_checkpoints: int = setting(2, "number of newest checkpoints to keep, besides the best", at_least=1, may_change=True)

    def __post_init__(self):
        super().__post_init__()
        if self.steps is not None and self.epochs is not None:
            raise UsageError(f"steps={self.steps} and epochs={self.epochs} are mutually exclusive: give only one")
        if self.batch_size % self.grad_accumulation:
            raise UsageError(f"batch_size={self.batch_size} must be divisible by grad_accumulation={self.grad_accumulation}")
        if self.min_learning_rate > self.learning_rate:
            raise UsageError(
                f"min_learning_rate={self.min_learning_rate} must not exceed learning_rate={self.learning_rate}"
            )


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """The text and its tokenizer."""

    dataset: str = setting(
        "shakespeare",
        "a corpus (shakespeare, tiny_shakespeare), a file (.txt, .txt.gz, .jsonl), a folder or a glob pattern",
        may_change=True,
    )
    val_dataset: str | None = setting(None, "validation text (default: the last tenth of the dataset)", may_change=True)
    encoding: str = setting("utf-8", "encoding of your own text files", may_change=True)
    data_dir: str | None = setting(
        None, "folder for downloaded and tokenized text (default: the user's cache folder)", may_change=True
    )
    tokenizer: str = setting(
        "char", "tokenizer: char | byte | word | bpe, or the path of a tokenizer.json or of GPT-2's vocab.json"
    )


@dataclasses.dataclass(frozen=True)
class ChatConfig(Section):
    """Conversations, and the tokenizer of their text."""

    dataset: str = setting(
        "chat_shakespeare",
        "conversations (chat_shakespeare, qa_shakespeare), a file (.jsonl), a folder or a glob pattern",
        may_change=True,
    )
    val_dataset: str | None = setting(
        None, "validation conversations (default: the last tenth, or plays that are held out)", may_change=True
    )
    data_dir: str | None = setting(None, "folder for downloaded plays (default: the user's cache folder)", may_change=True)
    tokenizer: str = setting(
        "char", "tokenizer: char | byte | word | bpe, or the path of a tokenizer.json or of GPT-2's vocab.json"
    )


@dataclasses.dataclass(frozen=True)
class MaskedDataConfig(DataConfig):
    """The same for masked language modelling: the type of the section determines the task."""


@dataclasses.dataclass(frozen=True)
class LabelledTextConfig(Section):
    """Texts with a class for each, and their tokenizer."""

    dataset: str = setting(
        "shakespeare_genres",
        'labelled texts (shakespeare_genres), or a .jsonl file with a "text" and a "label" in each line',
        may_change=True,
    )
    val_dataset: str | None = setting(
        None, "validation texts (default: plays that are held out, or every tenth line)", may_change=True
    )
    data_dir: str | None = setting(None, "folder for downloaded plays (default: the user's cache folder)", may_change=True)
    tokenizer: str = setting(
        "word", "tokenizer: char | byte | word | bpe, or the path of a tokenizer.json or of GPT-2's vocab.json"
    )


@dataclasses.dataclass(frozen=True)
class ImageConfig(Section):
    """The images of image classification, and how they are varied and cut."""

    dataset: str = setting(
        "digits", "digits, or a folder with one subfolder of PNG or JPEG files for each class", may_change=True
    )
    data_dir: str | None = setting(None, "folder for downloaded images (default: the user's cache folder)", may_change=True)
    image_size: int = setting(28, "height and width in pixels; your own images are resized to it", at_least=1)
    color: bool = setting(False, "three colour channels instead of grey, for your own images")
    patch_size: int = setting(4, "height and width of a patch in pixels; image_size is a multiple of it", at_least=1)
    shift: float = setting(2.0, "augmentation: shift images by up to this many pixels", at_least=0.0)
    rotation: float = setting(12.0, "augmentation: rotate images by up to this many degrees", at_least=0.0)
    scale: float = setting(0.1, "augmentation: enlarge or shrink images by up to this share", at_least=0.0, below=1.0)
    label_smoothing: float = setting(
        0.1, "share of the probability that training spreads over all classes", at_least=0.0, below=1.0
    )

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise UsageError(f"image_size={self.image_size} must be divisible by patch_size={self.patch_size}")


@dataclasses.dataclass(frozen=True)
class FineTuningConfig(Section):
    """Which parameters are trained: all, all but the frozen ones, or a LoRA adapter. Patterns are explained in
    `models/patterns.py`."""

    freeze: str | None = setting(
        None, "parameters not to train: patterns of their paths, as in embedding,*block_0 (default: all are trained)"
    )
    lora_rank: int | None = setting(
        None,
        "train a LoRA adapter of this rank for the model in init_from, instead of that (default: no LoRA)",
        at_least=1,
    )
    lora_alpha: float = setting(16.0, "LoRA: scale of the adapter, which is multiplied by lora_alpha / lora_rank", above=0.0)
    lora_dropout: float = setting(0.0, "LoRA: dropout probability of the adapter's inputs", at_least=0.0, below=1.0)
    lora_targets: str = setting(
        "*attention,*feed_forward", "LoRA: dense layers to adapt, patterns of their paths such as *query,*value"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank and self.freeze is not None:
            raise UsageError(
                f"freeze={self.freeze} does not apply with lora_rank={self.lora_rank}, which trains only the adapter: "
                "omit it, and choose the adapted layers with lora_targets"
            )

    @property
    def lora_scale(self) -> float:
        assert self.lora_rank is not None
        return self.lora_alpha / self.lora_rank


# Settings that may differ when a run is resumed, and still affect results. Those of the first set name the text, which may
# have moved; a resumed run checks that it is the same. The other two move the end of the schedule.
NAME_THE_TEXT = {"dataset", "val_dataset", "encoding"}
AFFECT_RESULTS = {"steps", "epochs"} | NAME_THE_TEXT

# The settings of each task's data, by the task's name. `tasks/` uses the same names.
TASKS: dict[str, type[Section]] = {
    "language_modelling": DataConfig,
    "chat": ChatConfig,
    "masked_language_modelling": MaskedDataConfig,
    "text_classification": LabelledTextConfig,
    "image_classification": ImageConfig,
}


@dataclasses.dataclass(frozen=True)
class ReferenceResult:
    """The measured result of a preset, so that a run can report whether its own result is normal.

    `mean` is a measure of the task on the full validation split, averaged over seeds: the loss in nats, or another one that
    `measure` names. `spread` is the largest deviation of a seed from that mean. Both apply to the unmodified preset on its
    own dataset.
    """

    mean: float
    spread: float
    seeds: int
    measure: str = "loss"


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a run. The type of its `data` section determines the task."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: Section = DataConfig()
    fine_tuning: FineTuningConfig = FineTuningConfig()
    reference_result: ReferenceResult | None = None

    def __post_init__(self):
        for name, section in (SECTIONS | {"data": Section}).items():
            if not isinstance(getattr(self, name), section):
                raise UsageError(f"{name}={shortened(getattr(self, name))} must be a {section.__name__}")
        if self.training.init_from is not None and not hasattr(self.data, "tokenizer"):
            raise UsageError(f"init_from={self.training.init_from}: {self.task} starts from random weights; omit init_from")

    @property
    def task(self) -> str:
        """The name of the task. Raises UsageError if `data` does not belong to a task."""
        for name, section in TASKS.items():
            if type(self.data) is section:
                return name
        raise UsageError(f"data={self.data!r} must be the settings of a task: {', '.join(TASKS)}")

    @property
    def settings(self) -> "dict[str, Setting]":
        """All settings of this config, by name."""
        return settings_of({name: type(getattr(self, name)) for name in SECTIONS})

    @property
    def neutral_settings(self) -> set[str]:
        """Settings that change the result of a run no more than chance does: the seed, how often it logs or saves."""
        may_change = {name for name, entry in self.settings.items() if entry.field.metadata["may_change"]}
        return may_change - AFFECT_RESULTS | {"seed"}

    @property
    def settings_from_data(self) -> set[str]:
        """Settings that the data determines if they are None."""
        return {name for name, entry in self.settings.items() if entry.field.metadata["from_data"]}

    def override(self, changes: Mapping[str, Any] = types.MappingProxyType({}), /, **more: Any) -> "Config":
        """A copy with some settings changed, given by name: `config.override({"num_layers": 6})` or `num_layers=6`.

        `steps` replaces a preset's `epochs` and vice versa. The reference result is dropped if anything changes that can
        affect it. Raises UsageError for unknown names and invalid values.
        """
        changes = {**changes, **more}
        sections, known = {name: {} for name in SECTIONS}, self.settings
        for name, value in changes.items():
            if name not in known:
                other = f"; {self.task} has no such setting" if name in SETTINGS else did_you_mean(name, known)
                raise UsageError(f"unknown setting {name!r}{other}")
            sections[known[name].section][name] = value
        if changes.get("epochs") is not None:
            sections["training"].setdefault("steps", None)
        if changes.get("steps") is not None:
            sections["training"].setdefault("epochs", None)
        new = dataclasses.replace(
            self, **{name: dataclasses.replace(getattr(self, name), **values) for name, values in sections.items()}
        )
        if set(differences(self, new)) - self.neutral_settings:
            new = dataclasses.replace(new, reference_result=None)
        return new

    def with_data_settings_of(self, other: "Config") -> "Config":
        """This config, with the settings that the data determines taken from `other`, a config for the same data."""
        new = self
        for name in self.settings_from_data & other.settings.keys():
            if get_setting(self, name) is None:
                section = self.settings[name].section
                values = dataclasses.replace(getattr(new, section), **{name: get_setting(other, name)})
                new = dataclasses.replace(new, **{section: values})
        return new

    def to_json(self) -> str:
        """Readable JSON. `from_json` turns it into an equal config."""
        return json.dumps({"task": self.task} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Inverse of `to_json`. Raises DataError if this version cannot read the JSON as a config."""
        try:
            values = json.loads(text)
            task = values.pop("task", "language_modelling")  # absent in earlier versions
            result = values.pop("expectation" if "expectation" in values else "reference_result")  # renamed in 0.2
            if result and "val_loss" in result:  # renamed in 0.3
                result["mean"] = result.pop("val_loss")
            types = SECTIONS | {"data": TASKS[task]}
            values.setdefault("fine_tuning", {})  # absent in earlier versions
            sections = {name: section(**values.pop(name)) for name, section in types.items()}
            return cls(**sections, **values, reference_result=ReferenceResult(**result) if result else None)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"not a valid config for this version: {error}") from error


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig, "training": TrainingConfig, "data": DataConfig, "fine_tuning": FineTuningConfig,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    section: str
    field: dataclasses.Field


def settings_of(sections: Mapping[str, type[Section]]) -> dict[str, Setting]:
    return {field.name: Setting(name, field) for name, section in sections.items() for field in dataclasses.fields(section)}


# All settings of all tasks by name, which is also the name of the flag. Of a name that tasks share, the first task's.
SETTINGS = {
    name: entry for section in reversed(TASKS.values()) for name, entry in settings_of(SECTIONS | {"data": section}).items()
}


def get_setting(config: Config, name: str) -> Any:
    return getattr(getattr(config, config.settings[name].section), name)


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ: name → (value in `config`, value in `other`), or just "task"."""
    if config.task != other.task:
        return {"task": (config.task, other.task)}
    pairs = {name: (get_setting(config, name), get_setting(other, name)) for name in config.settings}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


@functools.cache
def preset_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in CONFIGS_DIR.glob("*.py")))


def load_preset(name: str | os.PathLike) -> Config:
    """The config that `get_config()` returns in `configs/NAME.py`, or in a Python file given by its path.

    Raises UsageError if there is no such preset, if the file fails, or if it has no `get_config() -> Config`.
    """
    name = str(name)
    path = Path(name) if name.endswith(".py") else CONFIGS_DIR / f"{name}.py"
    if not path.is_file():
        raise UsageError(
            f"no preset {name!r}{did_you_mean(name, preset_names())}; "
            f"allowed: {', '.join(preset_names())}, or the path of a .py file with get_config()"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # because it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if callable(getattr(module, "get_config", None)) else None
    except (UsageError, DataError):
        raise
    except Exception as error:  # user code may raise anything
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UsageError(f"{path} must define a get_config() that returns a minigpt_jax Config")
    return config
