"""What Hugging Face's transformers calls the settings and the parameters of a GPT.

Two of its architectures are special cases of the GPT here: GPT-2 and Llama. Each is a table: which settings it fixes, what
it calls the other ones, and which tensor holds which parameter. Reading and writing both follow these tables.

Nothing is dropped in silence: a setting that the tables do not name must have its default, and a parameter is an error.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
from flax import traverse_util

from minigpt_jax.config import ModelConfig
from minigpt_jax.errors import DataError
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params

# Settings of which an export keeps nothing, since the same weights are the same model whatever they are: they decide how it
# is trained, or in which precision it computes. With the values that a model has when it is read.
NOT_STORED = {"dropout": 0.0, "dtype": "float32", "init": "gpt2", "remat": False}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One stored tensor: parameters of ours, concatenated along their last axis."""

    name: str
    parameters: tuple[str, ...]
    is_transposed: bool = False  # PyTorch's linear layers keep (outputs, inputs)

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Of what is stored, from the shapes of the parameters."""
        *first, last = shapes[self.parameters[0]]
        whole = (*first, last * len(self.parameters))
        return whole[::-1] if self.is_transposed else whole


@dataclasses.dataclass(frozen=True)
class Architecture:
    """No setting of ours is in two of `choices`, `settings` and NOT_STORED. One that is in none must have its default."""

    class_name: str
    choices: dict[str, Any]  # the settings of ours that it is
    settings: dict[str, str]  # what it calls the other ones
    fixed: dict[str, Any]  # settings of its own, with the only value that is the model here
    defaults: dict[str, Any]  # what transformers takes for settings that a config.json leaves out
    prefix: str  # of all names but the head's; files of the model without a head lack it
    outside: tuple[Tensor, ...]
    layer: tuple[Tensor, ...]  # of each layer, with {} for its number
    ignored: str  # pattern of names that some files have, and that are no parameters


def linear(name: str, parameter: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of one of PyTorch's linear layers."""
    return Tensor(f"{name}.weight", (f"{parameter}/kernel",), True), Tensor(f"{name}.bias", (f"{parameter}/bias",))


def conv1d(name: str, *parameters: str) -> tuple[Tensor, Tensor]:
    """The same of GPT-2, which keeps (inputs, outputs) and has queries, keys and values in one matrix."""
    weight, bias = (tuple(f"{one}/{ours}" for one in parameters) for ours in ("kernel", "bias"))
    return Tensor(f"{name}.weight", weight), Tensor(f"{name}.bias", bias)


def rms_norm(name: str, parameter: str) -> Tensor:
    return Tensor(f"{name}.weight", (f"{parameter}/scale",))


def layer_norm(name: str, parameter: str) -> tuple[Tensor, Tensor]:
    return rms_norm(name, parameter), Tensor(f"{name}.bias", (f"{parameter}/bias",))


HEAD, BLOCK = Tensor("lm_head.weight", ("head/kernel",), True), "transformer/block_{}"

