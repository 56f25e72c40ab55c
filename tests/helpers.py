"""What several test files need: reproducible arrays, parameters far from their initial values, comparisons of trees."""

import functools
import zlib

import jax
import numpy as np


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_tokens(*shape, vocab_size, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, shape, np.int32)


def random_params(module, *inputs, scale=0.5):
    """Parameters of the right shapes, far from their initial values, without the compilation that drawing them takes.

    Each follows from its path and shape alone.
    """
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]

    def values(path, leaf):
        return scale * normal(*leaf.shape, seed=zlib.crc32(jax.tree_util.keystr(path).encode()))

    return jax.tree_util.tree_map_with_path(values, shapes)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_close(tree, other, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), tree, other)


def attention_by_loop(q_BTHK, k_BSHK, v_BSHK, allowed_BTS, bias_HTS=None):
    """Equation 1 of the paper for one batch row, query and head at a time."""
    B, T, H, K = q_BTHK.shape
    o_BTHK = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        seen = np.flatnonzero(allowed_BTS[b, t])
        scores = np.array([np.dot(q_BTHK[b, t, h], k_BSHK[b, s, h]) / np.sqrt(K) for s in seen])
        if bias_HTS is not None:
            scores += bias_HTS[h, t, seen]
        weights = np.exp(scores - scores.max())
        o_BTHK[b, t, h] = sum(w * v_BSHK[b, s, h] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return o_BTHK
