"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): an optimizer for matrices.

AdamW scales every number of a gradient by itself. Muon takes a matrix as a whole: it replaces the mean gradient U S Vᵀ by
U Vᵀ, so that all its directions are learned equally fast, not only the few in which most examples agree.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Of five polynomials that together bring singular values from 0.001 to 1 closest to 1, namely to 0.88 to 1.12; found with a
# linear program for each (Amsel et al. 2025, arXiv:2505.16932, section 3).
COEFFICIENTS = (
    (8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.563), (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)  # fmt: skip
RMS = 0.2  # of an update's values, about that of AdamW's, so that both take the same learning rates (Liu et al. 2025)


def orthogonal(x_MN: jax.Array) -> jax.Array:
    """About U Vᵀ for x = U S Vᵀ, by matrix products alone: a polynomial a x + b x xᵀ x + c (x xᵀ)² x changes the singular
    values, and leaves U and V as they are. Zeros stay zeros."""
    if x_MN.shape[0] > x_MN.shape[1]:
        return orthogonal(x_MN.T).T  # of the two products x xᵀ and xᵀ x, the smaller one
    x_MN = x_MN / (jnp.linalg.norm(x_MN) + 1e-12)  # no singular value is greater than this norm
    for a, b, c in COEFFICIENTS:
        gram_MM = x_MN @ x_MN.T
        x_MN = a * x_MN + (b * gram_MM + c * gram_MM @ gram_MM) @ x_MN
    return x_MN


class MuonState(NamedTuple):
    mu: Any  # the mean gradient of each matrix


def scale_by_muon(beta: jax.Array | float) -> optax.GradientTransformation:
    """Turns gradients of matrices into Muon's updates: orthogonal, from a mean with decay rate `beta` that looks one step
    ahead (Nesterov 1983), and of the size of AdamW's."""

    def mean(mu: Any, grads: Any) -> Any:
        return jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, mu, grads)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        mu = mean(state.mu, updates)
        ahead = mean(mu, updates)
        return jax.tree.map(lambda x: RMS * max(x.shape) ** 0.5 * orthogonal(x), ahead), MuonState(mu)

    return optax.GradientTransformation(lambda params: MuonState(jax.tree.map(jnp.zeros_like, params)), update)


def muon_or(other: optax.GradientTransformation, beta: jax.Array | float) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, the other optimizer for the embeddings, the head and all vectors."""

    def is_matrix_of_block(path: Any, x: Any) -> bool:
        return x.ndim == 2 and "block_" in jax.tree_util.keystr(path)

    return optax.partition(
        {True: scale_by_muon(beta), False: other}, lambda tree: jax.tree_util.tree_map_with_path(is_matrix_of_block, tree)
    )
