"""What a run is: three frozen dataclasses, checked when they are made, and their way from preset and flags to JSON and back.

Every setting stands once, as a field below. Its help line, its allowed values and its command-line flag all come from there.
Precedence: the defaults here < a preset in `configs/` < flags on the command line.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt_jax.errors import DataError, UsageError, did_you_mean, require_choice

PRESETS_DIR = Path(__file__).resolve().parent.parent / "configs"


def setting(
    default: Any, help: str, *, choices=(), at_least=None, at_most=None, above=None, below=None, may_change=False,
    from_data=False,
) -> Any:  # fmt: skip
    """A dataclass field with what users are told about it (`help`) and what is allowed.

    `at_least` and `at_most` are inclusive, `above` and `below` exclusive bounds. `may_change` marks what may differ when a
    run is resumed. Of these only `steps` and `epochs` change what is computed from then on: the schedule ends elsewhere.
    `from_data` marks what the data decides where it is None.
    """
    rules = {"help": help, "choices": choices, "at_least": at_least, "at_most": at_most, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=rules | {"may_change": may_change, "from_data": from_data})


def setting_type(field: dataclasses.Field) -> type:
    """The plain type of a setting: `int` for a field declared `int | None`."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in typing.get_args(field.type) if kind is not type(None))
    assert isinstance(field.type, type)  # and not its name
    return field.type


def check_setting(field: dataclasses.Field, value: Any) -> None:
    """Raises UsageError, saying what is allowed, unless `value` suits `field`."""
    name, rules, kind = field.name, field.metadata, setting_type(field)
    if field.type != kind and value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number if kind is float else type(value) is kind):
        raise UsageError(f"{name}={value!r} must be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{name}={value} must be a finite number")
    if rules["choices"]:
        require_choice(name, str(value), rules["choices"])
    if rules["at_least"] is not None and value < rules["at_least"]:
        raise UsageError(f"{name}={value} must be at least {rules['at_least']}")
    if rules["at_most"] is not None and value > rules["at_most"]:
        raise UsageError(f"{name}={value} must be at most {rules['at_most']}")
    if rules["above"] is not None and value <= rules["above"]:
        raise UsageError(f"{name}={value} must be above {rules['above']}")
    if rules["below"] is not None and value >= rules["below"]:
        raise UsageError(f"{name}={value} must be below {rules['below']}")


