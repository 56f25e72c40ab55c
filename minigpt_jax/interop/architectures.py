"""Hugging Face's names for the settings and parameters of a GPT.

Two architectures in transformers are special cases of this GPT: GPT-2 and Llama. Each is described by a table: the settings
it fixes, its names for the others, and which tensor holds which parameter. Reading and writing both follow these tables.

A third, BERT, is read as an encoder, for its hidden states.

Nothing is dropped silently: a setting that is not in the tables must have its default, and any other parameter is an error.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from minigpt_jax.config import ModelConfig
from minigpt_jax.errors import DataError
from minigpt_jax.models.bert import NUM_TYPES, Encoder
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params

# Names of activations in config.json that stand for the same function, and the name that the tables below use.
SAME_ACTIVATION = dict.fromkeys(("gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"), "gelu_new") | {
    "swish": "silu"
}

# Settings that an export leaves out, with the values that reading sets: they only affect how the model is trained, the
# precision that it computes in, or the padding of its vocabulary.
NOT_STORED = {"dropout": 0.0, "dtype": "float32", "init": "gpt2", "remat": False, "vocab_multiple": 1}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One stored tensor: our parameters, concatenated along their last axis."""

    name: str
    parameters: tuple[str, ...]
    is_transposed: bool = False  # PyTorch's linear layers store (outputs, inputs)

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The stored shape, from the shapes of our parameters."""
        *first, last = shapes[self.parameters[0]]
        shape = (*first, last * len(self.parameters))
        return shape[::-1] if self.is_transposed else shape


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Each of our settings is in at most one of `choices`, `settings` and NOT_STORED. One in none must have its default."""

    class_name: str
    choices: dict[str, Any]  # our settings that it fixes
    settings: dict[str, str]  # our other settings and its names for them
    fixed: dict[str, Any]  # its own settings, with the only values supported here
    defaults: dict[str, Any]  # what transformers assumes for settings missing from config.json
    prefix: str  # of all names but the head's; absent in files of the headless model
    outside: tuple[Tensor, ...]  # tensors outside the layers
    layer: tuple[Tensor, ...]  # tensors of each layer, with {} for its index
    ignored: str  # pattern of names in some files that are not parameters of our model
    model: Callable[[ModelConfig], nn.Module] = GPT


