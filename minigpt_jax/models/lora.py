"""LoRA (Hu et al. 2021): the change of a dense layer's kernel W is the product of two small matrices.

    y = x (W + α/R · A B) = x W + α/R · (x A) B        A_DR random, B_RF zero at first; R: the rank

W stays fixed and is shared; only A and B are trained. An adapter is a tree like the model's parameters, with `lora_A` and
`lora_B` where an adapted layer has its `kernel`. `merge` computes the left side, for a model as fast as the original one.
Training uses the right side: it needs no gradient of W, and can drop inputs of the adapter alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from minigpt_jax.errors import UsageError
from minigpt_jax.models.dropout import drop
from minigpt_jax.models.patterns import by_path, matching


def target_layers(params: Any, patterns: str, rank: int) -> tuple[str, ...]:
    """The paths of the dense layers to adapt. Raises UsageError if a pattern selects none, or for a rank above full rank."""
    kernels = {path.removesuffix("/kernel"): leaf for path, leaf in by_path(params).items() if path.endswith("/kernel")}
    layers = matching(list(kernels), patterns, "lora_targets")
    smallest = min(layers, key=lambda layer: min(kernels[layer].shape))
    if rank > min(kernels[smallest].shape):
        D, F = kernels[smallest].shape
        raise UsageError(f"lora_rank={rank} must be at most {min(D, F)}: {smallest}/kernel is {D} × {F}")
    return tuple(layers)


def init(key: jax.Array, params: Any, layers: tuple[str, ...], rank: int) -> Any:
    """An adapter of these layers. A is uniform within ±1/√D, as in the authors' code, and B zero: it changes nothing yet."""
    adapter = {}
    for number, layer in enumerate(layers):
        D, F = by_path(params)[f"{layer}/kernel"].shape
        uniform = jax.random.uniform(jax.random.fold_in(key, number), (D, rank), minval=-1.0, maxval=1.0)
        adapter |= {f"{layer}/lora_A": uniform / D**0.5, f"{layer}/lora_B": jnp.zeros((rank, F))}
    return traverse_util.unflatten_dict(adapter, sep="/")


def merge(params: Any, adapter: Any, scale: float) -> Any:
    """The parameters with W + scale · A B in place of each adapted W. `scale` is α/R."""
    merged, factors = by_path(params), by_path(adapter)
    for layer in layers_of(adapter):
        a_DR, b_RF = factors[f"{layer}/lora_A"], factors[f"{layer}/lora_B"]
        merged[f"{layer}/kernel"] = merged[f"{layer}/kernel"] + scale * (a_DR @ b_RF)
    return traverse_util.unflatten_dict(merged, sep="/")


def attach(params: Any, adapter: Any, scale: Any, dropout: Any = None, key: jax.Array | None = None) -> Any:
    """The parameters with an adapter beside each adapted kernel, for AdaptableDense. With dropout,
    its probability and key are there too."""
    attached, factors = by_path(params), by_path(adapter)
    for number, layer in enumerate(layers_of(adapter)):
        attached |= {f"{layer}/lora_A": factors[f"{layer}/lora_A"], f"{layer}/lora_B": scale * factors[f"{layer}/lora_B"]}
        if dropout is not None and key is not None:
            attached |= {f"{layer}/lora_dropout": dropout, f"{layer}/lora_key": key, f"{layer}/lora_number": number}
    return traverse_util.unflatten_dict(attached, sep="/")


def layers_of(adapter: Any) -> list[str]:
    return sorted(path.removesuffix("/lora_A") for path in by_path(adapter) if path.endswith("/lora_A"))


def low_rank(x: jax.Array, layer: Any) -> jax.Array:
    """(x A) B in the dtype of x, from a layer's parameters with an attached adapter."""
    a_DR, b_RF = layer["lora_A"].astype(x.dtype), layer["lora_B"].astype(x.dtype)
    x_ND = x.reshape(-1, x.shape[-1])  # N: the merged leading axes
    if "lora_key" in layer:
        x_ND = drop(x_ND, layer["lora_dropout"], jax.random.fold_in(layer["lora_key"], layer["lora_number"]))
    return (x_ND @ a_DR @ b_RF).reshape(*x.shape[:-1], -1)


class AdaptableDense(nn.Dense):
    """x W + b and, if an adapter is attached to the layer's parameters, its output."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        if not self.has_variable("params", "lora_A"):
            return y
        return y + low_rank(x.astype(y.dtype), self.variables["params"])
