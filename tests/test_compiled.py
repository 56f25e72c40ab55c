"""Compiled and op by op, a large attention input gives the same numbers.

XLA's fusions of a matmul with the sum of squares after it have been wrong beyond 32,768 float32 rows on some CPUs
(openxla, jaxlib 0.10): the form of a dense layer followed by QK-norm.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KERNELS, normal

pytestmark = pytest.mark.slow

B, T, H, K = 66, 64, 8, 32  # 33,792 rows of queries
X_BTD, KERNEL_DF = normal(B, T, 48), normal(48, H * K, seed=1)


def expected():
    """The normalised queries, in float64."""
    q_BTHK = (X_BTD.astype(np.float64) @ KERNEL_DF).reshape(B, T, H, K)
    return q_BTHK / np.sqrt(np.mean(q_BTHK**2, axis=-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_dense_and_qk_norm_agree_compiled_and_not_beyond_32768_rows(name):
    assert B * T * H > 2**15
    kernels = KERNELS[name]

    def queries(x_BTD, kernel_DF):
        return kernels.unit_rms(kernels.matmul(x_BTD, kernel_DF).reshape(B, T, H, K), 1e-6)

    def loss(x_BTD, kernel_DF):
        return jnp.sum(queries(x_BTD, kernel_DF) * weights_BTHK)

    weights_BTHK = normal(B, T, H, K, seed=2)
    gradient = jax.grad(loss, argnums=(0, 1))
    compiled, eager = (jax.tree.map(np.asarray, (f(X_BTD, KERNEL_DF), g(X_BTD, KERNEL_DF))) for f, g in [
        (jax.jit(queries), jax.jit(gradient)), (queries, gradient),
    ])  # fmt: skip
    np.testing.assert_allclose(compiled[0], expected(), atol=1e-5, rtol=0)
    for one, other in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)