@dataclasses.dataclass(frozen=True)
class Section:
    """Base of the groups of settings: checks each field against its own rules."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The architecture. Everything that decides the shape of the parameters or the meaning of a forward pass."""

    num_layers: int = setting(4, "transformer blocks", at_least=1)
    num_heads: int = setting(4, "attention heads for queries", at_least=1)
    num_kv_heads: int | None = setting(
        None, "heads for keys and values; fewer than num_heads share them; None: as many", at_least=1
    )
    embed_dim: int = setting(128, "width of the residual stream", at_least=1)
    ff_dim: int = setting(512, "hidden width of the feed-forward network", at_least=1)
    context_length: int = setting(64, "longest sequence that the model attends over, in tokens", at_least=1)
    vocab_size: int | None = setting(
        None,
        "tokens in the vocabulary; None: what the text has, at most 10,000 (word) or 4,096 (bpe)",
        at_least=1,
        from_data=True,
    )
    dropout: float = setting(
        0.0, "probability of dropping an element of the embeddings and of each sub-layer's output", at_least=0.0, below=1.0
    )
    bias: bool = setting(False, "bias vectors in the blocks' dense layers and in norms")
    positions: str = setting("rotary", "how positions enter", choices=("sinusoidal", "learned", "rotary"))
    norm: str = setting("rmsnorm", "normalisation", choices=("layernorm", "rmsnorm"))
    norm_placement: str = setting("pre", "norm before each sub-layer, or after the addition", choices=("pre", "post"))
    activation: str = setting(
        "relu2", "non-linearity of the feed-forward network", choices=("gelu", "relu", "relu2", "swiglu")
    )
    qk_norm: bool = setting(True, "normalise queries and keys before their product")
    init: str = setting(
        "fan_in",
        "spread of initial weights: 0.02 as in GPT-2, or 1/sqrt of the inputs, and wider embeddings",
        choices=("gpt2", "fan_in"),
    )
    tie_embeddings: bool = setting(False, "the output layer is the transposed token embedding")
    dtype: str = setting(
        "float32", "type of the computation; parameters are always float32", choices=("float32", "bfloat16")
    )
    remat: bool = setting(False, "run each block anew for its gradient, which takes less memory and more time")

    def __post_init__(self):
        super().__post_init__()
        if self.embed_dim % self.num_heads:
            raise UsageError(f"embed_dim={self.embed_dim} must be divisible by num_heads={self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise UsageError(f"num_heads={self.num_heads} must be divisible by num_kv_heads={self.kv_heads}")
        if self.positions == "rotary" and self.head_size % 2:
            raise UsageError(
                f"positions=rotary turns pairs of features, so embed_dim/num_heads={self.head_size} must be even; "
                "choose another num_heads, or positions learned or sinusoidal"
            )

    @property
    def head_size(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def known_vocab_size(self) -> int:
        """`vocab_size` once the tokenizer has said it, as every model needs it."""
        assert self.vocab_size is not None
        return self.vocab_size

    @property
    def can_slide(self) -> bool:
        """Whether a text may be longer than the context: positions enter as distances, not as rows of a table."""
        return self.positions not in ("learned", "sinusoidal")


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Section):
    """The optimisation and the rhythm of the run."""

    batch_size: int = setting(12, "sequences in an optimizer step", at_least=1)
    steps: int | None = setting(None, "optimizer steps (or give epochs)", at_least=1, below=2**31, may_change=True)
    epochs: float | None = setting(None, "passes over the training text (or give steps)", above=0.0, may_change=True)
    grad_accumulation: int = setting(
        1, "parts that a batch is worked through in: the same result in less memory", at_least=1
    )
    learning_rate: float = setting(1e-3, "peak learning rate", above=0.0)
    min_learning_rate: float = setting(1e-4, "learning rate at the last step", at_least=0.0)
    warmup_steps: int = setting(100, "steps over which the rate rises linearly to its peak", at_least=0)
    schedule: str = setting(
        "cosine",
        "how the rate falls from its peak after the warmup: along half a cosine, or a line, or not at all",
        choices=("cosine", "linear", "constant"),
    )
    weight_decay: float = setting(0.1, "decoupled weight decay, on matrices only", at_least=0.0)
    beta1: float = setting(0.9, "AdamW: decay of the mean of gradients", at_least=0.0, below=1.0)
    beta2: float = setting(0.99, "AdamW: decay of the mean of squared gradients", at_least=0.0, below=1.0)
    grad_clip: float = setting(1.0, "largest global norm of the gradient", above=0.0)
    ema: float = setting(
        0.0,
        "decay of a moving average of the parameters, which evaluation and generation then use; 0: none",
        at_least=0.0,
        below=1.0,
    )
    seed: int = setting(  # JAX uses 32 bits of it
        0, "root of all randomness: initial weights, order of the batches, dropout", at_least=0, below=2**32
    )
    init_from: str | None = setting(
        None, "folder of a run, or of a GPT-2 or Llama of Hugging Face, with whose weights training begins; None: drawn ones"
    )
    eval_every: int = setting(250, "steps between evaluations", at_least=1, may_change=True)
    eval_batches: int = setting(40, "batches of validation text in an evaluation, always the same ones", at_least=1)
    checkpoint_every: int = setting(
        500, "steps between checkpoints, beside those of lower validation losses", at_least=1, may_change=True
    )
    sample_every: int = setting(250, "steps between printed samples; 0: none", at_least=0, may_change=True)
    log_every: int = setting(50, "steps between rows of training metrics", at_least=1, may_change=True)
    patience: int = setting(
        0, "evaluations in a row without a lower loss after which training ends; 0: never", at_least=0, may_change=True
    )
    max_bad_steps: int = setting(
        10, "steps in a row with a loss or gradient that is not finite after which it gives up", at_least=1, may_change=True
    )
    keep_checkpoints: int = setting(2, "newest checkpoints to keep, beside the best", at_least=1, may_change=True)

    def __post_init__(self):
        super().__post_init__()
        if self.steps is not None and self.epochs is not None:
            raise UsageError(f"steps={self.steps} and epochs={self.epochs} exclude each other: give one of them")
        if self.batch_size % self.grad_accumulation:
            raise UsageError(f"batch_size={self.batch_size} must be divisible by grad_accumulation={self.grad_accumulation}")
        if self.min_learning_rate > self.learning_rate:
            raise UsageError(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}")


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """The text and how it becomes tokens."""

    dataset: str = setting(
        "shakespeare",
        "a corpus (shakespeare, tiny_shakespeare), or a file (.txt, .txt.gz, .jsonl), a folder or a pattern of them",
    )
    val_dataset: str | None = setting(None, "text to validate on; None: the last tenth of the dataset")
    encoding: str = setting("utf-8", "encoding of your own text files")
    data_dir: str | None = setting(
        None, "folder for downloaded and tokenized text; None: the user's cache folder", may_change=True
    )
    tokenizer: str = setting(
        "char",
        "how text is cut into tokens: char | byte | word | bpe, or the path of a tokenizer.json or GPT-2's vocab.json",
    )


# What can be trained, by name, each with the section that holds its settings. `tasks/` has the same names.
TASKS: dict[str, type[Section]] = {"language_modelling": DataConfig}


@dataclasses.dataclass(frozen=True)
class ReferenceResult:
    """What a preset was measured to reach, so that a first run can say whether its result is normal.

    `val_loss` is the mean over seeds of the loss over the whole validation split, in nats per token; `spread` is the
    largest distance of a seed from that mean. Both hold for the preset as it stands, on its own dataset.
    """

    val_loss: float
    spread: float
    seeds: int


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. The type of its `data` section says what is trained."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: Section = DataConfig()
    reference_result: ReferenceResult | None = None

    @property
    def task(self) -> str:
        """The name of what is trained. Raises UsageError where `data` is no task's section."""
        for name, section in TASKS.items():
            if type(self.data) is section:
                return name
        raise UsageError(f"data={self.data!r} must be the section of a task: {', '.join(TASKS)}")

    @property
    def settings(self) -> "dict[str, Setting]":
        """Every setting that this config has, by its plain name."""
        return settings_of({name: type(getattr(self, name)) for name in SECTIONS})

    def override(self, changes: Mapping[str, Any]) -> "Config":
        """A config with some settings changed, given by their plain names: `config.override({"num_layers": 6})`.

        `steps` replaces a preset's `epochs` and the other way round. A reference result is kept only where nothing that it
        was measured with changes. Raises UsageError for unknown names and bad values.
        """
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
        harmless = {name for name, one in known.items() if one.field.metadata["may_change"]} - {"steps", "epochs"} | {"seed"}
        if set(differences(self, new)) - harmless:
            new = dataclasses.replace(new, reference_result=None)
        return new

    def with_data_settings_of(self, other: "Config") -> "Config":
        """This config, with what is left to the data as it is in `other`, which was made for the same data."""
        new = self
        for name, one in self.settings.items():
            if one.field.metadata["from_data"] and get_setting(self, name) is None and name in other.settings:
                section = dataclasses.replace(getattr(new, one.section), **{name: get_setting(other, name)})
                new = dataclasses.replace(new, **{one.section: section})
        return new

    def to_json(self) -> str:
        """Readable JSON, from which `from_json` makes an equal config."""
        return json.dumps({"task": self.task} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Inverse of `to_json`. Raises DataError where the JSON is not a config that this version can read."""
        try:
            values = json.loads(text)
            task = values.pop("task", "language_modelling")  # which earlier versions did not write
            result = values.pop("expectation" if "expectation" in values else "reference_result")  # the former until 0.2
            types = SECTIONS | {"data": TASKS[task]}
            sections = {name: section(**values.pop(name)) for name, section in types.items()}
            return cls(**sections, **values, reference_result=ReferenceResult(**result) if result else None)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"not a config of this version: {error}") from error


SECTIONS: dict[str, type[Section]] = {"model": ModelConfig, "training": TrainingConfig, "data": DataConfig}


@dataclasses.dataclass(frozen=True)
class Setting:
    section: str
    field: dataclasses.Field


def settings_of(sections: Mapping[str, type[Section]]) -> dict[str, Setting]:
    return {field.name: Setting(name, field) for name, section in sections.items() for field in dataclasses.fields(section)}


# Every setting of every task by its plain name, which is also the name of its flag.
SETTINGS = {name: one for section in TASKS.values() for name, one in settings_of(SECTIONS | {"data": section}).items()}


def get_setting(config: Config, name: str) -> Any:
    return getattr(getattr(config, config.settings[name].section), name)


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ: name → (value in `config`, value in `other`). Of two tasks: their names."""
    if config.task != other.task:
        return {"task": (config.task, other.task)}
    pairs = {name: (get_setting(config, name), get_setting(other, name)) for name in config.settings}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


@functools.cache
def preset_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in PRESETS_DIR.glob("*.py")))


def load_preset(name: str) -> Config:
    """The config that `configs/NAME.py`, or a Python file given by its path, makes with `get_config()`.

    Raises UsageError where there is no such preset, the file fails, or it has no `get_config() -> Config`.
    """
    path = Path(name) if name.endswith(".py") else PRESETS_DIR / f"{name}.py"
    if not path.is_file():
        raise UsageError(
            f"no preset {name!r}{did_you_mean(name, preset_names())}; "
            f"allowed: {', '.join(preset_names())}, or the path of a .py file with get_config()"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # since it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if callable(getattr(module, "get_config", None)) else None
    except (UsageError, DataError):
        raise
    except Exception as error:  # a user's own program, in which anything may fail
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UsageError(f"{path} must define get_config() that returns a minigpt_jax Config")
    return config