def linear(name: str, parameter: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a PyTorch linear layer."""
    return Tensor(f"{name}.weight", (f"{parameter}/kernel",), True), Tensor(f"{name}.bias", (f"{parameter}/bias",))


def conv1d(name: str, *parameters: str) -> tuple[Tensor, Tensor]:
    """The same for GPT-2, which stores (inputs, outputs) and has queries, keys and values in one matrix."""
    weight, bias = (tuple(f"{parameter}/{ours}" for parameter in parameters) for ours in ("kernel", "bias"))
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
                 "qk_norm": False, "token_shift": False, "num_kv_heads": None},
        settings={"num_layers": "n_layer", "num_heads": "n_head", "embed_dim": "n_embd", "ff_dim": "n_inner",
                  "context_length": "n_positions", "vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings",
                  "bias": "bias"},  # our own key: other GPT-2 models always have biases
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
        ignored=r"h\.\d+\.attn\.(masked_)?bias",  # the causal mask, in the original GPT-2 files
    ),
    # Touvron et al. 2023
    "llama": Architecture(
        class_name="LlamaForCausalLM",
        choices={"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "norm_placement": "pre",
                 "qk_norm": False, "token_shift": False},
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


# Read as an `Encoder`, not as a language model.
ENCODERS = {
    # Devlin et al. 2019
    "bert": Architecture(
        class_name="BertModel",
        choices={"positions": "learned", "norm": "layernorm", "activation": "gelu_exact", "norm_placement": "post",
                 "qk_norm": False, "token_shift": False, "num_kv_heads": None, "bias": True, "tie_embeddings": True},
        settings={"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "embed_dim": "hidden_size",
                  "ff_dim": "intermediate_size", "context_length": "max_position_embeddings", "vocab_size": "vocab_size",
                  "norm_epsilon": "layer_norm_eps"},
        fixed={"hidden_act": "gelu", "position_embedding_type": "absolute", "type_vocab_size": NUM_TYPES,
               "is_decoder": False, "add_cross_attention": False},
        defaults={"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072,
                  "max_position_embeddings": 512, "vocab_size": 30522, "layer_norm_eps": 1e-12},
        prefix="bert.",
        outside=(Tensor("embeddings.word_embeddings.weight", ("embedding/tokens/embedding",)),
                 Tensor("embeddings.position_embeddings.weight", ("embedding/positions/embedding",)),
                 Tensor("embeddings.token_type_embeddings.weight", ("embedding/types/embedding",)),
                 *layer_norm("embeddings.LayerNorm", "embedding/norm")),
        layer=(*linear("encoder.layer.{}.attention.self.query", f"{BLOCK}/attention/query"),
               *linear("encoder.layer.{}.attention.self.key", f"{BLOCK}/attention/key"),
               *linear("encoder.layer.{}.attention.self.value", f"{BLOCK}/attention/value"),
               *linear("encoder.layer.{}.attention.output.dense", f"{BLOCK}/attention/output"),
               *layer_norm("encoder.layer.{}.attention.output.LayerNorm", f"{BLOCK}/attention_norm"),
               *linear("encoder.layer.{}.intermediate.dense", f"{BLOCK}/feed_forward/up"),
               *linear("encoder.layer.{}.output.dense", f"{BLOCK}/feed_forward/down"),
               *layer_norm("encoder.layer.{}.output.LayerNorm", f"{BLOCK}/feed_forward_norm")),
        ignored=r"embeddings\.position_ids|pooler\.dense\.(weight|bias)",
        model=Encoder,
    ),
}  # fmt: skip


def architecture_of(model_type: str) -> Architecture:
    return (ARCHITECTURES | ENCODERS)[model_type]


def parameter_shapes(config: ModelConfig, model: Callable[[ModelConfig], nn.Module] = GPT) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters by path, such as `transformer/block_0/attention/query/kernel`."""
    tree = jax.eval_shape(lambda: init_params(jax.random.key(0), model(config)))
    leaves: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def stored_shapes(config: ModelConfig, model_type: str) -> dict[str, tuple[int, ...]]:
    """`parameter_shapes` of the stored model. GPT-2 always has biases: those that our model lacks are stored as zeros."""
    config = dataclasses.replace(config, bias=True) if model_type == "gpt2" else config
    return parameter_shapes(config, architecture_of(model_type).model)


def with_vocab_rows(params: Any, num_rows: int) -> Any:
    """The parameters with this many rows of token embeddings, and columns of the output layer: cut, or padded with zeros."""
    if len(params["embedding"]["tokens"]["embedding"]) == num_rows:
        return params

    def resized(leaf: jax.Array) -> jax.Array:
        missing = max(0, num_rows - len(leaf))
        return jnp.pad(leaf[:num_rows], [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))

    embedding = params["embedding"] | {"tokens": jax.tree.map(resized, params["embedding"]["tokens"])}
    head = {"head": jax.tree.map(lambda leaf: resized(leaf.T).T, params["head"])} if "head" in params else {}
    return params | {"embedding": embedding} | head


def tensors(config: ModelConfig, model_type: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The stored tensors, by name, of a folder with parameters of these shapes.

    Raises DataError if the architecture has no tensor for some of them.
    """
    architecture = architecture_of(model_type)
    layers = [
        Tensor(tensor.name.format(i), tuple(path.format(i) for path in tensor.parameters), tensor.is_transposed)
        for i in range(config.num_layers)
        for tensor in architecture.layer
    ]
    by_name = {architecture.prefix + tensor.name: tensor for tensor in (*architecture.outside, *layers)} | {HEAD.name: HEAD}
    by_name = {name: tensor for name, tensor in by_name.items() if shapes.keys() >= set(tensor.parameters)}
    check_no_unmapped(set(shapes) - {path for tensor in by_name.values() for path in tensor.parameters}, model_type)
    return by_name


def check_no_unmapped(unmapped: Collection[str], model_type: str) -> None:
    """Raises DataError, naming them, if there are parameters without a tensor in the architecture."""
    if unmapped:
        raise DataError(f"{model_type} has no tensors for the model's parameters {abbreviated(unmapped)}")


def abbreviated(paths: Collection[str]) -> str:
    """The first three paths and the number of others: a deep model has one of each kind in every layer."""
    shown = sorted(paths)[:3]
    return ", ".join(shown) + (f" and {len(paths) - len(shown)} more" if len(paths) > len(shown) else "")