ARCHITECTURES = {
    # Radford et al. 2019
    "gpt2": Architecture(
        class_name="GPT2LMHeadModel",
        choices={"positions": "learned", "norm": "layernorm", "activation": "gelu", "norm_placement": "pre",
                 "qk_norm": False, "num_kv_heads": None},
        settings={"num_layers": "n_layer", "num_heads": "n_head", "embed_dim": "n_embd", "ff_dim": "n_inner",
                  "context_length": "n_positions", "vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings",
                  "bias": "bias"},  # which no other GPT-2 has: it always has biases
        fixed={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
               "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        defaults={"n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": None, "n_positions": 1024, "vocab_size": 50257,
                  "tie_word_embeddings": True, "bias": True},
        prefix="transformer.",
        outside=(Tensor("wte.weight", ("embedding/tokens/embedding",)),
                 Tensor("wpe.weight", ("embedding/positions/embedding",)),
                 *layer_norm("ln_f", "transformer/final_norm")),
        layer=(*layer_norm("h.{}.ln_1", f"{BLOCK}/attention_norm"),
               *conv1d("h.{}.attn.c_attn", *(f"{BLOCK}/attention/{part}" for part in ("query", "key", "value"))),
               *conv1d("h.{}.attn.c_proj", f"{BLOCK}/attention/output"),
               *layer_norm("h.{}.ln_2", f"{BLOCK}/feed_forward_norm"),
               *conv1d("h.{}.mlp.c_fc", f"{BLOCK}/feed_forward/up"),
               *conv1d("h.{}.mlp.c_proj", f"{BLOCK}/feed_forward/down")),
        ignored=r"h\.\d+\.attn\.(masked_)?bias",  # the causal mask, in GPT-2's first files
    ),
    # Touvron et al. 2023
    "llama": Architecture(
        class_name="LlamaForCausalLM",
        choices={"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "norm_placement": "pre",
                 "qk_norm": False},
        settings={"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "embed_dim": "hidden_size",
                  "num_kv_heads": "num_key_value_heads", "ff_dim": "intermediate_size", "vocab_size": "vocab_size",
                  "context_length": "max_position_embeddings", "tie_embeddings": "tie_word_embeddings",
                  "bias": "attention_bias"},
        fixed={"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_type": "default",
               "partial_rotary_factor": 1.0},
        defaults={"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "num_key_value_heads": None,
                  "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048,
                  "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-6},
        prefix="model.",
        outside=(Tensor("embed_tokens.weight", ("embedding/tokens/embedding",)), rms_norm("norm", "transformer/final_norm")),
        layer=(rms_norm("layers.{}.input_layernorm", f"{BLOCK}/attention_norm"),
               *linear("layers.{}.self_attn.q_proj", f"{BLOCK}/attention/query"),
               *linear("layers.{}.self_attn.k_proj", f"{BLOCK}/attention/key"),
               *linear("layers.{}.self_attn.v_proj", f"{BLOCK}/attention/value"),
               *linear("layers.{}.self_attn.o_proj", f"{BLOCK}/attention/output"),
               rms_norm("layers.{}.post_attention_layernorm", f"{BLOCK}/feed_forward_norm"),
               *linear("layers.{}.mlp.gate_proj", f"{BLOCK}/feed_forward/gate"),
               *linear("layers.{}.mlp.up_proj", f"{BLOCK}/feed_forward/up"),
               *linear("layers.{}.mlp.down_proj", f"{BLOCK}/feed_forward/down")),
        ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    ),
}  # fmt: skip


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters by path: `transformer/block_0/attention/query/kernel`."""
    model = GPT(config)
    tree = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    leaves: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def stored_shapes(config: ModelConfig, model_type: str) -> dict[str, tuple[int, ...]]:
    """`parameter_shapes` of what a folder holds: GPT-2 always has biases. Those that the model lacks are stored as zeros."""
    return parameter_shapes(dataclasses.replace(config, bias=True) if model_type == "gpt2" else config)


def tensors(config: ModelConfig, model_type: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The stored tensors, by name, of a folder with parameters of these shapes.

    Raises DataError where the architecture has no place for some of them.
    """
    architecture = ARCHITECTURES[model_type]
    layers = [
        Tensor(one.name.format(layer), tuple(path.format(layer) for path in one.parameters), one.is_transposed)
        for layer in range(config.num_layers)
        for one in architecture.layer
    ]
    found = {architecture.prefix + one.name: one for one in (*architecture.outside, *layers)} | {HEAD.name: HEAD}
    found = {name: one for name, one in found.items() if shapes.keys() >= set(one.parameters)}
    check_placed(set(shapes) - {path for one in found.values() for path in one.parameters}, model_type)
    return found


def check_placed(unplaced: Collection[str], model_type: str) -> None:
    """Raises DataError, naming them, where there are parameters that no tensor of the architecture holds."""
    if unplaced:
        raise DataError(f"{model_type} has no place for the model's parameters {listed(unplaced)}")


def listed(paths: Collection[str]) -> str:
    """The first three and how many follow, for a message: a deep model has one of each kind in every layer."""
    shown = sorted(paths)[:3]
    return ", ".join(shown) + (f" and {len(paths) - len(shown)} more" if len(paths) > len(shown) else "")
